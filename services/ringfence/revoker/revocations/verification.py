"""Verifies revocations: who signed them, and whether that person, agent or service may end what they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ringfence.kernel.base.errors import InvalidMessageError, SignatureError
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.messages.lease import Lease, Selector
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.leases.revocations import Revocation, agent_of_task, objection, verify_revocation
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.delegations import Delegations
from ringfence.model.records.directory import Directory


class RevocationVerifier:
    """Verifies revocations, and decides whether to follow them. Before it refuses one, it waits for missing records."""

    def __init__(self, runtime: Runtime, directory: Directory, *, patience_s: float) -> None:
        """`patience_s`: the longest wait for the local tables to catch up."""
        self._runtime = runtime
        self._directory = directory
        self._patience_s = patience_s
        self._delegations = Delegations(directory)

    async def verify(
        self, batch: Sequence[Received]
    ) -> tuple[list[Revocation], list[tuple[Received, InvalidMessageError]]]:
        """Verify signatures. Returns the revocations by known signers, and the other records with their errors."""
        verified: dict[int, Revocation] = {}
        failed: dict[int, InvalidMessageError] = {}
        for caught_up in (False, True):
            for i, record in enumerate(batch):
                if caught_up and i not in failed:
                    continue
                try:
                    verified[i] = verify_revocation(record, self._directory, self._runtime.trust)
                    failed.pop(i, None)
                except InvalidMessageError as error:
                    failed[i] = error
            # The signer may have been registered a moment ago.
            unknown = any(isinstance(problem, SignatureError) for problem in failed.values())
            if caught_up or not unknown or not await self._runtime.tables_caught_up(self._patience_s):
                break
        return [verified[i] for i in sorted(verified)], [(batch[i], problem) for i, problem in failed.items()]

    async def objections(
        self, revocations: Sequence[Revocation], leases: Mapping[str, Lease]
    ) -> list[Reason | None]:
        """Why each revocation is not followed, or None. `leases`: those that revocations name, by their ids."""
        reasons = [self._objection(revocation, leases) for revocation in revocations]
        if any(reasons) and await self._runtime.tables_caught_up(self._patience_s):
            reasons = [
                reason and self._objection(revocation, leases)
                for revocation, reason in zip(revocations, reasons, strict=True)
            ]
        return reasons

    def _objection(self, revocation: Revocation, leases: Mapping[str, Lease]) -> Reason | None:
        return objection(revocation, leases.get(revocation.claims.lease_id or ""), self._directory)

    def agent_of(self, selector: Selector) -> str | None:
        """The only agent whose leases a selector can cover; None if there may be others, or that is not known."""
        if selector.task_id is not None:
            return agent_of_task(selector.task_id, self._directory)
        return selector.agent_id

    def unknown_subject(self, selector: Selector) -> Reason | None:
        """The reason if nothing has the name that a selector gives, or None. Call it once the tables have caught up."""
        named: dict[SubjectKind, str | None] = {
            "agent": selector.agent_id,
            "task": selector.task_id,
            "target": selector.target_id,
            "user": selector.sponsor or selector.user_id,
        }
        for kind, id in named.items():
            if id is not None and not self._is_known(kind, id):
                message = f"there is no {kind} {id}, so nothing was ended; look it up: ringfence {kind} list"
                return Reason(code=Code.SUBJECT_UNKNOWN, message=message)
        return None

    def _is_known(self, kind: SubjectKind, id: str) -> bool:
        try:
            return self._directory.entry(kind, id) is not None
        except ChainError:
            return True  # there is a record, though it does not count

    def known_holders(self, selector_key: str) -> frozenset[str]:
        """The agents that hold delegated parts of what a selector key names, as far as records have arrived here."""
        return self._delegations.holders(selector_key)

    async def holders(self, selector_key: str) -> frozenset[str] | None:
        """All agents that hold delegated parts of what a selector key names; None if the tables do not catch up.

        Call it after fencing. Leases that enter Redis after the fence were requested later. Those in Redis rest on
        tasks that were on Kafka before.
        """
        if not await self._runtime.tables_caught_up(self._patience_s):
            return None
        return self._delegations.holders(selector_key)
