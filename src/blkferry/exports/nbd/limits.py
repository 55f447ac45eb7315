"""What one client may ask of a turn and hold of the daemon, and where one way of serving it gives way to another."""

from __future__ import annotations

SENDFILE_FROM = 32 << 10
"""Reads of at least this many bytes are sent from the page cache; below it one copy is cheaper than two more calls."""

ZEROES = memoryview(bytes(SENDFILE_FROM))

MAX_READ_PIECES = 64
"""Chunks of one sparse read; a read that is more fragmented comes as one chunk of data."""

MAX_STATUS_EXTENTS = 4096
"""Extents in the reply to a BLOCK_STATUS, of all its contexts together: 64 KiB at most, so that all that may be in
flight for a client are 16 MiB. Clients ask on from where a reply ends."""

MAX_STATUS_LOOKS = 16
"""How often a context is asked for more, a millisecond or two of work each time."""

MAX_ENGINE_PIECES = 32
"""Places that a read which is not in the page cache is gathered from at once; one that is more scattered is a task."""

MAX_MAPPED = 256
"""Replies sent straight from the mapped file by one call: two pieces each, of the 1024 that the kernel takes."""

FEW = 24
"""Fewer small requests than this, but more than one, make a turn that could have been larger."""

GATHER_SECONDS = 12e-6
"""What a client needs to send two or three requests."""

MAX_RECEIVES = 4
"""How often one client may receive in a turn while large writes are on their way: the rest of a payload, what follows
it, and the same once more."""

MAX_PLAIN_READ = 32 << 10
"""Reads of up to so many bytes that come this way are sent as they are: finding out where the holes are would take as
long again, and on another server's disk a round trip."""
