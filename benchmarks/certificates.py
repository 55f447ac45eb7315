"""A certificate authority for an hour: what servers and clients of the TLS rows show each other."""

from __future__ import annotations

import subprocess
from pathlib import Path

from servers import BenchError, peer

_TEMPLATES = {
    "ca": "cn = benchmark\nca\ncert_signing_key\n",
    "server": "cn = localhost\ndns_name = localhost\nip_address = 127.0.0.1\ntls_www_server\nsigning_key\n",
    "client": "cn = client\ntls_www_client\nsigning_key\n",
}


def make(directory: Path) -> Path:
    """Make a directory as QEMU, nbdkit and libnbd want it; return it."""
    directory.mkdir(parents=True)
    for name, template in _TEMPLATES.items():
        (directory / f"{name}.template").write_text(template + "expiration_days = 1\n", encoding="utf-8")
        key, certificate = directory / f"{name}-key.pem", directory / f"{name}-cert.pem"
        _certtool("--generate-privkey", "--key-type=rsa", "--bits=2048", f"--outfile={key}")
        how = ["--generate-self-signed"]
        if name != "ca":
            ca = directory / "ca"
            how = ["--generate-certificate", f"--load-ca-certificate={ca}-cert.pem", f"--load-ca-privkey={ca}-key.pem"]
        _certtool(*how, f"--load-privkey={key}", f"--template={directory}/{name}.template", f"--outfile={certificate}")
    return directory


def _certtool(*options: str) -> None:
    done = subprocess.run([*peer("certtool"), *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"certtool: {done.stderr.strip()[-500:]}")
