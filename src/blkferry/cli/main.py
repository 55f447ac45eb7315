"""`blkferry`: where the process starts. The commands are in `app`, which is imported with signals already in hand."""

from __future__ import annotations

from blkferry.cli.console import exit_on_signals


def main() -> None:
    """Run the command line and exit."""
    exit_on_signals()
    from blkferry.cli.app import app

    app(prog_name="blkferry")


if __name__ == "__main__":
    main()
