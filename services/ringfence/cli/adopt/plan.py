"""The plan of a new adoption, from a credential in a file and what the person typed."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringfence.backends.database import DatabaseLogin
from ringfence.backends.secret_sources import BackendSettings
from ringfence.cli.adopt.adoption import (
    OTHER,
    POSTGRES,
    PROVIDERS,
    AdoptFolder,
    Adoption,
    AdoptStoppedError,
    Provider,
    WrappedServer,
)
from ringfence.cli.adopt.files import PLACEHOLDER, credentials_in, identity_of, server_entry, server_of
from ringfence.cli.adopt.steps import Place, Role
from ringfence.cli.shared.arguments import parse_permission, parse_scope, write_permission
from ringfence.cli.shared.mcp_tools import (
    list_tools,
    plain_tools,
    target_options,
    tool_permissions,
    with_server,
)
from ringfence.cli.shared.options import duration_s, settings
from ringfence.client.reports.read_api import ReadApi
from ringfence.kernel.base.settings import load
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Permission
from ringfence.scan import kinds
from ringfence.scan.findings import Finding, Pattern, SecretValue
from ringfence.scan.readers.database_clients import PgpassReader

_KINDS = {one.kind.id: one.kind for one in kinds.FORMATS}


@dataclass(frozen=True, slots=True)
class Typed:
    """Options that the person typed. None of them comes from a scanned file."""

    field: str | None
    target: str | None
    url: str | None
    trial: str | None
    allow: tuple[str, ...]
    agent: str
    agent_key: Path | None
    on_behalf_of: str | None
    lasts: str
    vault: str | None
    vault_token: Path | None
    wrap: str | None
    """The command of an MCP server."""
    mounts: tuple[str, ...]


def planned(file: Path, typed: Typed, folder: AdoptFolder, keys: Mapping[Role, Path]) -> Adoption:
    """Return the adoption of a credential: a new one, or the one of this target that has begun.

    Raises AdoptStoppedError where something is missing that only the person can say.
    """
    path = file.resolve()
    finding, secret = _chosen(path, typed.field, folder)
    kind = _KINDS.get(finding.kind)
    database = finding.reader == PgpassReader.name
    if not database and (
        finding.pattern is Pattern.PASSWORD or (kind and kind.template not in ("http", "github-api"))
    ):
        raise AdoptStoppedError(
            f"a {finding.title} has no way here, only keys of HTTP APIs and the passwords of .pgpass; see the steps "
            "of: ringfence scan --details"
        )
    provider = POSTGRES if database else PROVIDERS.get(kind.service or "", OTHER) if kind else OTHER
    target = typed.target or provider.target
    if (begun := folder.load(target) if target else None) is not None:
        if begun.exposed != finding.fingerprint:
            raise AdoptStoppedError(f"another credential became target {target}; name another --target")
        return begun
    url = typed.url or provider.url
    if not target or not url:
        missing = (
            "--target, --url postgresql://USER@HOST/DATABASE" if database else "--target, --url and --trial"
        )
        raise AdoptStoppedError(f"{finding.title} has no template; type {missing}, as it is not known")
    tools = f"{target}-tools"
    of_tools = tuple(one for one in typed.allow if typed.wrap and one.startswith(f"{tools}:"))
    allow = _allow(target, provider, tuple(one for one in typed.allow if one not in of_tools))
    add, allowed = provider.add, f"GET {typed.trial}" if typed.trial else provider.allowed
    if database:
        add, allowed = (*add, "--address", _address(url)), _statement(allow)
    if not allowed:
        raise AdoptStoppedError("name a path that a GET may read, for the trial: --trial PATH")
    places = load(BackendSettings).secrets
    if places is None:
        raise AdoptStoppedError(
            "there is no folder for secrets; set RINGFENCE_BACKENDS_SECRETS for issuer, revoker, gateway and here"
        )
    user = typed.on_behalf_of or _user_of(keys)
    place = places.absolute() / (f"{target}.vault" if typed.vault else target)
    token = typed.vault_token.absolute() if typed.vault_token else None
    key = (typed.agent_key or Path(f"{typed.agent}.json")).absolute()
    duration_s(typed.lasts)
    assert finding.fingerprint is not None
    identity, data, _ = identity_of(path, folder.fingerprinter)
    server = server_of(data, secret.reveal())
    wrapped = None
    if typed.wrap is not None:
        if not server:
            raise AdoptStoppedError(f"no MCP server that {path} starts has this credential; leave --wrap out")
        _check_others(path, server, data, secret, folder)
        wrapped = _wrapped(tools, typed, server_entry(json.loads(_without(data, secret)), server), of_tools)
    beside = Path(sys.executable).with_name("ringfence")
    adoption = Adoption(
        target=target, kind="postgres" if database else "http", title=finding.title, file=path,
        reader=finding.reader, field=finding.place.field,
        exposed=finding.fingerprint, content=identity, server=server, wrapped=wrapped,
        program=str(beside) if beside.exists() else "ringfence",
        place=place, vault=typed.vault, vault_token=token, url=url.rstrip("/"), typed=typed.url is not None, add=add,
        allow=allow, agent=typed.agent, agent_key=key, new_agent=True, user=user,
        lasts=typed.lasts, allowed=allowed, refused=provider.refused, headers=dict(provider.headers),
        rotate=kind.revoke_url if kind else None, started_s=int(time.time()),
    )  # fmt: skip
    _check_records(Place(adoption, folder, keys))
    return adoption


def _without(data: bytes, secret: SecretValue) -> bytes:
    return data.replace(secret.reveal().encode(), PLACEHOLDER.encode())


def _check_others(
    path: Path, server: tuple[str, ...], data: bytes, secret: SecretValue, folder: AdoptFolder
) -> None:
    """Raises AdoptStoppedError if the server has another credential: it would get into arguments and state."""
    entry = json.dumps(server_entry(json.loads(data), server), ensure_ascii=False)
    for finding, other in credentials_in(path, folder.fingerprinter):
        if other.reveal() != secret.reveal() and other.reveal() in entry:
            raise AdoptStoppedError(
                f"{server[-1]} has another credential, {finding.place.field}; --wrap takes servers with one"
            )


def _wrapped(target: str, typed: Typed, entry: Mapping[str, Any], allow: tuple[str, ...]) -> WrappedServer:
    """Return the server as it starts in a sandbox; starts it once outside, with an empty environment, for its tools.

    `entry`: of the file, without the credential. `allow`: permissions of its tools that the person typed.
    Raises AdoptStoppedError, and InvalidCallError if it lists no tools.
    """
    command = tuple(shlex.split(str(typed.wrap)))
    if command != (entry["command"], *entry.get("args", [])):
        raise AdoptStoppedError(
            f"--wrap is another command than that in the file; type it as it is there, and {PLACEHOLDER} for the "
            "credential"
        )
    if not all(Path(one).is_absolute() for one in typed.mounts):
        raise AdoptStoppedError(
            "write each --mount as an absolute path: the client may start the server elsewhere"
        )
    key_file = settings().runner_key_file
    if key_file is None:
        raise AdoptStoppedError(
            "--wrap needs this machine's runner; set RINGFENCE_RUNNER_KEY_FILE, and see docs/runs.md"
        )
    tools = plain_tools(with_server(command, list_tools, {"PATH": os.environ.get("PATH", os.defpath)}))
    variables = {
        name: value for name, value in (entry.get("env") or {}).items() if not name.startswith("RINGFENCE_")
    }
    return WrappedServer(
        target=target,
        add=target_options(tools),
        allow=tuple(
            dict.fromkeys(
                (
                    *tool_permissions(target, tools),
                    *map(write_permission, parse_scope(allow, may_be_empty=True)),
                )
            )
        ),
        tools=tuple(one.name for one in tools if one.reads),
        command=command,
        mounts=typed.mounts,
        variables=tuple(f"{name}={value}" for name, value in variables.items()),
        runner=SigningKey.load(key_file).id.rpartition("/")[2],
    )


def _check_records(place: Place) -> None:
    """Note whether the agent is there already, and the target was. Raises AdoptStoppedError if the target is."""
    adoption = place.adoption

    def status_of(target: str) -> Callable[[ReadApi], Awaitable[str]]:
        async def status(api: ReadApi) -> str:
            return str((await api.record("target", target))["state"]["status"])

        return status

    async def agent(api: ReadApi) -> str:
        return str((await api.record("agent", adoption.agent))["id"])

    for one in (adoption, adoption.wrapped):
        before = place.found(status_of(one.target)) if one else None
        if one and before == "active":
            raise AdoptStoppedError(f"there is a target {one.target} already; name another --target")
        if one and before is not None:
            one.add = (*one.add, "--yes")  # it was removed, and nothing is there to be replaced
    adoption.new_agent = place.found(agent) is None
    if not adoption.new_agent and adoption.wrapped:
        raise AdoptStoppedError(
            f"agent {adoption.agent} is registered; a wrapped server is an agent of its own: --agent"
        )
    if not adoption.new_agent and not adoption.agent_key.exists():
        raise AdoptStoppedError(f"agent {adoption.agent} is registered; name its key file with --agent-key")


def _chosen(path: Path, field: str | None, folder: AdoptFolder) -> tuple[Finding, SecretValue]:
    found = list(credentials_in(path, folder.fingerprinter))
    chosen = [pair for pair in found if field in (None, pair[0].place.field)]
    if len(chosen) == 1:
        return chosen[0]
    fields = ", ".join(sorted({one.place.field for one, _ in found}))
    if not found:
        raise AdoptStoppedError(f"there is no credential in {path} that the scan knows")
    raise AdoptStoppedError(f"say which credential of {path} with --field: {fields}")


def _user_of(keys: Mapping[Role, Path]) -> str:
    if (key := keys.get("user")) is None:
        raise AdoptStoppedError("say whom the agent works for: --user KEYFILE, or --on-behalf-of USER")
    return SigningKey.load(key).id.rpartition("/")[2]


def _allow(target: str, provider: Provider, typed: tuple[str, ...]) -> tuple[str, ...]:
    """Return what task, ceiling and entitlement allow: as typed, else as the template usually has it; and the trial."""

    def permission(verbs: tuple[str, ...], resource: str) -> Permission:
        return Permission(target=target, verbs=verbs, resources=(resource,))

    if not typed and provider.scope is None:
        raise AdoptStoppedError(
            f"name what the agent may use: --allow '{target}:{provider.example}'; repeatable"
        )
    scope = list(parse_scope(typed)) if typed else [permission(*provider.scope)] if provider.scope else []
    if any(one.target != target for one in scope):
        raise AdoptStoppedError(f"--allow names another target than {target}")
    if provider.reads is not None:
        scope.append(permission(*provider.reads))
    return tuple(dict.fromkeys(map(write_permission, scope)))


def _address(url: str) -> str:
    """Return the `host:port` of a database for agents. Raises AdoptStoppedError for other URLs, or a password."""
    try:
        login = DatabaseLogin.parse(url, ("postgresql", "postgres"), 5432)
    except ValueError:
        login = None
    if login is None or login.password or not login.database or login.host.startswith("/"):
        raise AdoptStoppedError("type --url as postgresql://USER@HOST/DATABASE, without the password")
    return f"[{login.host}]:{login.port}" if ":" in login.host else f"{login.host}:{login.port}"


def _statement(allow: tuple[str, ...]) -> str:
    """Return the statement of the trial that must succeed: a row of the first table that may be read."""
    for permission in map(parse_permission, allow):
        for resource in permission.resources:
            names = resource.split("/")
            if {"read", "select"} & set(permission.verbs) and len(names) == 3 and "*" not in resource:
                schema, table = (name.replace('"', '""') for name in names[1:])
                return f'SELECT FROM "{schema}"."{table}" LIMIT 1'
    return "SELECT"
