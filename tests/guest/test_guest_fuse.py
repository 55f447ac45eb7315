"""`blkferry mount` by somebody who is not root, which takes fusermount3: in a guest, where both may be let do that."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from blkferry.exports.fuse.fusermount import COULD_NOT_MOUNT
from peers import KERNEL, requires

HOME = "/run/somebody"
ETC = "/run/fuse/etc"
SOMEBODY = 65534
"""Who is called nobody, for fusermount3 wants to know a name."""
PROGRAMS = Path(sys.executable).parent

pytestmark = [
    requires(KERNEL, "qemu-system-x86_64", "fusermount3"),
    pytest.mark.timeout(300),  # an emulated machine feels whatever else this one has to do
]


@pytest.fixture
def somebody(guest):
    """Runs scripts as a user who may not mount, but use /dev/fuse, blkferry and fusermount3; with an image of 1 MiB.

    A script ends with all its mounts. `fuse_conf` is what /etc/fuse.conf says.
    """
    guest.run("modprobe fuse")
    guest.run(
        f"""
        chmod 666 /dev/fuse
        mkdir -p {HOME} {ETC}
        cp /etc/passwd /etc/group /etc/nsswitch.conf /etc/ld.so.cache {ETC}
        ln -sf /proc/self/mounts {ETC}/mtab
        head -c 1048576 /dev/urandom >{HOME}/disk.img
        chown -R {SOMEBODY}:{SOMEBODY} {HOME}
        """,
        bare=True,
    )

    def run(script: str, fuse_conf: str = "") -> str:
        # The capability leads to our programs, should they be in root's home; mounting takes another one.
        prepare = f"""
        echo {fuse_conf} >{ETC}/fuse.conf
        mount --bind {ETC} /etc
        mount -t fusectl fusectl /sys/fs/fuse/connections
        cd {HOME}
        export HOME={HOME} PATH={PROGRAMS}:$PATH
        exec setpriv --reuid {SOMEBODY} --regid {SOMEBODY} --clear-groups --inh-caps +dac_read_search \\
            --ambient-caps +dac_read_search sh -ec {shlex.quote(script)}
        """
        return guest.run(f"exec unshare --mount sh -ec {shlex.quote(prepare)}", bare=True)

    return run


def test_somebody_mounts_and_unmounts(somebody):
    said = somebody(
        """
        blkferry mount -w disk.img file | grep private
        cmp file disk.img
        grep -o 'fuse.blkferry.*user_id=.*' /proc/mounts
        printf changed | dd of=file conv=notrunc status=none
        exec 3<file
        if blkferry umount file; then echo 'not refused'; exit 1; fi
        exec 3<&-
        blkferry umount file
        test ! -e file
        head -c 7 disk.img
        """
    ).splitlines()
    assert said[0] == "  private: only you can open it, which --allow-other changes"
    assert said[1] == (
        f"fuse.blkferry rw,nosuid,nodev,relatime,user_id={SOMEBODY},group_id={SOMEBODY},default_permissions,"
        "max_read=67108864 0 0"
    )
    assert said[2] == "blkferry: 'file' is in use"
    assert said[3].startswith("It is open in ")
    assert said[4:] == ["changed"]


def test_what_a_killed_one_leaves_and_force(somebody):
    """Unmounting what is dead or in use takes fusermount3, too."""
    said = somebody(
        """
        pid=$(blkferry mount --json disk.img file | sed 's/.*"pid": \\([0-9]*\\).*/\\1/')
        kill -KILL $pid
        while kill -0 $pid 2>/dev/null; do sleep 0.1; done
        cat file 2>&1 | sed 's/.*: //'
        blkferry mount -q -w disk.img file
        cmp file disk.img
        exec 3<file
        blkferry umount --force file 3<&-
        if head -c 1 <&3 2>/dev/null; then echo 'not cut off'; exit 1; fi
        wc -c <file
        rm file
        """
    ).splitlines()
    assert said == ["Transport endpoint is not connected", f"{HOME}/file", "0"]


def test_who_is_let_in(somebody):
    refused = somebody(
        """
        if blkferry mount --allow-other on disk.img file; then echo 'not refused'; exit 1; fi
        test ! -e file
        """
    ).splitlines()
    assert refused == [
        f"blkferry: {COULD_NOT_MOUNT}: option allow_other only allowed if 'user_allow_other' is set in /etc/fuse.conf",
        "Root has to put the line user_allow_other into /etc/fuse.conf; or use allow-other=off.",
    ]
    said = somebody(
        """
        blkferry mount -q disk.img file
        grep -c 'user_id.*allow_other' /proc/mounts
        blkferry umount file
        """,
        fuse_conf="user_allow_other",
    )
    assert said.split() == [f"{HOME}/file", "1"]
