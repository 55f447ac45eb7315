"""`authz-list`: rules, of which the first that fits decides, and a policy for whom none fits."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from blkferry.objects.authz.base import Authz
from blkferry.schema.qapi import Doc, Struct, branch
from blkferry.schema.qom import ObjectOptions


class QAuthZListPolicy(enum.StrEnum):
    """What becomes of an identity."""

    DENY = "deny"
    ALLOW = "allow"


class QAuthZListFormat(enum.StrEnum):
    """How a rule is compared."""

    EXACT = "exact"
    GLOB = "glob"


class QAuthZListRule(Struct):
    """A rule."""

    match: Annotated[str, Doc("the identity; as a glob, * is any text and ? any character", since="4.0")]
    policy: Annotated[QAuthZListPolicy, Doc("what becomes of who fits", since="4.0")]
    format: Annotated[QAuthZListFormat, Doc("how it is compared", since="4.0")] = QAuthZListFormat.EXACT

    def fits(self, identity: str) -> bool:
        """Whether the rule is about this identity."""
        if self.format is QAuthZListFormat.GLOB:
            return fits_glob(identity, self.match)
        return identity == self.match


@branch
class AuthZListProperties(ObjectOptions):
    """Allow or deny identities by rules."""

    qom_type: Literal["authz-list"] = "authz-list"
    policy: Annotated[QAuthZListPolicy, Doc("what becomes of who fits no rule", since="4.0")] = QAuthZListPolicy.DENY
    rules: Annotated[list[QAuthZListRule] | None, Doc("the rules; the first that fits decides", since="4.0")] = None


class AuthzList(Authz):
    """Allows by rules."""

    kind: ClassVar[str] = "authz-list"
    options_type: ClassVar[type[ObjectOptions]] = AuthZListProperties

    def __init__(self, options: ObjectOptions) -> None:
        assert isinstance(options, AuthZListProperties)
        super().__init__(options)
        self._policy = options.policy
        self._rules = options.rules or ()

    async def allows(self, identity: str) -> bool:
        return decide(identity, self._rules, self._policy)


def decide(identity: str, rules: Sequence[QAuthZListRule], policy: QAuthZListPolicy) -> bool:
    """Whether the first rule that fits allows this identity, or the policy if none does."""
    found = next((rule.policy for rule in rules if rule.fits(identity)), policy)
    return found is QAuthZListPolicy.ALLOW


def fits_glob(text: str, pattern: str) -> bool:
    """Whether a pattern fits all of a text. At most len(text) * len(pattern) steps: the text is a stranger's."""
    at, index = 0, 0
    star, resume = -1, 0  # where the last * stands, and where what follows it is tried next
    while at < len(text):
        if index < len(pattern) and pattern[index] == "*":
            star, resume = index, at
            index += 1
        elif index < len(pattern) and pattern[index] in {"?", text[at]}:
            at += 1
            index += 1
        elif star >= 0:
            resume += 1
            at, index = resume, star + 1
        else:
            return False
    return not pattern[index:].strip("*")
