"""When each agent last asked, by the key that it asked with: from the decisions on its requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jws import kid_of
from ringfence.messages.credential import CredentialDecision

MAX_KEYS: Final = 32
"""So many keys are remembered of an agent; beyond, the one that was seen longest ago is forgotten."""


class KeyLastSeen:
    """What is known by this process: a decision from before its start counts where it still mattered then."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[str, int]] = {}
        self._listeners: list[Callable[[str], None]] = []

    def on_change(self, listener: Callable[[str], None]) -> None:
        """Call `listener` with the id of each agent that was seen."""
        self._listeners.append(listener)

    def on_decision(self, decision: CredentialDecision, agent_id: str) -> None:
        """Take in a decision of policy, which verified the request inside before it signed."""
        try:
            kid = kid_of(decision.request)
        except InvalidMessageError:
            return
        at_ms, keys = decision.source.appended_at_ms, self._seen.setdefault(agent_id, {})
        if at_ms <= keys.get(kid, 0):
            return
        keys[kid] = at_ms
        if len(keys) > MAX_KEYS:
            del keys[min(keys, key=lambda kid: keys[kid])]
        for listener in self._listeners:
            listener(agent_id)

    def of(self, agent_id: str) -> Mapping[str, int]:
        """By the thumbprint of each key, when the latest request signed with it was appended, in milliseconds."""
        return self._seen.get(agent_id, {})
