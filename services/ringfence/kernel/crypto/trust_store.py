"""The trust store: which keys speak for which service, by a trust bundle that the pinned root signed.

The root is offline. It may hand over to another root: the bundle then has a chain of handovers, each signed by the root
before, which leads from the pinned root to the one that signed the bundle.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ringfence.kernel.base.clock import utc_text
from ringfence.kernel.base.errors import InvalidMessageError, SignatureError, UnavailableError
from ringfence.kernel.crypto.jwe import usable
from ringfence.kernel.crypto.jws import KeyFinder, UnverifiedJws, parse, verify
from ringfence.kernel.crypto.keys import PublicKey, public_key, thumbprint, valid_key
from ringfence.messages.base import Claims, KeyRecord, PublicJwk, ServiceRole, Topic
from ringfence.messages.codes import Code
from ringfence.messages.trust import OidcIssuer, OidcUse, Origin, RootHandover, SecondPerson, TrustBundle

log = logging.getLogger(__name__)

C = TypeVar("C", bound=Claims)


@dataclass(frozen=True, slots=True)
class _Service:
    roles: frozenset[ServiceRole]
    keys: tuple[KeyRecord, ...]
    encryption_keys: tuple[KeyRecord, ...]


class TrustStore:
    """The trust bundle in force: the one with the highest version that was loaded.

    Without a bundle, and after the bundle's `exp`, no key of a service is trusted.
    """

    def __init__(self, trust_domain: str, root_fingerprint: str) -> None:
        """`root_fingerprint` is the RFC 7638 thumbprint of the root key (`RINGFENCE_TRUST_ROOT`)."""
        self.trust_domain = trust_domain
        self.root_id = f"spiffe://{trust_domain}/root"
        self._fingerprint = root_fingerprint
        self._root: PublicKey | None = None
        """The root of the bundle in force: the pinned one, or one that it handed over to."""
        self._bundle: TrustBundle | None = None
        self._compact = b""
        self._of_another: str | None = None
        """Why a bundle of another root or trust domain was refused. Not verified: it only explains `unready`."""
        self._services: dict[str, list[_Service]] = {}
        """The services of the bundle by id, because every message needs a lookup."""

    def anew(self) -> TrustStore:
        """An empty trust store with the same pinned root."""
        return TrustStore(self.trust_domain, self._fingerprint)

    @property
    def version(self) -> int | None:
        return self._bundle.version if self._bundle else None

    @property
    def compact(self) -> bytes:
        """The bundle in force as the root signed it; empty if there is none."""
        return self._compact

    def load(self, compact: str | bytes, now_s: float) -> bool:
        """Verify a trust bundle, and put it in force. False if it is not newer than the bundle in force.

        An expired bundle is put in force too, and denies everything: it is still the root's last word.

        Raises SignatureError if it is signed neither by the pinned root nor by one that this root handed over to, and
        InvalidMessageError if it is malformed.
        """
        try:
            root, bundle = self._by_any_root(compact, TrustBundle)
        except InvalidMessageError as error:
            if error.code != Code.AUD_UNEXPECTED:
                raise
            self._of_another = (
                f"the trust bundle on Kafka is of another trust domain ({error}): this is another installation; "
                "correct RINGFENCE_TRUST_DOMAIN or RINGFENCE_KAFKA"
            )
            raise InvalidMessageError(self._of_another, code=error.code) from None
        believed = self._root.kid if self._root else self._fingerprint
        if root.kid != believed and not self._leads(believed, root.kid, bundle.handovers):
            self._of_another = (
                f"the trust bundle on Kafka is signed by root {root.kid}, and RINGFENCE_TRUST_ROOT pins "
                f"{self._fingerprint or 'none'}: this is another installation, or the wrong fingerprint"
            )
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
        """Whether signed handovers lead from the root `believed` to the root `wanted`, both given by thumbprint."""
        at = believed
        for handover in handovers:
            root, claims = self._by_any_root(handover, RootHandover)
            if root.kid == at:  # earlier ones belong to roots before the trusted one
                at = thumbprint(claims.next_root)
        return at == wanted

    def _by_any_root(self, compact: str | bytes, model: type[C]) -> tuple[PublicKey, C]:
        """Verify a message with the key in its own header. Returns that key and the claims.

        Nothing vouches for the key: the caller compares it with the pinned root, or with a handover. Raises
        InvalidMessageError.
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
        """The root key `kid`: the current root, or a former root that was in office at `at_s` (seconds).

        With `at_s` None, a former root at any time. Use this only to find the owner of a key, never to accept its
        signature.
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
        """The key `kid` of the service `iss`, if the service has one of `roles` and the key is valid at `at_s`; else
        None.
        """
        if self._bundle is None or at_s >= self._bundle.exp:
            return None
        for service in self._services.get(iss, ()):
            if not service.roles.isdisjoint(roles):
                return valid_key(service.keys, kid, at_s)
        return None

    def service_keys(self, id: str, role: ServiceRole, at_s: float) -> tuple[KeyRecord, ...]:
        """The signing keys of the service `id` that are valid at `at_s`, if it has this role; else none."""
        if self._bundle is None or at_s >= self._bundle.exp:
            return ()
        for service in self._services.get(id, ()):
            if role in service.roles:
                return tuple(key for key in service.keys if key.not_before <= at_s < key.not_after)
        return ()

    def signed_by_service(self, jws: UnverifiedJws, at_s: float, roles: tuple[ServiceRole, ...]) -> bool:
        """Whether a service with one of `roles` signed this message. The message may have any shape."""
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
        """Whether a message that is not trusted now may become trusted with the next bundle.

        That is so if the bundle has expired, and a service that may write this message on this topic signed it with a
        key that was valid up to the bundle's end. Messages of strangers and of other services never qualify: they could
        hold up all readers.
        """
        if self._bundle is None or at_s < self._bundle.exp:
            return False
        try:
            jws = parse(compact)
        except InvalidMessageError:
            return False
        return self.signed_by_service(jws, self.no_later_s(at_s), topic.signed_by(jws.header.typ))

    def require_judgeable(self, topic: Topic[Any], compact: str | bytes, at_s: float) -> None:
        """Raises UnavailableError if `may_be_vouched_for`: the message has to wait for the next bundle."""
        if self.may_be_vouched_for(topic, compact, at_s):
            raise UnavailableError(
                f"a service signed this after the end of the bundle: {self.expired(at_s)}",
                code=Code.TRUST_EXPIRED,
            )

    def no_later_s(self, at_s: float) -> float:
        """`at_s`, but at most the last second of the bundle in force.

        Use it only to judge an end, or a message that waits for the next bundle, never to grant anything.
        """
        return at_s if self._bundle is None else min(at_s, self._bundle.exp - 1)

    def encryption_keys(
        self, role: ServiceRole, at_s: float, *, of: str | None = None
    ) -> tuple[KeyRecord, ...]:
        """The public keys to encrypt to at `at_s`: those of all services with `role`, or only those of the service
        `of`.
        """
        if self._bundle is None or at_s >= self._bundle.exp:
            return ()
        every = (one for id, some in self._services.items() if of in (None, id) for one in some)
        return usable((key for one in every if role in one.roles for key in one.encryption_keys), at_s)

    def finder(self, *roles: ServiceRole, at_s: float) -> KeyFinder:
        """A `KeyFinder` for messages that only services with these roles may sign, at `at_s`."""
        return lambda iss, kid: self.service_key(iss, kid, roles, at_s)

    def origins(self, at_s: float) -> tuple[Origin, ...]:
        """The origins where people may use passkeys at `at_s` (seconds), by the bundle in force.

        Also after the bundle's `exp`, because people's other keys count then too. An origin with an unknown field is
        ignored.
        """
        if self._bundle is None:
            return ()
        return tuple(
            origin
            for origin in self._bundle.origins
            if origin.not_before <= at_s
            and (origin.not_after is None or at_s < origin.not_after)
            and not origin.model_extra
        )

    def second_person(self, at_s: float) -> SecondPerson:
        """Whether widening commands that are appended at `at_s` (seconds) need a second person."""
        if self._bundle is None:
            return "required"
        begun = [one for one in self._bundle.second_person if one.not_before <= at_s]
        if not begun:
            return "reported"
        last = max(begun, key=lambda one: one.not_before)
        return "required" if last.model_extra else last.mode

    def oidc_issuer(self, issuer: str, use: OidcUse, at_s: float) -> OidcIssuer | None:
        """The OIDC issuer with this name, if its tokens are accepted for `use` at `at_s`; else None."""
        if self._bundle is None or at_s >= self._bundle.exp:
            return None
        fitting = (one for one in self._bundle.oidc_issuers if one.issuer == issuer and use in one.uses)
        return next(fitting, None)

    def unready(self) -> str | None:
        """The reason if no bundle is in force, else None."""
        if self._bundle:
            return None
        return self._of_another or "no trust bundle on the trust topic; run: ringfence init --publish"

    def expired(self, now_s: float) -> str | None:
        """The reason if the bundle in force has expired at `now_s`, else None."""
        if self._bundle is None or now_s < self._bundle.exp:
            return None
        ended = utc_text(self._bundle.exp)
        return (
            f"trust bundle {self._bundle.version} expired at {ended}: nobody is believed; the root signs the next one: "
            "ringfence init --renew --publish"
        )

    def require(self, now_s: float | None = None) -> TrustBundle:
        """The bundle in force. Raises UnavailableError if there is none, or if it has expired at `now_s`."""
        if self._bundle is None:
            raise UnavailableError(str(self.unready()))
        if now_s is not None and (reason := self.expired(now_s)):
            raise UnavailableError(reason, code=Code.TRUST_EXPIRED)
        return self._bundle
