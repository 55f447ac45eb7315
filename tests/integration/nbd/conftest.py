"""A daemon with one writable export; each test that uses it proves at its end that others do not notice it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving import SIZE, Served, eventually

from blkferry.testing.daemon import DaemonThread


@pytest.fixture(params=["buffered", "direct"])
def served(request, tmp_path) -> Iterator[Served]:
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(n.to_bytes(8) for n in range(SIZE // 8)))
    with DaemonThread() as daemon:
        daemon.execute(
            "blockdev-add",
            driver="file",
            node_name="f",
            filename=str(path),
            discard="unmap",
            cache={"direct": request.param == "direct"},
        )
        daemon.export("f")
        with daemon.client() as client:  # whatever is made on first use is there now
            client.read(0, SIZE)
            client.write(0, client.read(0, 100_000))
            client.flush()
        eventually(lambda: not daemon.daemon.exports.get("e").clients)
        serving = Served(daemon, path)
        yield serving
        serving.check()
