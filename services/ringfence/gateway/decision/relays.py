"""Decides on byte relays for runs: from a run's socket to a target whose protocol is not HTTP.

A relay goes to the address in the target's record, and only while the run has a live lease there that was delivered to
its instance. Statements inside are not seen, so nothing else is decided: what a statement may do, the target decides
by the credential. The gateway cannot see which credential is used, so the end of any of these leases ends the relay.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from http import HTTPStatus
from typing import Final

from ringfence.gateway.contract import Attempt, PresentedIdentity, RateCheck, RelayPermit, Verdict
from ringfence.gateway.decision.context import ActionIds, DecisionContext
from ringfence.gateway.decision.decision_events import DecisionEvents
from ringfence.gateway.decision.sender import SenderAuthenticator
from ringfence.gateway.domain import (
    FORBIDDEN,
    TOO_MANY_REQUESTS,
    UNAVAILABLE,
    ChosenLease,
    Refusal,
    Sender,
    check_run_of_lease,
    lease_reasons,
    refuse,
)
from ringfence.gateway.events.spool import SpoolFullError
from ringfence.gateway.hosts import split_host_and_port
from ringfence.gateway.state.view import View
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.http1.head import RequestRefusedError
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.messages.lease import Lease
from ringfence.messages.registry import TargetRecord, TargetState
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.requests.facts import DeniedError, load_records, violations_of
from ringfence.model.target_settings import RELAYED_KINDS
from ringfence.model.verdict import ALLOWED, Allowed, Refused

log = logging.getLogger(__name__)

FORWARD: Final = "forward"
"""The verb at an SSH target by which its server connects to other hosts."""
_RETRY_S: Final = 5
_MAX_REASONS: Final = 20

Address = tuple[str, int]


class RelayTargets:
    """An index of targets that relays go to, by host and port. Addresses are unverified: `at` verifies."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._ids: dict[Address, set[str]] = {}
        self._addresses: dict[str, Address] = {}
        directory.on_change(self._on_change)

    def may_be_at(self, address: Address) -> bool:
        """Whether the record of a target may name this address."""
        return bool(self._ids.get(address))

    def at(self, address: Address) -> list[TargetState]:
        """The active targets whose verified records name exactly this address. Raises ChainError."""
        found = []
        for id in sorted(self._ids.get(address, ())):
            entry = self._directory.target(id)
            if entry is not None and entry.state.status == "active" and address_of(entry.state) == address:
                found.append(entry.state)
        return found

    def _on_change(self, kind: SubjectKind, id: str) -> None:
        record = self._directory.unverified(kind, id) if kind == "target" else None
        if not isinstance(record, TargetRecord):
            return
        before = self._addresses.pop(id, None)
        if before is not None:
            self._ids[before].discard(id)
            if not self._ids[before]:
                del self._ids[before]
        address = address_of(record.state)
        if address is not None:
            self._addresses[id] = address
            self._ids.setdefault(address, set()).add(id)


def address_of(target: TargetState) -> Address | None:
    """Host and port in a target's record, in canonical form; None if it has none, or if no relay goes to its kind."""
    address = (target.backend.model_extra or {}).get("address")
    if target.backend.kind not in RELAYED_KINDS or not isinstance(address, str) or ":" not in address:
        return None
    try:
        return split_host_and_port(address, "https")
    except RequestRefusedError:
        return None


@dataclass(slots=True, eq=False)
class Relays:
    """The `RelayGate` of this gateway. See the protocol for the contract of each method."""

    view: View
    authenticator: SenderAuthenticator
    events: DecisionEvents
    clock: Clock
    _: KW_ONLY
    entitlements_max_age_s: int
    _targets: RelayTargets = field(init=False)
    _ids: ActionIds = field(init=False, default_factory=ActionIds)

    def __post_init__(self) -> None:
        self._targets = RelayTargets(self.view.directory)

    def may_be_at(self, host: str, port: int) -> bool:
        return self._targets.may_be_at((host, port))

    async def decide(
        self, presented: PresentedIdentity, authority: str, host: str, port: int, rate_check: RateCheck
    ) -> tuple[Verdict, RelayPermit | None]:
        context = DecisionContext(self._ids.new(), Attempt(authority, "https", "CONNECT", authority))
        began_ns = time.perf_counter_ns()
        try:
            found = await self._decide(context, presented, (host, port), rate_check)
        except Exception:  # fail closed
            log.exception("a relay could not be decided")
            found = refuse(Code.UNDECIDED, "the gateway could not decide this")
        context.took_ns = time.perf_counter_ns() - began_ns
        verdict = _verdict(context, found)
        try:
            self.events.record(context, presented, verdict)
        except SpoolFullError as error:
            log.error("no relay is opened: %s", error)
            reason = Reason(
                code=error.code, message="what is decided cannot be recorded now; ask again later"
            )
            return Verdict(context.id, allowed=False, status=UNAVAILABLE, reasons=(reason,)), None
        if isinstance(found, Refusal) or context.sender is None:
            return verdict, None
        return verdict, _Permit(self, self.view, self.events, context, (host, port), found)

    async def _decide(
        self, context: DecisionContext, presented: PresentedIdentity, address: Address, rate_check: RateCheck
    ) -> RelayLeases | Refusal:
        """Decide on a relay:

        1. The view is fresh.
        2. The sender is authenticated.
        3. The data plane's rate limits allow one more request of its agent.
        4. The run has leases at the address (`leases`).
        """
        if isinstance(freshness := self.view.check_freshness(), Refused):
            return Refusal(UNAVAILABLE, (freshness.reason,))
        sender = await self.authenticator.authenticate(presented, context.attempt)
        if isinstance(sender, Refusal):
            context.sender = sender.sender
            return sender
        context.sender = sender
        if isinstance(rate := rate_check(sender.agent_id), Refused):
            return Refusal(TOO_MANY_REQUESTS, (rate.reason,))
        found = self.leases(sender, address)
        if not isinstance(found, Refusal):
            context.chosen = found[0]
        return found

    def leases(self, sender: Sender, address: Address) -> RelayLeases | Refusal:
        """The live leases that a relay of a run to this address rests on, at least one; or why there is no relay.

        1. The records of the targets at this address can be trusted (`record_untrusted`).
        2. There is a target (`target_unknown`).
        3. None of them is an SSH server that forwards (`forward_not_relayed`).
        4. The lease that the handle names, if any, may be used on this socket (`check_run_of_lease`).
        5. The run has a live lease there that was delivered to it; with a handle, that one (`no_lease`).
        6. Everything that these leases' credentials allow is still allowed (`_chosen`).
        """
        now_s = self.clock.now_ms() / 1000
        try:
            targets = {target.target_id: target for target in self._targets.at(address)}
        except ChainError as error:
            return refuse(Code.RECORD_UNTRUSTED, str(error))
        if not targets:
            return refuse(
                Code.TARGET_UNKNOWN, "no target is there: have an operator add it, or ask for another"
            )
        for target in targets.values():
            if target.backend.kind == "ssh" and any(verb.verb == FORWARD for verb in target.verbs):
                message = (
                    f"target {target.target_id} grants {FORWARD}, by which everything is reachable that its server "
                    "reaches: no relay goes there; have an operator add the host without that verb"
                )
                return refuse(Code.FORWARD_NOT_RELAYED, message)
        named = self.view.table.get(sender.lease_id) if sender.lease_id is not None else None
        if named is not None and isinstance(elsewhere := check_run_of_lease(sender, named), Refused):
            return Refusal(FORBIDDEN, (elsewhere.reason,))
        leases = [
            lease
            for lease in self.view.table.delivered_to_run(sender.run_id or "")
            if lease.target_id in targets and lease.backend == targets[lease.target_id].backend.kind
        ]
        if not leases or sender.lease_id not in (None, *(lease.lease_id for lease in leases)):
            message = (
                f"run {sender.run_id} has no live lease at {', '.join(sorted(targets))} that was delivered to it: ask "
                "for one, with delivery to the agent"
            )
            return Refusal(FORBIDDEN, (Reason(code=Code.NO_LEASE, message=message[:1000], side="lease"),))
        chosen = [self._chosen(sender, lease, now_s) for lease in leases]
        reasons = [reason for one in chosen if isinstance(one, Refusal) for reason in one.reasons]
        if reasons:
            return Refusal(FORBIDDEN, tuple(reasons[:_MAX_REASONS]))
        return tuple(one for one in chosen if isinstance(one, ChosenLease))

    def _chosen(self, sender: Sender, lease: Lease, now_s: float) -> ChosenLease | Refusal:
        """A lease, with the records by which all that its credential allows is still allowed."""
        directory, wanted = self.view.directory, lease.scope
        try:
            ground = load_records(directory, sender.agent_id, lease.task_id, lease.target_id)
        except DeniedError as error:
            return Refusal(FORBIDDEN, (error.reason,))
        reasons = [
            *violations_of(ground, wanted, now_s, self.entitlements_max_age_s),
            *lease_reasons(lease, ground, wanted, directory, now_s),
        ]
        if sender.task_id != lease.task_id:
            reasons.append(Reason(code=Code.HANDLE_OTHER_TASK, message="the lease is of another task"))
        return Refusal(FORBIDDEN, tuple(reasons)) if reasons else ChosenLease(lease, ground, wanted)


RelayLeases = tuple[ChosenLease, ...]


class _Permit:
    """The `RelayPermit` of one relay."""

    def __init__(
        self,
        relays: Relays,
        view: View,
        events: DecisionEvents,
        context: DecisionContext,
        address: Address,
        leases: RelayLeases,
    ) -> None:
        assert context.sender is not None
        self._relays = relays
        self._view = view
        self._events = events
        self._context = context
        self._sender = context.sender
        self._began_s = time.monotonic()
        self._address = address
        self._leases = leases
        self._checked: tuple[object, ...] = ()
        """The versions of all records, and the second, at the last complete check."""

    def watch(self, on_ended: Callable[[], None]) -> Callable[[], None]:
        if self._view.stale() is not None:
            on_ended()
            return lambda: None
        unsubscribing = [self._view.table.watch(one.lease.lease_id, on_ended) for one in self._leases]

        def unsubscribe() -> None:
            for each in unsubscribing:
                each()

        return unsubscribe

    def check(self) -> Allowed | Refused:
        """Check whether more may be relayed:

        1. The view is fresh.
        2. Each lease of the relay is live.
        3. If a record has changed, or a second has passed: the relay would still be allowed (`Relays.leases`).
        """
        table, directory = self._view.table, self._view.directory
        if isinstance(freshness := self._view.check_freshness(), Refused):
            return freshness
        for one in self._leases:
            if isinstance(live := table.check_live(one.lease), Refused):
                return live
        versions = (*directory.versions, directory.trust.version, int(time.monotonic()))
        if versions == self._checked:
            return ALLOWED
        found = self._relays.leases(self._sender, self._address)
        if isinstance(found, Refusal):
            return Refused(found.reasons[0])
        self._checked = versions
        return ALLOWED

    def ended(self, sent_bytes: int, received_bytes: int, reason: Reason | None) -> None:
        self._events.record_relay_end(
            self._context,
            self._address,
            sent_bytes=sent_bytes,
            received_bytes=received_bytes,
            duration_ms=round((time.monotonic() - self._began_s) * 1000),
            reason=reason,
        )


def _verdict(context: DecisionContext, found: RelayLeases | Refusal) -> Verdict:
    refusal = found if isinstance(found, Refusal) else None
    status = refusal.status if refusal is not None else HTTPStatus.OK.value
    return Verdict(
        context.id,
        allowed=refusal is None,
        status=status,
        reasons=refusal.reasons if refusal is not None else (),
        lease=context.lease,
        target=context.chosen.ground.target.state if context.chosen is not None else None,
        retry_after_s=_RETRY_S if status in (UNAVAILABLE, TOO_MANY_REQUESTS) else None,
        task_id=context.task_id,
    )
