"""What is known of an image, for people: the lines that `qemu-img info` and `qemu-img snapshot -l` write."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

_UNITS = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")


def info_text(facts: dict[str, Any]) -> str:
    """One image."""
    return "".join(f"{line}\n" for line in _info(facts))


def _info(facts: dict[str, Any]) -> Iterator[str]:
    yield f"image: {facts['filename']}"
    yield f"file format: {facts['format']}"
    yield f"virtual size: {_size(facts['virtual-size'])}"
    taken = facts.get("actual-size")
    yield f"disk size: {short_size(taken) if taken is not None else 'unavailable'}"
    if facts.get("encrypted"):
        yield "encrypted: yes"
    if "cluster-size" in facts:
        yield f"cluster_size: {facts['cluster-size']}"
    if facts.get("dirty-flag"):
        yield "cleanly shut down: no"
    if "backing-filename" in facts:
        full = facts.get("full-backing-filename")
        actual = f" (actual path: {full})" if full != facts["backing-filename"] else ""
        yield f"backing file: {facts['backing-filename']}{actual}"
        if "backing-filename-format" in facts:
            yield f"backing file format: {facts['backing-filename-format']}"
    if facts.get("snapshots"):
        yield "Snapshot list:"
        yield from snapshot_lines(facts["snapshots"])
    specific = facts.get("format-specific", {}).get("data")
    if specific:
        yield "Format specific information:"
        yield from _members(specific, "    ")
    for child in facts.get("children", []):
        below = child["info"]
        yield f"Child node '/{child['name']}':"
        yield f"    filename: {below['filename']}"
        yield f"    protocol type: {below['format']}"
        yield f"    file length: {_size(below['virtual-size'])}"
        taken = below.get("actual-size")
        yield f"    disk size: {short_size(taken) if taken is not None else 'unavailable'}"


def _members(members: dict[str, Any], indent: str) -> Iterator[str]:
    for key, value in members.items():
        name = key.replace("-", " ")
        if isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from _members(value, indent + "    ")
        elif isinstance(value, list):
            yield f"{indent}{name}:"
            yield from _items(value, indent + "    ")
        else:
            yield f"{indent}{name}: {_word(value)}"


def _items(items: list[Any], indent: str) -> Iterator[str]:
    for number, item in enumerate(items):
        if isinstance(item, dict):
            yield f"{indent}[{number}]:"
            yield from _members(item, indent + "    ")
        else:
            yield f"{indent}[{number}]: {_word(item)}"


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _size(size: int) -> str:
    return f"{short_size(size)} ({size} bytes)"


def short_size(size: int) -> str:
    """A size as qemu-img writes it: three digits, 1000 and more of a unit are the next one."""
    unit = 0
    while size / 1024**unit >= 1000 and unit < len(_UNITS) - 1:
        unit += 1
    return f"{size / 1024**unit:.3g} {_UNITS[unit]}B"


def snapshot_lines(snapshots: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A table of snapshots, as qemu-img lays it out."""
    for row in (("ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"), *map(_row, snapshots)):
        number, name, size, date, clock, icount = row
        yield f"{number:<7} {name:<16} {size:>8} {date:>19} {clock:>15} {icount:>10}"


def _row(snapshot: dict[str, Any]) -> tuple[str, ...]:
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot["date-sec"]))
    minutes, seconds = divmod(snapshot["vm-clock-sec"], 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours:04}:{minutes:02}:{seconds:02}.{snapshot['vm-clock-nsec'] // 1_000_000:03}"
    size = short_size(snapshot["vm-state-size"])
    return (snapshot["id"], snapshot["name"], size, date, clock, str(snapshot.get("icount", "--")))
