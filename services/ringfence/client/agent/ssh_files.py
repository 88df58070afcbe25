"""The files that OpenSSH's client needs: key, certificate and host keys, in a temporary folder."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from ringfence.kernel.base.private_files import open_private

_SSH_CONFIG = """\
Host {target}
    HostName {host}
    Port {port}
    User {user}
    HostKeyAlias {target}
    IdentityFile "{folder}/key"
    CertificateFile "{folder}/key-cert.pub"
    IdentitiesOnly yes
    IdentityAgent none
    UserKnownHostsFile "{folder}/known_hosts"
    GlobalKnownHostsFile none
    StrictHostKeyChecking yes
    PreferredAuthentications publickey
    BatchMode yes
"""


@contextlib.contextmanager
def ssh_client(value: str, target: str) -> Iterator[list[str]]:
    """Yield `ssh -F FILE`, in which the host has the target's id. The files are deleted at the end of the block."""
    # In memory where the machine offers that, so that the key is never on a disk.
    memory = os.environ.get("XDG_RUNTIME_DIR", "")
    folder_of = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="ringfence-", dir=folder_of) as folder:
        yield ["ssh", "-F", str(ssh_files(value, target, Path(folder)))]


def ssh_files(value: str, target: str, folder: Path) -> Path:
    """Write the files of an SSH credential to `folder`. Returns the config file for `ssh -F`."""
    credential = json.loads(value)
    url = urlsplit(credential["url"])
    known_hosts = "".join(f"{target} {key}\n" for key in credential["host_keys"])
    config = _SSH_CONFIG.format(
        target=target,
        host=url.hostname,
        port=url.port or 22,
        user=url.username,
        folder=str(folder).replace("%", "%%"),
    )
    for name, text in (
        ("key", credential["private_key"]),
        ("key-cert.pub", credential["certificate"] + "\n"),
        ("known_hosts", known_hosts),
        ("config", config),
    ):
        with os.fdopen(open_private(folder / name, os.O_WRONLY | os.O_EXCL), "w") as file:
            file.write(text)
    return folder / "config"
