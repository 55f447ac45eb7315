"""The machine under examination: what checks ask of it, so that tests can put another in its place."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass, field

CAP_NET_ADMIN = 12
CAP_SYS_ADMIN = 21

_PLACES = "/usr/local/sbin:/usr/sbin:/sbin"
"""Where programs are that only root has on PATH."""


@dataclass(frozen=True)
class Machine:
    """The files below `root`, and who we are."""

    root: str = "/"
    uid: int = field(default_factory=os.geteuid)
    kernel: str = field(default_factory=platform.release)

    def path(self, path: str) -> str:
        """Where an absolute path is found."""
        return os.path.join(self.root, path.lstrip("/"))

    def exists(self, path: str) -> bool:
        return os.path.exists(self.path(path))

    def usable(self, path: str) -> bool:
        """Whether we may read and write it."""
        return os.access(self.path(path), os.R_OK | os.W_OK)

    def lines(self, path: str) -> list[str]:
        """Of a text file; none if it is not there."""
        try:
            with open(self.path(path), encoding="utf-8", errors="replace") as file:
                return file.read().splitlines()
        except OSError:
            return []

    def has_module(self, name: str) -> bool:
        """Whether the kernel has it, loaded or built in."""
        builtin = self.lines(f"/lib/modules/{self.kernel}/modules.builtin")
        return self.exists(f"/sys/module/{name}") or any(_is(line, name) for line in builtin)

    def offers_module(self, name: str) -> bool:
        """Whether there is one to load."""
        known = self.lines(f"/lib/modules/{self.kernel}/modules.dep")
        return any(_is(line.partition(":")[0], name) for line in known)

    def may(self, capability: int) -> bool:
        """Whether we have a capability of Linux."""
        for line in self.lines("/proc/self/status"):
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> capability & 1)
        return self.uid == 0

    def program(self, name: str) -> str | None:
        """Where a program is."""
        places = [os.environ.get("PATH", os.defpath), _PLACES] if self.root == "/" else [_PLACES, "/usr/bin:/bin"]
        found = (os.path.join(self.path(place), name) for each in places for place in each.split(":"))
        return next((path for path in found if shutil.which(path)), None)


def _is(path: str, module: str) -> bool:
    return os.path.basename(path).split(".ko")[0].replace("-", "_") == module
