"""The socket over which we ask something of the front end ("Back-end communication")."""

from __future__ import annotations

import logging
import socket

from blkferry.wire.vhost_user.constants import BackendRequest
from blkferry.wire.vhost_user.messages import build_backend_request
from blkferry.wire.vhost_user.payloads import ProtocolError

log = logging.getLogger(__name__)


class BackendChannel:
    """A channel over `fd`, which is its own from now on. Raises ProtocolError, and leaves it, when it is not a socket.

    `name` is what log lines call the front end. Nothing waits for it: who does not read is not told.
    """

    def __init__(self, fd: int, name: str) -> None:
        try:
            self._sock = socket.socket(fileno=fd)
        except OSError as error:
            raise ProtocolError("the descriptor for requests of ours is not a socket") from error
        self._sock.setblocking(False)
        self._name = name

    def config_changed(self) -> None:
        """The configuration is to be read again."""
        try:
            self._sock.send(build_backend_request(BackendRequest.CONFIG_CHANGE_MSG), socket.MSG_NOSIGNAL)
        except OSError as error:
            log.warning("%s: it was not told that the disk has another size: %s", self._name, error.strerror)

    def close(self) -> None:
        self._sock.close()
