"""The encryption of old qcow2 images (crypt_method 1): AES-128-CBC with the password itself as the key.

It is for getting data out of old images: the key is as weak as the password, nothing tells a wrong password from the
right one, and equal sectors at the same place of two images are equal. Sectors are counted on the **guest** disk.
"""

from __future__ import annotations

from blkferry.crypt.aes import IvGen, Mode, Scheme, SectorCipher, sector_cipher

KEY_BYTES = 16


def legacy_cipher(passphrase: bytes) -> SectorCipher:
    """The cipher for a password, of which only the first 16 bytes count. Raises Error(UNSUPPORTED)."""
    key = passphrase[:KEY_BYTES].ljust(KEY_BYTES, b"\0")
    return sector_cipher(Scheme(Mode.CBC, IvGen.PLAIN64), key)
