import json
import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkferry.wire.qmp.text import MAX_WORD, InvalidText, _plain, decode, decode_careful

# U+0000 is refused on purpose, and surrogates alone are no text.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=20,
)
JSON_LIKE = st.text(st.sampled_from("{}[]:,\"'\\ \t\n\r\0\x01\x7f0123456789-+.eEtrufalsn/bxNI\u00e9\ud7ff\U0001f600"))


def value_of(text: str) -> object:
    return decode(text.encode(), 1)


def refusal(text: bytes) -> str:
    with pytest.raises(InvalidText) as caught:
        decode(text, 1)
    return str(caught.value)


@given(JSON, st.booleans())
def test_round_trip(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert value_of(text) == value
    assert decode_careful(text) == value


@given(JSON_LIKE)
def test_the_careful_decoder_accepts_what_the_plain_one_does(text):
    try:
        expected = _plain(text)
    except ValueError:
        return
    if "\\u" not in text:
        assert repr(decode_careful(text)) == repr(expected)


@given(st.binary() | JSON_LIKE.map(str.encode))
def test_junk_is_refused_or_a_value_that_json_can_carry(junk):
    try:
        value = decode(junk, 1)
    except InvalidText as error:
        sentence = str(error)
        assert sentence.startswith("JSON parse error, ")
        assert sentence.isprintable()
    else:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{'execute': 'query-version'}", {"execute": "query-version"}),
        ("""{"a": 'it"s', 'b': "it's"}""", {"a": 'it"s', "b": "it's"}),
        (r"""['\'', "\'", '\"']""", ["'", "'", '"']),
        (r'"\u00e9\ud83d\ude00\/\b\f\n\r\t\\"', "\u00e9\U0001f600/\b\f\n\r\t\\"),
        ("\r\n [ 1 ,\t-0.5e1 , true,false , null ]\r\n", [1, -5.0, True, False, None]),
        ("[[], {}, [{}], {'a': []}]", [[], {}, [{}], {"a": []}]),
        ("18446744073709551616", 2**64),
        ("'\x7f\u00a0'", "\x7f\u00a0"),
    ],
)
def test_what_is_accepted(text, value):
    assert value_of(text) == value


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "expecting value"),
        (b"[,]", "expecting value"),
        (b"[1,]", "expecting value"),
        (b'{"a":}', "expecting value"),
        (b"[1}", "expecting ',' or ']'"),
        (b"[1 2]", "expecting ',' or ']'"),
        (b'{"a": 1 "b": 2}', "expecting ',' or '}'"),
        (b'{"a" 1}', "expecting ':' after key 'a'"),
        (b"{1: 2}", "expecting a string as key"),
        (b'{"a": 1,}', "expecting a string as key"),
        (b"[1] 2", "expecting the end of the message"),
        (b"foo", "invalid keyword 'foo'"),
        (b"[foo]", "invalid keyword 'foo'"),
        (b"{foo: 1}", "invalid keyword 'foo'"),
        (b"[NaN]", "invalid keyword 'NaN'"),
        (b"[Infinity]", "invalid keyword 'Infinity'"),
        (b"[-Infinity]", "stray '-Infinity'"),
        (b"[01]", "stray '01'"),
        (b"[1.]", "stray '1.'"),
        (b"[+1]", "stray '+1'"),
        (b"[%d]", "stray '%d'"),
        (b"[\x01]", r"stray '\x01'"),
        (b'["a\nb"]', "stray '\"'"),
        (b'{"a": 1, "a": 2}', "duplicate key"),
        (b"{'a': 1, 'a': 2}", "duplicate key"),
        (b'{"a": {"b": 1, "\\u0062": 2}}', "duplicate key"),
        (rb'"\ud83d"', r"\ud83d is not a valid Unicode character"),
        (rb'"\ud83d\ude00\ude00"', r"\ude00 is not a valid Unicode character"),
        (rb'"\ud83dx"', r"\ud83d is not a valid Unicode character"),
        (rb'"\u0000"', r"\u0000 is not accepted in a string"),
        (rb'"\x"', r"invalid escape sequence '\x'"),
        (rb'"\u12g4"', r"invalid escape sequence '\u'"),
        (b'"\xc0\x80"', "invalid UTF-8 at byte 1"),
        (b'"\xed\xa0\x80"', "invalid UTF-8 at byte 1"),
        (b"[1e999]", "number '1e999' is out of range"),
        (b"[-1e999]", "number '-1e999' is out of range"),
        (b"[" + b"9" * 641 + b"]", "number of 641 characters is too long"),
        (b"[0." + b"9" * 640 + b"]", "number of 642 characters is too long"),
        (b"[" + b"x" * 5000 + b"]", "invalid keyword '" + "x" * 40 + "...'"),
    ],
)
def test_what_is_refused(text, sentence):
    assert refusal(text) == "JSON parse error, " + sentence


def test_the_longest_number_survives_the_lowest_limit_of_the_interpreter():
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)
    try:
        assert json.dumps(value_of("9" * MAX_WORD)) == "9" * MAX_WORD
    finally:
        sys.set_int_max_str_digits(before)


def test_small_numbers_are_not_out_of_range():
    assert value_of("1e-999") == 0.0
    assert math.copysign(1, float(str(value_of("-0.0")))) == -1


def test_deep_texts_do_not_use_the_stack():
    depth = 100_000
    value = decode(b"[" * depth + b"]" * depth, depth)
    for _ in range(depth - 1):
        (value,) = value
    assert value == []
