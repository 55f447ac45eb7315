"""argv is split as getopt_long splits it; the texts are those the real daemon prints."""

import pytest

from blkferry.cli.options import Given, split
from blkferry.cli.qsd import LONG, SHORT
from blkferry.errors import Error, ErrorKind


def options(*argv):
    return list(split(argv, LONG, SHORT))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--blockdev", "a,b=c"], Given("blockdev", "a,b=c", "--blockdev a,b=c")),
        (["--blockdev=a=b"], Given("blockdev", "a=b", "--blockdev=a=b")),
        (["--blockdev", "--help"], Given("blockdev", "--help", "--blockdev --help")),
        (["--blockdev="], Given("blockdev", "", "--blockdev=")),
        (["--vers"], Given("version", "", "--vers")),
        (["--n", "x"], Given("nbd-server", "x", "--n x")),
        (["-h"], Given("help", "", "-h")),
        (["-Tfoo"], Given("trace", "foo", "-Tfoo")),
        (["-T", "foo"], Given("trace", "foo", "-T foo")),
    ],
)
def test_one_option(argv, expected):
    assert options(*argv) == [expected]


def test_a_cluster_of_short_options():
    assert [(given.name, given.argument) for given in options("-hVTx", "--")] == [
        ("help", ""),
        ("version", ""),
        ("trace", "x"),
    ]


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["foo"], "foo: Unexpected argument"),
        (["-"], "-: Unexpected argument"),
        (["--", "foo"], "foo: Unexpected argument"),
        (["-x"], "invalid option -- 'x'"),
        (["--foo"], "unrecognized option '--foo'"),
        (["--=x"], "unrecognized option '--'"),
        (["--he=3"], "option '--help' doesn't allow an argument"),
        (["--m"], "option '--monitor' requires an argument"),
        (["-T"], "option requires an argument -- 'T'"),
    ],
)
def test_what_is_no_option(argv, text):
    with pytest.raises(Error) as caught:
        options(*argv)
    assert (caught.value.kind, caught.value.message) == (ErrorKind.INVALID_ARGUMENT, text)


def test_an_abbreviation_must_be_unique():
    long = {"color": False, "colour": False, "col": True}
    with pytest.raises(Error, match="option '--colo' is ambiguous; possibilities: '--color' '--colour'"):
        list(split(["--colo"], long, {}))
    assert next(split(["--col", "x"], long, {})).name == "col"  # a whole name is no abbreviation


def test_what_stands_before_an_error_is_seen_first():
    seen = split(["--help", "--bogus"], LONG, SHORT)
    assert next(seen).name == "help"
    with pytest.raises(Error):
        next(seen)
