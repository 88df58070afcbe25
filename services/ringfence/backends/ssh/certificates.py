"""OpenSSH user certificates: translates a scope into rights at a host, and signs a certificate for them.

A resource is `user` or `user/command`. `read` and `write` are rights on a command. The host's administrator names
each command, and says which of the two it is. `shell` (every command), `terminal` and `forward` (TCP connections to
and from wherever the host can) are rights on the user. A scope that a certificate cannot express exactly is refused,
never rounded up.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    SSHCertificateBuilder,
    SSHCertificateType,
)

from ringfence.backends.ssh.host_helper import COMMAND_VERBS, KEY_ID, PRINCIPAL, WAYS, serial_of
from ringfence.backends.target_settings import InexactError
from ringfence.messages.base import Permission
from ringfence.model.scope.globs import Glob, ScopeError, parse_glob

VERBS: Final = (*COMMAND_VERBS, *WAYS)
MAX_COMMANDS: Final = 64
_USER: Final = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_COMMAND: Final = re.compile(r"[A-Za-z0-9*][A-Za-z0-9._*-]{0,63}")

Rights = Mapping[str, Mapping[str, Sequence[str]]]
"""The host's offer by user: the names of its commands under `read` and `write`, its kinds of access under `may`."""


@dataclass(frozen=True, slots=True)
class CommandRequest:
    verb: str
    glob: Glob

    def __str__(self) -> str:
        return f"{self.verb} {self.glob.text!a}"


@dataclass(frozen=True, slots=True)
class CommandPlan:
    """A parsed scope: the user, and the requested rights."""

    user: str
    requests: tuple[CommandRequest, ...]


@dataclass(frozen=True, slots=True)
class AllowedCommands:
    """The rights that a certificate grants."""

    user: str
    commands: tuple[tuple[str, str], ...]
    """(verb, name) of each command."""
    login_kinds: frozenset[str]


def plan(scope: Iterable[Permission]) -> CommandPlan:
    """Parse a scope without access to the host. Raises InexactError."""
    requests = [
        CommandRequest(_checked_verb(verb), _resource_glob(resource))
        for permission in scope
        for resource in permission.resources
        for verb in permission.verbs
    ]
    if not requests:
        raise InexactError("the scope is empty")
    for request in requests:
        if not request.glob.reaches(2 if request.verb in COMMAND_VERBS else 1):
            what = "command, user/command" if request.verb in COMMAND_VERBS else "user"
            raise InexactError(f"{request}: {request.verb} is a right on a {what}, which this cannot name")
    users = {request.glob.segments[0] for request in requests}
    if len(users) > 1:
        raise InexactError("a credential is for one user: ask for one for each")
    verbs = {request.verb for request in requests}
    if "shell" in verbs and verbs & set(COMMAND_VERBS):
        raise InexactError("shell is every command, not those named beside it: ask for one or the other")
    return CommandPlan(users.pop(), tuple(dict.fromkeys(requests)))


def _checked_verb(verb: str) -> str:
    if verb not in VERBS:
        raise InexactError(f"the verb {verb!a} is none: write one of {', '.join(VERBS)}")
    return verb


def _resource_glob(text: str) -> Glob:
    try:
        glob = parse_glob(text)
    except ScopeError as error:
        raise InexactError(str(error)) from None
    user, *rest = glob.segments
    if "*" in user:
        raise InexactError(f"{text!a} names no user: write user, or user/command")
    if not _USER.fullmatch(user):
        raise InexactError(f"{text!a}: {user!a} is no name of a user")
    for segment in rest:
        if not _COMMAND.fullmatch(segment):
            raise InexactError(f"{text!a}: {segment!a} is no name of a command")
    return glob


def allowed(command_plan: CommandPlan, host_rights: Rights) -> AllowedCommands:
    """Return what a plan means at a host with these rights. Raises InexactError if a request matches nothing there."""
    if command_plan.user not in host_rights:
        raise InexactError(f"no certificate can be for user {command_plan.user!a} there")
    has = host_rights[command_plan.user]
    commands: dict[tuple[str, str], None] = {}
    login_kinds: set[str] = set()
    for request in command_plan.requests:
        if request.verb in WAYS:
            if request.verb not in has["may"]:
                raise InexactError(f"{request}: the host does not allow it")
            login_kinds.add(request.verb)
            continue
        matching = [name for name in has[request.verb] if request.glob.matches(f"{command_plan.user}/{name}")]
        if not matching:
            raise InexactError(f"{request} means no command that the host has now")
        commands.update({(request.verb, name): None for name in matching})
    if len(commands) > MAX_COMMANDS:
        raise InexactError(f"the scope means more than {MAX_COMMANDS} commands: ask for less at a time")
    return AllowedCommands(command_plan.user, tuple(commands), frozenset(login_kinds))


BEFORE_S: Final = 300
"""A certificate is valid from so long before it is made, because the host's clock may be behind."""
_OWN_S: Final = 300
_EXTENSIONS: Final = {"terminal": b"permit-pty", "forward": b"permit-port-forwarding"}


@dataclass(frozen=True, slots=True)
class CertificateTerms:
    """The terms of a lease's certificate: its commands, source addresses and times."""

    name: str
    """The lease's, `<trust domain>.<lease id>`. Serial and key id follow from it."""
    allowed: AllowedCommands
    run: Sequence[str]
    """The command line that the host runs to choose among commands."""
    source_addresses: str | None
    """Networks in CIDR notation, separated by commas; None allows any."""
    began_s: int
    """Start of the lease in seconds since 1970."""
    deadline_s: int


def for_lease(authority: Ed25519PrivateKey, key: Ed25519PublicKey, terms: CertificateTerms) -> str:
    """Return a certificate that allows exactly `terms`, as one line."""
    allowed = terms.allowed
    builder = (
        SSHCertificateBuilder()
        .public_key(key)
        .type(SSHCertificateType.USER)
        .serial(serial_of(terms.name))
        .key_id((KEY_ID + terms.name).encode())
        .valid_principals([(PRINCIPAL + allowed.user).encode()])
        .valid_after(terms.began_s - BEFORE_S)
        .valid_before(terms.deadline_s)
    )
    if "shell" not in allowed.login_kinds:
        granted = [f"{verb}:{command}" for verb, command in allowed.commands]
        forced = shlex.join([*terms.run, allowed.user, *granted])
        builder = builder.add_critical_option(b"force-command", forced.encode())
    if terms.source_addresses is not None:
        builder = builder.add_critical_option(b"source-address", terms.source_addresses.encode())
    for way in sorted(allowed.login_kinds & _EXTENSIONS.keys(), key=_EXTENSIONS.__getitem__):
        builder = builder.add_extension(_EXTENSIONS[way], b"")
    return builder.sign(authority).public_bytes().decode()


def for_ringfence(authority: Ed25519PrivateKey, key: Ed25519PublicKey, user: str, now_s: int) -> str:
    """Return the certificate for Ringfence's own login. Its serial is 0, which the KRL never revokes."""
    return (
        SSHCertificateBuilder()
        .public_key(key)
        .type(SSHCertificateType.USER)
        .serial(0)
        .key_id(b"ringfence")
        .valid_principals([(PRINCIPAL + user).encode()])
        .valid_after(now_s - BEFORE_S)
        .valid_before(now_s + _OWN_S)
        .sign(authority)
        .public_bytes()
        .decode()
    )


def private_text(key: Ed25519PrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()


def public_text(key: Ed25519PublicKey) -> str:
    """Return a public key as one line."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
