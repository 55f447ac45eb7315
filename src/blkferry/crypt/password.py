"""What of a secret is the password of an image."""

from __future__ import annotations

from blkferry.errors import Error, ErrorKind


def password(secret_id: str, data: bytes) -> bytes:
    """The password that a secret's data is, by QEMU's rules: UTF-8 that ends before the first NUL. Raises Error.

    An image that QEMU made from a secret with a NUL in it opens with the part before that only, so the cut matters.
    """
    try:
        data.decode()
    except UnicodeDecodeError:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            f"Data from secret {secret_id} is not valid UTF-8",
            hint="If the data is in base64, say so with format=base64.",
        ) from None
    return data.partition(b"\0")[0]
