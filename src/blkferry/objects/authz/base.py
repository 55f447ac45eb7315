"""What every authorization object answers."""

from __future__ import annotations

from blkferry.objects.base import BlkObject


class Authz(BlkObject):
    """Tells who is allowed. An identity is the distinguished name of a certificate (`TlsCreds.identity`)."""

    async def allows(self, identity: str) -> bool:
        """Whether whoever this is may come in. In doubt nobody may: it raises nothing."""
        raise NotImplementedError
