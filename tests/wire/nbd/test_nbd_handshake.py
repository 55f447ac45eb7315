"""The server's handshake machine, spoken to in bytes."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blkferry.wire.nbd import handshake as machine_module
from blkferry.wire.nbd.client import (
    BlockSize,
    ExportSize,
    InfoText,
    OptionReply,
    build_flags,
    build_info,
    build_option,
    build_queries,
    parse_info,
    parse_meta_context,
    parse_server,
    take_export_name_reply,
    take_greeting,
    take_option_reply,
)
from blkferry.wire.nbd.constants import (
    MAX_INFO_OPTION,
    MAX_META_OPTION,
    MAX_OPTION,
    MAX_STRING,
    OPTION_MAGIC,
    HandshakeFlag,
    Info,
    Mode,
    Opt,
    Rep,
    RepError,
    TransmissionFlag,
)
from blkferry.wire.nbd.handshake import MAX_OUTGOING, TRANSITIONS, ExportInfo, Handshake, Negotiated, State
from blkferry.wire.nbd.options import OPTION

BOTH = 3  # client flags: fixed newstyle, no zeroes
WRITABLE = TransmissionFlag(0xD6D)
READ_ONLY = TransmissionFlag(0x50F)
ALLOCATION = (0, "base:allocation")
DEPTH = (1, "qemu:allocation-depth")
BITMAPS = ((2, "qemu:dirty-bitmap:b0"), (3, "qemu:dirty-bitmap:b1"))

DISK = ExportInfo("disk", "the disk", 1 << 30, WRITABLE, 512, 4096, 32 << 20, (ALLOCATION, DEPTH, *BITMAPS))
PLAIN = ExportInfo("", "", 1024, READ_ONLY, 1, 4096, 32 << 20, (ALLOCATION,))


@dataclass
class Shelf:
    """A directory in memory. `exports` may be changed while a client haggles."""

    exports: list[ExportInfo]

    def list(self):
        return self.exports

    def find(self, name):
        return next((export for export in self.exports if export.name == name), None)


class Client:
    """A scripted client: sends bytes, returns the option replies that come back."""

    def __init__(self, *exports, flags=BOTH):
        self.shelf = Shelf(list(exports) or [DISK, PLAIN])
        self.machine = Handshake(self.shelf)
        self.incoming = bytearray(self.drain())
        assert take_greeting(self.incoming) == HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        self.machine.receive(build_flags(flags))

    def drain(self):
        sent = b""
        while data := self.machine.outgoing():
            sent += data
        return sent

    def send(self, option, payload=b""):
        return self.send_raw(build_option(option, payload))

    def send_raw(self, data):
        self.machine.receive(data)
        self.incoming += self.drain()
        replies = []
        while (reply := take_option_reply(self.incoming)) is not None:
            replies.append(reply)
        return replies

    def ack(self, option, payload=b""):
        """Send an option that must succeed; return what came before the ACK."""
        *replies, last = self.send(option, payload)
        assert last == OptionReply(option, Rep.ACK, b"")
        return replies

    def refusal(self, option, payload=b""):
        """Send an option that must fail, and leave the negotiation open; return the error and its text."""
        last = self.send(option, payload)[-1]
        assert last.failed
        assert last.option == option
        assert self.machine.state is State.OPTION
        assert self.send(Opt.LIST)[-1].kind == Rep.ACK, "the stream is still in step"
        return RepError(last.kind), last.text

    def infos(self, option, payload):
        return [parse_info(reply.payload) for reply in self.ack(option, payload)]

    def contexts(self, option, name, *queries):
        return [parse_meta_context(reply.payload) for reply in self.ack(option, build_queries(name, queries))]


# --- Greeting and flags (4.1) ---------------------------------------------------------------------


def test_the_greeting_is_the_specifications():
    assert Handshake(Shelf([])).outgoing() == bytes.fromhex("4e42444d41474943 49484156454f5054 0003")


@pytest.mark.parametrize("flags", [4, 1 << 31, 0xFFFFFFFF])
def test_unknown_client_flags_close(flags):
    client = Client(flags=flags)
    assert client.machine.state is State.CLOSED
    assert "unknown client flags" in client.machine.closed_reason
    assert client.send(Opt.LIST) == []


@pytest.mark.parametrize("flags", [0, 2])
def test_without_fixed_newstyle_only_an_export_name_is_taken(flags):
    client = Client(flags=flags)
    assert client.send(Opt.LIST) == []
    assert client.machine.state is State.CLOSED

    client = Client(flags=flags)
    client.machine.receive(build_option(Opt.EXPORT_NAME, b"disk"))
    assert client.machine.state is State.DONE


def test_wrong_option_magic_closes():
    client = Client()
    assert client.send_raw(struct.pack(">QII", OPTION_MAGIC + 1, Opt.LIST, 0)) == []
    assert client.machine.state is State.CLOSED


# --- EXPORT_NAME ----------------------------------------------------------------------------------


def test_export_name_golden_vectors():
    """Size and flags, then 124 zeroes unless the client declined them."""
    terse, padded = Client(flags=3), Client(flags=1)
    for client in (terse, padded):
        client.machine.receive(bytes.fromhex("49484156454f5054 00000001 00000004") + b"disk")
        assert client.machine.state is State.DONE
        assert client.machine.result == Negotiated("disk", Mode.SIMPLE, (), WRITABLE)
    answer = bytes.fromhex("0000000040000000 0d6d")
    assert terse.drain() == answer
    assert padded.drain() == answer + bytes(124)


def test_export_name_may_be_empty_and_keeps_what_was_negotiated():
    client = Client()
    client.ack(Opt.STRUCTURED_REPLY)
    client.contexts(Opt.SET_META_CONTEXT, "", "base:allocation")
    client.send_raw(build_option(Opt.EXPORT_NAME, b"") + b"first request")
    flags = READ_ONLY | TransmissionFlag.SEND_DF
    assert client.machine.result == Negotiated("", Mode.STRUCTURED, (ALLOCATION,), flags)
    assert client.machine.leftover == b"first request"
    assert take_export_name_reply(client.incoming, no_zeroes=True) == ExportSize(1024, flags)


@pytest.mark.parametrize("name", [b"nothing", b"disk\0", b"\xff", b"x" * MAX_STRING, b"x" * (MAX_STRING + 1)])
def test_an_export_name_that_cannot_be_granted_closes_without_a_reply(name):
    client = Client()
    assert client.send(Opt.EXPORT_NAME, name) == []
    assert client.incoming == b""
    assert client.machine.state is State.CLOSED
    assert client.machine.result is None


def test_export_name_after_extended_headers_closes():
    client = Client()
    client.ack(Opt.EXTENDED_HEADERS)
    client.send_raw(build_option(Opt.EXPORT_NAME, b"disk"))
    assert client.machine.state is State.CLOSED
    assert client.incoming == b""


# --- ABORT, LIST, STARTTLS, unknown options -------------------------------------------------------


@pytest.mark.parametrize("payload", [b"", b"why"])
def test_abort_is_acknowledged_then_closed(payload):
    client = Client()
    assert client.send(Opt.ABORT, payload) == [OptionReply(Opt.ABORT, Rep.ACK, b"")]
    assert client.machine.state is State.CLOSED
    assert client.send(Opt.LIST) == []


def test_list_gives_names_and_descriptions_in_order():
    client = Client()
    assert [parse_server(reply.payload) for reply in client.ack(Opt.LIST)] == [("disk", "the disk"), ("", "")]


def test_list_golden_vector():
    client = Client(replace(PLAIN, name="a", description="b"))
    client.machine.receive(bytes.fromhex("49484156454f5054 00000003 00000000"))
    assert client.drain() == bytes.fromhex(
        "0003e889045565a9 00000003 00000002 00000006 00000001 61 620003e889045565a9 00000003 00000001 00000000"
    )


def test_starttls_is_refused_by_policy():
    assert Client().refusal(Opt.STARTTLS) == (RepError.POLICY, "TLS not configured")


def test_the_last_refusal_is_remembered_but_not_that_of_an_unknown_option():
    client = Client()
    assert client.machine.refused == ""
    client.refusal(99)
    assert client.machine.refused == ""
    client.refusal(Opt.INFO, build_info("dis"))
    client.refusal(99)
    assert client.machine.refused == "export 'dis' not present"


@pytest.mark.parametrize("option", [0, 4, 12, 99, 0xFFFFFFFF])
@pytest.mark.parametrize("payload", [b"", b"x" * 100_000])
def test_unknown_options_are_refused_and_skipped(option, payload):
    assert Client().refusal(option, payload) == (RepError.UNSUP, f"Unsupported option {option} (<unknown>)")


@pytest.mark.parametrize(
    ("option", "label"),
    [
        (Opt.LIST, "list"),
        (Opt.STARTTLS, "starttls"),
        (Opt.STRUCTURED_REPLY, "structured reply"),
        (Opt.EXTENDED_HEADERS, "extended headers"),
    ],
)
def test_options_without_payload_refuse_one(option, label):
    expected = (RepError.INVALID, f"option '{label}' has unexpected length")
    assert Client().refusal(option, b"x") == expected
    assert Client().refusal(option, b"x" * 1_000_000) == expected


# --- Limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [Opt.LIST, Opt.INFO, Opt.SET_META_CONTEXT, Opt.EXPORT_NAME, 99])
def test_an_option_over_32_mib_closes(option):
    client = Client()
    assert client.send_raw(OPTION.pack(OPTION_MAGIC, option, MAX_OPTION + 1)) == []
    assert client.machine.state is State.CLOSED
    assert client.machine.closed_reason == "len (33554433) is larger than max len (33554432)"


def test_oversized_payload_is_skipped_not_buffered():
    client = Client()
    total = MAX_OPTION
    client.send_raw(OPTION.pack(OPTION_MAGIC, 99, total))
    block = bytes(1 << 20)
    for _ in range(total // len(block) - 1):
        assert client.send_raw(block) == []
        assert len(client.machine._incoming) == 0
    (reply,) = client.send_raw(block)
    assert reply.kind == RepError.UNSUP


@pytest.mark.parametrize("option", [Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT])
def test_too_many_queries_are_too_big(option):
    queries = ["x" * 1000] * 300
    error, text = Client().refusal(option, build_queries("disk", queries))
    assert error is RepError.TOO_BIG
    assert str(MAX_META_OPTION) in text


@pytest.mark.parametrize("option", [Opt.INFO, Opt.GO])
def test_info_longer_than_its_count_can_say_is_invalid(option):
    name = option.name.lower()
    longest = build_info("n" * MAX_STRING, [7] * 0xFFFF)
    assert len(longest) == MAX_INFO_OPTION
    assert Client().refusal(option, longest)[0] is RepError.UNKNOWN
    assert Client().refusal(option, longest + b"x") == (
        RepError.INVALID,
        f"option '{name}' has unexpected length",
    )


def test_a_flood_of_options_does_not_grow_the_output():
    """One packet of LISTs, amplified by long descriptions: parsing waits until the transport has sent."""
    loud = replace(PLAIN, description="d" * MAX_STRING)
    client = Client(*[replace(loud, name=f"e{i}") for i in range(10)])
    one_reply = 10 * (20 + 4 + 2 + MAX_STRING) + 20
    client.machine.receive(build_option(Opt.LIST) * 1000 + build_option(Opt.ABORT))
    sizes = []
    while size := client.machine.outgoing_size:
        sizes.append(size)
        assert len(client.machine.outgoing()) == size
    assert max(sizes) < MAX_OUTGOING + one_reply
    assert sum(sizes) == 1000 * one_reply + 20
    assert client.machine.state is State.CLOSED


def test_nothing_is_parsed_while_replies_wait():
    client = Client(replace(PLAIN, description="d" * MAX_STRING))
    client.machine.receive(build_option(Opt.LIST) * 200)
    waiting = client.machine.outgoing_size
    client.machine.receive(build_option(Opt.ABORT))
    assert client.machine.outgoing_size == waiting
    assert client.machine.state is State.OPTION
    client.drain()
    assert client.machine.state is State.CLOSED


# --- INFO and GO ----------------------------------------------------------------------------------


def test_info_sends_description_sizes_and_export_and_stays_in_negotiation():
    client = Client()
    infos = client.infos(Opt.INFO, build_info("disk", [Info.BLOCK_SIZE]))
    assert infos == [
        InfoText(Info.DESCRIPTION, "the disk"),
        BlockSize(512, 4096, 32 << 20),
        ExportSize(1 << 30, WRITABLE),
    ]
    assert client.machine.state is State.OPTION
    assert client.machine.result is None


def test_go_golden_vector():
    client = Client(replace(PLAIN, name="x"))
    client.machine.receive(bytes.fromhex("49484156454f5054 00000007 00000007 00000001 78 0000"))
    assert client.drain() == bytes.fromhex(
        "0003e889045565a9 00000007 00000003 0000000e 0003 00000001 00001000 02000000"
        "0003e889045565a9 00000007 00000003 0000000c 0000 0000000000000400 050f"
        "0003e889045565a9 00000007 00000001 00000000"
    )
    assert client.machine.state is State.DONE


def test_name_comes_only_on_request_and_first():
    client = Client()
    infos = client.infos(Opt.GO, build_info("disk", [Info.BLOCK_SIZE, Info.NAME]))
    assert infos[0] == InfoText(Info.NAME, "disk")
    assert [type(info) for info in infos[1:]] == [InfoText, BlockSize, ExportSize]


def test_unknown_requests_are_ignored():
    client = Client()
    assert len(client.infos(Opt.GO, build_info("", [4, 99, 0xFFFF]))) == 2


@pytest.mark.parametrize(
    ("option", "kinds", "minimum"),
    [(Opt.GO, [], 1), (Opt.GO, [Info.BLOCK_SIZE], 512), (Opt.INFO, [Info.BLOCK_SIZE], 512)],
)
def test_minimum_block_size_depends_on_who_asks(option, kinds, minimum):
    infos = Client().infos(option, build_info("disk", kinds))
    assert BlockSize(minimum, 4096, 32 << 20) in infos


def test_info_that_does_not_ask_for_sizes_it_needs_is_told_so():
    *replies, last = Client().send(Opt.INFO, build_info("disk"))
    assert BlockSize(512, 4096, 32 << 20) in [parse_info(reply.payload) for reply in replies]
    assert (last.kind, last.text) == (
        RepError.BLOCK_SIZE_REQD,
        "request NBD_INFO_BLOCK_SIZE to use this export",
    )
    assert Client().ack(Opt.INFO, build_info("")), "an export of any alignment has nothing to require"


@pytest.mark.parametrize("option", [Opt.INFO, Opt.GO, Opt.LIST_META_CONTEXT])
def test_unknown_exports(option):
    def payload(name):
        return build_queries(name) if option is Opt.LIST_META_CONTEXT else build_info(name)

    client = Client()
    assert client.refusal(option, payload("dis")) == (RepError.UNKNOWN, "export 'dis' not present")
    long = "n" * 79 + "\u00e9" * 10
    assert client.refusal(option, payload(long)) == (
        RepError.UNKNOWN,
        f"export '{'n' * 79}...' not present",
    )
    assert client.refusal(option, payload("a\x1b[2J\n")) == (
        RepError.UNKNOWN,
        "export 'a?[2J?' not present",
    )


MALFORMED = [
    (b"", "Inconsistent lengths in option {}"),
    (b"\0\0\0", "Inconsistent lengths in option {}"),
    (struct.pack(">I", 5) + b"disk", "Inconsistent lengths in option {}"),
    (struct.pack(">I", 4) + b"disk", "Inconsistent lengths in option {}"),
    (struct.pack(">I", MAX_STRING + 1) + b"x" * 5000, "Invalid name length: 4097"),
    (struct.pack(">I", 0xFFFFFFFF), "Invalid name length: 4294967295"),
    (struct.pack(">I", 5) + b"di\0sk" + bytes(4), "Unexpected embedded NUL in option {}"),
    (struct.pack(">I", 2) + b"\xc3\x28" + bytes(4), "Name is not valid UTF-8 in option {}"),
]


@pytest.mark.parametrize(("payload", "text"), MALFORMED)
@pytest.mark.parametrize("option", [Opt.INFO, Opt.GO, Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT])
def test_malformed_names_are_invalid(option, payload, text):
    client = Client()
    client.ack(Opt.STRUCTURED_REPLY)
    label = option.name.lower().replace("_", " ")
    assert client.refusal(option, payload) == (RepError.INVALID, text.format(label))


@pytest.mark.parametrize("option", [Opt.INFO, Opt.GO])
def test_payload_of_info_must_be_consumed_exactly(option):
    client = Client()
    label = option.name.lower()
    good = build_info("disk", [Info.NAME])
    expected = (RepError.INVALID, f"option '{label}' has unexpected length")
    assert client.refusal(option, good + b"\0") == expected
    assert client.refusal(option, good + good) == expected
    inconsistent = (RepError.INVALID, f"Inconsistent lengths in option {label}")
    assert client.refusal(option, good[:-1]) == inconsistent
    assert client.refusal(option, good[:-2]) == inconsistent
    assert client.machine.result is None


def test_the_longest_name_is_legal():
    name = "\u20ac" * (MAX_STRING // 3) + "x"
    client = Client(replace(PLAIN, name=name))
    client.ack(Opt.GO, build_info(name))
    assert client.machine.result.export == name


def test_go_leaves_what_follows_to_transmission():
    client = Client()
    client.send_raw(build_option(Opt.GO, build_info("")) + build_option(Opt.LIST))
    assert client.machine.state is State.DONE
    assert client.machine.leftover == build_option(Opt.LIST)
    client.machine.receive(b"more")
    assert client.machine.leftover == build_option(Opt.LIST) + b"more"


# --- Modes and flags (3.3) ------------------------------------------------------------------------


def test_structured_reply_is_negotiated_once():
    client = Client()
    client.ack(Opt.STRUCTURED_REPLY)
    assert client.refusal(Opt.STRUCTURED_REPLY) == (
        RepError.INVALID,
        "structured reply already negotiated",
    )
    client.ack(Opt.GO, build_info(""))
    assert client.machine.result.mode is Mode.STRUCTURED


def test_extended_headers_imply_structured_replies_and_come_once():
    client = Client()
    client.ack(Opt.STRUCTURED_REPLY)
    client.ack(Opt.EXTENDED_HEADERS)
    assert client.refusal(Opt.EXTENDED_HEADERS) == (
        RepError.INVALID,
        "extended headers already negotiated",
    )
    assert client.refusal(Opt.STRUCTURED_REPLY) == (
        RepError.EXT_HEADER_REQD,
        "extended headers already negotiated",
    )
    client.ack(Opt.GO, build_info(""))
    assert client.machine.result.mode is Mode.EXTENDED


@pytest.mark.parametrize(
    ("mode", "with_contexts", "info_flags", "go_flags"),
    [
        (None, False, 0xD6D, 0xD6D),
        (Opt.STRUCTURED_REPLY, False, 0xDED, 0xDED),
        (Opt.STRUCTURED_REPLY, True, 0xDED, 0xDED),
        (Opt.EXTENDED_HEADERS, False, 0x1DED, 0xDED),
        (Opt.EXTENDED_HEADERS, True, 0x1DED, 0x1DED),
    ],
)
def test_flags_say_what_was_negotiated(mode, with_contexts, info_flags, go_flags):
    client = Client()
    if mode is not None:
        client.ack(mode)
    if with_contexts:
        assert client.contexts(Opt.SET_META_CONTEXT, "disk", "base:allocation")
    request = build_info("disk", [Info.BLOCK_SIZE])
    assert client.infos(Opt.INFO, request)[-1] == ExportSize(1 << 30, info_flags)
    assert client.infos(Opt.GO, request)[-1] == ExportSize(1 << 30, go_flags)
    assert client.machine.result.flags == go_flags


# --- Meta contexts (4.2) --------------------------------------------------------------------------


def test_list_meta_context_needs_no_structured_replies_and_has_no_ids():
    expected = [(0, text) for _, text in DISK.contexts]
    assert Client().contexts(Opt.LIST_META_CONTEXT, "disk") == expected


QUERIES = [
    (["base:"], [ALLOCATION], []),
    (["qemu:"], [DEPTH, *BITMAPS], []),
    (["qemu:dirty-bitmap:"], [*BITMAPS], []),
    (["base:allocation"], [ALLOCATION], [ALLOCATION]),
    (["qemu:dirty-bitmap:b1", "base:allocation"], [ALLOCATION, BITMAPS[1]], [ALLOCATION, BITMAPS[1]]),
    (["base:allocation", "base:allocation"], [ALLOCATION], [ALLOCATION]),
    (["qemu:", "base:allocation"], [*DISK.contexts], [ALLOCATION]),
    (["qemu:allocation-depth"], [DEPTH], [DEPTH]),
    (["qemu:dirty-bitmap:b"], [], []),
    (["base", "", ":", "x:", "x:y", "base:allocationx", "BASE:allocation"], [], []),
    (["y" * (MAX_STRING + 1), "base:allocation"], [ALLOCATION], [ALLOCATION]),
]


@pytest.mark.parametrize(("queries", "listed", "selected"), QUERIES)
def test_queries(queries, listed, selected):
    client = Client()
    client.ack(Opt.STRUCTURED_REPLY)
    assert client.contexts(Opt.LIST_META_CONTEXT, "disk", *queries) == [(0, text) for _, text in listed]
    assert client.contexts(Opt.SET_META_CONTEXT, "disk", *queries) == selected
    client.ack(Opt.GO, build_info("disk"))
    assert client.machine.result.contexts == tuple(selected)


def test_a_query_that_is_not_utf8_matches_nothing():
    payload = build_queries("disk", ["base:allocation", "??"]).replace(b"??", b"\xff\0")
    client = Client()
    client.ack(Opt.STRUCTURED_REPLY)
    assert len(client.ack(Opt.SET_META_CONTEXT, payload)) == 1


def test_no_queries_select_nothing():
    client = Client()
    client.ack(Opt.STRUCTURED_REPLY)
    client.contexts(Opt.SET_META_CONTEXT, "disk", "base:allocation")
    assert client.contexts(Opt.SET_META_CONTEXT, "disk") == []
    client.ack(Opt.GO, build_info("disk"))
    assert client.machine.result.contexts == ()


def test_set_meta_context_needs_structured_replies():
    assert Client().refusal(Opt.SET_META_CONTEXT, build_queries("disk", ["base:allocation"])) == (
        RepError.INVALID,
        "request option 'set meta context' when structured reply is not negotiated",
    )


@pytest.mark.parametrize(
    "payload",
    [
        build_queries("nothing", ["base:allocation"]),
        build_queries("disk", ["base:allocation"]) + b"\0",
        build_queries("disk", ["base:allocation"])[:-1],
        build_queries("disk", ["x" * 1000] * 300),
        b"",
    ],
)
def test_a_failed_selection_replaces_the_one_before(payload):
    client = Client()
    client.ack(Opt.EXTENDED_HEADERS)
    client.contexts(Opt.SET_META_CONTEXT, "disk", "base:allocation")
    client.refusal(Opt.SET_META_CONTEXT, payload)
    client.ack(Opt.GO, build_info("disk"))
    assert client.machine.result.contexts == ()
    assert client.machine.result.flags == 0xDED


@pytest.mark.parametrize("option", [Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT])
def test_payload_of_queries_must_be_consumed_exactly(option):
    client = Client()
    client.ack(Opt.STRUCTURED_REPLY)
    label = option.name.lower().replace("_", " ")
    good = build_queries("disk", ["base:allocation"])
    unexpected = (RepError.INVALID, f"option '{label}' has unexpected length")
    inconsistent = (RepError.INVALID, f"Inconsistent lengths in option {label}")
    assert client.refusal(option, good + b"\0") == unexpected
    assert client.refusal(option, good[:-1]) == inconsistent
    assert client.refusal(option, build_queries("disk")[:-4] + b"\xff" * 4) == inconsistent
    assert client.refusal(option, build_queries("disk")[:-4] + b"\0\0\0\1" + b"\xff" * 4) == inconsistent


def test_contexts_of_another_export_are_dropped():
    client = Client()
    client.ack(Opt.EXTENDED_HEADERS)
    assert client.contexts(Opt.SET_META_CONTEXT, "disk", "base:allocation")
    assert client.infos(Opt.GO, build_info(""))[-1] == ExportSize(1024, READ_ONLY | TransmissionFlag.SEND_DF)
    assert client.machine.result.contexts == ()


def test_info_about_another_export_keeps_the_selection():
    client = Client()
    client.ack(Opt.STRUCTURED_REPLY)
    client.contexts(Opt.SET_META_CONTEXT, "disk", "base:allocation")
    client.ack(Opt.INFO, build_info(""))
    client.refusal(Opt.GO, build_info("nothing"))
    client.ack(Opt.GO, build_info("disk"))
    assert client.machine.result.contexts == (ALLOCATION,)


def test_contexts_that_have_gone_meanwhile_are_dropped():
    client = Client()
    client.ack(Opt.STRUCTURED_REPLY)
    client.contexts(Opt.SET_META_CONTEXT, "disk", *[text for _, text in BITMAPS])
    client.shelf.exports[0] = replace(DISK, contexts=(ALLOCATION, (2, "qemu:dirty-bitmap:b1")))
    client.ack(Opt.GO, build_info("disk"))
    assert client.machine.result.contexts == ()


# --- Laws -----------------------------------------------------------------------------------------


def test_every_state_can_be_left_or_is_final():
    final = {State.DONE, State.CLOSED}
    assert {state for state, _ in TRANSITIONS} == set(State) - final
    assert set(TRANSITIONS.values()) == set(State) - {State.CLIENT_FLAGS}


NAMES = st.sampled_from(["disk", "", "nothing", "\u00e9", "d\0"])
TEXTS = st.sampled_from(["base:", "base:allocation", "qemu:", "qemu:dirty-bitmap:b0", "x:y", ""])
NUMBERS = st.one_of(st.sampled_from([*Opt, 4, 0xFFFFFFFF]), st.integers(0, 20))
OPTIONS = st.one_of(
    st.builds(build_option, NUMBERS, st.binary(max_size=40)),
    st.builds(build_option, NUMBERS),
    st.builds(
        build_option,
        st.sampled_from([Opt.INFO, Opt.GO]),
        st.builds(build_info, NAMES, st.lists(st.integers(0, 4), max_size=4)),
    ),
    st.builds(
        build_option,
        st.sampled_from([Opt.SET_META_CONTEXT, Opt.LIST_META_CONTEXT]),
        st.builds(build_queries, NAMES, st.lists(TEXTS, max_size=4)),
    ),
    st.builds(build_option, st.just(Opt.EXPORT_NAME), st.builds(str.encode, NAMES)),
)
SESSIONS = st.tuples(
    st.sampled_from([build_flags(flags) for flags in (3, 3, 3, 1, 0, 7)]), st.lists(OPTIONS, max_size=8)
).map(lambda parts: parts[0] + b"".join(parts[1]))


def converse(pieces):
    machine = Handshake(Shelf([DISK, PLAIN]))
    sent = b""
    for piece in pieces:
        machine.receive(piece)
        while data := machine.outgoing():
            sent += data
    return sent, machine.state, machine.result, machine.closed_reason, machine.leftover


@given(SESSIONS)
@settings(max_examples=300, deadline=None)
def test_byte_at_a_time_equals_whole(session):
    whole = converse([session])
    assert converse(session[i : i + 1] for i in range(len(session))) == whole
    half = len(session) // 2
    assert converse([session[:half], memoryview(session)[half:]]) == whole


@given(st.lists(st.one_of(st.binary(max_size=60), SESSIONS, OPTIONS), max_size=6))
@settings(max_examples=300, deadline=None)
def test_junk_gives_replies_or_a_closed_state_and_never_an_exception(pieces):
    sent, state, result, reason, _ = converse(pieces)
    answers = bytearray(sent[machine_module.GREETING.size :])
    assert (state is State.DONE) == (result is not None)
    assert (state is State.CLOSED) == bool(reason)
    while (reply := take_option_reply(answers) if answers[:2] == b"\0\3" else None) is not None:
        assert reply.kind in {*Rep, *RepError}
    if answers:
        assert state is State.DONE, "only the answer to EXPORT_NAME is not an option reply"


# --- TLS ------------------------------------------------------------------------------------------


class SecureClient(Client):
    """A client of a server that requires TLS."""

    def __init__(self, *exports, flags=BOTH):
        self.shelf = Shelf(list(exports) or [DISK, PLAIN])
        self.machine = Handshake(self.shelf, tls_required=True)
        self.incoming = bytearray(self.drain())
        take_greeting(self.incoming)
        self.machine.receive(build_flags(flags))

    def secure(self, denial=""):
        self.ack(Opt.STARTTLS)
        assert self.machine.state is State.STARTTLS
        self.machine.secured(denial)


@pytest.mark.parametrize("option", [*set(Opt) - {Opt.EXPORT_NAME, Opt.ABORT, Opt.STARTTLS}, 4, 99])
def test_before_tls_nothing_is_answered_or_remembered(option):
    client = SecureClient()
    text = f"Option {int(option):#x} not permitted before TLS"
    for payload in (b"", build_info("disk"), bytes(5000)):
        (reply,) = client.send(option, payload)
        assert (reply.kind, reply.text) == (RepError.TLS_REQD, text)
        assert client.machine.state is State.OPTION
    client.secure()
    client.send(Opt.GO, build_info("disk"))
    assert client.machine.result.mode is Mode.SIMPLE
    assert client.machine.result.contexts == ()


def test_before_tls_an_export_name_ends_the_session():
    client = SecureClient()
    assert client.send(Opt.EXPORT_NAME, b"disk") == []
    assert client.machine.state is State.CLOSED
    assert client.machine.closed_reason == "Option 0x1 not permitted before TLS"


def test_before_tls_abort_is_refused_and_obeyed():
    client = SecureClient()
    (reply,) = client.send(Opt.ABORT)
    assert reply.kind == RepError.TLS_REQD
    assert client.machine.state is State.CLOSED


def test_tls_begins_once():
    client = SecureClient()
    assert client.send(Opt.STARTTLS, b"?")[0].kind == RepError.INVALID
    client.secure()
    assert client.refusal(Opt.STARTTLS) == (RepError.INVALID, "TLS already enabled")
    assert client.ack(Opt.LIST)


@pytest.mark.parametrize("at_once", [True, False])
def test_nothing_that_came_before_tls_is_taken_for_something_secure(at_once):
    """An attacker between the two must not be able to slip in an option in the clear (RFC 3207, section 6)."""
    client = SecureClient()
    starttls, slipped_in = build_option(Opt.STARTTLS), build_option(Opt.LIST)
    if at_once:
        client.send_raw(starttls + slipped_in)
    else:
        client.send_raw(starttls)
        client.send_raw(slipped_in)
    assert client.machine.state is State.CLOSED
    assert client.machine.closed_reason == "the client did not wait for the answer to STARTTLS"


def test_whoever_is_denied_is_told_and_gets_nothing():
    client = SecureClient()
    client.secure("'CN=mallory' is not allowed to use this server")
    for option, payload in ((Opt.LIST, b""), (Opt.STRUCTURED_REPLY, b""), (Opt.GO, build_info("disk")), (99, b"")):
        (reply,) = client.send(option, payload)
        assert (reply.kind, reply.text) == (RepError.POLICY, "'CN=mallory' is not allowed to use this server")
    assert client.send(Opt.EXPORT_NAME, b"disk") == []
    assert client.machine.state is State.CLOSED
