"""From NBD URIs to the options of nodes, and of the credentials that those with TLS need.

The credentials are an object whose id follows from the URI, so that all nodes of one server share it.
"""

from __future__ import annotations

import getpass
import hashlib
import os
from typing import Any

from blkferry.errors import Error, ErrorKind
from blkferry.wire.nbd.uri import Location, Tls, parse_uri

KEYS = "keys.psk"


def location_of(uri: str) -> Location:
    """What an NBD URI says. Raises Error."""
    try:
        return parse_uri(uri)
    except ValueError as error:
        raise Error(ErrorKind.INVALID_ARGUMENT, f"'{uri}': {error}", hint="Like nbd://host/name.") from error


def remote_options(uri: str) -> dict[str, Any]:
    """The options of the node for what an NBD URI names. Raises Error."""
    location = location_of(uri)
    server: dict[str, Any]
    match location.kind:
        case "tcp":
            server = {"type": "inet", "host": location.host, "port": str(location.port)}
        case "vsock":
            server = {"type": "vsock", "cid": location.host, "port": str(location.port)}
        case _:
            server = {"type": "unix", "path": location.socket.removeprefix("\0")}
            if location.socket.startswith("\0"):
                server["abstract"] = True
    options: dict[str, Any] = {"driver": "nbd", "server": server}
    if location.export:
        options["export"] = location.export
    if location.tls is not None:
        options["tls-creds"] = _credentials(uri, location.tls)["id"]
        if location.tls.hostname:
            options["tls-hostname"] = location.tls.hostname
    return options


def credentials_for(uri: str) -> dict[str, str] | None:
    """The options, as on a command line, of the object that `remote_options` names in tls-creds. Raises Error.

    None where it names none.
    """
    tls = location_of(uri).tls
    return None if tls is None else _credentials(uri, tls)


def _credentials(uri: str, tls: Tls) -> dict[str, str]:
    if tls.kind == "anon":
        options = {"qom-type": "tls-creds-anon", "endpoint": "client"}
    elif tls.certificates:
        options = {"qom-type": "tls-creds-x509", "endpoint": "client", "dir": os.path.abspath(tls.certificates)}
        if not tls.verify_peer:
            options["verify-peer"] = "off"
    elif tls.psk_file:
        directory, name = os.path.split(os.path.abspath(tls.psk_file))
        if name != KEYS:
            text = f"'{uri}': the file of keys has to be called {KEYS}"
            raise Error(ErrorKind.INVALID_ARGUMENT, text, hint="As for all other credentials.")
        username = tls.username or _own_name()
        options = {"qom-type": "tls-creds-psk", "endpoint": "client", "dir": directory, "username": username}
    else:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            f"'{uri}': TLS needs credentials",
            hint=f"Add ?tls-certificates=DIR (with ca-cert.pem), or ?tls-psk-file=DIR/{KEYS}. "
            "With ?tls-type=anon nobody knows whom they talk to.",
        )
    digest = hashlib.sha256("\0".join(options.values()).encode(errors="surrogateescape")).hexdigest()
    return {**options, "id": f"nbds-{digest[:16]}"}


def _own_name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        raise Error(
            ErrorKind.INVALID_ARGUMENT, "Nobody says whose key to use", hint="Like nbds://user@host/name."
        ) from None
