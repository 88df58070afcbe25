"""What a command is judged on besides the state of its own subject, and how it is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.registry import AgentState, AgentTransferConsent, Delegation, Role, TaskState


class CommandRefusedError(RingfenceError):
    """A command that its signer may not give, or that does not fit the state of what it is about."""

    code = "command_refused"


@dataclass(frozen=True, slots=True)
class Actor:
    """Whose verified signature a command bears. The root has no user id, and neither has an agent."""

    user_id: str | None
    roles: frozenset[Role]
    delegation: Delegation | None = None
    """Of a provisioner: all that it may do."""
    provisioned_by: str | None = None
    """The provisioner of a user who comes from a directory."""
    agent: AgentState | None = None
    """The agent that gave it, as it was then: few commands are for agents to give."""

    @property
    def is_root(self) -> bool:
        return self.user_id is None and self.agent is None

    @property
    def is_operator(self) -> bool:
        return "operator" in self.roles


@dataclass(frozen=True, slots=True)
class Context:
    """What a command is judged on besides the state of its own subject."""

    actor: Actor
    at_s: int
    """The append time of the command, in seconds."""
    command_id: str
    """The UUIDv5 of (`iss`, `jti`): the id of what the command creates."""
    roles_of: Callable[[str], frozenset[Role]]
    """The roles that a user held at that time."""
    last_signed_s: int = 0
    """The latest `iat` among the commands that the state follows from."""
    consent_by: str | None = None
    """Who validly signed the embedded consent over the very same terms."""
    transfer_consent: AgentTransferConsent | None = None
    """That consent, where it is to a transfer: by the new sponsor, to the same agent."""
    consent_problem: str | None = None
    """Why an embedded consent does not count."""
    sponsor_of: Callable[[str], str | None] | None = None
    """The sponsor of an agent at that time. None for a reader of records, which cannot know it any more."""
    task_at: Callable[[str], TaskState | None] = lambda task_id: None
    """A task as it was then."""
