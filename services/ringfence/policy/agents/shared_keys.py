"""Detection of agent keys that two processes use at once, in incoming requests. Each case becomes a finding."""

from __future__ import annotations

from ringfence.kernel.crypto.jws import kid_of
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.credential import CredentialRequest, Reason
from ringfence.model.records.key_sharing import WINDOW_MS, KeyUses
from ringfence.policy.domain import Case


class SharedKeyDetector:
    """Examines each request once. An agent's requests come to one replica, in order."""

    def __init__(self, runtime: Runtime, uses: KeyUses) -> None:
        self._runtime = runtime
        self._uses = uses

    async def observe(self, case: Case) -> None:
        """Record who signed a request, and publish a finding if somebody else uses the key at the same time."""
        claims, at_ms = case.request.claims, case.source.appended_at_ms
        kid = kid_of(case.request.compact)
        other_mark = self._uses.saw(case.agent_id, kid, claims.process, at_ms)
        if other_mark is None:
            return
        message = (
            f"two processes use the key {kid} of agent {case.agent_id} at once, so that nobody can tell what which "
            "of them did; give each a key of its own, or let instances enrol theirs"
        )
        await self._runtime.event(
            "finding",
            CredentialRequest.typ,
            about=("key_shared", case.agent_id, kid, at_ms // WINDOW_MS),
            reasons=(Reason(code="key_shared", message=message),),
            source=case.source,
            actor=claims.iss,
            traceparent=case.traceparent,
            agent_id=case.agent_id,
            request_id=case.request_id,
            task_id=claims.task_id,
        )
