"""The one door to the `cryptography` package, an extra: blkferry works without it until an image is encrypted."""

from __future__ import annotations

import functools
import importlib

from blkferry.errors import Error, ErrorKind


@functools.cache
def require() -> None:
    """Import it. Raises Error(UNSUPPORTED) where it is not installed; importing parts of it afterwards is safe."""
    try:
        importlib.import_module("cryptography.hazmat.primitives.ciphers")
    except ImportError:
        raise Error(
            ErrorKind.UNSUPPORTED,
            "Encryption needs the Python package 'cryptography', which is not installed",
            hint="pip install 'blkferry[crypt]'",
        ) from None
