"""What a guest's kernel starts with: busybox, the few modules that lead to the root, and `init`.

The root is the machine's own by 9p, which the guest cannot write; its changes stay in its memory, in an overlay. So all
paths are the same in here as out there, those of the peers root and of a virtual environment among them.
"""

from __future__ import annotations

import lzma
import stat
from collections.abc import Sequence
from pathlib import Path

MODULES = ("9p", "9pnet_virtio", "overlay", "virtio_net")
"""All else that is needed to begin with is part of Debian's kernel. Tests load what they are about by themselves."""

INIT = """\
#!/bin/busybox sh
PATH=/bin
/bin/busybox --install -s /bin
for module in {modules}; do insmod /modules/$module; done
mount -t 9p -o ro,trans=virtio,version=9p2000.L,cache=loose,msize=512000 root /machine
mount -t tmpfs changes /changes
mkdir /changes/upper /changes/work
mount -t overlay -o lowerdir=/machine,upperdir=/changes/upper,workdir=/changes/work overlay /root
cd /root
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t devtmpfs devtmpfs dev
mount -t tmpfs tmpfs run
ip address add 10.0.2.15/24 dev eth0
ip link set lo up
ip link set eth0 up
cp /bin/busybox /agent run
exec switch_root /root /run/busybox sh /run/agent
"""

DONE = "the script ended with"
"""How the agent's line begins that tells a script's exit code."""

AGENT = f"""\
# Run what comes over the port, a script in base64 on each line, and give back what it says and how it ended.
export HOME=/root TERM=dumb LC_ALL=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
exec 3<>/dev/vport1p1
echo ready >&3
while read -r script <&3; do
    /bin/sh -ec "$(echo "$script" | /run/busybox base64 -d)" </dev/null >&3 2>&1 3>&-
    printf '\\n{DONE} %s\\n' $? >&3
done
"""


def build(modules: Path, *, load: Sequence[str] = MODULES, init: str = INIT) -> bytes:
    """Make it for the kernel whose modules are in this directory (/usr/lib/modules/VERSION of the peers root).

    `load` are the modules that `init` finds, which has their names in place of {modules}.
    """
    paths = _with_dependencies(modules, load)
    names = " ".join(path.name.removesuffix(".xz") for path in paths)
    busybox = modules.parents[2] / "bin/busybox"
    entries = [
        *(_entry(name, stat.S_IFDIR | 0o755) for name in ("bin", "modules", "machine", "changes", "root", "dev")),
        # Without it the kernel has nowhere to show what init says.
        _entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        _entry("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes()),
        *(
            _entry(f"modules/{path.name.removesuffix('.xz')}", stat.S_IFREG | 0o644, lzma.decompress(path.read_bytes()))
            for path in paths
        ),
        _entry("agent", stat.S_IFREG | 0o644, AGENT.encode()),
        _entry("init", stat.S_IFREG | 0o755, init.format(modules=names).encode()),
        _entry("TRAILER!!!", 0),
    ]
    return b"".join(entries)


def _with_dependencies(modules: Path, load: Sequence[str]) -> list[Path]:
    """Each module after those that it needs (modules.dep lists them with the first to load last)."""
    needs = dict(line.split(":") for line in (modules / "modules.dep").read_text().splitlines())
    path_of = {Path(path).name.split(".")[0]: path for path in needs}
    ordered: dict[str, None] = {}
    for name in load:
        path = path_of[name]
        ordered |= dict.fromkeys([*reversed(needs[path].split()), path])
    return [modules / path for path in ordered]


def _entry(name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """One file in the cpio format "newc" (Linux Documentation/driver-api/early-userspace/buffer-format.rst)."""
    encoded = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
    return b"".join(part + bytes(-len(part) % 4) for part in (head, content))
