"""Reading /proc/self/mountinfo."""

from __future__ import annotations

import os

from blkferry.exports.fuse.mountinfo import Mounted, parse

TEXT = r"""22 27 0:21 / /proc rw,relatime shared:5 - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
90 27 0:41 / /home/a\040b/\134x\043 rw,nosuid,nodev - fuse.blkferry /a\040disk.qcow2 rw,user_id=1000,allow_other
91 90 0:42 / /m rw master:1 propagate_from:2 - fuse.sshfs host: rw,user_id=0
"""


def test_what_is_mounted():
    proc, root, ours, other = parse(TEXT)
    assert (proc.path, proc.ours) == ("/proc", False)
    assert root == Mounted(os.makedev(254, 0), "/", "ext4", "/dev/vda", "rw,discard")
    assert ours == Mounted(
        os.makedev(0, 41),
        "/home/a b/\\x#",
        "fuse.blkferry",
        "/a disk.qcow2",
        "rw,user_id=1000,allow_other",
    )
    assert ours.ours
    assert (other.ours, other.type) == (False, "fuse.sshfs")
