"""How a credential is given to a program: in its environment, by the names that programs of its kind read.

What a program can only read from files is in files of mode 0600, in a folder that is there as long as the program.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from ringfence.client.replies import IssuedCredential

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
def applied(credential: IssuedCredential) -> Iterator[dict[str, str]]:
    """Variables for one command, which are good for anything only inside the block.

    `ssh`: `RINGFENCE_SSH_CONFIG`, a file for `ssh -F` that knows the host by the target's id, and what makes git and
    rsync use it. Any other kind: as `environment` has it.
    """
    if credential.kind != "ssh":
        yield environment(credential)
        return
    # In memory where the machine offers that: the key is never on a disk then.
    memory = os.environ.get("XDG_RUNTIME_DIR", "")
    folder_of = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="ringfence-", dir=folder_of) as folder:
        config = ssh_files(credential.value, credential.target, Path(folder))
        use_it = shlex.join(["ssh", "-F", str(config)])
        yield {"RINGFENCE_SSH_CONFIG": str(config), "GIT_SSH_COMMAND": use_it, "RSYNC_RSH": use_it}


def ssh_files(value: str, target: str, folder: Path) -> Path:
    """Write what OpenSSH's client reads into a folder. Returns the file for `ssh -F`, which knows the target's id."""
    given = json.loads(value)
    url = urlsplit(given["url"])
    known = "".join(f"{target} {key}\n" for key in given["host_keys"])
    config = _SSH_CONFIG.format(
        target=target,
        host=url.hostname,
        port=url.port or 22,
        user=url.username,
        folder=str(folder).replace("%", "%%"),
    )
    for name, text in (
        ("key", given["private_key"]),
        ("key-cert.pub", given["certificate"] + "\n"),
        ("known_hosts", known),
        ("config", config),
    ):
        with os.fdopen(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
    return folder / "config"


def environment(credential: IssuedCredential) -> dict[str, str]:
    """Variables for one command.

    `postgres`: what libpq reads (psql, psycopg, asyncpg, JDBC wrappers and others), and `DATABASE_URL`. `redis`:
    `REDIS_URL`. Any other kind: the value as it is, in `RINGFENCE_CREDENTIAL`; of an access token that is the token.
    """
    match credential.kind:
        case "postgres":
            url = urlsplit(credential.value)
            known = {
                "PGHOST": url.hostname,
                "PGPORT": str(url.port) if url.port else None,
                "PGUSER": unquote(url.username or ""),
                "PGPASSWORD": unquote(url.password or ""),
                "PGDATABASE": unquote(url.path.removeprefix("/")),
                "PGSSLMODE": dict(parse_qsl(url.query)).get("sslmode"),
                "DATABASE_URL": credential.value,
            }
            return {name: value for name, value in known.items() if value}
        case "redis":
            return {"REDIS_URL": credential.value}
        case _:
            return {"RINGFENCE_CREDENTIAL": credential.value}
