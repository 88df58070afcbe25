"""Records that a revoker acts on, opened: whose word they are is verified every time."""

from __future__ import annotations

from ringfence.kernel.jws import open_signed, parse
from ringfence.kernel.kafka import Received
from ringfence.kernel.keys import PublicKey, b64decode
from ringfence.kernel.trust import TrustStore
from ringfence.messages.lease import RevocationRequest
from ringfence.model.chains import ChainError
from ringfence.model.directory import Directory
from ringfence.model.opening import open_lease
from ringfence.revoker.domain import Order

__all__ = ["open_lease", "open_order"]


def open_order(record: Received, directory: Directory, trust: TrustStore) -> Order:
    """A revocation with the signature of somebody who may have a say. Raises InvalidMessageError."""
    at_s = record.appended_at_ms / 1000

    def find(iss: str, kid: str) -> PublicKey | None:
        try:
            return (
                directory.agent_key(iss, kid, at_s)
                or directory.user_key(iss, kid, at_s)
                or trust.service_key(iss, kid, ("revoker", "registry"), at_s)
            )
        except ChainError:
            return None

    signed = open_signed(parse(record.value), RevocationRequest, find, audience=trust.trust_domain)
    return Order(signed, record.coordinates, record.traceparent)


def may_have_selector(record: Received) -> bool:
    """Whether a revocation may have one: most are releases, which need no look."""
    try:
        return b'"selector"' in b64decode(record.value.split(b".")[1])
    except (ValueError, IndexError):
        return False
