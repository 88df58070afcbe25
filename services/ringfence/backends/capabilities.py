"""Capabilities of each kind of credential, as policy input: how it can be revoked, and who enforces its scope."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ringfence.backends import Backend
from ringfence.messages.codes import Code
from ringfence.messages.credential import Delivery, Reason
from ringfence.messages.registry import TargetState

log = logging.getLogger(__name__)

_ASK = "ask for delivery to the gateway (--delivery gateway), or leave the delivery to the target"


class BackendCapabilities:
    """Asks the backends. For a backend that is not installed here it assumes the weakest capabilities."""

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        self._backends = backends

    def delivery_refusals(self, target: TargetState, delivery: Delivery) -> tuple[Reason, ...]:
        """Return the reasons why a credential must not go to the agent, whatever the policy or two operators decide.

        Returns an empty tuple if it may.
        """
        if delivery == "gateway" or (target.delivery == "agent" and self(target)["enforced_by"] == "target"):
            return ()
        message = f"credentials of {target.target_id} go to gateways only: {_ASK}"
        return (Reason(code=Code.DELIVERY_GATEWAY_ONLY, message=message),)

    def __call__(self, target: TargetState) -> dict[str, str]:
        """Return `revocability` and `enforced_by` of credentials for a target."""
        backend = self._backends.get(target.backend.kind)
        if backend is None:
            return {"revocability": "ttl", "enforced_by": "target"}
        try:
            revocability = backend.revocability(target)
        except Exception:  # a backend of another package: its mistakes must not stop every request
            log.exception(
                "backend %s does not say how far %s can be recalled", backend.kind, target.target_id
            )
            revocability = "ttl"
        return {"revocability": revocability, "enforced_by": backend.enforced_by}
