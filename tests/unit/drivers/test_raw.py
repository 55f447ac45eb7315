"""The raw driver above nodes that cannot be written in place."""

from __future__ import annotations

from blkferry.testing.daemon import DaemonThread


def test_writes_reach_a_file_whose_bitmap_records_them(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    with DaemonThread() as daemon:
        daemon.execute("blockdev-add", driver="file", node_name="file", filename=str(path))
        daemon.execute("blockdev-add", driver="raw", node_name="raw", file="file", offset=4096)
        daemon.execute("block-dirty-bitmap-add", node="file", name="changes", granularity=4096)
        daemon.export("raw")
        with daemon.client() as client:
            client.write(1 << 16, b"x" * 512)
            client.write(1 << 17, b"y" * 5000)
        (node,) = (each for each in daemon.execute("query-named-block-nodes") if each["node-name"] == "file")
        assert node["dirty-bitmaps"][0]["count"] == 3 * 4096
    data = path.read_bytes()
    assert data[(1 << 16) + 4096 :][:512] == b"x" * 512
    assert data[(1 << 17) + 4096 :][:5000] == b"y" * 5000
    assert data.count(0) == len(data) - 5512
