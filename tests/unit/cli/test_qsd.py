"""The first reading of blkferry-qsd's command line: what kind of run it is."""

import pytest

from blkferry.cli import qsd
from blkferry.errors import Error


def test_the_first_decisive_option_wins():
    assert qsd.read(["--blockdev", "bad", "--help", "--bogus"]).say == qsd.USAGE
    assert qsd.read(["--version", "--help"]).say.startswith("blkferry-qsd version ")
    with pytest.raises(Error, match="--bogus"):
        qsd.read(["--bogus", "--help"])
    with pytest.raises(Error, match="foo: Unexpected argument"):
        qsd.read(["foo", "--version"])


def test_the_rest_keeps_its_order():
    plan = qsd.read(["--export", "e", "--pidfile", "a", "--object", "o", "--daemonize", "--pidfile=b", "--blockdev=d"])
    assert [given.name for given in plan.todo] == ["export", "object", "blockdev"]
    assert (plan.pidfile, plan.daemonize, plan.traced, plan.say) == ("b", True, False, None)


def test_trace_is_accepted():
    assert qsd.read(["-T", "foo"]).traced
    assert qsd.read(["--trace", "help"]).say == "There are no trace events.\n"


def test_usage_names_every_option():
    for name in qsd.LONG:
        assert f"--{name}" in qsd.USAGE
    for letter in qsd.SHORT:
        assert f"-{letter}, " in qsd.USAGE


def test_there_is_an_action_for_every_other_option():
    from blkferry.cli.actions import _ACTIONS

    assert set(_ACTIONS) == set(qsd.LONG) - {"help", "version", "trace", "pidfile", "daemonize"}
