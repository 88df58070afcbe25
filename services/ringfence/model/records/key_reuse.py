"""Reports of messages that renewed keys signed. A service that reads agents' messages sends them to the registry.

The registry verifies the message again, so a report needs no trust. One that is lost is made by the next use.
"""

from __future__ import annotations

from typing import Final

from ringfence.kernel.base.errors import InvalidMessageError, SignatureError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.crypto.jws import UnverifiedJws
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.codes import Code
from ringfence.messages.registry import AgentReportReuse, RenewedKey
from ringfence.messages.topics import REGISTRY_COMMAND
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.lifecycle import REUSE_AFTER_S
from ringfence.model.records.command_chain import SIGNED_BY_AGENTS, ChainError
from ringfence.model.records.directory import Directory

_LIFE_S: Final = 120
_MOST: Final = 1_000


def renewed_key(directory: Directory, jws: UnverifiedJws) -> tuple[str, RenewedKey] | None:
    """The agent and its renewed key that a message names, if it does. The signature is not verified."""
    model = SIGNED_BY_AGENTS.get(jws.header.typ)
    if model is None:
        return None
    try:
        agent_id = subject_of(directory.trust.trust_domain, jws.unverified_claims(model).iss, "agent")
        entry = directory.agent(agent_id) if agent_id else None
    except (InvalidMessageError, ChainError):
        return None
    if entry is None:
        return None
    found = (one for one in entry.state.renewed if one.kid == jws.header.kid)
    return next(
        ((entry.state.agent_id, one) for one in found if one.kid not in entry.state.compromised), None
    )


def ended_by_renewal(kid: str) -> SignatureError:
    return SignatureError(
        f"key {kid} was renewed, and signs nothing any more; read the key file again", code=Code.KEY_ENDED
    )


class ReuseReporter:
    """Reports each use of a renewed key to the registry, once for each agent's key."""

    def __init__(self, runtime: Runtime, directory: Directory) -> None:
        self._runtime = runtime
        self._directory = directory
        self._reported: BoundedDict[str, None] = BoundedDict(_MOST)

    async def __call__(self, agent_id: str, key: RenewedKey, jws: UnverifiedJws) -> None:
        """Report a message if it proves that a renewed key is in other hands. Raises UnavailableError, KafkaError."""
        now_ms = self._runtime.clock.now_ms()
        try:
            use = self._directory.chains.key_use(agent_id, jws, now_ms)
        except (InvalidMessageError, ChainError):
            return
        if not key.at + REUSE_AFTER_S < use.signed_s < key.first_not_after or key.kid in self._reported:
            return
        claims = AgentReportReuse(
            iss=self._runtime.key.id,
            aud=self._runtime.settings.trust_domain,
            iat=now_ms // 1000,
            exp=now_ms // 1000 + _LIFE_S,
            jti=derived_id("reuse", self._runtime.key.id, jws.compact, now_ms),
            agent_id=agent_id,
            message=jws.compact,
        )
        await self._runtime.publisher.publish_signed(REGISTRY_COMMAND, agent_id, claims, self._runtime.key)
        self._reported[key.kid] = None
