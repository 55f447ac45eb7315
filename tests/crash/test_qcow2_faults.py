"""Requests that fail below an image: whoever asked is told, the image stays in order, and what comes later works."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable

import pytest
from crash_model import Guest
from test_qcow2_crash import CASES, Lab, act

from blkferry.daemon.daemon import Daemon
from blkferry.errors import Error
from blkferry.testing.record import Bytes, Disk

Fault = Callable[[str, int, int], int]


class Some:
    """Fails requests for a while, again and again."""

    def __init__(self, rng: random.Random, code: int, verbs: tuple[str, ...]) -> None:
        self.rng = rng
        self.code = code
        self.verbs = verbs
        self.failed = 0
        self.left = 0

    def __call__(self, verb: str, offset: int, length: int) -> int:
        if verb not in self.verbs:
            return 0
        if not self.left and self.rng.random() < 0.03:
            self.left = self.rng.choice([1, 1, 2, 5])
        if not self.left:
            return 0
        self.left -= 1
        self.failed += 1
        return self.code


class Nth:
    """Fails one request."""

    def __init__(self, number: int, code: int) -> None:
        self.left = number
        self.code = code
        self.failed = 0

    def __call__(self, verb: str, offset: int, length: int) -> int:
        self.left -= 1
        if self.left:
            return 0
        self.failed += 1
        return self.code


async def live_through(lab: Lab, guest: Guest, fault: Fault, steps: int) -> int:
    """Do things while requests fail; how many of them ended with an error."""
    errors = 0
    snapshots = lab.spec.get("refcount_bits") != 1
    resizes = lab.spec.get("version") != 2 and "backing" not in lab.options
    for _ in range(steps):
        guest.log.fault = fault
        try:
            await act(guest, lab.rng, snapshots=snapshots, resizes=resizes)
        except (OSError, Error):
            errors += 1
        if lab.rng.random() < 0.2:
            guest.log.fault = lambda *_: 0
            guest.compare(await guest.content(), guest.log.position + 1)
    guest.log.fault = lambda *_: 0
    assert not guest.node.corrupt, "an error from below is no corruption"
    return errors


async def settle(lab: Lab, guest: Guest) -> None:
    """All works again: write everywhere, flush, close, and look."""
    await guest.write(3, 40)
    await guest.flush()
    guest.compare(await guest.content(), guest.log.position + 1)
    await lab.close()
    await lab.examiner.examine(lab.below.content(), guest, guest.log.position + 1)


async def fail_now_and_then(case: str, seed: int, *, steps: int = 40, samples: int = 2) -> None:
    async with Daemon() as daemon:
        lab = Lab(daemon, case, f"faults {seed}", Bytes)
        guest = await lab.prepare()
        some = Some(lab.rng, lab.rng.choice([errno.EIO, errno.ENOSPC]), ("write", "grow", "resize", "flush", "read"))
        errors = await live_through(lab, guest, some, steps)
        assert bool(errors) <= bool(some.failed)
        await settle(lab, guest)
        await lab.examine(samples=samples)


async def fill_up(case: str, seed: int, *, steps: int = 40) -> None:
    """Nothing that needs space works, the rest does, and all does when there is space again."""
    async with Daemon() as daemon:
        lab = Lab(daemon, case, f"full {seed}", Disk)
        guest = await lab.prepare()
        full = lab.below.length + 20_000

        def fault(verb: str, offset: int, length: int) -> int:
            grows = verb in {"grow", "resize"} and length > full
            return errno.ENOSPC if grows or (verb == "write" and offset + length > full) else 0

        await live_through(lab, guest, fault, steps)
        await settle(lab, guest)
        await lab.examine(samples=1)


async def fail_once(case: str, kind: type[Bytes | Disk], seed: int, *, step: int) -> None:
    """Again and again, with another request that fails: every one of `step`."""
    number, failed = 1 + seed % step, True
    while failed:
        async with Daemon() as daemon:
            lab = Lab(daemon, case, f"any {seed}", kind)
            guest = await lab.prepare(64 << 10)
            nth = Nth(number, errno.EIO)

            def fault(verb: str, offset: int, length: int, nth: Nth = nth) -> int:
                # After a failed flush every later one of a descriptor fails.
                return nth(verb, offset, length) if verb != "flush" else 0

            await live_through(lab, guest, fault, 15)
            await settle(lab, guest)
            failed = bool(nth.failed)
            number += step


@pytest.mark.parametrize("case", CASES)
async def test_requests_that_fail_now_and_then(case):
    await fail_now_and_then(case, 1, steps=25, samples=1)


@pytest.mark.parametrize("case", ["4k", "many blocks", "subclusters, backing"])
async def test_a_full_disk(case):
    await fill_up(case, 1)


@pytest.mark.parametrize("kind", [Bytes, Disk])
@pytest.mark.parametrize("case", ["512", "backing"])
async def test_any_one_request_that_fails(case, kind):
    await fail_once(case, kind, 1, step=13)
