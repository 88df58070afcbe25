"""Whose word a revocation is, and whether they have a say: for whoever follows it, and for whoever only fences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ringfence.kernel.base.errors import InvalidMessageError, SignatureError
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.credential import Reason
from ringfence.messages.lease import Lease, Selector
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.leases.revocations import Revocation, agent_of_task, objection, verify_revocation
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.delegations import Delegations
from ringfence.model.records.directory import Directory


class RevocationVerifier:
    """Opens and judges revocations. Nobody is refused for a record that has not arrived here yet."""

    def __init__(self, runtime: Runtime, directory: Directory, *, patience_s: float) -> None:
        """`patience_s`: how long such records are waited for."""
        self._runtime = runtime
        self._directory = directory
        self._patience_s = patience_s
        self._delegations = Delegations(directory)

    async def open(
        self, batch: Sequence[Received]
    ) -> tuple[list[Revocation], list[tuple[Received, InvalidMessageError]]]:
        """Those with a valid signature of somebody who may have a say, and the others."""
        opened: dict[int, Revocation] = {}
        failed: dict[int, InvalidMessageError] = {}
        for caught_up in (False, True):
            for i, record in enumerate(batch):
                if caught_up and i not in failed:
                    continue
                try:
                    opened[i] = verify_revocation(record, self._directory, self._runtime.trust)
                    failed.pop(i, None)
                except InvalidMessageError as error:
                    failed[i] = error
            # The signer may have been registered a moment ago.
            unknown = any(isinstance(problem, SignatureError) for problem in failed.values())
            if caught_up or not unknown or not await self._runtime.tables_caught_up(self._patience_s):
                break
        return [opened[i] for i in sorted(opened)], [(batch[i], problem) for i, problem in failed.items()]

    async def objections(
        self, orders: Sequence[Revocation], leases: Mapping[str, Lease]
    ) -> list[Reason | None]:
        """Why each is not followed, or None. `leases`: those that are named one by one, by their ids."""
        found = [self._objection(order, leases) for order in orders]
        if any(found) and await self._runtime.tables_caught_up(self._patience_s):
            found = [one and self._objection(order, leases) for order, one in zip(orders, found, strict=True)]
        return found

    def agent_of(self, selector: Selector) -> str | None:
        """The only agent whose leases a selector can cover; None where there may be others, or that is not known."""
        if selector.task_id is not None:
            return agent_of_task(selector.task_id, self._directory)
        return selector.agent_id

    def unknown(self, selector: Selector) -> Reason | None:
        """That there is nobody, or nothing, of the name that a selector gives. To be asked once the tables are read."""
        named: dict[SubjectKind, str | None] = {
            "agent": selector.agent_id,
            "task": selector.task_id,
            "target": selector.target_id,
            "user": selector.sponsor or selector.user_id,
        }
        for kind, id in named.items():
            if id is not None and not self._is_known(kind, id):
                message = f"there is no {kind} {id}, so nothing was ended; look it up: ringfence {kind} list"
                return Reason(code="subject_unknown", message=message)
        return None

    def _is_known(self, kind: SubjectKind, id: str) -> bool:
        try:
            return self._directory.entry(kind, id) is not None
        except ChainError:
            return True  # it is there, and counts for nothing

    def known_holders(self, selector_key: str) -> frozenset[str]:
        """The agents that hold parts of what a mark is about, as far as has arrived here."""
        return self._delegations.holders(selector_key)

    async def holders(self, selector_key: str) -> frozenset[str] | None:
        """All agents that hold parts of what a mark is about; None where nobody can say.

        To be asked behind a fence: what comes into Redis behind it was asked for later, and what is there rests on
        tasks that stood on Kafka by then.
        """
        if not await self._runtime.tables_caught_up(self._patience_s):
            return None
        return self._delegations.holders(selector_key)

    def _objection(self, order: Revocation, leases: Mapping[str, Lease]) -> Reason | None:
        return objection(order, leases.get(order.claims.lease_id or ""), self._directory)
