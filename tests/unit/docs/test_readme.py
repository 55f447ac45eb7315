"""What the README shows does what it says."""

import pathlib
import re
import textwrap

README = (pathlib.Path(__file__).parents[3] / "README.md").read_text()


async def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    names = {}
    exec("import blkferry\nasync def example():\n" + textwrap.indent(example, "    "), names)
    await names["example"]()
    said = capsys.readouterr().out
    assert said.startswith("b'hello' is also at nbd+unix:///disk?socket=")
    assert (tmp_path / "disk.img").read_bytes()[:5] == b"hello"


def test_the_example_of_the_package_is_the_one_of_the_readme():
    import blkferry

    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert textwrap.dedent(blkferry.__doc__.partition("\n")[2]).strip() == example.strip()
