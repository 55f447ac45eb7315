"""What is accepted, and the sentences that say why something is not."""

import enum
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkferry.errors import Error, ErrorKind
from blkferry.schema import model
from blkferry.schema.block import BlockdevOptions, BlockdevRef, BlockResize
from blkferry.schema.char import ChardevAdd, ChardevNull, ChardevSocket
from blkferry.schema.export import (
    BlockExportDel,
    BlockExportInfo,
    BlockExportOptions,
    BlockExportOptionsNbd,
    BlockExportRemoveMode,
    NbdServerOptions,
    NbdServerStart,
)
from blkferry.schema.qapi import Doc, Int32, Named, Null, Size, Struct, Uint16, Uint64, branch, union
from blkferry.schema.qom import IothreadProperties, ObjectOptions
from blkferry.schema.registry import COMMANDS
from blkferry.schema.sockets import (
    SocketAddress,
    SocketAddressFd,
    SocketAddressInet,
    SocketAddressLegacy,
    SocketAddressUnix,
)
from blkferry.schema.visit import MAX_DEPTH, MAX_ECHO, dump, visit

EXPORT = {"type": "nbd", "id": "e", "node-name": "n"}


class Everything(Struct):
    """One member of each type that no command has yet."""

    text: Annotated[str | None, Doc("text")] = None
    narrow: Annotated[Uint16 | None, Doc("16 bits")] = None
    signed: Annotated[Int32 | None, Doc("32 bits")] = None
    plain: Annotated[int | None, Doc("64 bits")] = None
    wide: Annotated[Uint64 | None, Doc("unsigned 64 bits")] = None
    size: Annotated[Size | None, Doc("bytes")] = None
    flag: Annotated[bool | None, Doc("a switch")] = None
    backing: Annotated[str | Null | None, Named("StrOrNull"), Doc("explicit null")] = None
    names: Annotated[list[str] | None, Doc("a list")] = None
    inner: Annotated["Everything | None", Doc("itself")] = None


@union("kind")
class Shape(Struct):
    """A union of the tests' own."""

    kind: Annotated[str, Doc("the kind")]


@branch
class Square(Shape):
    """A branch."""

    kind: Literal["square"] = "square"
    side: Annotated[int, Doc("length")]
    within: Annotated[str | Shape | None, Named("ShapeRef"), Doc("what holds it")] = None


def refusal(form, value, **how):
    with pytest.raises(Error) as caught:
        visit(form, value, **how)
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT
    return caught.value


@pytest.mark.parametrize(
    ("form", "value", "message"),
    [
        (BlockExportDel, {}, "Parameter 'id' is missing"),
        (BlockExportDel, {"id": 1}, "Invalid parameter type for 'id', expected: string"),
        (BlockExportDel, {"id": None}, "Invalid parameter type for 'id', expected: string"),
        (BlockExportDel, {"id": "e", "mode": "foo"}, "Parameter 'mode' does not accept value 'foo'"),
        (BlockExportDel, {"id": "e", "foo": 1}, "Parameter 'foo' is unexpected"),
        (BlockExportOptions, {"id": "e"}, "Parameter 'type' is missing"),
        (BlockExportOptions, {"type": "foo"}, "Parameter 'type' does not accept value 'foo'"),
        (BlockExportOptions, {"type": 5}, "Invalid parameter type for 'type', expected: string"),
        (BlockExportOptions, EXPORT | {"node_name": "n"}, "Parameter 'node_name' is unexpected"),
        (
            BlockExportOptions,
            EXPORT | {"writable": "on"},
            "Invalid parameter type for 'writable', expected: boolean",
        ),
        (
            BlockExportOptions,
            EXPORT | {"iothread": 1},
            "Invalid parameter type for 'iothread', expected: BlockExportIothreads",
        ),
        (
            BlockExportOptions,
            EXPORT | {"iothread": ["a", 1]},
            "Invalid parameter type for 'iothread[1]', expected: string",
        ),
        (NbdServerOptions, {"max-connections": 1.0}, "Parameter 'max-connections' expects uint64"),
        (NbdServerOptions, {"max-connections": "1"}, "Parameter 'max-connections' expects uint64"),
        (NbdServerOptions, {"max-connections": True}, "Parameter 'max-connections' expects uint64"),
        (NbdServerOptions, {"max-connections": 2**32}, "Parameter 'max-connections' expects uint32_t"),
        (NbdServerOptions, {"max-connections": -1}, "Parameter 'max-connections' expects uint32_t"),
        (NbdServerOptions, {"addr": "x"}, "Invalid parameter type for 'addr', expected: object"),
        (NbdServerOptions, {"addr": {}}, "Parameter 'addr.type' is missing"),
        (NbdServerOptions, {"addr": {"type": "unix"}}, "Parameter 'addr.path' is missing"),
        (NbdServerOptions, {"addr": {"type": "inet", "host": ""}}, "Parameter 'addr.port' is missing"),
        (NbdServerOptions, {"addr": {"type": "tcp"}}, "Parameter 'type' does not accept value 'tcp'"),
        (
            NbdServerOptions,
            {"addr": {"type": "inet", "host": "", "port": "1", "to": 65536}},
            "Parameter 'to' expects uint16_t",
        ),
        (NbdServerStart, {"addr": {"type": "unix"}}, "Parameter 'addr.data' is missing"),
        (NbdServerStart, {"addr": {"type": "unix", "data": {}}}, "Parameter 'addr.data.path' is missing"),
        (
            NbdServerStart,
            {"addr": {"type": "unix", "data": {"path": "/s", "foo": 1}}},
            "Parameter 'addr.data.foo' is unexpected",
        ),
        (
            NbdServerStart,
            {"addr": {"type": "unix", "path": "/s", "data": {"path": "/s"}}},
            "Parameter 'addr.path' is unexpected",
        ),
        (
            NbdServerStart,
            {"addr": {"type": "unix", "data": "/s"}},
            "Invalid parameter type for 'addr.data', expected: object",
        ),
        (BlockResize, {"size": "1"}, "Invalid parameter type for 'size', expected: integer"),
        (BlockResize, {"size": 2**63}, "Parameter 'size' expects int64_t"),
        (
            ObjectOptions,
            {"qom-type": "iothread", "id": "i", "poll-max-ns": -1},
            "poll-max-ns value must be in range [0, 9223372036854775807]",
        ),
        (Everything, {"signed": 2**31}, "Parameter 'signed' expects int32_t"),
        (Everything, {"signed": "x"}, "Invalid parameter type for 'signed', expected: integer"),
        (Everything, {"wide": 10**5000}, "Parameter 'wide' expects uint64_t"),
        (Everything, {"backing": 1}, "Invalid parameter type for 'backing', expected: StrOrNull"),
        (Everything, {"names": "x"}, "Invalid parameter type for 'names', expected: array"),
        (
            Everything,
            {"inner": {"inner": {"flag": 1}}},
            "Invalid parameter type for 'inner.inner.flag', expected: boolean",
        ),
        (Square, {"kind": "circle", "side": 1}, "Parameter 'kind' does not accept value 'circle'"),
    ],
)
def test_json_refusals_are_worded_as_qemu_words_them(form, value, message):
    assert str(refusal(form, value)) == message


@pytest.mark.parametrize(
    ("form", "value", "message"),
    [
        (BlockExportOptions, EXPORT | {"writable": "maybe"}, "Parameter 'writable' expects 'on' or 'off'"),
        (BlockExportOptions, EXPORT | {"writable": "ON"}, "Parameter 'writable' expects 'on' or 'off'"),
        (BlockExportOptions, EXPORT | {"id": {"a": "b"}}, "Parameters 'id.*' are unexpected"),
        (Everything, {"narrow": "1k"}, "Parameter 'narrow' expects integer"),
        (Everything, {"narrow": "65536"}, "Parameter 'narrow' expects uint16_t"),
        (Everything, {"size": "4KiB"}, "Parameter 'size' expects size"),
        (Everything, {"size": "1.5"}, "Parameter 'size' expects size"),
        (Everything, {"size": "16E"}, "Parameter 'size' expects size"),
        (Everything, {"size": "1e3"}, "Parameter 'size' expects size"),
        (Everything, {"size": ["1"]}, "Parameters 'size.*' are unexpected"),
        (Everything, {"narrow": "9" * 5000}, "Parameter 'narrow' expects integer"),
        (Everything, {"inner": {"narrow": "x"}}, "Parameter 'inner.narrow' expects integer"),
        (Everything, {"names": ["a", {}]}, "Parameters 'names.1.*' are unexpected"),
    ],
)
def test_keyval_refusals_are_worded_as_qemu_words_them(form, value, message):
    assert str(refusal(form, value, keyval=True)) == message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("on", True), ("yes", True), ("true", True), ("y", True)),
        *(("off", False), ("no", False), ("false", False), ("n", False)),
    ],
)
def test_keyval_switches(text, value):
    assert visit(Everything, {"flag": text}, keyval=True).flag is value


@pytest.mark.parametrize(
    ("text", "value"), [("10", 10), ("0x1F", 31), ("017", 15), ("0", 0), (" 5", 5), ("+5", 5), ("-5", -5)]
)
def test_keyval_integers(text, value):
    assert visit(Everything, {"plain": text}, keyval=True).plain == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("512", 512), ("4k", 4096), ("4K", 4096), ("0.5M", 1 << 19), ("3b", 3), ("1.5G", 3 << 29)),
        *(("0x10", 16), ("0.3k", 307), ("2T", 2 << 40), ("2P", 2 << 50), ("15E", 15 << 60), (".5k", 512)),
    ],
)
def test_keyval_sizes(text, value):
    assert visit(Everything, {"size": text}, keyval=True).size == value


def test_hints_say_what_would_be_right():
    assert refusal(BlockExportOptions, EXPORT | {"writeable": True}).hint.startswith("Did you mean 'writable'?")
    assert refusal(BlockExportOptions, {"type": "ndb"}).hint.startswith("Did you mean 'nbd'? Possible: ")
    assert refusal(BlockExportDel, {}).hint == "Needed: the export to remove."
    misspelled = {"type": "nbd", "id": "e", "node_name": "n"}
    assert refusal(BlockExportOptions, misspelled).hint == "Was 'node_name' meant to be it?"
    nested = {"addr": {"type": "inet", "host": "", "port": "1", "to": -1}}
    assert refusal(NbdServerOptions, nested).hint == "'addr.to' must be between 0 and 65535."
    assert refusal(BlockExportDel, {"id": "e", "mode": "s"}).hint == "Possible: safe, hard."


def test_errors_name_their_parameter_in_full_for_programs():
    assert refusal(NbdServerOptions, {"addr": {"type": "tcp"}}).facts == {"parameter": "addr.type"}


def test_an_echoed_value_is_cut():
    message = str(refusal(BlockExportDel, {"id": "e", "mode": "x" * 100_000}))
    assert len(message) < MAX_ECHO + 100


@pytest.mark.parametrize("form", [SocketAddress, SocketAddressLegacy])
@pytest.mark.parametrize(
    "value",
    [{"type": "unix", "path": "/s", "tight": False}, {"type": "unix", "data": {"path": "/s", "tight": False}}],
)
def test_flat_and_legacy_addresses_are_one_value(form, value):
    assert visit(form, value) == SocketAddressUnix(path="/s", tight=False)


def test_an_address_member_whose_wire_name_is_a_python_type():
    assert visit(SocketAddress, {"type": "fd", "str": "3"}) == SocketAddressFd(fd="3")
    assert dump(SocketAddressFd(fd="3")) == {"type": "fd", "str": "3"}


def test_a_wrapped_branch_without_required_members_may_leave_data_out():
    wanted = ChardevAdd(id="c", backend=ChardevNull())
    assert visit(ChardevAdd, {"id": "c", "backend": {"type": "null"}}) == wanted
    assert visit(ChardevAdd, {"id": "c", "backend": {"type": "null", "data": {}}}) == wanted


def test_defaults_are_those_of_the_protocol():
    server = visit(NbdServerStart, {"addr": {"type": "inet", "data": {"host": "h", "port": "1"}}})
    assert (server.max_connections, server.handshake_max_seconds) == (0, 10)
    assert server.addr == SocketAddressInet(host="h", port="1")
    export = visit(BlockExportOptions, EXPORT)
    assert export == BlockExportOptionsNbd(id="e", node_name="n")
    assert (export.writable, export.writethrough, export.iothread) == (False, False, None)
    iothread = visit(ObjectOptions, {"qom-type": "iothread", "id": "i"})
    assert isinstance(iothread, IothreadProperties)
    assert (iothread.poll_max_ns, iothread.thread_pool_max) == (32768, 64)
    chardev = visit(
        ChardevAdd,
        {"id": "c", "backend": {"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": "/s"}}}}},
    )
    assert chardev.backend == ChardevSocket(addr=SocketAddressUnix(path="/s"), server=True, wait=False)


def test_null_is_not_absence():
    assert visit(Everything, {"backing": None}).backing is Null.NULL
    assert visit(Everything, {}).backing is None
    assert dump(Everything(backing=Null.NULL)) == {"backing": None}


def test_an_iothread_is_one_name_or_a_list():
    assert visit(BlockExportOptions, EXPORT | {"iothread": "a"}).iothread == "a"
    assert visit(BlockExportOptions, EXPORT | {"iothread": ["a"]}).iothread == ["a"]
    assert visit(BlockExportOptions, EXPORT | {"iothread": "a"}, keyval=True).iothread == "a"


def test_alternates_choose_by_json_type():
    inner = {"kind": "square", "side": 1}
    square = visit(Shape, {"kind": "square", "side": 2, "within": inner})
    assert square == Square(side=2, within=Square(side=1))
    assert visit(BlockdevRef, "node") == "node"
    assert str(refusal(BlockdevRef, 1, path="file")) == "Invalid parameter type for 'file', expected: BlockdevRef"
    assert str(refusal(BlockdevRef, {}, path="file")) == "Parameter 'file.driver' is missing"


def test_nesting_is_bounded():
    def nested(levels):
        value = {}
        for _ in range(levels):
            value = {"inner": value}
        return value

    assert visit(Everything, nested(MAX_DEPTH)) is not None
    assert str(refusal(Everything, nested(MAX_DEPTH + 1))) == "Parameter nesting depth limit exceeded"
    assert str(refusal(Everything, nested(100_000))) == "Parameter nesting depth limit exceeded"


def test_dump_keeps_the_tag_and_leaves_out_defaults():
    assert dump(BlockExportOptionsNbd(id="e", node_name="n")) == EXPORT
    assert dump(BlockExportDel(id="e", mode=BlockExportRemoveMode.HARD)) == {"id": "e", "mode": "hard"}
    assert dump([BlockExportInfo(id="e", type="nbd", node_name="n", shutting_down=False, clients=[])]) == [
        {"id": "e", "type": "nbd", "node-name": "n", "shutting-down": False, "clients": []}
    ]


# -- every declared type, filled from its own model --------------------------------------------------------------

NAMES = st.text(max_size=5)


def wire_values(type_):
    """A strategy for the JSON form of a type."""
    match type_:
        case model.Builtin.STR:
            return NAMES
        case model.Builtin.BOOL:
            return st.booleans()
        case model.Builtin.NULL:
            return st.none()
        case model.Integer(low=low, high=high):
            return st.integers(low, high)
        case model.Enumeration() | model.Tag():
            return st.sampled_from(type_.values)
        case model.Array(element=element):
            return st.lists(wire_values(element), max_size=3)
        case model.Alternate(choices=choices):
            return st.one_of([wire_values(choice) for choice in choices if not is_open(choice)])
        case model.Object(cls=cls):
            variants = type_.variants
            if variants is None:
                return wire_object(model.members(cls))
            return st.one_of(
                [
                    wire_object(model.members(branch_)).map(lambda value, tag=tag: {variants.tag: tag} | value)
                    for tag, branch_ in variants.all().items()
                ]
            )
    raise AssertionError(type_)


def is_open(type_):
    """Whether the type nests in itself, or is a union that may have no branch here."""
    return isinstance(type_, model.Object) and type_.cls in {Everything, Shape, BlockdevOptions}


def wire_object(members):
    closed = [member for member in members if not is_open(member.type)]
    return st.fixed_dictionaries(
        {member.name: wire_values(member.type) for member in closed if not member.optional},
        optional={member.name: wire_values(member.type) for member in closed if member.optional},
    )


FORMS = [
    *(command.arguments for command in COMMANDS.values() if command.arguments is not BlockdevOptions),
    *(Everything, Square, SocketAddress, NbdServerOptions),
]
INPUTS = st.sampled_from([form for form in FORMS if form is not None]).flatmap(
    lambda form: st.tuples(st.just(form), wire_values(model.resolve(form)))
)


@given(INPUTS)
def test_what_dump_writes_visit_reads_back(made):
    form, value = made
    seen = visit(form, value)
    assert visit(form, dump(seen)) == seen


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | NAMES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "id", "addr", "data", "path", "backend", "inner"]) | NAMES, inner)
    ),
    max_leaves=10,
)


@given(st.sampled_from([form for form in FORMS if form is not None]), JSON, st.booleans())
def test_visit_raises_nothing_but_invalid_argument(form, value, keyval):
    try:
        seen = visit(form, value, keyval=keyval)
    except Error as error:
        assert error.kind is ErrorKind.INVALID_ARGUMENT  # noqa: PT017
    else:
        assert isinstance(seen, form)


def test_enums_have_wire_names_as_values():
    for form in FORMS:
        for member in model.members(form) if form is not None else ():
            if isinstance(member.type, model.Enumeration):
                assert issubclass(member.type.cls, enum.StrEnum)
