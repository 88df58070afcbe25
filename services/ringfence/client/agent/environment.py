"""Passes a credential to a program in environment variables that programs of its kind read.

What a program only reads from files is written with mode 0600 to a folder that is deleted when the program ends.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from ringfence.client.agent.credentials import GatewayCredential, IssuedCredential
from ringfence.client.agent.ssh_files import ssh_client
from ringfence.client.settings import ClientSettings

_IDENTITIES = re.compile(
    r"RINGFENCE_(?!KAFKA_)(IDENTITY|AGENT|ATTEST|RUN_INSTANCE|\w*KEY_(FILES?|DIR)|\w*TOKENS?(_FILE)?)",
    re.IGNORECASE,
)
"""The settings that name a key, a token or an identity, but for those of the connection to Kafka."""


def own_environment(
    inherited: Mapping[str, str],
    settings: ClientSettings,
    key: Path | None,
    attest: str | None,
    agent_id: str | None,
) -> dict[str, str]:
    """Return the environment for a command of an agent: `inherited`, with no identity but the agent's own.

    `key`, `attest` and `agent_id` are those of `Agent.connect`, whose choice this follows.
    """
    own: dict[str, Any]
    if key is None and attest is None and settings.run_instance is not None:
        own = {"RUN_INSTANCE": settings.run_instance, "AGENT": agent_id or settings.agent}
    elif key is None and (attest or settings.attest):
        own = {
            "ATTEST": attest or settings.attest,
            "AGENT": agent_id or settings.agent,
            "ATTEST_KEY_FILE": settings.attest_key_file,
        }
    else:
        file = key or settings.identity
        own = {"IDENTITY": file and file.absolute()}
    kept = {name: value for name, value in inherited.items() if not _IDENTITIES.fullmatch(name)}
    return kept | {f"RINGFENCE_{name}": str(value) for name, value in own.items() if value is not None}


@contextlib.contextmanager
def applied(credential: IssuedCredential) -> Iterator[dict[str, str]]:
    """Environment variables for one command, valid inside the block.

    `ssh`: `RINGFENCE_SSH_CONFIG`, a file for `ssh -F` in which the host has the target's id, and variables that make
        git and rsync use it. Any other kind: see `environment`.
    """
    if credential.kind != "ssh" or isinstance(credential, GatewayCredential):
        yield environment(credential)
        return
    with ssh_client(credential.value, credential.target) as use:
        use_it = shlex.join(use)
        yield {"RINGFENCE_SSH_CONFIG": use[-1], "GIT_SSH_COMMAND": use_it, "RSYNC_RSH": use_it}


def environment(credential: IssuedCredential) -> dict[str, str]:
    """Environment variables for one command, by the credential's kind.

    `postgres`: what libpq reads (psql, psycopg, asyncpg, JDBC wrappers and others), and `DATABASE_URL`. `redis`:
        `REDIS_URL`. Any other kind: the value, e.g. the access token, in `RINGFENCE_CREDENTIAL`. A gateway lease of any
        kind: its handle in `RINGFENCE_LEASE`.
    """
    if isinstance(credential, GatewayCredential):
        return {"RINGFENCE_LEASE": credential.handle}
    return VARIABLES.get(credential.kind, _value)(credential.value)


def _value(value: str) -> dict[str, str]:
    return {"RINGFENCE_CREDENTIAL": value}


def _libpq(value: str) -> dict[str, str]:
    url = urlsplit(value)
    variables = {
        "PGHOST": url.hostname,
        "PGPORT": str(url.port) if url.port else None,
        "PGUSER": unquote(url.username or ""),
        "PGPASSWORD": unquote(url.password or ""),
        "PGDATABASE": unquote(url.path.removeprefix("/")),
        "PGSSLMODE": dict(parse_qsl(url.query)).get("sslmode"),
        "DATABASE_URL": value,
    }
    return {name: text for name, text in variables.items() if text}


def _redis(value: str) -> dict[str, str]:
    return {"REDIS_URL": value}


VARIABLES: Mapping[str, Callable[[str], dict[str, str]]] = {
    "jwt": _value,
    "postgres": _libpq,
    "redis": _redis,
    "ssh": _value,
}
"""By kind, the function that makes the variables: every kind in `CREDENTIAL_KINDS` that is delivered to agents."""
