"""PAM decides, by rules and accounts of the test's own in the place of the machine's."""

from __future__ import annotations

import shlex
import subprocess
import sys
import textwrap

import pytest

import peers

pytestmark = peers.requires("unshare")

ASK = """\
import asyncio, sys
from blkferry import Daemon

async def main(service, identities):
    async with Daemon() as daemon:
        await daemon.execute("object-add", {"qom-type": "authz-pam", "id": "a", "service": service})
        answers = await asyncio.gather(*map(daemon.objects["a"].allows, identities))
        print([identity for identity, allowed in zip(identities, answers) if allowed])

asyncio.run(main(sys.argv[1], sys.argv[2:]))
"""


@pytest.fixture
def ask(tmp_path):
    """`ask(rules, *identities)`: whom the service with these rules allows."""
    services = tmp_path / "pam.d"
    services.mkdir()

    def ask(rules, *identities, service="blkferry", **files):
        (services / "blkferry").write_text(textwrap.dedent(rules))
        instead = {"pam.d": services}
        for name, content in files.items():
            instead[name] = tmp_path / name
            instead[name].write_text(content)
        mounts = [f"mount -n --bind {shlex.quote(str(ours))} /etc/{name}" for name, ours in instead.items()]
        inside = " && ".join([*mounts, 'exec "$@"'])
        command = ["unshare", "--mount", "--propagation", "slave", "--", "sh", "-c", inside, "sh"]
        done = subprocess.run(
            [*command, sys.executable, "-c", ASK, service, *identities],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return ask


def test_the_account_rules_of_the_service_decide(ask, tmp_path):
    names = tmp_path / "allowed"
    names.write_text("O=Lab,CN=client1\nbob\n")
    rules = f"account requisite pam_listfile.so item=user sense=allow file={names} onerr=fail\n"
    identities = ["O=Lab,CN=client1", "O=Lab,CN=client2", "bob", "eve", "a\nbob", ""]
    assert ask(rules, *identities) == "['O=Lab,CN=client1', 'bob']"


def test_only_account_rules_count(ask):
    assert ask("auth required pam_permit.so\naccount required pam_deny.so\n", "bob") == "[]"
    assert ask("auth required pam_deny.so\naccount required pam_permit.so\n", "bob") == "['bob']"


def test_without_rules_nobody_is_allowed(ask):
    assert ask("", "bob") == "[]"
    assert ask("account required pam_permit.so\n", "bob", service="another") == "[]"


def test_accounts_of_the_machine_may_be_what_decides(ask):
    """As a service has it that leaves that to pam_unix: who has an account that has not expired."""
    passwd = "root:x:0:0::/:/bin/sh\nCN=backup:x:4000:4000::/:/bin/false\nCN=late:x:4001:4001::/:/bin/false\n"
    shadow = "root:*:19000:0:99999:7:::\nCN=backup:*:19000:0:99999:7:::\nCN=late:*:19000:0:99999:7::19001:\n"
    identities = ["CN=backup", "CN=late", "CN=nobody", "root"]
    allowed = ask("account required pam_unix.so\n", *identities, passwd=passwd, shadow=shadow)
    assert allowed == "['CN=backup', 'root']"
