"""Remedies for each finding: commands of Ringfence to paste, and what to rotate or delete.

Names in files are hostile: a command contains a host or an account only if it is a plain one. Otherwise the command has
a capital word for a person to replace.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from typing import Final

from ringfence.scan import kinds
from ringfence.scan.findings import Finding, Pattern, Remedy
from ringfence.scan.kinds import Template

_HOST: Final = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(:\d{1,5})?\Z")
_ROLE: Final = re.compile(r"arn:aws[a-z-]*:(?:iam|sts)::\d{12}:[A-Za-z0-9+=,.@_/-]{1,200}\Z")
_NOT_IN_IDS: Final = re.compile(r"[^a-z0-9]+")
_PORTS: Final = {"mysql": 3306, "postgres": 5432, "redis": 6379, "ssh": 22}
_FORMAT_TEMPLATES: Final = {one.kind.id: one.kind.template for one in kinds.FORMATS}
_SERVICE_TEMPLATES: Final[dict[str, Template]] = {
    "GitHub": "github-api", "PostgreSQL": "postgres", "MySQL": "mysql", "MariaDB": "mysql", "Redis": "redis",
    "Valkey": "redis", "SSH": "ssh",
    "AWS": "federation",
    "Google Cloud": "federation", "Azure": "federation", "Kubernetes": "federation", "Vault": "federation",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Target:
    id: str
    options: tuple[str, ...]
    allow: str


def is_adoptable(reader: str, pattern: Pattern, service: str | None, kind: str) -> bool:
    """Return whether `ringfence adopt` replaces such a finding: a key of an HTTP API, or a password of `.pgpass`.

    `kind`: the id of the kind of credential.
    """
    if reader == "pgpass":
        return True
    return (
        (reader in ("dotenv", "shell") or reader.startswith("mcp-"))
        and pattern in (Pattern.STATIC_KEY, Pattern.USER_TOKEN)
        and _template_of(service, kind) in ("http", "github-api")
    )


def remedies_of(finding: Finding, kind: kinds.Kind | None = None) -> tuple[Remedy, ...]:
    """Return the steps in order: first the replacement of the credential, then its revocation."""
    path = finding.place.path
    adoptable = is_adoptable(finding.reader, finding.pattern, finding.opens.service, finding.kind)
    steps = (
        [
            Remedy(
                "replace it, with the key files of operator, sponsor and user; the command says what else it needs, "
                "and asks before its first step",
                _command("ringfence", "adopt", _expanded(path), "--field", finding.place.field),
            ),
            _end_of(finding),
        ]
        if adoptable and _is_own_path(path)
        else [*_replacement_of(finding), _end_of(finding), _deletion_of(finding)]
    )
    if finding.readable_by in ("group", "everyone") and _is_own_path(path):
        steps.append(
            Remedy("until then, close the file to others", _command("chmod", "600", _expanded(path)))
        )
    return tuple(steps)


def _replacement_of(finding: Finding) -> list[Remedy]:
    """Return the steps from the target to the task, where each is a command of one person."""
    target = _target_of(finding)
    agent = _agent_of(finding)
    service = finding.opens.service or "the service"
    return [
        Remedy(
            f"as an operator, make {service} a target",
            _command("ringfence", "target", "add", target.id, "--description", _description(finding), *target.options),
        ),
        Remedy(
            "as an operator, entitle the person whom the agent works for; narrow it to what the agent needs",
            _command("ringfence", "user", "set", "USER", "--add", target.allow, "--yes"),
        ),
        Remedy(
            "as a sponsor, register the agent, with the most it may ever hold",
            _command(
                "ringfence", "agent", "register", agent, "--description", f"acts on {target.id}", "--allow",
                target.allow, "--new-key", f"{agent}.json",
            ),
        ),
        Remedy(
            "as that person, assign a task that ends",
            _command(
                "ringfence", "task", "assign", agent, "--purpose", f"what {agent} does on {target.id}", "--allow",
                target.allow, "--for", "1h",
            ),
        ),
    ]  # fmt: skip


def _end_of(finding: Finding) -> Remedy:
    kind = _KINDS.get(finding.kind)
    if kind is not None and kind.revoke_command:
        return Remedy("end the old credential", kind.revoke_command)
    if kind is not None and kind.revoke_url:
        return Remedy("end the old credential where it was issued", None, kind.revoke_url)
    if finding.pattern is Pattern.PASSWORD:
        return Remedy("change the password at the service: whoever read the file knows it")
    if finding.kind.startswith("ssh-key"):
        return Remedy("remove the public key from every authorized_keys")
    if finding.reader == "keyring" and finding.fingerprint is None:
        return Remedy("end in it what agents must not use")
    if finding.kind == kinds.SSH_AGENT.id:
        return Remedy("start agents without the socket", "env -u SSH_AUTH_SOCK AGENT-COMMAND")
    return Remedy("revoke the old credential at its issuer: whoever read the file has it")


def _deletion_of(finding: Finding) -> Remedy:
    place = finding.place
    if finding.reader == "environment":
        name = place.field if re.fullmatch(r"[A-Za-z_]\w{0,100}", place.field) else "NAME"
        return Remedy("take it out of the environment", f"unset {name}")
    if finding.reader == "process":
        return Remedy("start these processes without the variable, by `ringfence run`")
    if finding.reader == "cloud-metadata":
        return Remedy(
            "take the role from the machine, or run agents in a sandbox that cannot reach the metadata service"
        )
    if finding.reader == "keyring" and finding.fingerprint is None:
        return Remedy("run agents by `ringfence run`, which shows them no keyring")
    if finding.reader == kinds.SSH_AGENT.id:
        return Remedy("run agents by `ringfence run`, which hands on no socket")
    return Remedy(
        f"delete {place.field} from {place}, and from the history of the repository if it was committed"
    )


def _template_of(service: str | None, kind: str) -> Template:
    return _SERVICE_TEMPLATES.get(service or "") or _FORMAT_TEMPLATES.get(kind, "http")


def _target_of(finding: Finding) -> _Target:
    opens = finding.opens
    template = _template_of(opens.service, finding.kind)
    host = opens.host if opens.host and _HOST.match(opens.host) else None
    id = _id_of(_target_name(finding, host))
    if template == "github-api":
        allow = json.dumps({"target": id, "verbs": ["contents:read"], "resources": ["repos/**"]})
        options: tuple[str, ...] = ("--template", "github-api")
        if host and host != "api.github.com":
            options = (*options, "--setting", f"url=https://{host}")
        return _Target(id, options, allow)
    if template in _PORTS:
        address = host or "HOST"
        if ":" not in address:
            address += f":{_PORTS[template]}"
        return _Target(id, ("--template", template, "--address", address), f"{id}:read:**")
    if template == "federation":
        return _Target(
            id, ("--template", "federation", *_audience(finding, host), "--max-ttl", "5m"), f"{id}:assume:**"
        )
    return _Target(
        id, ("--template", "http", "--setting", f"url=https://{host or 'HOST'}"), f"{id}:read:path/**"
    )


def _target_name(finding: Finding, host: str | None) -> str:
    """Return a target's name: the service, and the host or account that distinguishes it from others of the service."""
    service, kind = finding.opens.service, _KINDS.get(finding.kind)
    if host and (kind is None or host != kind.host):
        name = host.partition(":")[0]
        return name if service in (None, "HTTP") else f"{service} {name}"
    if service == "AWS" and finding.opens.account:
        return f"{service} {finding.opens.account}"
    return service or "service"


def _audience(finding: Finding, host: str | None) -> tuple[str, ...]:
    service, opens = finding.opens.service, finding.opens
    if service == "AWS":
        role = opens.role if opens.role and _ROLE.match(opens.role) else None
        account = opens.account if opens.account and re.fullmatch(r"\d{12}", opens.account) else "ACCOUNT"
        return ("--audience", role or f"arn:aws:iam::{account}:role/ROLE")
    if service == "Azure":
        return ("--audience", "api://AzureADTokenExchange", "--setting", "alg=RS256")
    return ("--audience", f"https://{host or 'HOST'}")


def _agent_of(finding: Finding) -> str:
    for user in finding.used_by:
        client, colon, _ = user.partition(": MCP server ")
        if colon or user in _AGENTS:
            return _id_of(client)
    return "my-agent"


def _agent_names() -> frozenset[str]:
    from ringfence.scan.readers import FILE_READERS

    return frozenset(reader.user for reader in FILE_READERS if reader.user)


_AGENTS: Final = _agent_names() | {"GitHub Copilot"}
_KINDS: Final = {one.id: one for one in vars(kinds).values() if isinstance(one, kinds.Kind)} | {
    one.kind.id: one.kind for one in kinds.FORMATS
}


def _id_of(text: str) -> str:
    id = _NOT_IN_IDS.sub("-", text.lower()).strip("-")[:40].strip("-")
    if not id or id == "ringfence":
        return "service"
    return id if id[0].isalpha() else f"t-{id}"


def _description(finding: Finding) -> str:
    service = finding.opens.service or "service"
    return (
        f"{service}, instead of an inherited credential"
        if re.fullmatch(r"[\w .-]{1,60}", service)
        else "a service"
    )


def _command(*words: str) -> str:
    return " ".join(map(shlex.quote, words))


def _is_own_path(path: str) -> bool:
    return "*" not in path and "…" not in path


def _expanded(path: str) -> str:
    import os

    return os.path.expanduser(path)
