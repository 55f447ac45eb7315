import logging
from types import SimpleNamespace

from blkferry.exports import complaints


def test_one_line_a_second_says_how_many_failures_were_left_out(monkeypatch, caplog):
    now = 100.0
    monkeypatch.setattr(complaints, "time", SimpleNamespace(monotonic=lambda: now))
    said = complaints.Complaints(logging.getLogger("somebody"))
    for number in range(4):
        said.add("a client", f"failure {number}")
    now += complaints.QUIET_SECONDS
    said.add("a client", "failure 4")
    said.add("a client", "failure 5")
    now += complaints.QUIET_SECONDS
    said.add("another", "failure 6")
    now += complaints.QUIET_SECONDS
    said.add("another", "failure 7")
    assert [record.getMessage() for record in caplog.records] == [
        "a client: failure 0",
        "a client: failure 4 (and 3 failures before it)",
        "another: failure 6 (and 1 failures before it)",
        "another: failure 7",
    ]
