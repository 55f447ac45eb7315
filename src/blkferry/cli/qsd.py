"""`blkferry-qsd`: the command line of qemu-storage-daemon, to be put in its place.

argv is read twice. First everything that decides what kind of run this is: wrong options, --help, --version,
--daemonize, --pidfile; of --help, --version and errors the first one wins. Then the rest is done strictly from left to
right, so a name must be defined before it is used, and the first error ends the start. The PID file, or the end of the
process that was told to --daemonize, says that all of it is up.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from blkferry.cli.console import complain, exit_on_signals, log_to_stderr
from blkferry.cli.options import Given, split
from blkferry.errors import Error

PROGRAM = "blkferry-qsd"

USAGE = """\
Usage: blkferry-qsd [options]
blkferry with the command line of qemu-storage-daemon

  -h, --help             display this help and exit
  -V, --version          output version information and exit
  -T, --trace <pattern>  accepted for compatibility; there is nothing to trace

  --blockdev [driver=]<driver>[,node-name=<name>][,<option>=<value>...]
                         open a block node
  --nbd-server addr.type=inet,addr.host=<host>,addr.port=<port>[,max-connections=<n>]
  --nbd-server addr.type=unix,addr.path=<path>[,max-connections=<n>]
                         listen for NBD clients
  --export [type=]<type>,id=<id>,node-name=<name>[,writable=on|off][,<option>=<value>...]
                         offer a node
  --object [qom-type=]<type>,id=<id>[,<property>=<value>...]
                         create an object, such as an iothread
  --chardev [backend=]<backend>,id=<id>[,<option>=<value>...]
                         create a character device
  --monitor [chardev=]<id>[,pretty=on|off]
                         talk QMP over a character device

  --pidfile <path>       write the process id to a file once everything is up
  --daemonize            go to the background, and exit here once everything is up

The options that take values also take JSON ('{"driver": ...}'), and tell about themselves:
  --blockdev help        --blockdev file,help        --export nbd,help        --object iothread,help
They are carried out from left to right, so objects come before the nodes and exports that name them.

Example: serve disk.img read-only to NBD clients on this machine, until SIGTERM
  blkferry-qsd --blockdev file,node-name=disk,filename=disk.img,read-only=on \\
      --nbd-server addr.type=unix,addr.path=/tmp/nbd.sock \\
      --export nbd,id=export,node-name=disk,name=disk
"""

LONG = {
    "help": False,
    "version": False,
    "trace": True,
    "blockdev": True,
    "nbd-server": True,
    "export": True,
    "object": True,
    "chardev": True,
    "monitor": True,
    "pidfile": True,
    "daemonize": False,
}
SHORT = {"h": "help", "V": "version", "T": "trace"}


@dataclass
class Plan:
    """What the first reading found."""

    todo: list[Given] = field(default_factory=list)
    say: str | None = None
    """What to print instead of running."""
    pidfile: str | None = None
    daemonize: bool = False
    traced: bool = False


def main() -> int:
    """Run, and return the exit code."""
    exit_on_signals()
    try:
        plan = read(sys.argv[1:])
        if plan.say is not None:
            sys.stdout.write(plan.say)
            return 0
        return _run(plan)
    except Error as error:
        complain(PROGRAM, error)
        return 1


def read(argv: Sequence[str]) -> Plan:
    """The first reading. Raises Error."""
    plan = Plan()
    for given in split(argv, LONG, SHORT):
        match given.name:
            case "help":
                plan.say = USAGE
            case "version":
                plan.say = _version()
            case "trace" if given.argument in ("help", "?"):
                plan.say = "There are no trace events.\n"
            case "trace":
                plan.traced = True
            case "pidfile":
                plan.pidfile = given.argument
            case "daemonize":
                plan.daemonize = True
            case _:
                plan.todo.append(given)
        if plan.say is not None:
            break
    return plan


def _version() -> str:
    from importlib.metadata import version

    from blkferry.daemon.daemon import QEMU_VERSION

    behaves_as = ".".join(map(str, QEMU_VERSION))
    return f"{PROGRAM} version {version('blkferry')}\nBehaves as qemu-storage-daemon {behaves_as}\n"


def _run(plan: Plan) -> int:
    from blkferry.cli.actions import HelpWanted, carry_out
    from blkferry.daemon.daemon import Daemon
    from blkferry.daemon.run import go_to_background, run

    log_to_stderr(PROGRAM)
    if plan.traced:
        sys.stderr.write(f"{PROGRAM}: warning: --trace is ignored, since blkferry has no trace events\n")

    async def fill(daemon: Daemon) -> None:
        for given in plan.todo:
            await carry_out(daemon, given)

    detach = go_to_background() if plan.daemonize else _stay
    try:
        run(fill, pidfile=plan.pidfile, on_ready=lambda _: detach())
    except HelpWanted as wanted:
        sys.stdout.write(f"{wanted}\n")
        sys.stdout.flush()
        detach()
    return 0


def _stay() -> None:
    """What going to the background amounts to for those who stay."""
