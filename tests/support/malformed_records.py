"""Truly signed records that nobody can read: what a bad deploy of a service writes, or whoever took over its key."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey, b64decode, b64encode
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.base import SERVICE_ROLES, Claims, ServiceRole, Topic, typ_header
from ringfence.messages.trust import ServiceIdentity, TrustBundle

DAY_S = 86_400


def malformed(key: SigningKey, typ: str, aud: str, **claims: Any) -> str:
    """A message of this `typ`, signed by this key, of no shape that it may have."""
    head = {"alg": key.alg, "kid": key.kid, "typ": typ}
    body = {"iss": key.id, "aud": aud, "iat": int(time.time()), "jti": uuid.uuid4().hex, **claims}
    text = ".".join(b64encode(json.dumps(part).encode()) for part in (head, body))
    return f"{text}.{b64encode(key.sign(text.encode()))}"


def signed_messages(topic: Topic[Any]) -> list[type[Claims]]:
    """The signed messages of a topic."""
    return [model for model in topic.models if issubclass(model, Claims)]


def typs(topic: Topic[Any]) -> list[str]:
    """Their `typ` headers."""
    return [typ_header(model) for model in signed_messages(topic)]


class Services:
    """A trust domain with a service of each role, and a trust store that believes them."""

    def __init__(self, td: str = "test.example") -> None:
        self.td = td
        self.root = SigningKey.generate(f"spiffe://{td}/root")
        self.trust = TrustStore(td, self.root.kid)
        self.keys: dict[ServiceRole, SigningKey] = {
            role: SigningKey.generate(f"spiffe://{td}/service/{role}") for role in SERVICE_ROLES
        }
        self._version = 0
        self.publish()

    def publish(self, *, lasts_s: int = DAY_S, **ends_s: int) -> None:
        """The next bundle. `ends_s`: when the key of a role ends."""
        now_s, self._version = int(time.time()), self._version + 1
        bundle = TrustBundle(
            iss=self.root.id, aud=self.td, iat=now_s - DAY_S, exp=now_s + lasts_s, jti="b", version=self._version,
            services=tuple(
                ServiceIdentity(id=key.id, roles=(role,), keys=(key.record(ends_s.get(role, now_s + DAY_S)),))
                for role, key in self.keys.items()
            ),
        )  # fmt: skip
        self.trust.load(sign(bundle, self.root, header_jwk=True), now_s)


def second_form(compact: str) -> str:
    """The same message with the other form of its ECDSA signature, (r, n-s), which anybody can make."""
    text, _, signature = compact.rpartition(".")
    raw = b64decode(signature)
    s = _P256_ORDER - int.from_bytes(raw[32:])
    return f"{text}.{b64encode(raw[:32] + s.to_bytes(32))}"


_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
