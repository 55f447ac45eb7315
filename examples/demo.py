#!/usr/bin/env python3
"""Serve a disk image, read it back as a client would, and say what happened. Exits with 0 when all bytes came through.

Needs nothing but blkferry. Where nbdcopy or qemu-img is on PATH, that reads the image too, since a client nobody here
wrote convinces more than our own.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from blkferry.testing.nbd import Client
from blkferry.units import format_size

MIB = 1 << 20
SIZE = 256 * MIB
CHUNK = MIB
WRITTEN = (0, 100 * MIB, SIZE - CHUNK)  # all else of the image is a hole


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="blkferry-demo-") as directory:
        image, sock = Path(directory, "disk.img"), Path(directory, "nbd.sock")
        make_image(image)
        print(
            f"Made {image.name}: {format_size(SIZE)}, of which {len(WRITTEN)} MiB are written and the rest is a hole."
        )

        command = [
            str(Path(sys.executable).with_name("blkferry")),
            "serve",
            "--json",
            "--socket",
            str(sock),
            str(image),
        ]
        begun = time.perf_counter()
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line:
                print("blkferry serve did not start; what it says is above.")
                return 1
            uri = json.loads(line)["exports"][0]["uris"][0]
            print(f"blkferry serve was ready after {time.perf_counter() - begun:.2f} s:\n  {uri}")
            same = read_back(image, sock) and all(copy_with(peer, image, uri, directory) for peer in peers(uri))
        finally:
            server.terminate()
            code = server.wait()
        print(f"Stopped with SIGTERM: exit code {code}, the socket is {'still there' if sock.exists() else 'gone'}.")
        return 0 if same and code == 0 and not sock.exists() else 1


def make_image(path: Path) -> None:
    noise = random.Random(1)
    with path.open("wb") as file:
        file.truncate(SIZE)
        for offset in WRITTEN:
            file.seek(offset)
            file.write(noise.randbytes(CHUNK))


def read_back(image: Path, sock: Path) -> bool:
    """Read everything with our own client."""
    begun = time.perf_counter()
    with Client.connect(str(sock), image.name) as client, image.open("rb") as original:
        same = client.size == SIZE
        for offset in range(0, SIZE, CHUNK):
            same = same and client.read(offset, CHUNK) == original.read(CHUNK)
        client.disconnect()
    seconds = time.perf_counter() - begun
    return tell("our own client", f"{format_size(SIZE)} in {seconds:.2f} s", same=same)


def peers(uri: str) -> list[list[str]]:
    """The command lines of the clients on PATH; each lacks the file to copy to."""
    known = [["nbdcopy", uri], ["qemu-img", "convert", "-O", "raw", uri]]
    return [command for command in known if shutil.which(command[0])]


def copy_with(command: list[str], image: Path, uri: str, directory: str) -> bool:
    """Copy the image with somebody else's client, and compare."""
    copy = Path(directory, f"{command[0]}.img")
    done = subprocess.run([*command, str(copy)], check=False)
    same = done.returncode == 0 and same_bytes(image, copy)
    return tell(command[0], f"copied {uri.partition(':')[0]} to a file", same=same)


def same_bytes(one: Path, other: Path) -> bool:
    with one.open("rb") as first, other.open("rb") as second:
        return all(first.read(CHUNK) == second.read(CHUNK) for _ in range(SIZE // CHUNK + 1))


def tell(who: str, what: str, *, same: bool) -> bool:
    print(f"  {who}: {what}, {'every byte as in the image' if same else 'but NOT the bytes of the image'}")
    return same


if __name__ == "__main__":
    sys.exit(main())
