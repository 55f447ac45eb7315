"""`authz-pam`: a PAM service decides, by its `account` rules, with the identity for the user's name."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import logging
from typing import Annotated, ClassVar, Literal

from blkferry.errors import Error, ErrorKind
from blkferry.graph.graph import Graph
from blkferry.objects.authz.base import Authz
from blkferry.schema.qapi import Doc, branch
from blkferry.schema.qom import ObjectOptions

log = logging.getLogger(__name__)

# Of <security/_pam_types.h>.
_SUCCESS = 0
_CONVERSATION_ERROR = 19
_SILENT = 0x8000

_Converse = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


class _Conversation(ctypes.Structure):
    """struct pam_conv."""

    _fields_ = (("conv", _Converse), ("appdata_ptr", ctypes.c_void_p))


@branch
class AuthZPAMProperties(ObjectOptions):
    """Let PAM decide who is allowed."""

    qom_type: Literal["authz-pam"] = "authz-pam"
    service: Annotated[str, Doc("the PAM service, a file in /etc/pam.d", since="4.0")]


class AuthzPam(Authz):
    """Allows whom PAM has a valid account for."""

    kind: ClassVar[str] = "authz-pam"
    options_type: ClassVar[type[ObjectOptions]] = AuthZPAMProperties

    def __init__(self, options: ObjectOptions) -> None:
        assert isinstance(options, AuthZPAMProperties)
        super().__init__(options)
        self._service = options.service
        if not self._service.isprintable():
            raise Error(ErrorKind.INVALID_ARGUMENT, "Parameter 'service' expects the name of a PAM service")

    async def start(self, graph: Graph, engine: str) -> None:
        """Load libpam; raises Error(UNSUPPORTED) where there is none."""
        del graph, engine
        await asyncio.to_thread(_library)

    async def allows(self, identity: str) -> bool:
        return await asyncio.to_thread(self._ask, identity)

    def _ask(self, identity: str) -> bool:
        """Start a transaction, ask for the account, and end it. Rules may take their time: this is a thread."""
        if "\0" in identity:  # PAM would see another name
            return False
        library = _library()
        handle = ctypes.c_void_p()
        conversation = _Conversation(_Converse(_say_nothing), None)
        service, user = self._service.encode(), identity.encode()
        status = library.pam_start(service, user, ctypes.byref(conversation), ctypes.byref(handle))
        if status != _SUCCESS:
            log.error("%s: PAM service '%s' cannot be asked: error %d", self.id, self._service, status)
            return False
        status = library.pam_acct_mgmt(handle, _SILENT)
        library.pam_end(handle, status)
        return bool(status == _SUCCESS)


def _say_nothing(_count: int, _messages: int, _responses: int, _data: int) -> int:
    """Answer questions of modules: there is nobody to ask."""
    return _CONVERSATION_ERROR


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libpam.so.0")
    except OSError as error:
        raise Error(
            ErrorKind.UNSUPPORTED,
            f"PAM is not available: {error}",
            hint="Install libpam (Debian's package is libpam0g), or use authz-list.",
        ) from None
    library.pam_start.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p)
    library.pam_acct_mgmt.argtypes = (ctypes.c_void_p, ctypes.c_int)
    library.pam_end.argtypes = (ctypes.c_void_p, ctypes.c_int)
    return library
