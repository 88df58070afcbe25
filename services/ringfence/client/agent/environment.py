"""How a credential is given to a program: in its environment, by the names that programs of its kind read.

What a program can only read from files is in files of mode 0600, in a folder that is there as long as the program.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import parse_qsl, unquote, urlsplit

from ringfence.client.agent.credentials import GatewayCredential, IssuedCredential
from ringfence.client.agent.ssh_files import ssh_client


@contextlib.contextmanager
def applied(credential: IssuedCredential) -> Iterator[dict[str, str]]:
    """Variables for one command, which are good for anything only inside the block.

    `ssh`: `RINGFENCE_SSH_CONFIG`, a file for `ssh -F` that knows the host by the target's id, and what makes git and
    rsync use it. Any other kind: as `environment` has it.
    """
    if credential.kind != "ssh" or isinstance(credential, GatewayCredential):
        yield environment(credential)
        return
    with ssh_client(credential.value, credential.target) as use:
        use_it = shlex.join(use)
        yield {"RINGFENCE_SSH_CONFIG": use[-1], "GIT_SSH_COMMAND": use_it, "RSYNC_RSH": use_it}


def environment(credential: IssuedCredential) -> dict[str, str]:
    """Variables for one command.

    `postgres`: what libpq reads (psql, psycopg, asyncpg, JDBC wrappers and others), and `DATABASE_URL`. `redis`:
    `REDIS_URL`. Any other kind: the value as it is, in `RINGFENCE_CREDENTIAL`; of an access token that is the token. A
    lease for the gateway: its handle in `RINGFENCE_LEASE`, whatever its kind.
    """
    if isinstance(credential, GatewayCredential):
        return {"RINGFENCE_LEASE": credential.handle}
    return VARIABLES.get(credential.kind, _value)(credential.value)


def _value(value: str) -> dict[str, str]:
    return {"RINGFENCE_CREDENTIAL": value}


def _libpq(value: str) -> dict[str, str]:
    url = urlsplit(value)
    known = {
        "PGHOST": url.hostname,
        "PGPORT": str(url.port) if url.port else None,
        "PGUSER": unquote(url.username or ""),
        "PGPASSWORD": unquote(url.password or ""),
        "PGDATABASE": unquote(url.path.removeprefix("/")),
        "PGSSLMODE": dict(parse_qsl(url.query)).get("sslmode"),
        "DATABASE_URL": value,
    }
    return {name: text for name, text in known.items() if text}


def _redis(value: str) -> dict[str, str]:
    return {"REDIS_URL": value}


VARIABLES: Mapping[str, Callable[[str], dict[str, str]]] = {
    "jwt": _value,
    "postgres": _libpq,
    "redis": _redis,
    "ssh": _value,
}
"""By kind, the variables that a value is given in: every kind of `CREDENTIAL_KINDS` that is handed out."""
