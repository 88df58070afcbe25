"""Who may speak as which service: the trust bundle, verified against the pinned root."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from ringfence.kernel.base.errors import InvalidMessageError, SignatureError, UnavailableError
from ringfence.kernel.crypto.jws import KeyFinder, UnverifiedJws, parse, verify
from ringfence.kernel.crypto.keys import PublicKey, public_key, thumbprint, valid_key
from ringfence.kernel.crypto.multi_recipient_jwe import usable
from ringfence.messages.base import Claims, ServiceRole, Topic
from ringfence.messages.keys import KeyRecord, PublicJwk
from ringfence.messages.oidc import OidcIssuer, OidcUse
from ringfence.messages.trust import RootHandover, TrustBundle

log = logging.getLogger(__name__)

C = TypeVar("C", bound=Claims)


@dataclass(frozen=True, slots=True)
class _Service:
    roles: frozenset[ServiceRole]
    keys: tuple[KeyRecord, ...]
    encryption_keys: tuple[KeyRecord, ...]


class TrustStore:
    """The highest trust bundle seen. It starts empty: nothing is trusted until a bundle signed by the root came."""

    def __init__(self, trust_domain: str, root_fingerprint: str) -> None:
        """`root_fingerprint` is the root key's RFC 7638 thumbprint (`RINGFENCE_TRUST_ROOT`)."""
        self.trust_domain = trust_domain
        self.root_id = f"spiffe://{trust_domain}/root"
        self._fingerprint = root_fingerprint
        self._root: PublicKey | None = None
        """The root of the bundle in force: the pinned one, or one to which it handed over."""
        self._bundle: TrustBundle | None = None
        self._compact = b""
        self._other_root: str | None = None
        """The root that signed a bundle which was refused for it."""
        self._services: dict[str, list[_Service]] = {}
        """Of the bundle, by their ids: they are looked up for every message."""

    def anew(self) -> TrustStore:
        """One with the same pin that has seen nothing yet."""
        return TrustStore(self.trust_domain, self._fingerprint)

    @property
    def version(self) -> int | None:
        """The version of the bundle in force."""
        return self._bundle.version if self._bundle else None

    @property
    def compact(self) -> bytes:
        """The bundle in force as the root signed it; empty where there is none."""
        return self._compact

    def load(self, compact: str | bytes, now_s: float) -> bool:
        """Take in a bundle. False where it is not newer than the one in force.

        One that has expired is taken in too, and denies everything: it is the root's last word all the same.

        Raises SignatureError where it is not signed by the pinned root or one that this led to, InvalidMessageError
        where it is malformed.
        """
        root, bundle = self._by_any_root(compact, TrustBundle)
        believed = self._root.kid if self._root else self._fingerprint
        if root.kid != believed and not self._leads(believed, root.kid, bundle.handovers):
            self._other_root = root.kid
            said = f"in force is {believed}" if self._root else f"pinned is {believed} (RINGFENCE_TRUST_ROOT)"
            raise SignatureError(f"signed by root {root.kid}, {said}")
        if self._bundle is not None and bundle.version <= self._bundle.version:
            return False
        self._bundle, self._root = bundle, root
        self._compact = compact.encode() if isinstance(compact, str) else compact
        self._services = {}
        for service in bundle.services:
            known = _Service(frozenset(service.roles), service.keys, service.encryption_keys)
            self._services.setdefault(service.id, []).append(known)
        log.info("trust bundle %d in force, by root %s", bundle.version, root.kid)
        if expired := self.expired(now_s):
            log.error("%s", expired)
        return True

    def _leads(self, believed: str, wanted: str, handovers: Sequence[str]) -> bool:
        """Whether the roots, each by its own signature, hand over from the one that is believed to the one wanted."""
        at = believed
        for handover in handovers:
            root, claims = self._by_any_root(handover, RootHandover)
            if root.kid == at:  # those before it are of roots before the one that is believed
                at = thumbprint(claims.next_root)
        return at == wanted

    def _by_any_root(self, compact: str | bytes, model: type[C]) -> tuple[PublicKey, C]:
        """What the key in its own header signed, and that key: nothing before the pin, or a root, vouches for the key.

        Raises InvalidMessageError.
        """
        jws = parse(compact)
        try:
            root = public_key(PublicJwk.model_validate(jws.header.jwk, strict=True))
        except ValueError:
            raise InvalidMessageError(
                "what a root signs carries the root's key in its header (jwk)"
            ) from None
        signed = verify(
            jws, model, lambda iss, kid: root if (iss, kid) == (self.root_id, root.kid) else None,
            audience=self.trust_domain,
        )  # fmt: skip
        return root, signed.claims

    def root_key(self, iss: str, kid: str, at_s: float | None = None) -> PublicKey | None:
        """The root's key `kid`, for what only the root signs: today's, or one that was the root's at `at_s`.

        At any time where `at_s` is None: to know whose a key is, never to believe what it signs.
        """
        if self._root is None or self._bundle is None or iss != self.root_id:
            return None
        if kid == self._root.kid:
            return self._root
        for former in self._bundle.former_roots:
            if former.kid == kid:
                return public_key(former.jwk) if at_s is None else valid_key((former,), kid, at_s)
        return None

    def service_key(
        self, iss: str, kid: str, roles: tuple[ServiceRole, ...], at_s: float
    ) -> PublicKey | None:
        """The key `kid` of service `iss` if it has one of `roles` and the key counts at `at_s`."""
        if self._bundle is None or at_s >= self._bundle.exp:
            return None
        for service in self._services.get(iss, ()):
            if not service.roles.isdisjoint(roles):
                return valid_key(service.keys, kid, at_s)
        return None

    def signed_by_service(self, jws: UnverifiedJws, at_s: float, roles: tuple[ServiceRole, ...]) -> bool:
        """Whether a service of one of these roles signed this, whatever it says: it may be of no shape that anybody
        knows.
        """
        if not roles:
            return False
        try:
            claims = json.loads(jws.payload)
            iss = claims["iss"] if isinstance(claims, dict) else None
        except (ValueError, KeyError, RecursionError):
            return False
        if not isinstance(iss, str):
            return False
        key = self.service_key(iss, jws.header.kid, roles, at_s)
        return (
            key is not None and key.alg == jws.header.alg and key.verifies(jws.signature, jws.signing_input)
        )

    def may_be_vouched_for(self, topic: Topic[Any], compact: str | bytes, at_s: float) -> bool:
        """Whether a service that may write this message on this topic signed it after the end of the bundle in force,
        by a key that counted up to that: nobody is believed now, and the next bundle may say that this was one to
        believe. What a stranger writes never is, nor what another service does: it could hold up everybody who reads.
        """
        if self._bundle is None or at_s < self._bundle.exp:
            return False
        try:
            jws = parse(compact)
        except InvalidMessageError:
            return False
        return self.signed_by_service(jws, self.no_later_s(at_s), topic.signed_by(jws.header.typ))

    def require_judgeable(self, topic: Topic[Any], compact: str | bytes, at_s: float) -> None:
        """Raises UnavailableError where `may_be_vouched_for`."""
        if self.may_be_vouched_for(topic, compact, at_s):
            raise UnavailableError(
                f"a service signed this after the end of the bundle: {self.expired(at_s)}",
                code="trust_expired",
            )

    def no_later_s(self, at_s: float) -> float:
        """`at_s`, or the last moment of the bundle in force where that is over by then. By this only an end is judged,
        and what waits for the next bundle: never what anybody is given.
        """
        return at_s if self._bundle is None else min(at_s, self._bundle.exp - 1)

    def encryption_keys(
        self, role: ServiceRole, at_s: float, *, of: str | None = None
    ) -> tuple[KeyRecord, ...]:
        """What may be sealed to at `at_s`: the keys of all services of a role, or of the one with the id `of`."""
        if self._bundle is None or at_s >= self._bundle.exp:
            return ()
        every = (one for id, some in self._services.items() if of in (None, id) for one in some)
        return usable((key for one in every if role in one.roles for key in one.encryption_keys), at_s)

    def finder(self, *roles: ServiceRole, at_s: float) -> KeyFinder:
        """A `KeyFinder` for messages that only services of these roles may sign."""
        return lambda iss, kid: self.service_key(iss, kid, roles, at_s)

    def oidc_issuer(self, issuer: str, use: OidcUse, at_s: float) -> OidcIssuer | None:
        """The issuer of that name, if its tokens count for `use` at `at_s`."""
        if self._bundle is None or at_s >= self._bundle.exp:
            return None
        fitting = (one for one in self._bundle.oidc_issuers if one.issuer == issuer and use in one.uses)
        return next(fitting, None)

    def unready(self) -> str | None:
        """Why nothing can be trusted yet, or None."""
        if self._bundle:
            return None
        if self._other_root:
            return (
                f"the trust bundle on Kafka is signed by root {self._other_root}, and RINGFENCE_TRUST_ROOT pins "
                f"{self._fingerprint or 'none'}: this is another installation, or the wrong fingerprint"
            )
        return "no trust bundle on the trust topic; run: ringfence init --publish"

    def expired(self, now_s: float) -> str | None:
        """Why nothing can be trusted any more, or None: the bundle in force has come to its end."""
        if self._bundle is None or now_s < self._bundle.exp:
            return None
        ended = datetime.fromtimestamp(self._bundle.exp, UTC).isoformat(timespec="seconds")
        return (
            f"trust bundle {self._bundle.version} expired at {ended}: nobody is believed; the root signs the next one: "
            "ringfence init --renew --publish"
        )

    def require(self, now_s: float | None = None) -> TrustBundle:
        """The bundle in force. Raises UnavailableError where there is none, or it has expired at `now_s`."""
        if self._bundle is None:
            raise UnavailableError(str(self.unready()))
        if now_s is not None and (reason := self.expired(now_s)):
            raise UnavailableError(reason, code="trust_expired")
        return self._bundle
