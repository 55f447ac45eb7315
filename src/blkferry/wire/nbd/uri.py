"""NBD URIs (the NBD project's doc/uri.md): where an export can be found, in one line."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

DEFAULT_PORT = 10809


class Location(NamedTuple):
    """What a URI says. `kind` is "tcp", "unix" or "vsock"; `host` is the context id of a vsock address."""

    kind: str
    export: str
    host: str = ""
    port: int = DEFAULT_PORT
    socket: str = ""


_KINDS = {"nbd": "tcp", "nbd+tcp": "tcp", "nbd+unix": "unix", "nbd+vsock": "vsock"}


def is_uri(text: str) -> bool:
    """Whether this is an NBD URI of any kind, those with TLS (nbds) among them."""
    return text.partition("://")[0] in {*_KINDS, "nbds", "nbds+tcp", "nbds+unix", "nbds+vsock"} and "://" in text


def parse_uri(text: str) -> Location:
    """Take an NBD URI apart. Raises ValueError with what is wrong with it."""
    parts = urlsplit(text)
    kind = _KINDS.get(parts.scheme)
    if kind is None:
        raise ValueError(f"the scheme '{parts.scheme}' is not supported, only {', '.join(_KINDS)}")
    if parts.fragment or parts.username is not None:
        raise ValueError("a user name and a fragment are not supported")
    query = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    if set(query) - {"socket"} or any(len(values) > 1 for values in query.values()):
        raise ValueError("the only parameter supported is one 'socket'")
    export = unquote(parts.path.removeprefix("/"), errors="strict")
    if kind == "unix":
        if parts.netloc or not query.get("socket", [""])[0]:
            raise ValueError("it needs the parameter 'socket' and no host, like nbd+unix:///name?socket=/path")
        return Location(kind, export, socket=query["socket"][0])
    if query:
        raise ValueError("the parameter 'socket' goes with nbd+unix only")
    host = unquote(parts.hostname or "")
    if kind == "vsock" and not host.isdecimal():
        raise ValueError("the host of a vsock address is a decimal number")
    return Location(kind, export, host or "localhost", DEFAULT_PORT if parts.port is None else parts.port)


def tcp_uri(host: str, port: int, export: str, *, tls: bool = False) -> str:
    """`nbd://host:port/export`, the port left out when it is the registered one; `nbds` for TLS."""
    shown = f"[{host}]" if ":" in host else host
    where = shown if port == DEFAULT_PORT else f"{shown}:{port}"
    return f"nbd{'s' if tls else ''}://{where}/{quote(export)}"


def unix_uri(path: str, export: str, *, tls: bool = False) -> str:
    """`nbd+unix:///export?socket=path`."""
    return f"nbd{'s' if tls else ''}+unix:///{quote(export)}?{urlencode({'socket': path}, safe='/', quote_via=quote)}"


def vsock_uri(cid: int, port: int, export: str, *, tls: bool = False) -> str:
    """`nbd+vsock://cid:port/export`, the port left out when it is the registered one."""
    where = str(cid) if port == DEFAULT_PORT else f"{cid}:{port}"
    return f"nbd{'s' if tls else ''}+vsock://{where}/{quote(export)}"
