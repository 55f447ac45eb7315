"""The schema that query-qmp-schema describes, against facts about QEMU 10.0's own."""

import pytest

from blkferry.schema import model
from blkferry.schema.control import VersionInfo, VersionTriple
from blkferry.schema.introspect import SchemaInfo, introspect
from blkferry.schema.qapi import EXTENSION, Command
from blkferry.schema.registry import COMMANDS, EVENTS
from blkferry.schema.visit import dump, visit

# Members of the arguments of each command in QEMU 10.0; "?" follows those that are optional.
ARGUMENTS = {
    "transaction": "actions:array properties?:object",
    "block-dirty-bitmap-add": "node:str name:str granularity?:int persistent?:bool disabled?:bool",
    "block-dirty-bitmap-remove": "node:str name:str",
    "block-dirty-bitmap-clear": "node:str name:str",
    "block-dirty-bitmap-enable": "node:str name:str",
    "block-dirty-bitmap-disable": "node:str name:str",
    "block-dirty-bitmap-merge": "node:str target:str bitmaps:array",
    "x-debug-block-dirty-bitmap-sha256": "node:str name:str",
    "blockdev-del": "node-name:str",
    "query-named-block-nodes": "flat?:bool",
    "block_resize": "device?:str node-name?:str size:int",
    "blockdev-create": "job-id:str options:object",
    "blockdev-reopen": "options:array",
    "blockdev-snapshot": "node:str overlay:str",
    "blockdev-snapshot-sync": (
        "device?:str node-name?:str snapshot-file:str snapshot-node-name?:str format?:str mode?:enum"
    ),
    "blockdev-snapshot-internal-sync": "device:str name:str",
    "blockdev-snapshot-delete-internal-sync": "device:str id?:str name?:str",
    "change-backing-file": "device:str image-node-name:str backing-file:str",
    "query-jobs": "",
    "job-pause": "id:str",
    "job-resume": "id:str",
    "job-cancel": "id:str",
    "job-complete": "id:str",
    "job-finalize": "id:str",
    "job-dismiss": "id:str",
    "nbd-server-start": "handshake-max-seconds?:int tls-creds?:str tls-authz?:str max-connections?:int addr:object",
    "nbd-server-stop": "",
    "nbd-server-add": "device:str name?:str description?:str writable?:bool bitmap?:str",
    "nbd-server-remove": "name:str mode?:enum",
    "block-export-del": "id:str mode?:enum",
    "query-block-exports": "",
    "qmp_capabilities": "enable?:array",
    "query-version": "",
    "query-commands": "",
    "query-qmp-schema": "",
    "getfd": "fdname:str",
    "closefd": "fdname:str",
    "quit": "",
    "object-del": "id:str",
    "chardev-add": "id:str backend:object",
    "chardev-remove": "id:str",
    "query-chardev": "",
    "blockdev-add": (
        "driver:enum node-name?:str discard?:enum cache?:object active?:bool read-only?:bool auto-read-only?:bool "
        "force-share?:bool detect-zeroes?:enum"
    ),
    "block-export-add": (
        "type:enum id:str fixed-iothread?:bool iothread?:str node-name:str writable?:bool writethrough?:bool "
        "allow-inactive?:bool"
    ),
    "object-add": "qom-type:enum id:str",
}
RETURNS = {
    "query-block-exports": "id:str type:enum node-name:str shutting-down:bool",
    "query-version": "qemu:object package:str",
    "query-jobs": "id:str type:enum status:enum current-progress:int total-progress:int error?:str",
    "blockdev-snapshot-delete-internal-sync": (
        "id:str name:str vm-state-size:int date-sec:int date-nsec:int vm-clock-sec:int vm-clock-nsec:int icount?:int"
    ),
    "x-debug-block-dirty-bitmap-sha256": "sha256:str",
    "query-commands": "name:str",
    "query-chardev": "label:str filename:str frontend-open:bool",
    "chardev-add": "pty?:str",
    "query-qmp-schema": "name:str meta-type:enum features?:array",
    "query-named-block-nodes": (
        "file:str node-name?:str ro:bool drv:str backing_file?:str backing_file_depth:int active:bool encrypted:bool "
        "detect_zeroes:enum bps:int bps_rd:int bps_wr:int iops:int iops_rd:int iops_wr:int image:object "
        "bps_max?:int cache:object write_threshold:int dirty-bitmaps?:array"
    ),
}
# What is not implemented is not promised: these members of QEMU's are left out on purpose.
LEFT_OUT = {"bps_max"}
WIDENED = {"iothread"}  # QEMU's, marked as it takes more here
OURS = {name for name, command in COMMANDS.items() if EXTENSION in command.features}
VARIANTS = {
    ("block-export-add", "nbd"): "name?:str description?:str bitmaps?:array allocation-depth?:bool",
    ("block-export-add", "vhost-user-blk"): "addr:object logical-block-size?:int num-queues?:int",
    ("block-export-add", "fuse"): "mountpoint:str growable?:bool allow-other?:enum",
    ("block-export-add", "vduse-blk"): ("name:str num-queues?:int queue-size?:int logical-block-size?:int serial?:str"),
    ("object-add", "iothread"): (
        "aio-max-batch?:int thread-pool-min?:int thread-pool-max?:int poll-max-ns?:int poll-grow?:int poll-shrink?:int"
    ),
}
INET = "host:str port:str numeric?:bool to?:int ipv4?:bool ipv6?:bool keep-alive?:bool mptcp?:bool"
ADDRESSES = {
    "inet": INET,
    "unix": "path:str abstract?:bool tight?:bool",
    "vsock": "cid:str port:str",
    "fd": "str:str",
}


@pytest.fixture(scope="module")
def schema():
    return {entry["name"]: entry for entry in dump(introspect(COMMANDS.values(), EVENTS.values()))}


def spelled(schema, name):
    """The members of an object type in the notation of the tables above, but for those marked as ours."""

    def kind(type_name):
        entry = schema[type_name]
        return type_name if entry["meta-type"] == "builtin" else entry["meta-type"]

    return {
        f"{member['name']}{'?' if 'default' in member else ''}:{kind(member['type'])}"
        for member in schema[name]["members"]
        if EXTENSION not in member.get("features", []) or member["name"] in WIDENED
    }


def expected(text):
    return {item for item in text.split() if item.partition(":")[0].rstrip("?") not in LEFT_OUT}


@pytest.mark.parametrize("command", ARGUMENTS)
def test_arguments_are_those_of_qemu(schema, command):
    ours = {
        item.replace("iothread?:alternate", "iothread?:str") for item in spelled(schema, schema[command]["arg-type"])
    }
    assert ours == expected(ARGUMENTS[command])


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - OURS))
def test_results_are_those_of_qemu(schema, command):
    name = schema[command]["ret-type"]
    if command not in RETURNS:
        assert name == "0"
        return
    if schema[name]["meta-type"] == "array":
        name = schema[name]["element-type"]
    assert spelled(schema, name) == expected(RETURNS[command])


def test_no_command_is_forgotten_by_these_tests():
    assert set(ARGUMENTS) == set(COMMANDS) - OURS


@pytest.mark.parametrize(("command", "case"), VARIANTS)
def test_branches_add_the_members_that_qemu_has(schema, command, case):
    arguments = schema[schema[command]["arg-type"]]
    types = {variant["case"]: variant["type"] for variant in arguments["variants"]}
    assert spelled(schema, types[case]) == expected(VARIANTS[command, case])


@pytest.mark.parametrize("case", ADDRESSES)
def test_the_legacy_address_is_described_with_its_wrapper(schema, case):
    server = schema[schema["nbd-server-start"]["arg-type"]]
    address = schema[next(member["type"] for member in server["members"] if member["name"] == "addr")]
    assert (address["tag"], spelled(schema, address["name"])) == ("type", {"type:enum"})
    wrapper = schema[{variant["case"]: variant["type"] for variant in address["variants"]}[case]]
    (data,) = wrapper["members"]
    assert data["name"] == "data"
    assert spelled(schema, data["type"]) == expected(ADDRESSES[case])


EVENT_DATA = {
    "BLOCK_EXPORT_DELETED": "id:str",
    "BLOCK_IMAGE_CORRUPTED": "device:str node-name?:str msg:str offset?:int size?:int fatal:bool",
    "JOB_STATUS_CHANGE": "id:str status:enum",
}


@pytest.mark.parametrize("name", sorted(EVENTS))
def test_events_are_those_of_qemu(schema, name):
    assert schema[name]["meta-type"] == "event"
    assert spelled(schema, schema[name]["arg-type"]) == expected(EVENT_DATA[name])


def test_older_commands_are_deprecated(schema):
    assert {name for name in COMMANDS if "deprecated" in schema[name].get("features", [])} == {
        "nbd-server-add",
        "nbd-server-remove",
    }


def test_libvirt_finds_out_that_overlays_may_be_written_only(schema):
    assert schema["blockdev-snapshot"]["features"] == ["allow-write-only-overlay"]


def test_enums_list_their_values_twice(schema):
    mode = next(m for m in schema[schema["block-export-del"]["arg-type"]]["members"] if m["name"] == "mode")
    assert schema[mode["type"]] == {
        "name": mode["type"],
        "meta-type": "enum",
        "members": [{"name": "safe"}, {"name": "hard"}],
        "values": ["safe", "hard"],
    }


def test_builtins_and_arrays_are_named_as_in_qemu(schema):
    assert schema["str"] == {"name": "str", "meta-type": "builtin", "json-type": "string"}
    assert schema["int"]["json-type"] == "int"
    assert schema["bool"]["json-type"] == "boolean"
    assert schema["any"]["json-type"] == "value"
    assert schema["[str]"] == {"name": "[str]", "meta-type": "array", "element-type": "str"}
    assert schema["0"] == {"name": "0", "meta-type": "object", "members": []}


def test_an_optional_member_has_a_null_default_and_a_required_one_none(schema):
    by_name = {member["name"]: member for member in schema[schema["block-export-del"]["arg-type"]]["members"]}
    assert by_name["mode"]["default"] is None
    assert "default" not in by_name["id"]


def test_extensions_carry_a_feature(schema):
    export = schema[schema["block-export-add"]["arg-type"]]
    marked = [member["name"] for member in export["members"] if EXTENSION in member.get("features", [])]
    assert marked == ["iothread"]
    iothread = next(member for member in export["members"] if member["name"] == "iothread")
    choices = {member["type"] for member in schema[iothread["type"]]["members"]}
    assert (schema[iothread["type"]]["meta-type"], choices) == ("alternate", {"str", "[str]"})


def test_every_name_is_described_once_and_every_reference_leads_somewhere(schema):
    entries = dump(introspect(COMMANDS.values(), EVENTS.values()))
    assert len(entries) == len(schema)
    for entry in entries:
        wanted = [entry.get(key) for key in ("arg-type", "ret-type", "element-type")]
        if entry["meta-type"] in {"object", "alternate"}:
            wanted += [member["type"] for member in entry["members"]]
            wanted += [variant["type"] for variant in entry.get("variants", [])]
        assert [name for name in wanted if name is not None and name not in schema] == []
        if entry["meta-type"] not in {"command", "event", "builtin", "array"}:
            assert entry["name"].isdigit()


def test_the_reply_fits_its_own_description():
    for entry in dump(introspect(COMMANDS.values(), EVENTS.values())):
        assert isinstance(visit(SchemaInfo, entry), SchemaInfo)


def test_only_what_is_mentioned_is_described():
    described = introspect([Command("c", "A command.", returns=VersionInfo)], [])
    names = [entry.name for entry in described]
    assert "bool" not in names
    assert [member.name for member in model.members(VersionTriple)] == ["major", "minor", "micro"]
    assert sorted(names) == ["0", "1", "2", "c", "int", "str"]
