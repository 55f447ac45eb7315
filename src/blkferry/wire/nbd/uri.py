"""NBD URIs (the NBD project's doc/uri.md): where an export can be found, in one line."""

from __future__ import annotations

from urllib.parse import quote, urlencode

DEFAULT_PORT = 10809


def tcp_uri(host: str, port: int, export: str, *, tls: bool = False) -> str:
    """`nbd://host:port/export`, the port left out when it is the registered one; `nbds` for TLS."""
    shown = f"[{host}]" if ":" in host else host
    where = shown if port == DEFAULT_PORT else f"{shown}:{port}"
    return f"nbd{'s' if tls else ''}://{where}/{quote(export)}"


def unix_uri(path: str, export: str, *, tls: bool = False) -> str:
    """`nbd+unix:///export?socket=path`."""
    return f"nbd{'s' if tls else ''}+unix:///{quote(export)}?{urlencode({'socket': path}, safe='/', quote_via=quote)}"
