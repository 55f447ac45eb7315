import fcntl
import os
import socket

import pytest

from blkferry.errors import Error, ErrorKind
from blkferry.sockets import activation, descriptors
from blkferry.sockets.activation import take_activation
from blkferry.sockets.descriptors import Descriptors

AHEAD = 500
"""Where no descriptor of the tests is."""


@pytest.fixture
def passed(monkeypatch):
    """Two descriptors in a row, as systemd passes them but for their numbers."""
    monkeypatch.setattr(activation, "FIRST", AHEAD)
    with socket.socket() as sock:
        for fd in (AHEAD, AHEAD + 1):
            os.dup2(sock.fileno(), fd, inheritable=True)
    yield
    for fd in (AHEAD, AHEAD + 1):
        try:
            os.close(fd)
        except OSError:
            pass


def environment(**changed):
    return {"PATH": "/bin", "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"} | changed


def test_sockets_have_their_names(passed):
    environ = environment()
    found = take_activation(environ)
    assert environ == {"PATH": "/bin"}
    assert found.names == ["a", "b"]
    assert fcntl.fcntl(AHEAD, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert found.take("b") == [AHEAD + 1]
    assert found.take(str(AHEAD)) == [AHEAD]
    assert found.names == []


def test_one_name_for_several(passed):
    assert take_activation(environment(LISTEN_FDNAMES="a:a")).take("a") == [AHEAD, AHEAD + 1]


@pytest.mark.parametrize("names", ["", ":"])
def test_no_name(passed, names):
    assert take_activation(environment(LISTEN_FDNAMES=names)).take("unknown") == [AHEAD, AHEAD + 1]


@pytest.mark.parametrize("pid", ["", "1", "x"])
def test_what_is_meant_for_another_process(passed, pid):
    environ = environment(LISTEN_PID=pid)
    assert take_activation(environ).names == []
    assert environ == {"PATH": "/bin"}


def test_nothing_passed():
    assert take_activation({}).names == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"LISTEN_FDS": "x"}, "LISTEN_FDS is 'x', which no number of descriptors can be"),
        ({"LISTEN_FDS": "-1"}, "LISTEN_FDS is '-1', which no number of descriptors can be"),
        ({"LISTEN_FDS": "9" * 5000}, f"LISTEN_FDS is '{'9' * 20}', which no number of descriptors can be"),
        ({"LISTEN_FDS": "999999999"}, "LISTEN_FDS is '999999999', which no number of descriptors can be"),
        ({"LISTEN_FDNAMES": "a"}, "LISTEN_FDNAMES has 1 names for 2 descriptors of LISTEN_FDS"),
        (
            {"LISTEN_FDS": "3", "LISTEN_FDNAMES": ""},
            f"Descriptor {AHEAD + 2} of the 3 that LISTEN_FDS promises: Bad file descriptor",
        ),
    ],
)
def test_a_broken_environment(passed, changed, message):
    with pytest.raises(Error) as caught:
        take_activation(environment(**changed))
    assert caught.value.message == message


# -- taking


def accept_any(sock: socket.socket) -> None:
    pass


async def test_taking_by_name_and_by_number(passed):
    found = take_activation(environment())
    descriptors.use(found)
    with pytest.raises(Error, match="Unable to parse FD number nosuch") as caught:
        descriptors.take("nosuch", accept_any)
    assert "known names are a, b" in caught.value.hint
    (sock,) = descriptors.take("a", accept_any)
    with sock:
        assert sock.fileno() == AHEAD
        assert not sock.getblocking()
    with socket.socket() as inherited:
        (sock,) = descriptors.take(str(inherited.detach()), accept_any)
        sock.close()


async def test_all_of_a_name_or_none(passed):
    def refuse_the_second(sock):
        if sock.fileno() != AHEAD:
            raise Error(ErrorKind.INVALID_ARGUMENT, "not this one")

    descriptors.use(take_activation(environment(LISTEN_FDNAMES="a:a")))
    with pytest.raises(Error, match="not this one"):
        descriptors.take("a", refuse_the_second)
    for fd in (AHEAD, AHEAD + 1):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_parents_descriptors_are_seen_and_not_closed(passed):
    parent = take_activation(environment())
    child = Descriptors(parent, numbers=False)
    assert child.names == ["a", "b"]
    assert not child.drop("a")
    child.close()
    assert child.take(str(AHEAD)) == [AHEAD]  # it is one of those that were passed
    assert child.take("b") == [AHEAD + 1]
    assert parent.names == []
