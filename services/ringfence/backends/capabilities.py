"""What each kind of credential declares of itself, for the bundle: how far it can be recalled, who enforces it."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ringfence.backends import Backend
from ringfence.messages.credential import Delivery, Reason
from ringfence.messages.registry import TargetState

log = logging.getLogger(__name__)


class BackendCapabilities:
    """Asks the backends; of those that are not installed here the least is taken to be true."""

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        self._backends = backends

    def never_handed_out(self, target: TargetState, delivery: Delivery) -> tuple[Reason, ...]:
        """Why a request cannot be for the agent, whatever a bundle or two operators say; empty where it can."""
        if delivery != "agent" or self(target)["enforced_by"] == "target":
            return ()
        ask = "ask for delivery to the gateway (--delivery gateway)"
        message = f"what {target.target_id} takes is never handed out: {ask}"
        return (Reason(code="delivery_gateway_only", message=message),)

    def __call__(self, target: TargetState) -> dict[str, str]:
        """`revocability` and `enforced_by` of credentials for a target."""
        backend = self._backends.get(target.backend.kind)
        if backend is None:
            return {"revocability": "ttl", "enforced_by": "target"}
        try:
            revocability = backend.revocability(target)
        except Exception:  # of another package: a mistake in it must not stop every request
            log.exception(
                "backend %s does not say how far %s can be recalled", backend.kind, target.target_id
            )
            revocability = "ttl"
        return {"revocability": revocability, "enforced_by": backend.enforced_by}
