"""NBD URIs, taken apart and put together."""

from __future__ import annotations

import pytest

from blkferry.wire.nbd.uri import Location, is_uri, parse_uri, tcp_uri, unix_uri, vsock_uri


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("nbd://host", Location("tcp", "", "host")),
        ("nbd://host:1/a%20b", Location("tcp", "a b", "host", 1)),
        ("nbd+tcp://[::1]:5//x", Location("tcp", "/x", "::1", 5)),
        ("nbd+unix:///n?socket=/a%3Fb", Location("unix", "n", socket="/a?b")),
        ("nbd+vsock://2:7/n", Location("vsock", "n", "2", 7)),
        (tcp_uri("::1", 10809, "a/b ?"), Location("tcp", "a/b ?", "::1")),
        (vsock_uri(3, 10809, "a?b"), Location("vsock", "a?b", "3")),
        (vsock_uri(3, 7, "a"), Location("vsock", "a", "3", 7)),
        (unix_uri("/a b&c", "ü"), Location("unix", "ü", socket="/a b&c")),
    ],
)
def test_parse(text, location):
    assert is_uri(text)
    assert parse_uri(text) == location


@pytest.mark.parametrize(
    "text",
    [
        "nbds://host/",
        "nbd+unix:///n",
        "nbd+unix://host/n?socket=/s",
        "nbd://host/?socket=/s",
        "nbd://host:99999/",
        "nbd://host/?other=1",
        "nbd+vsock://name/",
        "nbd://host/%ff",
        "nbd+unix:///?socket=/a&socket=/b",
    ],
)
def test_refused(text):
    assert is_uri(text)
    with pytest.raises(ValueError, match=r"."):
        parse_uri(text)


def test_what_is_none():
    assert not is_uri("nbd:host:1")
    assert not is_uri("/path/nbd://x")
