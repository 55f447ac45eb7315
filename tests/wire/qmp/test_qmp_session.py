import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkferry.errors import Error, ErrorKind
from blkferry.wire.qmp.session import (
    CLASS_OF_KIND,
    MAX_ID_DEPTH,
    NO_ID,
    Answered,
    CommandReceived,
    Mode,
    QmpClass,
    Session,
)

CAPABILITIES = b'{"execute": "qmp_capabilities"}'


def ready(*enable: str) -> Session:
    session = Session()
    command = {"execute": "qmp_capabilities", "arguments": {"enable": list(enable)}}
    assert answers(session, json.dumps(command).encode()) == [{"return": {}}]
    return session


def events(session: Session, data: bytes) -> list[CommandReceived | Answered]:
    session.receive(data)
    found = []
    while event := session.next_event():
        found.append(event)
    return found


def answers(session: Session, data: bytes) -> list[object]:
    found = []
    for event in events(session, data):
        assert isinstance(event, Answered)
        assert event.data.endswith(b"\r\n")
        found.append(json.loads(event.data))
    return found


def failure(desc: str, qmp_class="GenericError", **more) -> dict[str, object]:
    return {"error": {"class": qmp_class, "desc": desc}, **more}


def test_the_greeting_as_it_stands_on_the_wire():
    assert Session().greeting((10, 0, 2), "Debian") == (
        b'{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "Debian"}, '
        b'"capabilities": ["oob"]}}\r\n'
    )


def test_pretty():
    assert Session(pretty=True).reply(1, {"a": []}) == (
        b'{\n    "return": {\n        "a": []\n    },\n    "id": 1\n}\r\n'
    )


def test_negotiation():
    session = Session()
    expecting = failure("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound", id=1)
    assert answers(session, b'{"execute": "query-version", "id": 1}') == [expecting]
    assert session.mode is Mode.NEGOTIATING
    assert answers(session, CAPABILITIES) == [{"return": {}}]
    assert session.mode is Mode.READY
    complete = failure("Capabilities negotiation is already complete, command ignored", "CommandNotFound", id=None)
    assert answers(session, b'{"execute": "qmp_capabilities", "id": null}') == [complete]
    assert events(session, b'{"execute": "query-version"}') == [CommandReceived("query-version", {}, NO_ID)]


@pytest.mark.parametrize(
    ("arguments", "desc"),
    [
        ({"enable": "oob"}, "Invalid parameter type for 'enable', expected: array"),
        ({"enable": [1]}, "Invalid parameter type for 'enable[0]', expected: string"),
        ({"enable": ["oob", "foo"]}, "Parameter 'enable[1]' does not accept value 'foo'"),
        ({"foo": 1}, "Parameter 'foo' is unexpected"),
    ],
)
def test_a_failed_negotiation_changes_nothing(arguments, desc):
    session = Session()
    command = json.dumps({"execute": "qmp_capabilities", "arguments": arguments}).encode()
    assert answers(session, command) == [failure(desc)]
    assert session.mode is Mode.NEGOTIATING


@pytest.mark.parametrize(
    ("message", "desc"),
    [
        ("[]", "QMP input must be a JSON object"),
        ("null\n", "QMP input must be a JSON object"),
        ("12\n", "QMP input must be a JSON object"),
        ('"x"', "QMP input must be a JSON object"),
        ("{}", "QMP input lacks member 'execute'"),
        ('{"execute": 1}', "QMP input member 'execute' must be a string"),
        ('{"execute": null}', "QMP input member 'execute' must be a string"),
        ('{"execute": "x", "exec-oob": "x"}', "QMP input member 'exec-oob' is unexpected"),
        ('{"execute": "x", "arguments": []}', "QMP input member 'arguments' must be an object"),
        ('{"execute": "x", "arguments": null}', "QMP input member 'arguments' must be an object"),
        ('{"execute": "x", "foo": 1}', "QMP input member 'foo' is unexpected"),
        ('{"exec-oob": "x"}', "QMP input member 'exec-oob' is unexpected"),
        ("foo\n", "JSON parse error, invalid keyword 'foo'"),
        ('{"id": 1, "id": 1}', "JSON parse error, duplicate key"),
    ],
)
def test_envelopes_that_are_refused(message, desc):
    session = ready()
    assert answers(session, message.encode()) == [failure(desc)]
    assert len(events(session, b'{"execute": "x"}')) == 1


def test_out_of_band():
    session = ready("oob")
    desc = "The command query-jobs does not support OOB"
    assert answers(session, b'{"exec-oob": "query-jobs", "id": 1}') == [failure(desc, id=1)]
    clash = failure("QMP input member 'execute' clashes with 'exec-oob'")
    assert answers(session, b'{"execute": "x", "exec-oob": "x"}{"exec-oob": "x", "execute": "x"}') == [clash, clash]
    assert answers(session, b'{"exec-oob": 1}') == [failure("QMP input member 'exec-oob' must be a string")]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_characters="\0", codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.just("key"), inner),
)


@given(JSON)
def test_any_id_comes_back(value):
    session = ready()
    (command,) = events(session, json.dumps({"execute": "x", "id": value}).encode())
    assert isinstance(command, CommandReceived)
    assert json.loads(session.reply(command.id, {})) == {"return": {}, "id": value}
    assert answers(session, json.dumps({"id": value}).encode()) == [
        failure("QMP input lacks member 'execute'", id=value)
    ]


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_how_deep_an_id_may_nest(opening, closing):
    session = ready()

    def nested(levels: int) -> bytes:
        return f'{{"execute": "x", "id": {opening * levels}1{closing * levels}}}'.encode()

    (command,) = events(session, nested(MAX_ID_DEPTH - 1))
    session.reply(command.id, {})
    desc = f"QMP input member 'id' nests deeper than {MAX_ID_DEPTH} levels"
    for levels in (MAX_ID_DEPTH, 1000):
        assert answers(session, nested(levels)) == [failure(desc)]


def test_commands_come_one_by_one():
    session = Session()
    session.receive(CAPABILITIES + b'{"execute": "a"} {"execute": "b", "arguments": {"x": 1}}{"execute":')
    assert isinstance(session.next_event(), Answered)
    assert session.next_event() == CommandReceived("a", {})
    assert session.next_event() == CommandReceived("b", {"x": 1})
    assert session.next_event() is None
    session.receive(b'"c"}')
    assert session.next_event() == CommandReceived("c", {})


def test_replies():
    session = ready()
    assert session.reply(NO_ID, []) == b'{"return": []}\r\n'
    assert session.reply(None, {}) == b'{"return": {}, "id": null}\r\n'
    error = Error(ErrorKind.UNKNOWN_COMMAND, "The command nope has not been found", hint="look again")
    assert json.loads(session.error("x", error)) == failure(error.message, "CommandNotFound", id="x")


def test_events():
    session = ready()
    assert session.event("JOB_STATUS_CHANGE", {"id": "j"}, 1_700_000_000_123_456_789) == (
        b'{"timestamp": {"seconds": 1700000000, "microseconds": 123456}, '
        b'"event": "JOB_STATUS_CHANGE", "data": {"id": "j"}}\r\n'
    )
    assert "data" not in json.loads(session.event("STOP", {}, 0))


def test_text_that_is_not_unicode_does_not_break_the_line():
    reply = Session().reply(1, "a\udcffb\u00e9\u2028")
    assert json.loads(reply) == {"return": "a?b\u00e9\u2028", "id": 1}


def test_every_kind_of_error_has_a_class():
    assert set(CLASS_OF_KIND) == set(ErrorKind)
    others = {kind for kind in ErrorKind if CLASS_OF_KIND[kind] is not QmpClass.GENERIC_ERROR}
    assert others == {ErrorKind.UNKNOWN_COMMAND}


@given(st.binary(max_size=200))
def test_any_junk_is_answered_by_lines(junk):
    session = ready()
    for event in events(session, junk):
        if isinstance(event, Answered):
            assert "error" in json.loads(event.data)
            assert event.data.count(b"\n") == 1
