"""Help texts."""

from typing import Annotated

from blkferry.schema.block import BlockdevOptions
from blkferry.schema.export import BlockExportOptions, BlockExportOptionsNbd, NbdServerOptions
from blkferry.schema.help import MAX_COLUMN, help_text
from blkferry.schema.qapi import Doc, Struct
from blkferry.schema.qom import IothreadProperties


def test_a_union_lists_its_branches_and_what_they_share():
    lines = help_text(BlockExportOptions).splitlines()
    assert lines[0] == "How a node is offered to the outside."
    assert "type=nbd An export of the NBD server." in [" ".join(line.split()) for line in lines]
    assert "Common to every type:" in lines
    assert "  writable=<on|off>        clients may write (default: off)" in lines
    assert not any("description" in line for line in lines)


def test_a_branch_lists_all_its_members():
    lines = help_text(BlockExportOptionsNbd).splitlines()
    assert lines[0] == "type=nbd: An export of the NBD server."
    assert "  id=<str>                   name of the export, unique among all exports (required)" in lines
    assert "  description=<str>          free text for clients, at most 4096 bytes" in lines


def test_defaults_are_shown_as_they_would_be_written():
    rows = dict(line.split(maxsplit=1) for line in help_text(BlockdevOptions).splitlines() if "=<" in line)
    assert rows["detect-zeroes=<off|on|unmap>"].endswith("(default: off)")
    assert rows["active=<on|off>"] == "whether the node may be used at once (default: on)"
    rows = dict(line.split(maxsplit=1) for line in help_text(IothreadProperties).splitlines() if "=<" in line)
    assert rows["poll-max-ns=<int>"] == "longest busy wait before sleeping; 0 never waits (default: 32768)"


def test_nested_members_have_dotted_names():
    rows = dict(line.split(maxsplit=1) for line in help_text(NbdServerOptions).splitlines())
    assert rows["addr"] == "the address to listen on (required)"
    assert rows["addr.type=<fd|inet|unix|vsock>"] == "the kind of address (required)"
    assert rows["addr.path=<str>"] == "unix: path of the socket (required)"


def test_columns_line_up_and_a_long_entry_does_not_push_them():
    class Wide(Struct):
        """Wide."""

        a_name_that_is_far_longer_than_any_column_of_a_help_text: Annotated[int, Doc("first")] = 0
        b: Annotated[int, Doc("second")] = 0
        cc: Annotated[int, Doc("third")] = 0

    first, second, third = help_text(Wide).splitlines()[1:]
    assert second.index("second") == third.index("third") < MAX_COLUMN
    assert first.index("first") > MAX_COLUMN
