"""`authz-simple`: one identity is allowed."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from blkferry.objects.authz.base import Authz
from blkferry.schema.qapi import Doc, branch
from blkferry.schema.qom import ObjectOptions


@branch
class AuthZSimpleProperties(ObjectOptions):
    """Allow one identity."""

    qom_type: Literal["authz-simple"] = "authz-simple"
    identity: Annotated[str, Doc("who is allowed, such as O=Lab,CN=client1", since="4.0")]


class AuthzSimple(Authz):
    """Allows who is exactly this."""

    kind: ClassVar[str] = "authz-simple"
    options_type: ClassVar[type[ObjectOptions]] = AuthZSimpleProperties

    def __init__(self, options: ObjectOptions) -> None:
        assert isinstance(options, AuthZSimpleProperties)
        super().__init__(options)
        self._identity = options.identity

    async def allows(self, identity: str) -> bool:
        return identity == self._identity
