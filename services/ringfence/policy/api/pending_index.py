"""An index of what waits for approvals: who sees which request, and who could answer it, page by page.

A page of 25,000 pending requests must not cost 25,000 look-ups of records, so these are remembered until one of the
records changes. The rule itself is applied each time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal

from ringfence.kernel.crypto.jws import Signed, parse
from ringfence.kernel.service.http import Position
from ringfence.messages.credential import (
    CredentialDecision,
    CredentialRequest,
    RequiredClass,
)
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.records.api_access import Caller
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.requests.facts import DeniedError, RequestContext, load_context
from ringfence.policy.decision_log import DecisionLog, RequestState
from ringfence.policy.domain import may_approve_any

Show = Literal["mine", "others", "all"]
"""Those that the caller could answer, those that they could not, or both."""
_PAUSE_EVERY: Final = 1000
"""After so many requests the loop yields to the rest of the process."""
_LOAD_PAUSE_EVERY: Final = 50
"""The same where records have to be loaded and verified."""
_LOOK_EVERY_S: Final = 2.0
_BY_SPONSOR: Final[tuple[RequiredClass, ...]] = ("sponsor",)


@dataclass(frozen=True, slots=True)
class PendingPage:
    """A page of what a caller sees, the most urgent first."""

    states: tuple[RequestState, ...]
    after: Position | None
    """`expires_at` (seconds) and id of its last request; None if this is the last page."""
    mine: int
    """How many requests in all the caller could answer."""
    others: int
    """How many more they see."""


@dataclass(frozen=True, slots=True)
class _Known:
    """What is remembered of one request."""

    decision_id: str | None
    context: RequestContext
    of_records: bool
    """Whether its records are those that the approval was asked for on."""


class PendingIndex:
    """The pending requests of a decision log, with the records that each is about."""

    def __init__(
        self, directory: Directory, decisions: DecisionLog, policy_revision: Callable[[], str]
    ) -> None:
        self._directory = directory
        self._decisions = decisions
        self._policy_revision = policy_revision
        self._contexts: dict[str, _Known] = {}
        """By request id."""
        self._of_subject: dict[tuple[SubjectKind, str], set[str]] = {}
        self._trust_version = directory.versions[1]
        directory.on_change(self._on_change)

    async def page(
        self, caller: Caller, *, show: Show, agent: str | None, after: Position | None, limit: int
    ) -> PendingPage:
        """A page for a caller. `agent`: only requests of this one; the counts are of these alone, too.

        Requests that are superseded are left out: no approval of them counts.
        """
        self._forget()
        waiting = [state for state in self._decisions.pending() if agent in (None, state.agent_id)]
        waiting.sort(key=_position)
        shown: list[RequestState] = []
        mine = others = 0
        more = False
        for number, state in enumerate(waiting, start=1):
            decision = state.pending
            if decision is None:  # answered meanwhile
                continue
            known = self._loaded(state, decision)
            if known is not None and self._supersedes(known, decision):
                continue
            yours = known is not None and bool(self._classes(known, decision, caller))
            if not yours and not self._may_see(state, known, caller):
                continue
            mine, others = mine + yours, others + (not yours)
            wanted = show == "all" or yours == (show == "mine")
            if wanted and (after is None or _position(state) > after):
                if len(shown) < limit:
                    shown.append(state)
                else:
                    more = True
            if number % _PAUSE_EVERY == 0:
                await asyncio.sleep(0)
        return PendingPage(tuple(shown), _position(shown[-1]) if shown and more else None, mine, others)

    async def keep(self) -> None:
        """Load the records of what waits soon after it comes, so that no page has to. Ends never."""
        while True:
            loaded = 0
            for state in self._decisions.pending():
                if state.pending is None or self._known(state):
                    continue
                self.context(state, state.pending)
                loaded += 1
                if loaded % _LOAD_PAUSE_EVERY == 0:
                    await asyncio.sleep(0)
            await asyncio.sleep(_LOOK_EVERY_S)

    def classes(
        self, state: RequestState, decision: CredentialDecision, caller: Caller
    ) -> tuple[RequiredClass, ...]:
        """The approvals of a pending request that the caller could give."""
        known = self._loaded(state, decision)
        return () if known is None else self._classes(known, decision, caller)

    def context(self, state: RequestState, decision: CredentialDecision) -> RequestContext | None:
        """The records that a pending request is about; None if one is missing or counts for nothing."""
        known = self._loaded(state, decision)
        return None if known is None else known.context

    def is_superseded(self, state: RequestState, decision: CredentialDecision) -> bool:
        """Whether a record or the bundle has changed since the approval was asked for: one that is given is stale."""
        known = self._loaded(state, decision)
        return known is not None and self._supersedes(known, decision)

    def _classes(
        self, known: _Known, decision: CredentialDecision, caller: Caller
    ) -> tuple[RequiredClass, ...]:
        me = caller.user.user_id
        if decision.required == _BY_SPONSOR and known.context.agent.state.sponsor != me:
            return ()  # what most requests need, and what one person alone can give
        return may_approve_any(self._directory, me, decision.required, known.context)

    def _supersedes(self, known: _Known, decision: CredentialDecision) -> bool:
        """Whether the present records and bundle are not those that the approval was asked for on."""
        asked = decision.revisions
        return asked is not None and (not known.of_records or asked.policy != self._policy_revision())

    def _loaded(self, state: RequestState, decision: CredentialDecision) -> _Known | None:
        """What is remembered of a request, after loading its records if need be; None as `context`."""
        if found := self._known(state):
            return found
        # The request stands inside a decision of this service, which verified it before it signed.
        request = parse(decision.request).unverified_claims(CredentialRequest)
        try:
            context = load_context(self._directory, Signed(request, decision.request), state.request_id)
        except DeniedError:
            return None
        asked = decision.revisions
        of_records = asked is None or asked == context.revisions(asked.policy)
        known = self._contexts[state.request_id] = _Known(state.decision_id, context, of_records)
        for subject in _subjects(context):
            self._of_subject.setdefault(subject, set()).add(state.request_id)
        return known

    def _known(self, state: RequestState) -> _Known | None:
        found = self._contexts.get(state.request_id)
        return found if found is not None and found.decision_id == state.decision_id else None

    def _may_see(self, state: RequestState, known: _Known | None, caller: Caller) -> bool:
        if caller.sees_all:
            return True
        if known is not None:
            return caller.may_see_agent_of(known.context.agent.state.sponsor)
        try:
            entry = self._directory.agent(state.agent_id)
        except ChainError:
            return False
        return entry is not None and caller.may_see_agent_of(entry.state.sponsor)

    def _on_change(self, kind: SubjectKind, id: str) -> None:
        for request_id in self._of_subject.pop((kind, id), ()):
            self._contexts.pop(request_id, None)

    def _forget(self) -> None:
        """Forget what is over, and everything where the trust bundle changed: other records may count now."""
        if self._trust_version != self._directory.versions[1]:
            self._trust_version = self._directory.versions[1]
            self._contexts.clear()
            self._of_subject.clear()
        if len(self._contexts) <= 2 * sum(self._decisions.waiting().values()) + _PAUSE_EVERY:
            return
        waiting = {state.request_id for state in self._decisions.pending()}
        self._contexts = {id: found for id, found in self._contexts.items() if id in waiting}
        kept = ((subject, ids & self._contexts.keys()) for subject, ids in self._of_subject.items())
        self._of_subject = {subject: ids for subject, ids in kept if ids}


def _subjects(context: RequestContext) -> Iterable[tuple[SubjectKind, str]]:
    yield "agent", context.agent.state.agent_id
    yield "task", context.task.state.task_id
    yield "user", context.user.state.user_id
    yield "user", context.agent.state.sponsor
    yield "target", context.target.state.target_id
    for step in context.delegations:
        yield "agent", step.agent.state.agent_id
        yield "task", step.task.state.task_id


def _position(state: RequestState) -> Position:
    decision = state.pending
    return (decision.expires_at or 0 if decision else 0, state.request_id)
