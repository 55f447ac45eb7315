"""The commands of `blkferry` and their options. What they do is imported when they run, so help is quick."""

from __future__ import annotations

import sys

import click

from blkferry.cli.console import complain, log_to_stderr
from blkferry.cli.groups import Commands
from blkferry.cli.image import image
from blkferry.cli.mounting import mount, umount
from blkferry.errors import Error

PROGRAM = "blkferry"
MAX_PORT = 65535


def _print_version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    import platform
    from importlib.metadata import version

    from blkferry.daemon.daemon import QEMU_VERSION

    behaves_as = ".".join(map(str, QEMU_VERSION))
    click.echo(f"{PROGRAM} {version(PROGRAM)}")
    click.echo(f"QMP of QEMU {behaves_as}, {platform.python_implementation()} {platform.python_version()}")
    ctx.exit()


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="`blkferry COMMAND --help` tells more. `blkferry-qsd` has the command line of qemu-storage-daemon.",
)
@click.option(
    "-V", "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Say the version."
)
def app() -> None:
    """Offer disk images over the network or a socket, or as files.

    \b
    blkferry serve disk.img              read-only, to NBD clients on this machine
    blkferry serve -w disk.img           the same, and they may write
    blkferry serve memory:1G             an empty disk that is gone when you are done
    blkferry mount disk.qcow2            as the file disk.raw, for any program
    blkferry image info disk.qcow2       and whatever else there is to do with images
    """  # noqa: D301 - click's mark for lines to be left as they are


app.add_command(image)
app.add_command(mount)
app.add_command(umount)


@app.command(
    short_help="Offer images over NBD, or to virtual machines, until Ctrl-C.",
    epilog="Ctrl-C or SIGTERM end it: clients get the answers they wait for, everything written is on disk. "
    "A second one cuts clients off.",
)
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option("-w", "--writable", is_flag=True, help="Let clients write. Without it images are read-only.")
@click.option(
    "-n",
    "--name",
    "names",
    multiple=True,
    metavar="NAME",
    help="What clients ask for, once per image.  [default: the image's file name]",
)
@click.option("-s", "--socket", "sockets", multiple=True, metavar="PATH", help="Listen on a unix socket.")
@click.option(
    "--host",
    "hosts",
    multiple=True,
    metavar="HOST",
    help="Listen on this address; '' is all of them.  [default: 127.0.0.1]",
)
@click.option(
    "-p",
    "--port",
    "ports",
    multiple=True,
    type=click.IntRange(0, MAX_PORT),
    metavar="PORT",
    help="Listen on this TCP port; 0 is any free one.  [default: 10809]",
)
@click.option(
    "--fd",
    "fds",
    multiple=True,
    metavar="NAME",
    help="Listen on a socket that is there already: its number, or its name in systemd.  [default: systemd's only one]",
)
@click.option(
    "--vduse",
    multiple=True,
    metavar="NAME",
    help="Make a block device of this machine, /dev/vdX, instead of listening; once per image. With options of the "
    "export if need be, like disk0,num-queues=4.",
)
@click.option(
    "--vhost-user",
    "vhost_user",
    multiple=True,
    metavar="PATH",
    help="Instead of NBD: let a virtual machine have the image as a disk, over this unix socket; once per image.",
)
@click.option(
    "-f",
    "--format",
    "image_format",
    metavar="FORMAT",
    help="What the images are: raw or qcow2.  [default: what they look like]",
)
@click.option("--direct", is_flag=True, help="Bypass the page cache (O_DIRECT).")
@click.option(
    "--discard/--no-discard", default=True, help="Give space back that clients discard, or keep it.  [default: discard]"
)
@click.option("--description", metavar="TEXT", help="Free text that clients can show.")
@click.option(
    "--bitmap",
    "bitmaps",
    multiple=True,
    metavar="NAME",
    help="Let clients see this dirty bitmap of the images as qemu:dirty-bitmap:NAME.",
)
@click.option(
    "--allocation-depth", is_flag=True, help="Let clients see which backing file has what (qemu:allocation-depth)."
)
@click.option(
    "--max-connections",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Clients at the same time.  [default: any number]",
)
@click.option(
    "--tls",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False),
    help="Require TLS, with the certificates (or the keys.psk) in this directory.",
)
@click.option(
    "--allow",
    "allowed",
    multiple=True,
    metavar="NAME",
    help="With --tls: only clients whose certificate has this name, like 'O=Lab,CN=backup'.",
)
@click.option(
    "--object",
    "objects",
    multiple=True,
    metavar="OBJECT",
    help="Make an object, above all the password of an encrypted image: secret,id=key,file=PATH.",
)
@click.option("--qmp", metavar="PATH", help="Take QMP commands on this unix socket meanwhile.")
@click.option("--json", "as_json", is_flag=True, help="Say where the exports are in one line of JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Say where the exports are, one per line, and nothing else.")
@click.option("-v", "--verbose", count=True, help="Log who connects and leaves; twice for everything.")
def serve(
    images: tuple[str, ...],
    names: tuple[str, ...],
    sockets: tuple[str, ...],
    hosts: tuple[str, ...],
    ports: tuple[int, ...],
    fds: tuple[str, ...],
    vduse: tuple[str, ...],
    vhost_user: tuple[str, ...],
    *,
    writable: bool,
    image_format: str | None,
    direct: bool,
    discard: bool,
    description: str | None,
    bitmaps: tuple[str, ...],
    allocation_depth: bool,
    max_connections: int,
    tls: str | None,
    allowed: tuple[str, ...],
    objects: tuple[str, ...],
    qmp: str | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Offer images over NBD, or as disks of virtual machines, and say how clients reach them.

    IMAGE is a raw or qcow2 image, with its backing files, a block device, or memory:SIZE for an empty disk that is gone
    at the end (and always writable). With several of --socket, --host, --port and --fd it is offered at all of these
    addresses, on each host at each port.

    \b
    blkferry serve disk.img
    blkferry serve -w --socket /tmp/nbd.sock disk.img
    blkferry serve -w vm.qcow2
    blkferry serve --port 0 --json a.img b.img
    blkferry serve -w --direct /dev/sdb
    blkferry serve --socket /run/vm.sock --host 192.0.2.7 vm.qcow2
    blkferry serve --name scratch memory:10G
    blkferry serve --host '' --tls /etc/blkferry vm.qcow2
    blkferry serve -w --vduse disk0 vm.qcow2
    blkferry serve -w --vhost-user /run/vm/disk.sock vm.qcow2
    """  # noqa: D301
    for option, given in (("--name", names), ("--vduse", vduse), ("--vhost-user", vhost_user)):
        if given and len(given) != len(images):
            text = f"{option} is given {len(given)} times for {len(images)} images; give it once for each."
            raise click.UsageError(text)
    if vduse or vhost_user:
        _refuse_nbd(click.get_current_context(), "--vduse" if vduse else "--vhost-user")
    from blkferry.cli.serve import Request, Speech, serve_images

    log_to_stderr(PROGRAM, verbose)
    speech = Speech.JSON if as_json else Speech.URIS if quiet else Speech.PROSE
    request = Request(
        images=images,
        names=names,
        writable=writable,
        image_format=image_format,
        direct=direct,
        discard=discard,
        description=description,
        bitmaps=bitmaps,
        allocation_depth=allocation_depth,
        sockets=sockets,
        hosts=hosts,
        ports=ports,
        fds=fds,
        max_connections=max_connections,
        qmp=qmp,
        objects=objects,
        tls=tls,
        allowed=allowed,
        vduse=vduse,
        vhost_user=vhost_user,
    )
    try:
        serve_images(request, speech)
    except Error as error:
        complain(PROGRAM, error)
        sys.exit(1)


@app.command(
    short_help="Say what this machine lacks, and what to do about it.",
    epilog="It ends with 0 if all of that can be used, and with 1 if not. It changes nothing.",
)
@click.argument("subjects", nargs=-1, metavar="[WHAT]...")
@click.option("--json", "as_json", is_flag=True, help="Say it in one line of JSON.")
def doctor(subjects: tuple[str, ...], *, as_json: bool) -> None:
    """Say what this machine lacks for blkferry to do all it can.

    WHAT is nbd, fuse, vduse or engine; all of them unless some are named.

    \b
    blkferry doctor
    blkferry doctor vduse
    """  # noqa: D301
    from blkferry.cli.doctor import diagnose

    sys.exit(not diagnose(subjects, as_json=as_json))


def _refuse_nbd(ctx: click.Context, instead: str) -> None:
    """Raise UsageError when options are given that mean nothing where images are not offered over NBD."""
    ours = {"images", instead.removeprefix("--").replace("-", "_"), "writable", "image_format", "direct", "discard"}
    ours |= {"objects", "qmp", "as_json", "quiet", "verbose"}
    given = [
        parameter.opts[-1]
        for parameter in ctx.command.params
        if parameter.name not in ours
        and ctx.get_parameter_source(parameter.name or "") is click.core.ParameterSource.COMMANDLINE
    ]
    if given:
        raise click.UsageError(f"{', '.join(given)} cannot go with {instead}, which is instead of NBD.")
