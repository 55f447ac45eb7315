"""From L2 entries to extents: what a guest range holds, and where.

Pure but for what it is told of the image. A place is handed out only if it can be one: aligned, inside the file, and
for writing not where metadata is known to lie. What is wrong comes as OPAQUE content, and the driver's `read` says why.
"""

from __future__ import annotations

from collections.abc import Container, MutableSequence

from blkferry.drivers.qcow2.entries import ALL_ALLOCATED, COMPRESSED, COPIED, OFFSET, ZERO, Geometry
from blkferry.extent import MAX_EXTENTS, Content, Extent

Kind = tuple[Content, int, bool, bool]
"""Content, host offset (0 if there is none), may be overwritten in place, has host space."""

_OPAQUE: Kind = (Content.OPAQUE, 0, False, True)
_BELOW: Kind = (Content.BELOW, 0, False, False)
_ZERO: Kind = (Content.ZERO, 0, False, False)
_ZERO_ALLOCATED: Kind = (Content.ZERO, 0, False, True)


class Mapper:
    """Reads slices for one image. `child` is the role of the child that guest data lives in.

    `file_length` is kept up by the owner. `in_place` says whether anything may be overwritten at all just now.
    `opaque_data`: only the driver can read the bytes (encryption). `fixed`: host and guest offsets are the same
    (external data file). `settled`: allocated clusters are data, without asking the host file.
    """

    def __init__(
        self, geometry: Geometry, *, child: str, known: Container[int], fixed: bool, opaque_data: bool
    ) -> None:
        self.geometry = geometry
        self.child = child
        self.known = known
        self.fixed = fixed
        self.opaque_data = opaque_data
        self.file_length = 0
        self.in_place = False
        self.settled = True

    def kind(self, entry: int, cluster: int) -> Kind:
        """What a standard L2 entry says of guest cluster `cluster` as a whole, subclusters apart."""
        geometry = self.geometry
        if entry & COMPRESSED:
            return _OPAQUE
        host = entry & OFFSET
        if geometry.has_zero_flag and entry & ZERO:
            return _ZERO_ALLOCATED if host or (self.fixed and entry & COPIED) else _ZERO
        if not host and not (self.fixed and entry & COPIED):
            return _BELOW
        return self._data(entry, host, cluster)

    def _data(self, entry: int, host: int, cluster: int) -> Kind:
        if host & (self.geometry.cluster_size - 1) or (self.fixed and host != cluster << self.geometry.cluster_bits):
            return _OPAQUE
        if self.opaque_data:
            return (Content.OPAQUE, host, False, True)
        in_place = bool(entry & COPIED) and self.in_place
        if in_place and not self.fixed and host >> self.geometry.cluster_bits in self.known:
            in_place = False
        return (Content.DATA, host, in_place, True)

    def extents(self, values: MutableSequence[int], start: int, end: int) -> list[Extent]:
        """Extents for a range that lies within one slice, whose entries are `values`."""
        geometry = self.geometry
        bits, size = geometry.cluster_bits, geometry.cluster_size
        found: list[Extent] = []
        at = start
        while at < end and len(found) < MAX_EXTENTS:
            cluster = at >> bits
            index = (cluster & geometry.slice_mask) * geometry.words
            entry = values[index]
            if geometry.extended and not entry & COMPRESSED:
                self._extended(found, entry, values[index + 1], at, min(end, (cluster + 1) << bits))
                at = (cluster + 1) << bits
                continue
            content, host, in_place, allocated = self.kind(entry, cluster)
            stop = (cluster + 1) << bits
            if not geometry.extended and stop < end:
                step = size if content is Content.DATA else 0
                last = (geometry.slice_mask + 1) - 1
                while stop < end and index < last and values[index + 1] == entry + step:
                    if step and in_place != self.kind(entry + step, stop >> bits)[2]:
                        break
                    if content is Content.OPAQUE:
                        break
                    index += 1
                    entry += step
                    stop += size
            stop = min(stop, end)
            self._append(found, at, stop, content, host + (at & (size - 1)), in_place, allocated)
            at = stop
        return found

    def _extended(self, found: list[Extent], entry: int, bitmap: int, at: int, end: int) -> None:
        """One cluster with subclusters."""
        geometry = self.geometry
        bits, size = geometry.cluster_bits, geometry.cluster_size
        cluster = at >> bits
        host = entry & OFFSET
        has_host = bool(host) or bool(self.fixed and entry & COPIED)
        allocated, zero = bitmap & ALL_ALLOCATED, bitmap >> 32
        while at < end:
            sub = (at & (size - 1)) >> geometry.unit_bits
            bit = 1 << sub
            if allocated & bit:
                kind = self._data(entry, host, cluster) if has_host and not zero & bit else _OPAQUE
            elif zero & bit:
                kind = _ZERO_ALLOCATED if has_host else _ZERO
            else:
                kind = (Content.BELOW, 0, False, has_host)
            mask = (bit - 1) ^ ALL_ALLOCATED  # this subcluster and those after it
            same = allocated if allocated & bit else ~allocated
            same &= zero if zero & bit else ~zero
            differs = mask & ~same
            stop_sub = (differs & -differs).bit_length() - 1 if differs else 32
            stop = min(end, (cluster << bits) + (stop_sub << geometry.unit_bits))
            content, place, in_place, has_space = kind
            self._append(found, at, stop, content, place + (at & (size - 1)), in_place, has_space)
            at = stop

    def _append(
        self, found: list[Extent], at: int, stop: int, content: Content, host: int, in_place: bool, allocated: bool
    ) -> None:
        length = stop - at
        if content is not Content.DATA:
            if found and content is not Content.OPAQUE:
                last = found[-1]
                if last.content is content and last.allocated == allocated:
                    found[-1] = last._replace(length=last.length + length)
                    return
            found.append(Extent(at, length, content, at, None, False, allocated))
            return
        inside = self.file_length - host
        if inside < length:  # the file ends first: what is not there reads as zeroes
            if inside > 0:
                found.append(Extent(at, inside, Content.DATA, host, self.child, in_place, True, self.settled))
            else:
                inside = 0
            found.append(Extent(at + inside, length - inside, Content.ZERO, at + inside, None, False, True))
            return
        if found:
            last = found[-1]
            if last.content is content and last.offset + last.length == host and last.in_place == in_place:
                found[-1] = last._replace(length=last.length + length)
                return
        found.append(Extent(at, length, content, host, self.child, in_place, True, self.settled))
