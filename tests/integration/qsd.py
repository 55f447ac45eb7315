"""The same commands given to the real qemu-storage-daemon and to us: what it refuses we refuse in the same words."""

from __future__ import annotations

import json
import subprocess
import time

import peers
from blkferry.errors import Error
from blkferry.testing.daemon import DaemonThread

PAUSE = "pause"  # in place of a command: let jobs come to their end


def theirs(commands) -> list:
    """What qemu-storage-daemon answers: an error's text, or the result."""
    argv = [*peers.peer("qemu-storage-daemon"), "--chardev", "stdio,id=c", "--monitor", "chardev=c"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as daemon:

        def ask(name, arguments):
            daemon.stdin.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
            daemon.stdin.flush()
            while line := daemon.stdout.readline():
                answer = json.loads(line) if line.startswith("{") else {}
                if "return" in answer or "error" in answer:
                    return answer["error"]["desc"] if "error" in answer else answer["return"]
            raise AssertionError("qemu-storage-daemon ended")

        ask("qmp_capabilities", {})
        answers = []
        for command in commands:
            if command == PAUSE:
                time.sleep(0.2)
            else:
                answers.append(ask(*command))
        ask("quit", {})
    return answers


def ours(commands) -> list:
    """What we answer to the same."""
    answers = []
    with DaemonThread() as daemon:
        for command in commands:
            if command == PAUSE:
                time.sleep(0.2)
                continue
            name, arguments = command
            try:
                answers.append(daemon.execute(name, **arguments))
            except Error as error:
                answers.append(str(error))
    return answers


def compare(commands) -> None:
    """Give both the same commands, each on its own as `name, arguments`, and compare what they answer."""
    asked = [command for command in commands if command != PAUSE]
    for command, their_answer, our_answer in zip(asked, theirs(commands), ours(commands), strict=True):
        assert our_answer == their_answer, command
