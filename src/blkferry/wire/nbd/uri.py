"""NBD URIs (the NBD project's doc/uri.md): where an export can be found, in one line."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

DEFAULT_PORT = 10809


class Tls(NamedTuple):
    """How to prove who is who: a directory with certificates, or a file with keys and which `username` has which.

    `kind` is "x509", "psk" or "anon", which proves nothing; "" where that is left to the rest. `hostname` is the name
    that the server's certificate must have, where that is not the host's; `verify_peer` tells whether it is looked at.
    """

    certificates: str = ""
    psk_file: str = ""
    username: str = ""
    hostname: str = ""
    kind: str = ""
    verify_peer: bool = True


class Location(NamedTuple):
    """What a URI says. `kind` is "tcp", "unix" or "vsock"; `host` is the context id of a vsock address.

    `socket` may begin with a NUL: then it is an abstract name. Without `tls` nothing is encrypted.
    """

    kind: str
    export: str
    host: str = ""
    port: int = DEFAULT_PORT
    socket: str = ""
    tls: Tls | None = None


_HOST_CID = "2"  # of a guest's host, where libnbd looks if nobody says a cid
_KINDS = {"": "tcp", "+tcp": "tcp", "+unix": "unix", "+vsock": "vsock"}
_SCHEMES = {f"{name}{kind}" for name in ("nbd", "nbds") for kind in _KINDS}
_TLS_PARAMETERS = {
    "tls-type": "kind",
    "tls-certificates": "certificates",
    "tls-psk-file": "psk_file",
    "tls-hostname": "hostname",
    "tls-verify-peer": "verify_peer",
}
_TLS_FILES = {"x509": "certificates", "psk": "psk_file", "anon": None}
"""Which parameter goes with which type."""


def is_uri(text: str) -> bool:
    """Whether this is an NBD URI of any kind."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme in _SCHEMES


def parse_uri(text: str) -> Location:
    """Take an NBD URI apart. Raises ValueError with what is wrong with it."""
    parts = urlsplit(text)
    if parts.scheme not in _SCHEMES:
        raise ValueError(f"the scheme '{parts.scheme}' is not supported, only {', '.join(sorted(_SCHEMES))}")
    if parts.fragment:
        raise ValueError("a fragment is not supported; write # as %23")
    name, plus, transport = parts.scheme.partition("+")
    kind = _KINDS[plus + transport]
    parameters = _parameters(parts.query)
    username = _text(parts.username or "")
    tls = _tls(parameters, username) if name == "nbds" else None
    if tls is None and (username or parameters.keys() & _TLS_PARAMETERS):
        raise ValueError("a user name and parameters of TLS go with nbds only")
    if parts.password is not None:
        raise ValueError("a password is not supported")
    export = _text(parts.path.removeprefix("/"))
    socket = parameters.get("socket", "")
    if kind == "unix":
        if parts.hostname or parts.port is not None or not socket.removeprefix("\0"):
            raise ValueError("it needs the parameter 'socket' and no host, like nbd+unix:///name?socket=/path")
        return Location(kind, export, socket=socket, tls=tls)
    if "socket" in parameters:
        raise ValueError("the parameter 'socket' goes with nbd+unix only")
    host = _text(parts.hostname or "") or (_HOST_CID if kind == "vsock" else "localhost")
    if kind == "vsock" and not (host.isascii() and host.isdecimal()):
        raise ValueError("the host of a vsock address is a decimal number")
    return Location(kind, export, host, DEFAULT_PORT if parts.port is None else parts.port, tls=tls)


def _parameters(query: str) -> dict[str, str]:
    found = parse_qs(query, keep_blank_values=True, strict_parsing=bool(query), errors="strict")
    for name, values in found.items():
        if name != "socket" and name not in _TLS_PARAMETERS:
            raise ValueError(f"there is no parameter '{name}', only socket, {', '.join(_TLS_PARAMETERS)}")
        if len(values) > 1:
            raise ValueError(f"the parameter '{name}' is there more than once")
    return {name: values[0] for name, values in found.items()}


def _tls(parameters: dict[str, str], username: str) -> Tls:
    said = {field: parameters[name] for name, field in _TLS_PARAMETERS.items() if name in parameters}
    if not all(said.values()):
        raise ValueError("parameters of TLS must not be empty")
    if "certificates" in said and "psk_file" in said:
        raise ValueError("there are either certificates or keys (tls-psk-file), not both")
    kind = said.pop("kind", "")
    if kind and kind not in _TLS_FILES:
        raise ValueError(f"tls-type is one of {', '.join(_TLS_FILES)}")
    if kind and (said.keys() & _TLS_FILES.values()) - {_TLS_FILES[kind]}:
        raise ValueError(f"its certificates or keys do not go with tls-type={kind}")
    verify_peer = said.pop("verify_peer", "1")
    if verify_peer not in ("0", "1"):
        raise ValueError("tls-verify-peer is 0 or 1")
    return Tls(username=username, kind=kind, verify_peer=verify_peer == "1", **said)


def _text(quoted: str) -> str:
    return unquote(quoted, errors="strict")


def tcp_uri(host: str, port: int, export: str | None, *, tls: bool = False, full: bool = False) -> str:
    """`nbd://host:port/export`; `nbds` for TLS. The registered port is left out unless the URI is to be `full`.

    Here and below, an export that is None has no slash either, and means the same as the empty name.
    """
    shown = f"[{host}]" if ":" in host else host
    where = shown if port == DEFAULT_PORT and not full else f"{shown}:{port}"
    return f"nbd{'s' if tls else ''}://{where}{_path(export)}"


def unix_uri(path: str, export: str | None, *, tls: bool = False) -> str:
    """`nbd+unix:///export?socket=path`."""
    return f"nbd{'s' if tls else ''}+unix://{_path(export)}?{urlencode({'socket': path}, safe='/', quote_via=quote)}"


def vsock_uri(cid: int, port: int, export: str | None, *, tls: bool = False) -> str:
    """`nbd+vsock://cid:port/export`, the port left out when it is the registered one."""
    where = str(cid) if port == DEFAULT_PORT else f"{cid}:{port}"
    return f"nbd{'s' if tls else ''}+vsock://{where}{_path(export)}"


def _path(export: str | None) -> str:
    return "" if export is None else f"/{quote(export)}"
