"""Say QMP commands to a daemon, and print what it answers, one line each.

    python3 qmp_say.py SOCKET COMMAND [ARGUMENTS COMMAND ARGUMENTS ...]

ARGUMENTS are JSON. It runs in the guest, on any Python. With `wait:EVENT` in place of a command, and `{}`, it waits for
an event instead. Errors of commands are printed, and are no failure.
"""

from __future__ import annotations

import json
import socket
import sys

PATIENCE = 60.0


def main(path: str, *words: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(path)
        stream = sock.makefile("rw")
        stream.readline()
        events = []
        padded = [*words, "{}"] if len(words) % 2 else [*words]
        for command, arguments in (("qmp_capabilities", "{}"), *zip(padded[::2], padded[1::2], strict=True)):
            if command.startswith("wait:"):
                name = command.removeprefix("wait:")
                while name not in events:
                    events.append(json.loads(stream.readline()).get("event"))
                events.remove(name)
                print(name)
                continue
            stream.write(json.dumps({"execute": command, "arguments": json.loads(arguments)}) + "\n")
            stream.flush()
            while "event" in (answer := json.loads(stream.readline())):
                events.append(answer["event"])
            if command != "qmp_capabilities":
                print(json.dumps(answer.get("return", answer.get("error"))))


main(*sys.argv[1:])
