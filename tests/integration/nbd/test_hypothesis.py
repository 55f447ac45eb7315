"""Histories that hypothesis makes up, and makes short when one goes wrong: two connections, overlapping requests.

The requests of a batch are in flight at the same time on both connections, and none of them overlaps another that
changes it; batches overlap each other as they like. Together the examples run more than 20,000 requests.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_model import CHANGING, MENU, Disk

from blkferry.testing import nodes
from blkferry.testing.daemon import DaemonThread
from blkferry.wire.nbd.constants import Cmd, Mode

SIZE = (64 << 10) + 500
EXAMPLES = 200
BATCHES = st.lists(
    st.lists(
        st.tuples(
            st.integers(0, 1),  # the connection
            st.sampled_from(MENU),
            st.integers(0, SIZE - 1),
            st.one_of(st.integers(1, 600), st.sampled_from((512, 4096, 32768, 40000))),
            st.integers(0, 255),
        ),
        min_size=1,
        max_size=12,
    ),
    min_size=8,
    max_size=40,
)


@pytest.fixture(scope="module")
def counted():
    counter = Counter()
    yield counter
    assert counter["requests"] >= 20_000


@pytest.mark.parametrize("kind", ["buffered", "direct", "memory", "shuffled-small"])
def test_two_connections_equal_a_model(kind, tmp_path, counted):
    with DaemonThread() as daemon:
        daemon.export(nodes.add(daemon, kind, tmp_path, SIZE).node)
        with daemon.client(mode=Mode.EXTENDED) as first, daemon.client(mode=Mode.STRUCTURED) as second:

            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
            )
            @given(BATCHES)
            def histories_agree(batches):
                first.zero(0, first.size)
                disk = Disk(first.size)
                for batch in batches:
                    counted["requests"] += run(disk, (first, second), batch)
                disk.settle(0, second.read(0, second.size))

            histories_agree()


def run(disk, clients, batch):
    """Send what of a batch does not overlap, then take all replies."""
    taken, sent = [], []
    for number, (command, flags), offset, length, fill in batch:
        offset %= disk.size
        length = 0 if command == Cmd.FLUSH else min(length, disk.size - offset)
        start, end, changes = offset, offset + length, command in CHANGING
        if any(s < end and start < e and (changes or c) for s, e, c in taken):
            continue
        taken.append((start, end, changes))
        payload = bytes([fill]) * length if command == Cmd.WRITE else b""
        offset = 0 if command == Cmd.FLUSH else offset
        cookie = clients[number].submit(command, offset, length, flags, payload)
        sent.append((number, cookie, payload))
    for client in clients:
        client.push()
    for number, cookie, payload in sent:
        disk.apply(clients[number].wait(cookie), payload)
    return len(sent)
