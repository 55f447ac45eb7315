"""NBD URIs, taken apart and put together."""

from __future__ import annotations

import pytest

from blkferry.wire.nbd.uri import Location, Tls, is_uri, parse_uri, tcp_uri, unix_uri, vsock_uri


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("nbd://host", Location("tcp", "", "host")),
        ("nbd://host:1/a%20b", Location("tcp", "a b", "host", 1)),
        ("nbd+tcp://[::1]:5//x", Location("tcp", "/x", "::1", 5)),
        ("nbd+unix:///n?socket=/a%3Fb", Location("unix", "n", socket="/a?b")),
        ("nbd+vsock://2:7/n", Location("vsock", "n", "2", 7)),
        (tcp_uri("::1", 10809, "a/b ?"), Location("tcp", "a/b ?", "::1")),
        ("nbd+vsock:///n", Location("vsock", "n", "2")),
        ("nbd+unix:///?socket=%00/abstract", Location("unix", "", socket="\0/abstract")),
        ("nbds://host/n", Location("tcp", "n", "host", tls=Tls())),
        (
            "nbds://al%69ce@host:1/?tls-psk-file=/k%26",
            Location("tcp", "", "host", 1, tls=Tls(psk_file="/k&", username="alice")),
        ),
        (
            "nbds+unix:///n?tls-hostname=a.example&socket=/s&tls-certificates=/pki",
            Location("unix", "n", socket="/s", tls=Tls(certificates="/pki", hostname="a.example")),
        ),
        ("nbds://host/?tls-type=anon", Location("tcp", "", "host", tls=Tls(kind="anon"))),
        (
            "nbds://host/?tls-certificates=/c&tls-verify-peer=0&tls-type=x509",
            Location("tcp", "", "host", tls=Tls(certificates="/c", kind="x509", verify_peer=False)),
        ),
        ("nbds://host/?tls-verify-peer=1", Location("tcp", "", "host", tls=Tls())),
        (tcp_uri("h", 10809, None, full=True), Location("tcp", "", "h")),
        (unix_uri("/s", None), Location("unix", "", socket="/s")),
        ("nbds+unix://alice@/?socket=s", Location("unix", "", socket="s", tls=Tls(username="alice"))),
        ("nbds+vsock://5/", Location("vsock", "", "5", tls=Tls())),
        (tcp_uri("h", 1, "n", tls=True), Location("tcp", "n", "h", 1, tls=Tls())),
        (unix_uri("/s", "n", tls=True), Location("unix", "n", socket="/s", tls=Tls())),
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
        "nbds://host/?tls-certificates=",
        "nbds://host/?tls-certificates=/c&tls-psk-file=/k",
        "nbds://host/?tls-verify-peer=no",
        "nbds://host/?tls-type=ssl",
        "nbds://host/?tls-type=anon&tls-certificates=/c",
        "nbds://host/?tls-type=psk&tls-certificates=/c",
        "nbds://host/?tls-type=x509&tls-psk-file=/k",
        "nbd://host/?tls-type=anon",
        "nbds://alice:secret@host/",
        "nbds://host/#x",
        "nbd://alice@host/",
        "nbd://host/?tls-hostname=x",
        "nbds+unix:///?tls-hostname=x",
        "nbd+unix:///?socket=%00",
        "nbd+unix:///?socket=%ff",
        "nbd+vsock://٢/",
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


def test_what_is_left_out():
    assert tcp_uri("h", 10809, "x") == "nbd://h/x"
    assert tcp_uri("::1", 10809, "x", full=True) == "nbd://[::1]:10809/x"
    assert (tcp_uri("h", 5, ""), tcp_uri("h", 5, None)) == ("nbd://h:5/", "nbd://h:5")
    assert unix_uri("/s", None) == "nbd+unix://?socket=/s"
    assert vsock_uri(2, 5, None) == "nbd+vsock://2:5"
