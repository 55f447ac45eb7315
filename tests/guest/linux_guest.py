"""A Linux guest that runs scripts: Debian's kernel from the peers root, emulated, with the machine's root read-only.

It has no use for /dev/kvm. Its four processors take turns in one thread: processors that wait for each other would
otherwise wait for the host to schedule both, which costs far more than it gains. The host is 10.0.2.2 to it.
"""

from __future__ import annotations

import base64
import contextlib
import shlex
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import initramfs

import peers

HOST = "10.0.2.2"
"""The host's 127.0.0.1, as guests see it."""
BOOT_SECONDS = 60.0
SCRIPT_SECONDS = 120.0
"""Both are ten times what it takes when nothing else runs."""
_KERNEL_OPTIONS = "console=ttyS0 panic=-1 mitigations=off nokaslr"


class Guest:
    """A running guest, which does one thing at a time. What its kernel and its init say is in the file `console`."""

    def __init__(self, directory: Path, devices: Sequence[str] = ()) -> None:
        """Boot it, with its files in this directory and more `devices`, as options of QEMU.

        Its memory is shared with back ends of such devices. Raises AssertionError when it does not come up.
        """
        self.console = directory / "console"
        self.said = ""
        """What the script that runs, or ran last, has said so far."""
        self._rest = b""
        self._port, theirs = socket.socketpair()
        with theirs:
            image = directory / "initramfs"
            image.write_bytes(initramfs.build(modules()))
            self._process = subprocess.Popen(
                [*_machine(), *kernel(image), *_devices(self.console, theirs.fileno()), *devices],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        try:
            self._expect("ready", BOOT_SECONDS)
        except AssertionError as error:
            self.kill()
            raise AssertionError(f"the guest does not come up; its console:\n{self.last_words()}") from error

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def run(self, script: str, *, bare: bool = False, timeout: float = SCRIPT_SECONDS) -> str:
        """Run a script to its end, which must be with 0, and return what it says."""
        self.start(script, bare=bare)
        return self.finish(timeout=timeout)

    def start(self, script: str, *, bare: bool = False) -> None:
        """Begin to run a script as `sh -e` does, in the peers root or (bare) among the machine's own programs.

        Its mounts end with it, unless it is bare. Standard error is part of what it says.
        """
        if not bare:
            runner = peers.runner()
            assert runner is not None
            script = f"exec {shlex.join([runner, 'sh', '-ec', script])}"
        self.said = ""
        self._port.settimeout(10)
        self._port.sendall(base64.b64encode(script.encode()) + b"\n")

    def until(self, line: str, *, timeout: float = SCRIPT_SECONDS) -> None:
        """Wait until the script has said this line."""
        self._expect(line, timeout)

    def finish(self, *, timeout: float = SCRIPT_SECONDS) -> str:
        """Wait for the script's end, which must be with 0; return what it said."""
        code = self._expect(initramfs.DONE, timeout).removeprefix(initramfs.DONE).strip()
        assert code == "0", f"a script in the guest ended with {code}:\n{self.said}"
        self.said = self.said.removesuffix("\n")  # which the agent puts before its last line
        return self.said

    def _expect(self, start: str, timeout: float) -> str:
        """Read until a line begins like this, and return it; lines before it are what a script says."""
        deadline = time.monotonic() + timeout
        while True:
            line = self._line(deadline)
            if line.startswith(start):
                return line
            assert not line.startswith(initramfs.DONE), f"{line}, and never said '{start}':\n{self.said}"
            self.said += f"{line}\n"

    def _line(self, deadline: float) -> str:
        while b"\n" not in self._rest:
            self._port.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                received = self._port.recv(1 << 16)
            except TimeoutError:
                raise AssertionError(f"a script in the guest took too long; it said:\n{self.said}") from None
            assert received, f"the guest has ended; its script said:\n{self.said}"
            self._rest += received
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode(errors="replace")

    def reboot(self) -> None:
        """Begin anew, with nothing left of what it has changed. No script runs."""
        self.start("echo b >/proc/sysrq-trigger", bare=True)
        self._expect("ready", BOOT_SECONDS)

    def kill(self) -> None:
        """Switch it off. All it has changed is gone."""
        self._process.kill()
        self._process.wait()
        self._port.close()

    def last_words(self) -> str:
        """What its kernel said last."""
        with contextlib.suppress(FileNotFoundError):
            return "\n".join(self.console.read_text(errors="replace").splitlines()[-60:])
        return ""


def _root() -> Path:
    runner = peers.runner()
    assert runner is not None, "guests need the peers root (`make peers` makes it)"
    return Path(runner).with_name("root")


def modules() -> Path:
    (modules,) = (_root() / "usr/lib/modules").iterdir()
    return modules


def _machine() -> list[str]:
    """An emulated machine that dies with whoever started it."""
    return [
        *peers.peer("setpriv"),
        *("--pdeathsig", "KILL", "qemu-system-x86_64"),
        *("-accel", "tcg,thread=single", "-machine", "q35,memory-backend=memory", "-smp", "4", "-m", "512"),
        *("-object", "memory-backend-memfd,id=memory,size=512M,share=on"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-action", "panic=shutdown"),
    ]


def kernel(image: Path) -> list[str]:
    (kernel,) = (_root() / "boot").glob("vmlinuz-*")
    return ["-kernel", str(kernel), "-initrd", str(image), "-append", _KERNEL_OPTIONS]


def _devices(console: Path, port: int) -> list[str]:
    """Its console, its root, the port its agent listens on, and a network that has the host in it."""
    root = "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"
    return [
        *("-serial", f"file:{console}"),
        *("-fsdev", root, "-device", "virtio-9p-pci,fsdev=root,mount_tag=root"),
        *("-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,fd={port}"),
        *("-device", "virtserialport,chardev=agent"),
        *("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="),
    ]
