"""All objects of a daemon, by id: iothreads, secrets, TLS credentials, and who is authorized."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from blkferry.errors import Error, ErrorKind
from blkferry.graph import registry
from blkferry.graph.graph import well_formed
from blkferry.objects.base import BlkObject
from blkferry.objects.iothread import Iothread
from blkferry.objects.secret import Secret
from blkferry.objects.tls import TlsCreds
from blkferry.schema.qom import ObjectOptions

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon


class Objects(dict[str, BlkObject]):
    """They live on the main loop, in the order they were made."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__()
        self._daemon = daemon

    async def add(self, options: ObjectOptions) -> None:
        """Create an object. Raises Error when the id is taken or malformed, or the type unknown."""
        if not well_formed(options.id):
            raise Error(ErrorKind.INVALID_ARGUMENT, "Parameter 'id' expects an identifier", hint="Like 'io1'.")
        if options.id in self:
            raise Error(ErrorKind.EXISTS, f"There already is an object with id '{options.id}'", id=options.id)
        kind = registry.load("objects", options.qom_type)
        if kind is None:
            raise Error(ErrorKind.NOT_FOUND, f"invalid object type: {options.qom_type}")
        thing: BlkObject = kind(options)
        await thing.start(self._daemon.graph, self._daemon.engine)
        self[options.id] = thing

    async def remove(self, object_id: str) -> None:
        """Remove an object that nothing uses. Raises Error(NOT_FOUND) or Error(BUSY), naming the users."""
        thing = self.get(object_id)
        if thing is None:
            raise Error(
                ErrorKind.NOT_FOUND,
                f"object '{object_id}' not found",
                hint=f"Known objects: {', '.join(self)}." if self else "There are no objects.",
            )
        if users := list(thing.users(self._daemon.graph)):
            raise Error(
                ErrorKind.BUSY,
                f"object '{object_id}' is in use, can not be deleted",
                hint=f"It is used by {', '.join(users)}.",
            )
        del self[object_id]
        await thing.stop()

    def iothread(self, object_id: str) -> Iothread:
        """The iothread of this name; raises Error(NOT_FOUND)."""
        thing = self.get(object_id)
        if not isinstance(thing, Iothread):
            raise Error(
                ErrorKind.NOT_FOUND,
                f'iothread "{object_id}" not found',
                hint=self._list_objects(Iothread) or "Create it with object-add.",
            )
        return thing

    def secret(self, object_id: str) -> bytes:
        """What the secret of this name keeps; raises Error(NOT_FOUND) or Error(INVALID_ARGUMENT)."""
        thing = self.get(object_id)
        if isinstance(thing, Secret):
            return thing.value
        hint = self._list_objects(Secret) or "Create it with object-add."
        if thing is None:
            raise Error(ErrorKind.NOT_FOUND, f"No secret with id '{object_id}'", hint=hint)
        raise Error(ErrorKind.INVALID_ARGUMENT, f"Object with id '{object_id}' is not a secret", hint=hint)

    def credentials(self, object_id: str, endpoint: str) -> TlsCreds:
        """The TLS credentials of this name, for a "server" or "client"; raises Error."""
        thing = self.get(object_id)
        if thing is None:
            names = ", ".join(name for name, each in self.items() if isinstance(each, TlsCreds))
            hint = f"Known TLS credentials: {names}." if names else "Create them with object-add (tls-creds-x509)."
            raise Error(ErrorKind.NOT_FOUND, f"No TLS credentials with id '{object_id}'", hint=hint)
        if not isinstance(thing, TlsCreds):
            raise Error(ErrorKind.INVALID_ARGUMENT, f"Object with id '{object_id}' is not TLS credentials")
        if thing.endpoint != endpoint:
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                f"Expected TLS credentials for a {endpoint} endpoint",
                hint=f"'{object_id}' was made with endpoint={thing.endpoint}.",
            )
        return thing

    def client_tls(self, credentials_id: str, *, named: bool) -> ssl.SSLContext:
        """What a client of these credentials begins TLS with; `named` if it checks whom it talks to. Raises Error."""
        return self.credentials(credentials_id, "client").context(named=named)

    def _list_objects(self, kind: type[BlkObject]) -> str:
        names = ", ".join(name for name, thing in self.items() if isinstance(thing, kind))
        return f"Known {kind.kind}s: {names}." if names else ""
