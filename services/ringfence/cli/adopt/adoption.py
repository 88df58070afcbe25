"""The plan of one adoption, and how far it has come: a private file for each target, so that it can be continued.

It has no secret, only keyed fingerprints (`ringfence.scan.findings.Fingerprinter`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.private_files import make_private_folder, write_private
from ringfence.messages.codes import Code
from ringfence.scan.findings import Fingerprinter, load_key, state_folder

COPY_DAYS = 7
LEASE_TTL = "1h"
"""Of the agent's program."""


class AdoptStoppedError(RingfenceError):
    """Raised when the next step has to be done by another person, failed, or would not be safe. Says how to go on."""

    code = Code.ADOPT_STOPPED


@dataclass(frozen=True, slots=True)
class Provider:
    """The target of a kind of credential. Its host is from this table, never from a scanned file."""

    target: str
    url: str
    """Empty: the person types it."""
    add: tuple[str, ...]
    """Options of `ringfence target add`."""
    scope: tuple[tuple[str, ...], str] | None = None
    """Verbs and resources where the person types no permission; None: they have to."""
    example: str = "generate:model/NAME"
    """What they type, after the target."""
    reads: tuple[tuple[str, ...], str] | None = None
    """Verbs and resources of the trial, if they are no part of the rest."""
    allowed: str = ""
    """The request of the trial that must succeed; empty: the person types a path. It only reads."""
    refused: str = ""
    """The request that must be refused. It does no harm where it is not."""
    headers: Mapping[str, str] = field(default_factory=dict)


_MODELS = (("read",), "models")
_READS = ("metadata:read", "contents:read", "issues:read", "pulls:read")
PROVIDERS: Mapping[str, Provider] = {
    "OpenAI": Provider(
        "openai",
        "https://api.openai.com",
        ("--template", "model"),
        reads=_MODELS,
        allowed="GET /v1/models",
        refused="GET /v1/files",
    ),
    "Anthropic": Provider(
        "anthropic",
        "https://api.anthropic.com",
        ("--template", "model", "--setting", "auth=header", "--setting", "header=x-api-key"),
        reads=_MODELS,
        allowed="GET /v1/models",
        refused="GET /v1/files",
        headers={"anthropic-version": "2023-06-01"},
    ),
    "GitHub": Provider(
        "github",
        "https://api.github.com",
        ("--template", "github-api"),
        (_READS, "repos/**"),
        refused="GET /user",
    ),
}
"""By the service of the kind of credential, which the scan knows by the credential's format."""
POSTGRES = Provider(
    "",
    "",
    ("--template", "postgres"),
    example="read:DATABASE/SCHEMA/TABLE",
    refused="SELECT FROM pg_catalog.pg_authid LIMIT 1",
)
"""Of passwords in `.pgpass`. The requests of its trial are statements; only a superuser may read `pg_authid`."""
OTHER = Provider("", "", ("--template", "http"), (("read",), "path/**"), refused="OPTIONS /")


class WrappedServer(BaseModel):
    """An MCP server that starts in a sandbox after its adoption, and whose messages the gateway decides."""

    model_config = ConfigDict(extra="forbid")

    target: str
    """Whose rules decide its messages."""
    add: tuple[str, ...]
    """Options of `ringfence target add`."""
    allow: tuple[str, ...]
    tools: tuple[str, ...]
    """What the trial must list."""
    command: tuple[str, ...]
    """As the person typed it."""
    mounts: tuple[str, ...]
    variables: tuple[str, ...]
    """Of its environment, as `NAME=VALUE`, without a secret."""
    runner: str
    """The name of this machine's runner."""


class Adoption(BaseModel):
    """One adoption. Paths are absolute."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    target: str
    kind: Literal["http", "postgres"] = "http"
    """Of the target."""
    title: str
    """Of the credential."""
    file: Path
    reader: str
    field: str
    exposed: str
    """The fingerprint of the credential."""
    content: str
    """The identity of the file: inode and fingerprint of what is in it."""
    place: Path
    """The file of Ringfence's own secret for the target, or of the reference to it in Vault."""
    vault: str | None = None
    """Where the secret is in Vault, as `MOUNT/data/PATH#FIELD`; None: in the file."""
    vault_token: Path | None = None
    """The file with the person's token for Vault; None: `~/.vault-token`."""
    url: str
    """Of the server, without a password."""
    typed: bool
    """True if the person typed the URL; otherwise it is the template's."""
    add: tuple[str, ...]
    allow: tuple[str, ...]
    agent: str
    agent_key: Path
    new_agent: bool
    user: str
    lasts: str
    allowed: str
    refused: str
    headers: dict[str, str]
    rotate: str | None
    """The page where the provider's key is rotated."""
    server: tuple[str, ...] = ()
    """Where the file has the command of an MCP server with the credential: the names of its tables."""
    wrapped: WrappedServer | None = None
    """None: the server starts as it did, with a lease, and outside of a sandbox."""
    program: str = "ringfence"
    """How the server's client starts this program."""
    task: str | None = None
    done: tuple[str, ...] = ()
    started_s: int = 0

    @property
    def purpose(self) -> str:
        """Of the task, and of the leases."""
        return f"use {self.target} without its key"

    @property
    def granted(self) -> tuple[str, ...]:
        """The permissions of entitlement, ceiling and task."""
        return (*self.allow, *(self.wrapped.allow if self.wrapped else ()))

    def server_launch(self, this: Sequence[str]) -> tuple[str, ...]:
        """Return the command that starts the wrapped server, in its place."""
        assert self.wrapped is not None
        return (
            *this, "mcp", "wrap", "--task", str(self.task), "--target", self.wrapped.target,
            *each("--allow", self.granted), *each("--mount", self.wrapped.mounts),
            *each("--env", self.wrapped.variables), "--ttl", LEASE_TTL, "--", *self.wrapped.command,
        )  # fmt: skip

    def launch(self, ttl: str, reason: str, this: Sequence[str] = ("ringfence",)) -> tuple[str, ...]:
        """Return the command that starts a program of the agent with a lease; the program follows.

        It runs behind the gateway, or with the login of the lease at a database.
        """
        task = str(self.task)
        words = (
            *this, "--identity", str(self.agent_key), "request", "--task", task, *each("--allow", self.allow),
            "--ttl", ttl, "--reason", reason, "--exec", "--",
        )  # fmt: skip
        return (
            words if self.kind == "postgres" else (*words, *this, "gateway", "connect", "--task", task, "--")
        )


def each(option: str, values: Sequence[str]) -> tuple[str, ...]:
    """Return an option for each value, as words of a command."""
    return tuple(word for value in values for word in (option, value))


class AdoptFolder:
    """The state of all adoptions of this user, and the copies of files as they were."""

    def __init__(self) -> None:
        """Raises AdoptStoppedError without a home folder, OSError, and ValueError for an unusable key."""
        scan = state_folder()
        if scan is None:
            raise AdoptStoppedError("there is no home folder for the state; set HOME or XDG_STATE_HOME")
        self.fingerprinter = Fingerprinter(load_key(scan))
        self._path = scan.parent / "adopt"
        make_private_folder(self._path)

    def state_file(self, target: str) -> Path:
        return self._path / f"{target}.json"

    def copy_file(self, target: str) -> Path:
        return self._path / f"{target}.old"

    def load(self, target: str) -> Adoption | None:
        """Return the adoption of a target that has begun. Raises AdoptStoppedError if its file is damaged."""
        try:
            return Adoption.model_validate_json(self.state_file(target).read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError:
            raise AdoptStoppedError(
                f"{self.state_file(target)} is damaged; look at it, and delete it"
            ) from None

    def save(self, adoption: Adoption) -> None:
        write_private(self.state_file(adoption.target), adoption.model_dump_json(), durable=True)

    def forget(self, target: str) -> None:
        self.copy_file(target).unlink(missing_ok=True)
        self.state_file(target).unlink(missing_ok=True)

    def expire_copies(self) -> Iterator[Path]:
        """Delete copies older than `COPY_DAYS`, and yield their paths."""
        for copy in self._path.glob("*.old"):
            if time.time() - copy.stat().st_mtime > COPY_DAYS * 86_400:
                copy.unlink()
                yield copy
