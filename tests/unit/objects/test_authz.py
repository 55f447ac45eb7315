"""Authorization: who is allowed by which object."""

import ctypes
import json
import logging
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkferry import Daemon
from blkferry.errors import Error, ErrorKind
from blkferry.objects.authz import list_file, pam
from blkferry.objects.authz.rules import fits_glob
from blkferry.schema.keyval import parse_option
from blkferry.schema.qom import ObjectOptions


@pytest.fixture
async def daemon():
    async with Daemon() as daemon:
        yield daemon


async def add(daemon, kind, **options):
    await daemon.execute("object-add", {"qom-type": kind, "id": "a", **options})
    return daemon.objects["a"]


async def allowed(authz, *identities):
    return [identity for identity in identities if await authz.allows(identity)]


async def test_simple_allows_one(daemon):
    authz = await add(daemon, "authz-simple", identity="O=Lab,CN=client1")
    assert await allowed(authz, "O=Lab,CN=client1", "O=Lab,CN=client", "CN=client1,O=Lab", "") == ["O=Lab,CN=client1"]


async def test_the_first_rule_that_fits_decides(daemon):
    rules = [
        {"match": "bob", "policy": "deny"},
        {"match": "b*", "policy": "allow", "format": "glob"},
        {"match": "bob", "policy": "allow"},
        {"match": "x*", "policy": "allow"},
    ]
    authz = await add(daemon, "authz-list", rules=rules)
    assert await allowed(authz, "bob", "bill", "x*", "xy", "ab", "") == ["bill", "x*"]


async def test_a_policy_is_for_whom_no_rule_fits(daemon):
    authz = await add(daemon, "authz-list", policy="allow", rules=[{"match": "eve", "policy": "deny"}])
    assert await allowed(authz, "eve", "bob") == ["bob"]
    await daemon.execute("object-del", {"id": "a"})
    assert await allowed(await add(daemon, "authz-list"), "bob") == []


async def test_rules_are_written_on_the_command_line_too(daemon):
    options = parse_option(
        ObjectOptions,
        "authz-list,id=a,policy=deny,rules.0.match=O=Lab,,CN=*,rules.0.policy=allow,rules.0.format=glob,"
        "rules.1.match=root,rules.1.policy=allow",
        "qom-type",
    )
    await daemon.objects.add(options)
    assert await allowed(daemon.objects["a"], "O=Lab,CN=x", "root", "O=Lab") == ["O=Lab,CN=x", "root"]


@pytest.mark.parametrize(
    ("pattern", "fitting", "others"),
    [
        ("", [""], ["a"]),
        ("*", ["", "abc", "a\nb"], []),
        ("a?c", ["abc", "a\nc", "a☃c"], ["ac", "abbc"]),
        ("*.b*", ["x.b", ".b.b.c"], ["xb"]),
        ("[ab]", ["[ab]"], ["a"]),
        ("a*a", ["aa", "aba"], ["a"]),
        ("**a", ["a", "ba"], ["ab"]),
    ],
)
def test_globs(pattern, fitting, others):
    assert [text for text in [*fitting, *others] if fits_glob(text, pattern)] == fitting


@given(st.text("ab", max_size=12), st.text("ab*?", max_size=8))
def test_globs_fit_as_the_definition_has_it(text, pattern):
    def fits(text, pattern):
        if not pattern:
            return not text
        if pattern[0] == "*":
            return any(fits(text[start:], pattern[1:]) for start in range(len(text) + 1))
        return bool(text) and pattern[0] in {"?", text[0]} and fits(text[1:], pattern[1:])

    assert fits_glob(text, pattern) == fits(text, pattern)


# -- in a file -----------------------------------------------------------------------------------------------


def write(path, *names, policy="deny"):
    rules = [{"match": name, "policy": "allow"} for name in names]
    path.write_text(json.dumps({"policy": policy, "rules": rules}))


@pytest.mark.parametrize("kind", ["authz-listfile", "authz-list-file"])
async def test_a_file_is_read_again_when_it_changes(daemon, tmp_path, kind):
    path = tmp_path / "list.json"
    write(path, "bob")
    authz = await add(daemon, kind, filename=str(path))
    assert await allowed(authz, "bob", "eve") == ["bob"]
    write(path, "eve")
    assert await allowed(authz, "bob", "eve") == ["eve"]
    write(tmp_path / "new", "bob", "eve")
    os.replace(tmp_path / "new", path)
    assert await allowed(authz, "bob", "eve") == ["bob", "eve"]


async def test_without_refresh_it_is_not(daemon, tmp_path):
    path = tmp_path / "list.json"
    write(path, "bob")
    authz = await add(daemon, "authz-listfile", filename=str(path), refresh=False)
    write(path, "eve")
    assert await allowed(authz, "bob", "eve") == ["bob"]


async def test_a_broken_file_denies_everybody_until_it_is_mended(daemon, tmp_path, caplog):
    path = tmp_path / "list.json"
    write(path, "bob")
    authz = await add(daemon, "authz-listfile", filename=str(path))
    path.write_text("{")
    with caplog.at_level(logging.ERROR):
        assert await allowed(authz, "bob") == []
        assert await allowed(authz, "bob") == []
    assert len(caplog.records) == 1
    assert "nobody is allowed any more" in caplog.text
    write(path, "bob")
    assert await allowed(authz, "bob") == ["bob"]


async def test_a_file_that_is_gone_changes_nothing(daemon, tmp_path):
    path = tmp_path / "list.json"
    write(path, "bob")
    authz = await add(daemon, "authz-listfile", filename=str(path))
    path.unlink()
    assert await allowed(authz, "bob", "eve") == ["bob"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must contain JSON"),
        (b"{", "must contain JSON"),
        (b"\xff", "must contain JSON"),
        (b"[" * 100_000, "must contain JSON"),
        (b"[1]", "must contain a JSON object"),
        (b'{"rules": 5}', "Invalid parameter type for 'rules'"),
        (b'{"rules": [{"match": "x"}]}', "'rules[0].policy' is missing"),
        (b'{"foo": 1}', "'foo' is unexpected"),
        (b'{"policy": "maybe"}', "does not accept value 'maybe'"),
        (b" " * (list_file.MAX_FILE + 1), "larger than 1 MiB"),
    ],
)
async def test_a_wrong_file_is_refused(daemon, tmp_path, content, message):
    path = tmp_path / "list.json"
    path.write_bytes(content)
    with pytest.raises(Error) as caught:
        await add(daemon, "authz-listfile", filename=str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


async def test_a_missing_file_is_refused(daemon, tmp_path):
    with pytest.raises(Error) as caught:
        await add(daemon, "authz-listfile", filename=str(tmp_path / "none"))
    assert caught.value.kind is ErrorKind.NOT_FOUND


# -- PAM (whom it allows is seen in tests/interop/test_authz_pam.py) ------------------------------------------


async def test_without_libpam_the_error_says_so(daemon, monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    pam._library.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(Error) as caught:
        await add(daemon, "authz-pam", service="blkferry")
    assert caught.value.kind is ErrorKind.UNSUPPORTED
    assert "libpam.so.0" in str(caught.value)


@pytest.mark.parametrize("service", ["\ud800", "a\n"])
async def test_a_service_has_a_name(daemon, service):
    with pytest.raises(Error, match="expects the name of a PAM service"):
        await add(daemon, "authz-pam", service=service)


async def test_members_are_needed(daemon):
    for kind, member in (("simple", "identity"), ("listfile", "filename"), ("pam", "service")):
        with pytest.raises(Error, match=f"Parameter '{member}' is missing"):
            await add(daemon, f"authz-{kind}")
