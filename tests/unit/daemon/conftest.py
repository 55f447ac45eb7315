"""What works on descriptors must do so on both loops the daemon may run on."""

import asyncio

import uvloop

ON_BOTH_LOOPS = ("test_monitor",)


def pytest_asyncio_loop_factories(config, item):
    factories = {"asyncio": asyncio.new_event_loop}
    if item.module.__name__.rpartition(".")[2] in ON_BOTH_LOOPS:
        factories["uvloop"] = uvloop.new_event_loop
    return factories
