"""An organisation in which widening commands need a second person: proposals and second signatures, without Kafka."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.codes import Code
from ringfence.messages.registry import (
    CommandSecond,
    EmbeddedCommand,
    Proposal,
    SecondedCommand,
    SecondSignature,
)
from ringfence.messages.trust import SecondPersonMode
from ringfence.model.lifecycle import CommandRefusedError, command_subject
from ringfence.registry.domain import Change, Waits, changed_since, decide
from tests.support.in_memory_registry import START_MS, InMemoryRegistry

DAY_MS = 86_400_000


@dataclass(frozen=True)
class Proposed:
    """A command that waits, as the registry keeps it."""

    claims: Any
    jws: str
    at_ms: int
    revision: int


class DualControl(InMemoryRegistry):
    """olga, otto and oona are operators by the root. sam and suzy are sponsors by the root, and sam has the agent bot
    by the root. In the mode `required`.
    """

    second_person = (SecondPersonMode(mode="required", not_before=START_MS // 1000),)

    def __init__(self) -> None:
        super().__init__()
        for name in ("olga", "otto", "oona"):
            self.give(self.user_set("root", name, ["operator"]))
        for name in ("sam", "suzy"):
            self.give(self.user_set("root", name, ["sponsor"]))
        self.give(self.register("root", "bot", "sam"))

    def propose(self, claims: Any, key: SigningKey | None = None) -> Proposed:
        """Append a widening command. Raises what the registry would answer if it does not wait."""
        at_ms, jws = self.clock.ms, self.signed(claims, key)
        given = self.directory.chains.authorise(parse(jws), at_ms)
        waits = decide(self.current(*command_subject(given.claims, given.command_id)), given, self.memory)
        assert isinstance(waits, Waits), waits
        self.clock.ms += 1000
        return Proposed(claims, jws, at_ms, waits.revision)

    def word(
        self,
        by: str,
        proposed: Proposed,
        key: SigningKey | None = None,
        also: Proposed | None = None,
        **fields: Any,
    ) -> str:
        """A second signature, compact; `also`: over another command too."""
        named = [
            SecondedCommand(
                **{
                    "author": one.claims.iss, "command": one.claims.jti, "revision": one.revision,
                    "proposal": digest(parse(one.jws).signing_input), **fields,
                }
            )
            for one in (proposed, also) if one is not None
        ]  # fmt: skip
        return sign(self.claims(CommandSecond, by, commands=tuple(named)), key or self.key(by))

    def embedded(
        self, by: str, proposed: Proposed, key: SigningKey | None = None, **fields: Any
    ) -> EmbeddedCommand:
        """A command with its second signature of now, as a record embeds it."""
        second = SecondSignature(jws=self.word(by, proposed, key, **fields), proposed_at_ms=proposed.at_ms)
        return EmbeddedCommand(jws=proposed.jws, appended_at_ms=self.clock.ms, second=second)

    def second(self, by: str, proposed: Proposed, key: SigningKey | None = None, **fields: Any) -> Change:
        """Append a second signature. Raises what the registry would answer; a reader has to believe the record."""
        embedded = self.embedded(by, proposed, key, **fields)
        given = self.directory.chains.authorise(parse(embedded.jws), self.clock.ms, None, embedded.second)
        entry = self.directory.entry(*command_subject(given.claims, given.command_id))
        if changed_since(entry, self.proposal(proposed)):
            raise CommandRefusedError("its subject has changed", code=Code.SUBJECT_CHANGED)
        change = decide(self.current(*command_subject(given.claims, given.command_id)), given, self.memory)
        assert isinstance(change, Change), change
        record = self.sign_record(change.state, change.commands, change.revision, minor=change.minor)
        problem = self.admit(record)
        assert problem is None, problem
        self.directory.entry(*command_subject(given.claims, given.command_id))
        self.clock.ms += 1000
        return change

    def proposal(self, proposed: Proposed) -> Proposal:
        """What the registry keeps of a command that waits."""
        return self.claims(
            Proposal, "root", digest=digest(parse(proposed.jws).signing_input), sub=self.root.id,
            command=EmbeddedCommand(jws=proposed.jws, appended_at_ms=proposed.at_ms), revision=proposed.revision,
            ends_at_ms=proposed.at_ms + DAY_MS, status="open", at_ms=proposed.at_ms,
        )  # fmt: skip

    def seconded(self, by: str, claims: Any) -> Change:
        """Have a widening command proposed, and seconded by somebody."""
        return self.second(by, self.propose(claims))

    def forward(self, ms: int) -> None:
        """Let time pass."""
        self.clock.ms += ms

    def refusal(self, call: Any) -> str | None:
        """The code with which a call is refused, or None."""
        try:
            call()
        except RingfenceError as error:
            return str(error.code)
        return None


def waits(call: Any) -> bool:
    """Whether a command waits for a second person."""
    try:
        call()
    except CommandRefusedError as error:
        return error.code == Code.SECOND_MISSING
    return False
