"""The server's side of option haggling: bytes in, bytes out, until an export is chosen or the session ends.

It knows neither sockets, timers nor nodes: the transport moves the bytes and cuts a client that haggles too
long, a `Directory` says which exports there are. TLS is the transport's, too: in state STARTTLS it makes the connection
secure and says so (`secured`). Where TLS is required there is nothing else to be had before it (FORCEDTLS).

Invariants: no bytes a client sends raise an exception. Every option's payload is consumed exactly or the
option is refused, and its reply does not depend on how the bytes were split. An unauthenticated client cannot
make the machine hold more than one option (MAX_META_OPTION at most) on the way in, nor more than MAX_OUTGOING
and the replies to one option on the way out: while more than that waits, nothing further is parsed. So the
transport drives it like this:

    machine.receive(data)
    while data := machine.outgoing():   # draining lets the machine go on with what it already received
        send(data)                      # and only when all is sent is there reason to read again
    # then look at machine.state
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple, Protocol

from blkferry.wire.nbd.constants import (
    INIT_MAGIC,
    MAX_INFO_OPTION,
    MAX_META_OPTION,
    MAX_OPTION,
    MAX_STRING,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    ClientFlag,
    HandshakeFlag,
    Info,
    Mode,
    Opt,
    Rep,
    RepError,
    TransmissionFlag,
)
from blkferry.wire.nbd.options import (
    CLIENT_FLAGS,
    CONTEXT_ID,
    EXPORT_NAME_PADDING,
    EXPORT_NAME_REPLY,
    GREETING,
    INFO_BLOCK_SIZE,
    INFO_COUNT,
    INFO_EXPORT,
    INFO_KIND,
    OPTION,
    OPTION_REPLY,
    QUERY_COUNT,
    STRING_LENGTH,
    Payload,
    Refused,
)
from blkferry.wire.nbd.transmission import cut

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from blkferry.wire.nbd.transmission import Buffer

# Replies that may wait for the transport before parsing stops: enough for any client that waits for answers,
# as the specification demands, little enough to hold for each that does not.
MAX_OUTGOING: Final = 256 * 1024

# A plain number: the complement of an IntFlag has only the bits its class knows.
_KNOWN_CLIENT_FLAGS: Final = int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES)
_MAX_SHOWN_NAME: Final = 80  # bytes of a client's own name that an error text repeats
_WILDCARDS: Final = frozenset({b"base:", b"qemu:", b"qemu:dirty-bitmap:"})  # in LIST_META_CONTEXT only


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """An export as the handshake describes it.

    `flags` are those of a connection with simple replies; `minimum`, `preferred` and `maximum` are block
    sizes; `contexts` are the (id, name) pairs on offer, in the order replies list them.
    """

    name: str
    description: str
    size: int
    flags: TransmissionFlag
    minimum: int
    preferred: int
    maximum: int
    contexts: tuple[tuple[int, str], ...]


class Directory(Protocol):
    """The exports a client may see. Asked anew for every option, so it may change in between."""

    def list(self) -> Sequence[ExportInfo]: ...

    def find(self, name: str) -> ExportInfo | None: ...


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What client and server agreed on."""

    export: str
    mode: Mode
    contexts: tuple[tuple[int, str], ...]
    flags: TransmissionFlag


class State(enum.Enum):
    CLIENT_FLAGS = "waits for the client's flags"
    OPTION = "waits for the header of an option"
    STARTTLS = "waits for the transport to start TLS, once everything is sent"
    PAYLOAD = "waits for the payload of an option"
    SKIPPING = "throws away the payload of an option it will refuse"
    DONE = "transmission may begin"
    CLOSED = "the connection is to be closed once everything is sent"


class Event(enum.Enum):
    """What the bytes of one step turned out to be."""

    ACCEPTED = "flags we know"
    ADMITTED = "an option whose payload is worth reading"
    UNWANTED = "an option whose payload is not"
    ANSWERED = "an option, replied to"
    SECURING = "the wish for TLS"
    SECURED = "no bytes: TLS has begun"
    CHOSEN = "an export, agreed on"
    ENDED = "the end of the session"


TRANSITIONS: Final = {
    (State.CLIENT_FLAGS, Event.ACCEPTED): State.OPTION,
    (State.CLIENT_FLAGS, Event.ENDED): State.CLOSED,
    (State.OPTION, Event.ADMITTED): State.PAYLOAD,
    (State.OPTION, Event.UNWANTED): State.SKIPPING,
    (State.OPTION, Event.ENDED): State.CLOSED,
    (State.PAYLOAD, Event.ANSWERED): State.OPTION,
    (State.PAYLOAD, Event.SECURING): State.STARTTLS,
    (State.PAYLOAD, Event.CHOSEN): State.DONE,
    (State.PAYLOAD, Event.ENDED): State.CLOSED,
    (State.SKIPPING, Event.ANSWERED): State.OPTION,
    (State.STARTTLS, Event.SECURED): State.OPTION,
    (State.STARTTLS, Event.ENDED): State.CLOSED,
}


class _Rule(NamedTuple):
    """How an option is treated. A payload over `limit` bytes is skipped and refused with `over`."""

    label: str
    limit: int
    answer: Callable[[Handshake, Opt, Payload], Event]
    over: RepError = RepError.INVALID


class Handshake:
    """One client's negotiation. Owned by the thread that owns the connection.

    `tls_required`: the server has credentials, and serves nobody without TLS. `state` says where it is, `result` what
    was agreed once it is DONE, `closed_reason` why it is CLOSED, and `refused` what the client was last told it cannot
    have, in the words that it was told; options that we do not have do not count.
    """

    def __init__(self, directory: Directory, *, tls_required: bool = False) -> None:
        self.state = State.CLIENT_FLAGS
        self.result: Negotiated | None = None
        self.closed_reason = ""
        self.refused = ""
        self._directory = directory
        self._tls_required = tls_required
        self._is_secure = False
        self._denial = ""
        self._incoming = bytearray()
        self._outgoing = bytearray(
            GREETING.pack(INIT_MAGIC, OPTION_MAGIC, HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
        )
        self._needed = CLIENT_FLAGS.size  # bytes the current state takes; when SKIPPING, those still to come
        self._client_flags = ClientFlag(0)
        self._option = 0  # the one whose payload is awaited
        self._refusal = Refused(RepError.UNSUP, "")  # what it will be answered with, when SKIPPING
        self._mode = Mode.SIMPLE
        self._context_export = ""  # the export that `_contexts` were selected for
        self._contexts: tuple[tuple[int, str], ...] = ()

    def receive(self, data: Buffer) -> None:
        """Take bytes from the client, any number of them, and go as far as they allow."""
        if self.state is not State.CLOSED:
            self._incoming += data
            self._advance()

    def outgoing(self) -> bytes:
        """Drain what is to be sent. Call until it returns nothing: each call lets parsing go on."""
        data = bytes(self._outgoing)
        self._outgoing.clear()
        self._advance()
        return data

    def secured(self, denial: str = "") -> None:
        """TLS has begun, in state STARTTLS. Whoever is denied gets `denial` as the answer to whatever it asks."""
        self._is_secure = True
        self._denial = denial
        self.state = TRANSITIONS[self.state, Event.SECURED]
        self._needed = OPTION.size

    @property
    def outgoing_size(self) -> int:
        """Bytes that `outgoing` would return now."""
        return len(self._outgoing)

    @property
    def leftover(self) -> bytes:
        """What the client sent after its choice of an export: it belongs to the transmission phase."""
        return bytes(self._incoming) if self.state is State.DONE else b""

    # --- The machine ---------------------------------------------------------------------------------------

    def _advance(self) -> None:
        while len(self._outgoing) < MAX_OUTGOING:
            if self.state is State.SKIPPING:
                skipped = min(self._needed, len(self._incoming))
                del self._incoming[:skipped]
                self._needed -= skipped
                if self._needed:
                    return
                event = self._refuse(self._refusal)
            elif self.state is State.STARTTLS and self._incoming:
                # They were not encrypted, and must not be taken for something that was.
                event = self._end("the client did not wait for the answer to STARTTLS")
            elif self.state in self._STEPS and len(self._incoming) >= self._needed:
                data = bytes(self._incoming[: self._needed])
                del self._incoming[: self._needed]
                event = self._STEPS[self.state](self, data)
            else:
                return
            self.state = TRANSITIONS[self.state, event]
            if self.state is State.OPTION:
                self._needed = OPTION.size
            elif self.state is State.CLOSED:
                self._incoming.clear()

    def _take_client_flags(self, data: bytes) -> Event:
        (flags,) = CLIENT_FLAGS.unpack(data)
        unknown = flags & ~_KNOWN_CLIENT_FLAGS
        if unknown:
            return self._end(f"unknown client flags {unknown:#x}")
        self._client_flags = ClientFlag(flags)
        return Event.ACCEPTED

    def _take_option(self, data: bytes) -> Event:
        magic, self._option, self._needed = OPTION.unpack(data)
        if magic != OPTION_MAGIC:
            return self._end(f"option magic is {magic:#018x} instead of {OPTION_MAGIC:#018x}")
        if self._needed > MAX_OPTION:
            return self._end(f"len ({self._needed}) is larger than max len ({MAX_OPTION})")
        forbidden = self._forbidden()
        if self._option == Opt.EXPORT_NAME:
            if forbidden is not None:  # its reply cannot carry an error
                return self._end(forbidden.text)
            if self._needed > MAX_STRING:
                return self._end(f"Invalid name length: {self._needed}")
        elif ClientFlag.FIXED_NEWSTYLE not in self._client_flags:
            return self._end(f"option {self._option} without fixed newstyle negotiation")
        elif self._option == Opt.ABORT:  # whatever payload it has is ignored unread
            if forbidden is not None:
                self._refuse(forbidden)
            else:
                self._reply(Opt.ABORT, Rep.ACK)
            return self._end("client aborted the negotiation")
        elif self._option == Opt.SET_META_CONTEXT:
            self._contexts = ()  # it replaces the selection before it even when it fails
        if forbidden is not None:
            self._refusal = forbidden
            return Event.UNWANTED
        rule = self._RULES.get(self._option)
        if rule is None:
            self._refusal = Refused(RepError.UNSUP, f"Unsupported option {self._option} (<unknown>)")
            return Event.UNWANTED
        if self._needed > rule.limit:
            fault = "has unexpected length" if rule.over is RepError.INVALID else f"exceeds {rule.limit} bytes"
            self._refusal = Refused(rule.over, f"option '{rule.label}' {fault}")
            return Event.UNWANTED
        return Event.ADMITTED

    def _forbidden(self) -> Refused | None:
        """What the option is refused with, whatever it says: there is no TLS yet, or its peer is not to be served."""
        if self._tls_required and not self._is_secure and self._option != Opt.STARTTLS:
            return Refused(RepError.TLS_REQD, f"Option {self._option:#x} not permitted before TLS")
        return Refused(RepError.POLICY, self._denial) if self._denial else None

    def _take_payload(self, data: bytes) -> Event:
        rule = self._RULES[self._option]
        try:
            return rule.answer(self, Opt(self._option), Payload(rule.label, data))
        except Refused as refused:
            return self._refuse(refused)

    def _end(self, reason: str) -> Event:
        self.closed_reason = reason
        return Event.ENDED

    def _refuse(self, refused: Refused) -> Event:
        if refused.error is not RepError.UNSUP and self._option != Opt.ABORT:
            self.refused = refused.text
        self._reply(self._option, refused.error, refused.text.encode())
        return Event.ANSWERED

    def _reply(self, option: int, kind: Rep | RepError, payload: bytes = b"") -> None:
        self._outgoing += OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(payload)) + payload

    # --- The options ---------------------------------------------------------------------------------------

    def _export_name(self, _option: Opt, payload: Payload) -> Event:
        """No reply of this option can carry an error: what cannot be granted ends the session."""
        if self._mode is Mode.EXTENDED:
            return self._end("EXPORT_NAME after extended headers were negotiated")
        try:
            info = self._find(payload.rest_as_name())
        except Refused as refused:
            return self._end(refused.text)
        self._outgoing += EXPORT_NAME_REPLY.pack(info.size, self._choose(info))
        if ClientFlag.NO_ZEROES not in self._client_flags:
            self._outgoing += bytes(EXPORT_NAME_PADDING)
        return Event.CHOSEN

    def _list(self, option: Opt, _payload: Payload) -> Event:
        for info in self._directory.list():
            name = info.name.encode()
            self._reply(option, Rep.SERVER, STRING_LENGTH.pack(len(name)) + name + info.description.encode())
        self._reply(option, Rep.ACK)
        return Event.ANSWERED

    def _starttls(self, option: Opt, _payload: Payload) -> Event:
        if self._is_secure:
            raise Refused(RepError.INVALID, "TLS already enabled")
        if not self._tls_required:
            raise Refused(RepError.POLICY, "TLS not configured")
        self._reply(option, Rep.ACK)
        return Event.SECURING

    def _info_or_go(self, option: Opt, payload: Payload) -> Event:
        name = payload.name()
        wanted = {payload.number(INFO_KIND) for _ in range(payload.number(INFO_COUNT))}
        payload.end()
        info = self._find(name)
        flags = self._choose(info) if option is Opt.GO else self._flags(info, with_contexts=True)
        if Info.NAME in wanted:
            self._reply(option, Rep.INFO, INFO_KIND.pack(Info.NAME) + name.encode())
        if info.description:
            self._reply(option, Rep.INFO, INFO_KIND.pack(Info.DESCRIPTION) + info.description.encode())
        # Who did not ask may ignore the answer, so GO promises such a client that every size will do.
        minimum = info.minimum if Info.BLOCK_SIZE in wanted or option is Opt.INFO else 1
        sizes = (minimum, info.preferred, info.maximum)
        self._reply(option, Rep.INFO, INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *sizes))
        self._reply(option, Rep.INFO, INFO_EXPORT.pack(Info.EXPORT, info.size, flags))
        if option is Opt.INFO and info.minimum > 1 and Info.BLOCK_SIZE not in wanted:
            raise Refused(RepError.BLOCK_SIZE_REQD, "request NBD_INFO_BLOCK_SIZE to use this export")
        self._reply(option, Rep.ACK)
        return Event.CHOSEN if option is Opt.GO else Event.ANSWERED

    def _structured_reply(self, option: Opt, _payload: Payload) -> Event:
        if self._mode is Mode.EXTENDED:
            raise Refused(RepError.EXT_HEADER_REQD, "extended headers already negotiated")
        if self._mode is Mode.STRUCTURED:
            raise Refused(RepError.INVALID, "structured reply already negotiated")
        self._mode = Mode.STRUCTURED
        self._reply(option, Rep.ACK)
        return Event.ANSWERED

    def _extended_headers(self, option: Opt, _payload: Payload) -> Event:
        if self._mode is Mode.EXTENDED:
            raise Refused(RepError.INVALID, "extended headers already negotiated")
        self._mode = Mode.EXTENDED
        self._reply(option, Rep.ACK)
        return Event.ANSWERED

    def _meta_context(self, option: Opt, payload: Payload) -> Event:
        if option is Opt.SET_META_CONTEXT and self._mode is Mode.SIMPLE:
            text = f"request option '{payload.label}' when structured reply is not negotiated"
            raise Refused(RepError.INVALID, text)
        name = payload.name()
        count = payload.number(QUERY_COUNT)
        queries = {payload.take(payload.number(STRING_LENGTH)) for _ in range(count)}
        payload.end()
        info = self._find(name)
        if option is Opt.SET_META_CONTEXT:
            found = tuple(context for context in info.contexts if context[1].encode() in queries)
            self._contexts = found
            self._context_export = info.name
        else:
            prefixes = tuple(queries & _WILDCARDS) if count else (b"",)
            texts = [text for _, text in info.contexts]
            found = tuple((0, text) for text in texts if text.encode() in queries or text.encode().startswith(prefixes))
        for context_id, text in found:
            self._reply(option, Rep.META_CONTEXT, CONTEXT_ID.pack(context_id) + text.encode())
        self._reply(option, Rep.ACK)
        return Event.ANSWERED

    def _find(self, name: str) -> ExportInfo:
        info = self._directory.find(name)
        if info is None:
            raise Refused(RepError.UNKNOWN, f"export '{_shown(name)}' not present")
        return info

    def _choose(self, info: ExportInfo) -> TransmissionFlag:
        """Settle on this export. Contexts that are another's, or no longer its own, are dropped."""
        if self._context_export != info.name or not set(self._contexts) <= set(info.contexts):
            self._contexts = ()
        flags = self._flags(info, with_contexts=bool(self._contexts))
        self.result = Negotiated(info.name, self._mode, self._contexts, flags)
        return flags

    def _flags(self, info: ExportInfo, *, with_contexts: bool) -> TransmissionFlag:
        flags = info.flags
        if self._mode is not Mode.SIMPLE:
            flags |= TransmissionFlag.SEND_DF
        if self._mode is Mode.EXTENDED and with_contexts:
            flags |= TransmissionFlag.BLOCK_STAT_PAYLOAD
        return flags

    _STEPS: ClassVar[dict[State, Callable[[Handshake, bytes], Event]]] = {
        State.CLIENT_FLAGS: _take_client_flags,
        State.OPTION: _take_option,
        State.PAYLOAD: _take_payload,
    }

    _RULES: ClassVar[dict[int, _Rule]] = {
        Opt.EXPORT_NAME: _Rule("export name", MAX_STRING, _export_name),
        Opt.LIST: _Rule("list", 0, _list),
        Opt.STARTTLS: _Rule("starttls", 0, _starttls),
        Opt.INFO: _Rule("info", MAX_INFO_OPTION, _info_or_go),
        Opt.GO: _Rule("go", MAX_INFO_OPTION, _info_or_go),
        Opt.STRUCTURED_REPLY: _Rule("structured reply", 0, _structured_reply),
        Opt.LIST_META_CONTEXT: _Rule("list meta context", MAX_META_OPTION, _meta_context, RepError.TOO_BIG),
        Opt.SET_META_CONTEXT: _Rule("set meta context", MAX_META_OPTION, _meta_context, RepError.TOO_BIG),
        Opt.EXTENDED_HEADERS: _Rule("extended headers", 0, _extended_headers),
    }


def _shown(name: str) -> str:
    """A client's name for an error text or a log: not long, and with nothing that moves a cursor."""
    shortened = cut(name, _MAX_SHOWN_NAME).decode()
    if shortened != name:
        shortened += "..."
    return "".join(character if character.isprintable() else "?" for character in shortened)
