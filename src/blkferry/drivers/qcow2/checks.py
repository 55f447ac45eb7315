"""What the structures of a qcow2 image are checked for alike, and how a refusal is worded.

Sentences are QEMU's where QEMU has one, so that whoever searches for one finds the same advice; the hint says where the
structure is and which value was wrong.
"""

from __future__ import annotations

from typing import Final

from blkferry.errors import Error, ErrorKind

MAX_OFFSET: Final = (1 << 63) - 1
"""Offsets in a file are signed 64-bit numbers for the kernel, whatever a header field could hold."""

MAX_L1_SIZE: Final = 32 << 20
"""Bytes; QEMU's limit for the active L1 table and for those of snapshots."""


def corrupt(sentence: str, *, structure: str, offset: int, hint: str = "") -> Error:
    return Error(ErrorKind.CORRUPT, sentence, hint=hint, structure=structure, offset=offset)


def unsupported(sentence: str, *, structure: str, offset: int, hint: str = "") -> Error:
    return Error(ErrorKind.UNSUPPORTED, sentence, hint=hint, structure=structure, offset=offset)


def check_table(label: str, *, offset: int, entries: int, entry_size: int, limit: int, cluster_size: int) -> None:
    """Refuse a table of more than `limit` bytes, or one at a place where no table can be."""
    structure = label.lower()
    if entries > limit // entry_size:
        hint = f"it has {entries} entries of {entry_size} bytes, at most {limit // entry_size} are supported"
        raise corrupt(f"{label} too large", structure=structure, offset=offset, hint=hint)
    # Offset 0 is the header itself; only a table without entries may say that it is nowhere.
    if offset % cluster_size or offset + entries * entry_size > MAX_OFFSET or (entries and not offset):
        hint = f"it is {offset:#x}; it must be a multiple of the cluster size ({cluster_size}) behind the header"
        raise corrupt(f"{label} offset invalid", structure=structure, offset=offset, hint=hint)


def decode(field: bytes) -> str:
    """A string of the image: it ends at a zero byte if there is one, and any bytes survive the way there and back."""
    return field.split(b"\0", 1)[0].decode(errors="surrogateescape")


def encode(text: str, what: str) -> bytes:
    """The bytes that `decode` makes `text` of; raises Error where there are none."""
    try:
        field = text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        field = b""
    if not field or b"\0" in field:
        raise Error(ErrorKind.INVALID_ARGUMENT, f"{what} is empty or has characters that cannot be stored")
    return field


def printable(text: str) -> str:
    """A string of the image as it may stand in a sentence for a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
