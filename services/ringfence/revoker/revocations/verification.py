"""Verifies revocations: who signed them, and whether that person, agent or service may end what they name.

Redis finds leases by the agent that holds them. A lease of a delegated task ends with the original task and with the
original agent. The task records say who holds such parts (`Delegations`). That index grants nothing: it only says where
to look.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ringfence.kernel.base.errors import InvalidMessageError, SignatureError
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.codes import Code
from ringfence.messages.lease import Lease, Selector
from ringfence.messages.registry import TaskState
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.leases.revocations import Revocation, agent_of_task, check_revocation, verify_revocation
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.verdict import ALLOWED, Refused, Verdict, refused


class Delegations:
    """An index over the tasks of a directory. A delegation stays in it, whatever a later record says."""

    def __init__(self, directory: Directory) -> None:
        """Create it before the directory receives records."""
        self._directory = directory
        self._parts: dict[str, dict[str, str]] = {}
        """By task: its parts, and the agent of each."""
        self._holders: dict[str, set[str]] = {}
        """By agent: the agents of parts of its tasks, at any depth."""
        directory.on_change(self._on_change)

    def holders(self, mark: str) -> frozenset[str]:
        """Return the agents whose leases of delegated tasks may match a selector key."""
        kind, _, id = mark.partition(":")
        match kind:
            case "agent":
                return frozenset(self._holders.get(id, ()))
            case "task":
                return frozenset(self._holders_under(id))
            case "sponsor":  # the sponsors in the chain at the time of issue are no longer known
                return frozenset(agent for some in self._holders.values() for agent in some)
            case _:
                return frozenset()

    def _holders_under(self, task_id: str) -> Iterator[str]:
        todo, seen = [task_id], {task_id}
        while todo:
            for part, agent_id in self._parts.get(todo.pop(), {}).items():
                if part not in seen:
                    seen.add(part)
                    todo.append(part)
                    yield agent_id

    def _on_change(self, kind: SubjectKind, id: str) -> None:
        record = self._directory.unverified(kind, id) if kind == "task" else None
        task = record.state if record is not None else None
        if not isinstance(task, TaskState) or task.parent is None:
            return
        self._parts.setdefault(task.parent, {})[id] = task.agent_id
        for agent_id in (task.act or ())[1:]:
            self._holders.setdefault(agent_id, set()).add(task.agent_id)


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

    async def check(self, revocations: Sequence[Revocation], leases: Mapping[str, Lease]) -> list[Verdict]:
        """Check for each revocation whether to follow it. `leases`: those that revocations name, by their ids."""
        verdicts = [self._check(revocation, leases) for revocation in revocations]
        any_refused = any(isinstance(verdict, Refused) for verdict in verdicts)
        if any_refused and await self._runtime.tables_caught_up(self._patience_s):
            verdicts = [
                self._check(revocation, leases) if isinstance(verdict, Refused) else verdict
                for revocation, verdict in zip(revocations, verdicts, strict=True)
            ]
        return verdicts

    def _check(self, revocation: Revocation, leases: Mapping[str, Lease]) -> Verdict:
        return check_revocation(revocation, leases.get(revocation.claims.lease_id or ""), self._directory)

    def agent_of(self, selector: Selector) -> str | None:
        """The only agent whose leases a selector can cover; None if there may be others, or that is not known."""
        if selector.task_id is not None:
            return agent_of_task(selector.task_id, self._directory)
        return selector.agent_id

    def check_subject(self, selector: Selector) -> Verdict:
        """Check that there is what a selector names. Call it once the tables have caught up."""
        named: dict[SubjectKind, str | None] = {
            "agent": selector.agent_id,
            "task": selector.task_id,
            "target": selector.target_id,
            "user": selector.sponsor or selector.user_id,
        }
        for kind, id in named.items():
            if id is not None and not self._is_known(kind, id):
                message = f"there is no {kind} {id}, so nothing was ended; look it up: ringfence {kind} list"
                return refused(Code.SUBJECT_UNKNOWN, message)
        return ALLOWED

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
