"""Grants in policy: keeps them, selects those that replace an approval, and counts their uses.

The issuer's count is authoritative. The count here only avoids asking the issuer for what it would refuse.
"""

from __future__ import annotations

from collections.abc import Sequence

from ringfence.kernel.crypto.jws import Signed, parse
from ringfence.messages.approval import Approval, Grant
from ringfence.messages.credential import CredentialDecision
from ringfence.model.records.directory import Directory
from ringfence.model.requests.approvals import unmet
from ringfence.model.requests.facts import RecordContext
from ringfence.model.requests.grants import (
    GrantTable,
    check_grant,
    id_of,
)
from ringfence.model.verdict import Refused
from ringfence.policy.domain import Case, Evaluation, RequestRefused

_MOST_REMEMBERED = 1000
"""Beyond this number, expired grants are removed."""


class GrantBook:
    """Selects grants for requests, and knows which requests used them."""

    def __init__(self, table: GrantTable, directory: Directory) -> None:
        self._table = table
        self._directory = directory
        self._used: dict[str, set[str]] = {}

    def fitting(
        self, case: Case, evaluation: Evaluation, approvals: Sequence[Signed[Approval]], at_ms: int
    ) -> tuple[Signed[Grant], ...]:
        """Return grants that, with these approvals, satisfy every requirement; empty where they would not be enough."""
        facts, ruling, revisions = evaluation.facts, evaluation.ruling, evaluation.revisions
        if facts is None or revisions is None or isinstance(ruling, RequestRefused):
            return ()
        chosen: list[Signed[Grant]] = []
        lacking = unmet(ruling.required, approvals, self._directory, facts, at_ms=at_ms)
        for grant in self._table.of_task(facts.task.state.task_id):
            covers = check_grant(
                grant.claims, facts,
                at_ms=at_ms, ttl_s=ruling.ttl_s, delivery=facts.delivery, revisions=revisions,
            )  # fmt: skip
            if (
                isinstance(covers, Refused)
                or self._is_withdrawn(grant.claims, facts)
                or not self._is_left(grant, case.request_id)
            ):
                continue
            together: list[Signed[Approval] | Signed[Grant]] = [*approvals, *chosen, grant]
            still_unmet = unmet(ruling.required, together, self._directory, facts, at_ms=at_ms)
            if len(still_unmet) < len(lacking):
                chosen.append(grant)
                lacking = still_unmet
            if not lacking:
                return tuple(chosen)
        return ()

    def use(self, grants: Sequence[Signed[Grant]], request_id: str) -> bool:
        """Note that a request uses these grants. Returns False, and notes nothing, if one of them is used up."""
        if not all(self._is_left(grant, request_id) for grant in grants):
            return False
        for grant in grants:
            self._note(id_of(grant.claims), request_id)
        return True

    def append_times(self, grants: Sequence[Signed[Grant]]) -> dict[str, int]:
        """Return the append times (ms) of these grants, by the digest of each."""
        entries = [self._table.get(id_of(grant.claims)) for grant in grants]
        return {entry.signed.digest: entry.appended_at_ms for entry in entries if entry is not None}

    def on_allowed(self, decision: CredentialDecision) -> None:
        """Note the grants that a decision of policy used, whichever replica made it."""
        for compact in decision.grants or ():
            grant = parse(compact).unverified_claims(Grant)  # policy verified it before it signed
            self._note(id_of(grant), decision.request_id)

    def used(self, grant_id: str) -> int:
        """Return how many requests used a grant, as far as this process knows."""
        return len(self._used.get(grant_id, ()))

    def _note(self, grant_id: str, request_id: str) -> None:
        if grant_id not in self._used and len(self._used) >= _MOST_REMEMBERED:
            self._used = {id: used for id, used in self._used.items() if self._table.get(id)}
        self._used.setdefault(grant_id, set()).add(request_id)

    def _is_left(self, grant: Signed[Grant], request_id: str) -> bool:
        used = self._used.get(id_of(grant.claims), set())
        return request_id in used or len(used) < grant.claims.count

    def _is_withdrawn(self, grant: Grant, ground: RecordContext) -> bool:
        return self._table.is_withdrawn(
            grant, sponsor=ground.agent.state.sponsor, on_behalf_of=ground.task.state.on_behalf_of
        )
