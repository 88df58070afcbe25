"""Fields of an action's event that are derived from its request and its lease, and the counter of decisions."""

from __future__ import annotations

import functools
import hashlib
import re
from typing import Final

from ringfence.gateway.contract import Attempt
from ringfence.gateway.domain import Access
from ringfence.kernel.base import metrics
from ringfence.kernel.base.metrics import TalliedCounter
from ringfence.messages.lease import Lease

_LABEL: Final = re.compile(r"[A-Za-z0-9._:/-]{1,64}")
_METHOD: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}")


def act_of(lease: Lease, sender: str | None) -> tuple[str, ...] | None:
    """The delegation chain, from the first agent to the one that acts; None if the lease was not delegated."""
    return lease.act if lease.delegators and lease.agent_id == sender else None


def method_of(attempt: Attempt) -> str | None:
    """The HTTP method; None if it is not valid (RFC 9110, 9.1) or has more than 32 characters."""
    return attempt.method if _METHOD.fullmatch(attempt.method) else None


def label_of(attempt: Attempt) -> str | None:
    """The label; None if an event may not have its characters or its length."""
    return attempt.label if attempt.label and _LABEL.fullmatch(attempt.label) else None


def digest_of(attempt: Attempt) -> str:
    """SHA-256, in hexadecimal, over method, scheme, place, target and the digest of the body, if it was read."""
    body = hashlib.sha256(attempt.body).hexdigest() if attempt.body is not None else "-"
    place = attempt.target_id if attempt.target_id is not None else attempt.authority
    text = f"{attempt.method}\n{attempt.scheme}\n{place}\n{attempt.target}\n{body}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


@functools.cache
def decision_counter(outcome: str, access: Access | None) -> TalliedCounter:
    """The counter of decisions with this outcome (`allowed`, `observed` or `denied`) and access."""
    return metrics.ACTIONS.labels(outcome, access or "none")
