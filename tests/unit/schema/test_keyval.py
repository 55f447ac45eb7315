"""The grammar of `key=value` options and of their JSON alternative."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkferry.errors import Error, ErrorKind
from blkferry.schema.block import BlockdevOptions
from blkferry.schema.char import (
    ChardevAdd,
    ChardevNull,
    ChardevOptions,
    ChardevSocket,
    ChardevStdio,
    parse_chardev,
)
from blkferry.schema.control import MonitorOptions
from blkferry.schema.export import BlockExportOptions, BlockExportOptionsNbd, NbdServerOptions
from blkferry.schema.keyval import MAX_FRAGMENTS, MAX_LENGTH, Help, parse, parse_json, parse_option
from blkferry.schema.qom import ObjectOptions
from blkferry.schema.sockets import SocketAddressFd, SocketAddressInet, SocketAddressUnix


def refusal(call, *arguments, **named):
    with pytest.raises(Error) as caught:
        call(*arguments, **named)
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("a=1", {"a": "1"}),
        ("a=1,b=2", {"a": "1", "b": "2"}),
        ("a=1,", {"a": "1"}),
        ("a=", {"a": ""}),
        ("a=,b=2", {"a": "", "b": "2"}),
        ("name=x,,y=z", {"name": "x,y=z"}),
        ("a=x,,,b=2", {"a": "x,", "b": "2"}),
        ("a=,,", {"a": ","}),
        ("a=1,a=2", {"a": "2"}),
        ("a=b=c", {"a": "b=c"}),
        ("addr.type=inet,addr.host=::1", {"addr": {"type": "inet", "host": "::1"}}),
        ("b.0=x,b.1.node=n,b.1.name=m", {"b": ["x", {"node": "n", "name": "m"}]}),
        ("b.1=y,b.0=x", {"b": ["x", "y"]}),
        ("b.0.0=x", {"b": [["x"]]}),
        ("a=1\n2", {"a": "1\n2"}),
        ("a=help", {"a": "help"}),
    ],
)
def test_items(text, values):
    parsed = parse(text)
    assert (parsed.values, parsed.help) == (values, False)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("file", {"driver": "file"}),
        ("file,a=1", {"driver": "file", "a": "1"}),
        ("driver=file", {"driver": "file"}),
        ("x,,y", {"driver": "x,y"}),
        ("x,,y=z", {"driver": "x,y=z"}),
        ("file,driver=raw", {"driver": "raw"}),
    ],
)
def test_the_first_item_may_be_the_value_of_the_implied_key(text, values):
    assert parse(text, "driver").values == values


@pytest.mark.parametrize(
    ("text", "values"),
    [("help", {}), ("?", {}), ("file,help", {"driver": "file"}), ("help,driver=file", {"driver": "file"})],
)
def test_asking_for_help(text, values):
    parsed = parse(text, "driver")
    assert (parsed.values, parsed.help) == (values, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("writable", "Expected '=' after parameter 'writable'"),
        ("a=1,writable", "Expected '=' after parameter 'writable'"),
        (",", "Expected '=' after parameter ''"),
        ("a=1,,,b", "Expected '=' after parameter 'b'"),
        ("=1", "Invalid parameter ''"),
        ("a..b=1", "Invalid parameter 'a..b'"),
        ("a.=1", "Invalid parameter 'a.'"),
        ("0=1", "Invalid parameter '0'"),
        ("a.01=1", "Invalid parameter 'a.01'"),
        ("a b=1", "Invalid parameter 'a b'"),
        ("\u0661.a=1", "Invalid parameter '\u0661.a'"),
        ("file=x,file.driver=y", "Parameters 'file.*' used inconsistently"),
        ("file.driver=y,file=x", "Parameters 'file.*' used inconsistently"),
        ("a.b.c=1,a.b=2", "Parameters 'a.b.*' used inconsistently"),
        ("b.0=x,b.name=y", "Parameters 'b.*' used inconsistently"),
        ("bitmaps.0=x,bitmaps.2=y", "Parameter 'bitmaps.1' missing"),
        ("bitmaps.99999999999999999999=x", "Parameter 'bitmaps.0' missing"),
        ("a.0.1=x", "Parameter 'a.0.0' missing"),
        ("a" * 128 + "=1", f"Parameter fragment '{'a' * 128}' is too long"),
        (".".join("a" * (MAX_FRAGMENTS + 1)) + "=1", None),
        ("a=" + "x" * MAX_LENGTH, "Option is too long"),
    ],
)
def test_refusals(text, message):
    said = refusal(parse, text)
    assert said == message if message is not None else "nested too deeply" in said


def test_the_limits_themselves_are_allowed():
    assert parse("a" * 127 + "=1").values == {"a" * 127: "1"}
    assert parse("a=" + "x" * (MAX_LENGTH - 2)).values == {"a": "x" * (MAX_LENGTH - 2)}
    assert "a" in parse(".".join("a" * MAX_FRAGMENTS) + "=1").values


def test_options_are_typed():
    wanted = BlockExportOptionsNbd(id="e", node_name="n", writable=True, iothread="i")
    assert parse_option(BlockExportOptions, "nbd,id=e,node-name=n,writable=on,iothread=i", "type") == wanted
    text = '{"type": "nbd", "id": "e", "node-name": "n", "writable": true, "iothread": "i"}'
    assert parse_option(BlockExportOptions, text, "type") == wanted
    server = parse_option(NbdServerOptions, "addr.type=inet,addr.host=,addr.port=0,max-connections=0x10")
    assert server == NbdServerOptions(addr=SocketAddressInet(host="", port="0"), max_connections=16)
    assert parse_option(MonitorOptions, "chardev=c,pretty=on") == MonitorOptions(chardev="c", pretty=True)
    legacy = parse_option(NbdServerOptions, "addr.type=unix,addr.data.path=/s")
    assert legacy == NbdServerOptions(addr=SocketAddressUnix(path="/s"))


@pytest.mark.parametrize(
    ("form", "text", "message"),
    [
        (BlockExportOptions, "nbd,id=e,node-name=n,writable=maybe", "Parameter 'writable' expects 'on' or 'off'"),
        (BlockExportOptions, "foo,id=e", "Parameter 'type' does not accept value 'foo'"),
        (NbdServerOptions, "addr.type=inet,addr.host=h", "Parameter 'addr.port' is missing"),
        (NbdServerOptions, "addr.type=unix,addr.path=/s,foo=1", "Parameter 'foo' is unexpected"),
        (NbdServerOptions, "max-connections=x", "Parameter 'max-connections' expects integer"),
        (
            BlockExportOptions,
            '{"type": "nbd", "id": "e", "node-name": "n", "writable": "on"}',
            "Invalid parameter type for 'writable', expected: boolean",
        ),
        (BlockExportOptions, ' {"type": "nbd"}', "Parameter 'type' does not accept value ' {\"type\": \"nbd\"}'"),
        (BlockExportOptions, "foo,help", "Parameter 'type' does not accept value 'foo'"),
    ],
)
def test_option_refusals(form, text, message):
    assert refusal(parse_option, form, text, "type") == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSON parse error, expecting value"),
        ('{"a": 1} x', "JSON parse error, expecting value"),
        ('{"a": 1, "a": 2}', "JSON parse error, duplicate key"),
        ('{"a": {"b": 1, "b": 2}}', "JSON parse error, duplicate key"),
        ('{"a": NaN}', "JSON parse error, invalid keyword 'NaN'"),
        ('{"a": -Infinity}', "JSON parse error, invalid keyword '-Infinity'"),
        ('{"a": ' + "1" * 5000 + "}", "JSON parse error, invalid number"),
        ('{"a":' * 20_000, "JSON nesting depth limit exceeded"),
        ('{"a": "' + "x" * MAX_LENGTH + '"}', "Option is too long"),
    ],
)
def test_json_refusals(text, message):
    assert refusal(parse_json, text) == message


def test_help_is_a_result_of_its_own():
    all_types = parse_option(BlockExportOptions, "help", "type")
    assert isinstance(all_types, Help)
    assert "type=nbd" in all_types.text
    one_type = parse_option(BlockExportOptions, "nbd,?", "type")
    assert isinstance(one_type, Help)
    assert "description=<str>" in one_type.text
    assert isinstance(parse_option(NbdServerOptions, "help"), Help)


@pytest.mark.parametrize(
    ("text", "backend"),
    [
        ("socket,id=c,path=/s,server=on,wait=off", ChardevSocket(addr=SocketAddressUnix(path="/s"))),
        ("socket,path=/s,server,nowait,id=c", ChardevSocket(addr=SocketAddressUnix(path="/s"))),
        ("backend=socket,id=c,path=/s", ChardevSocket(addr=SocketAddressUnix(path="/s"), server=False)),
        (
            "socket,id=c,path=n,abstract,notight,server",
            ChardevSocket(addr=SocketAddressUnix(path="n", abstract=True, tight=False)),
        ),
        (
            "socket,id=c,host=h,port=1,to=9,ipv4,server=on",
            ChardevSocket(addr=SocketAddressInet(host="h", port="1", to=9, ipv4=True)),
        ),
        ("socket,id=c,fd=3,server=on", ChardevSocket(addr=SocketAddressFd(fd="3"))),
        ("stdio,id=c,signal=off", ChardevStdio(signal=False)),
        ("null,id=c", ChardevNull()),
    ],
)
def test_chardev(text, backend):
    assert parse_chardev(text) == ChardevAdd(id="c", backend=backend)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stdio", "Parameter 'id' is missing"),
        ("socket,id=c", "chardev 'c' needs exactly one of 'path', 'port' and 'fd'"),
        ("socket,id=c,path=/s,fd=3", "chardev 'c' needs exactly one of 'path', 'port' and 'fd'"),
        ("pty,id=c", "Parameter 'backend' does not accept value 'pty'"),
        ("socket,id=c,nothing", "Expected '=' after parameter 'nothing'"),
    ],
)
def test_chardev_refusals(text, message):
    assert refusal(parse_chardev, text) == message


def test_chardev_help():
    answer = parse_chardev("help")
    assert isinstance(answer, Help)
    assert "backend=socket" in answer.text


FRAGMENT = st.sampled_from(["a", "b-c", "type", "data", "0", "1", "x_y"])
KEY = st.lists(FRAGMENT, min_size=1, max_size=4).map(".".join)
ITEM = st.tuples(KEY, st.text(max_size=6)).map(lambda pair: f"{pair[0]}={pair[1]}")
TEXT = st.one_of(st.lists(ITEM | FRAGMENT | st.just("help")).map(",".join), st.text(), st.text(alphabet="a.0,={}\"'?"))


@given(TEXT, st.none() | st.just("a"))
def test_parse_raises_nothing_but_invalid_argument(text, implied):
    try:
        parse(text, implied)
    except Error as error:
        assert error.kind is ErrorKind.INVALID_ARGUMENT  # noqa: PT017


FORMS = [BlockdevOptions, BlockExportOptions, ChardevOptions, MonitorOptions, NbdServerOptions, ObjectOptions]


@given(st.sampled_from(FORMS), TEXT | TEXT.map(lambda text: "{" + text), st.none() | st.just("type"))
def test_parse_option_raises_nothing_but_invalid_argument(form, text, implied):
    try:
        value = parse_option(form, text, implied)
    except Error as error:
        assert error.kind is ErrorKind.INVALID_ARGUMENT  # noqa: PT017
    else:
        assert isinstance(value, form | Help)


LEAVES = st.text(max_size=6)
TREES = st.dictionaries(
    st.sampled_from(["a", "b-c", "d_e"]),
    st.recursive(
        LEAVES,
        lambda inner: (
            st.lists(inner, min_size=1, max_size=3) | st.dictionaries(st.sampled_from(["x", "y-z"]), inner, min_size=1)
        ),
        max_leaves=8,
    ),
    min_size=1,
)


def written(value, path=""):
    """The items that spell a nested value."""
    if isinstance(value, str):
        return [f"{path}={value.replace(',', ',,')}"]
    pairs = enumerate(value) if isinstance(value, list) else value.items()
    return [item for key, inner in pairs for item in written(inner, f"{path}.{key}" if path else str(key))]


@given(TREES, st.randoms(use_true_random=False))
def test_items_in_any_order_spell_the_same_value(tree, random):
    items = written(tree)
    random.shuffle(items)
    assert parse(",".join(items)).values == tree
