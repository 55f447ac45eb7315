import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from blkferry.wire.qmp.stream import MAX_DEPTH, MAX_MESSAGE, NEED_DATA, Fault, Parser

STRAY_FF = Fault(r"JSON parse error, stray '\xff'")


def values(parser: Parser) -> list[object]:
    found = []
    while (value := parser.next_value()) is not NEED_DATA:
        found.append(value)
    return found


def parse(data: bytes, **options) -> list[object]:
    parser = Parser(**options)
    parser.feed(data)
    return values(parser)


def parse_bytewise(data: bytes, **options) -> list[object]:
    parser = Parser(**options)
    found = []
    for at in range(len(data)):
        parser.feed(data[at : at + 1])
        found += values(parser)
    return found


STREAM = st.lists(
    st.sampled_from([b'{"a": 1}', b"[", b"]", b"{", b"}", b'"', b"'", b"\\", b"\n", b"\n{", b" ", b"\xff", b"\x01"])
    | st.sampled_from([b"12", b"true", b"foo", b":", b",", b'"x"', b"\xc3", b"\xa9", b"\r\n", b"\\u00e9"])
    | st.binary(max_size=3),
    max_size=30,
).map(b"".join)


@given(STREAM, st.sampled_from([8, 20, MAX_MESSAGE]))
@example(b'{"a": "\n\n{"b": 1}\n', MAX_MESSAGE)
@example(b'["\\', MAX_MESSAGE)
def test_byte_at_a_time_equals_whole(stream, max_message):
    assert parse_bytewise(stream, max_message=max_message) == parse(stream, max_message=max_message)


@given(STREAM)
def test_after_any_junk_a_client_can_start_afresh(junk):
    assert parse(junk + b'\xff{"execute": "x"}')[-1] == {"execute": "x"}


@given(STREAM)
def test_a_line_that_starts_with_a_brace_ends_any_fault(junk):
    parser = Parser()
    parser.feed(junk + b'\n["\x01')  # if it was still good, it is bad now
    values(parser)
    parser.feed(b'\n{"execute": "x"}')
    assert values(parser)[-1] == {"execute": "x"}


@given(st.binary(max_size=300))
def test_a_line_costs_at_most_one_answer_for_each_message_in_it(junk):
    line = b"?" + junk.translate(None, b"\n\xff") + b"\n"
    assert len(parse(line)) == 1


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b'{"a": 1}{"b": 2}', [{"a": 1}, {"b": 2}]),
        (b'\r\n {"a": 1} \r\n\t{"b": 2}\r\n', [{"a": 1}, {"b": 2}]),
        (b'{"a": "}]{["}[1]', [{"a": "}]{["}, [1]]),
        (b"""{'a': '}"'}""", [{"a": '}"'}]),
        (rb'{"a": "\"}\\"}', [{"a": '"}\\'}]),
        (b'{\n  "a": {\n    "b": 1\n  }\n}\n', [{"a": {"b": 1}}]),
        (b"12 true null \"x\"'y'", [12, True, None, "x", "y"]),
        (b"12", []),
        (b'{"a": 1', []),
    ],
)
def test_framing(stream, expected):
    assert parse(stream) == expected
    assert parse_bytewise(stream) == expected


def fault(sentence: str) -> Fault:
    return Fault("JSON parse error, " + sentence)


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        # ... outside of brackets a bad message ends with its line
        (b"foo bar baz\n[1]", [fault("invalid keyword 'foo'"), [1]]),
        (b'}}} "it\'s" [\n[1]', [fault("expecting value"), [1]]),
        (b": 1\n[1]", [fault("expecting value"), [1]]),
        (b"\x00\x01\x02\n[1]", [fault(r"stray '\x00'"), [1]]),
        (b"x" * 641 + b"\n[1]", [fault("expecting value"), [1]]),
        (b'"abc\n[1]', [fault(r"stray character '\x0a' in a string"), [1]]),
        # ... inside with its closing bracket
        (b'{"a" 1, foo}[1]', [fault("expecting ':' after key 'a'"), [1]]),
        (b"{]{}", [fault("expecting a string as key"), {}]),
        (b'{"a": "\x01"}[1]', [fault(r"stray character '\x01' in a string"), [1]]),
        (b'{"a": "\x01",\n  "b": {}\n}\n[1]', [fault(r"stray character '\x01' in a string"), [1]]),
        # ... or where a line starts with a brace
        (b'{"a": "b}\n{"c": 1}', [fault(r"stray character '\x0a' in a string"), {"c": 1}]),
        (b'{"a": "b}\r\n{"c": 1}', [fault(r"stray character '\x0d' in a string"), {"c": 1}]),
        # ... or with 0xFF, whatever came before
        (b'\xff{"a": 1}', [STRAY_FF, {"a": 1}]),
        (b"\xff\xff\xff[1]\xff[2]", [STRAY_FF, [1], STRAY_FF, [2]]),
        (b'{"a": "\xff[1]', [STRAY_FF, [1]]),
        (b'{"a": [\xff[1]', [STRAY_FF, [1]]),
        (b'{"a": "\x01\xff[1]', [fault(r"stray character '\x01' in a string"), [1]]),
    ],
)
def test_one_fault_per_bad_message(stream, expected):
    assert parse(stream) == expected
    assert parse_bytewise(stream) == expected


def test_depth():
    deepest = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    (value,) = parse(deepest)
    assert isinstance(value, list)
    assert parse(b"[" + deepest + b"][1]") == [Fault("JSON nesting depth limit exceeded"), [1]]


def test_size():
    largest = b'["' + b"x" * (MAX_MESSAGE - 4) + b'"]'
    assert len(largest) == MAX_MESSAGE
    assert parse(largest) == [["x" * (MAX_MESSAGE - 4)]]
    too_large = Fault(f"JSON message size limit of {MAX_MESSAGE} bytes exceeded")
    assert parse(b" " + largest[:2] + b"y" + largest[2:] + b"[1]") == [too_large, [1]]


def test_an_endless_message_is_not_kept():
    parser = Parser()
    found = []
    for _ in range(3 * MAX_MESSAGE >> 16):
        parser.feed(b"[" + b"x" * 0xFFFF)
        found += values(parser)
    assert len(found) == 1
    assert len(parser._buffer) == 0


def test_blanks_are_not_kept():
    parser = Parser()
    parser.feed(b" \r\n" * 1000)
    assert values(parser) == []
    assert len(parser._buffer) == 0


def test_a_long_message_in_many_pieces_is_scanned_once():
    message = json.dumps(["[{" * 10] * 20_000).encode()
    parser = Parser()
    for at in range(0, len(message), 16):
        parser.feed(message[at : at + 16])
        found = parser.next_value()
        assert parser._scanned == len(parser._buffer)  # the next piece is all that is left to do
    assert found == json.loads(message)
