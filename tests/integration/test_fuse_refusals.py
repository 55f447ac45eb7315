"""What qemu-storage-daemon refuses, we refuse in the same words."""

from __future__ import annotations

import os

import pytest
from qsd import compare

from blkferry.exports.fuse import mountinfo
from peers import requires

pytestmark = [
    requires("qemu-storage-daemon"),
    pytest.mark.skipif(
        os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="only root may mount, where there is /dev/fuse"
    ),
]


def test_refusals(tmp_path):
    file = tmp_path / "file"
    file.touch()

    def export(export_id, path, **options):
        options = {"type": "fuse", "node-name": "n", "id": export_id, "mountpoint": str(path), **options}
        return "block-export-add", options

    compare([
        ("blockdev-add", {"driver": "null-co", "node-name": "n", "size": 1 << 20, "read-only": True}),
        export("e", tmp_path / "missing"),
        export("e", tmp_path / "missing" / "below"),
        export("e", tmp_path),
        export("e", "/dev/null"),
        export("e", ""),
        export("e", file, writable=True),
        export("e", file),
        export("e", tmp_path / "missing"),
        export("f", file),
        ("block-export-del", {"id": "f"}),
        ("block-export-del", {"id": "e"}),
        export("f", file, **{"allow-other": "maybe"}),
        export("f", file, **{"allow-other": "off", "growable": True}),
        ("block-export-del", {"id": "f", "mode": "hard"}),
    ])  # fmt: skip
    assert mountinfo.topmost(str(file)) is None
