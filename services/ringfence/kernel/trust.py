"""Who may speak as which service: the trust bundle, verified against the pinned root."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ringfence.kernel.envelope import usable
from ringfence.kernel.errors import InvalidMessageError, SignatureError, UnavailableError
from ringfence.kernel.jws import KeyFinder, open_signed, parse
from ringfence.kernel.keys import PublicKey, public_key, valid_key
from ringfence.messages.keys import KeyRecord, PublicJwk
from ringfence.messages.oidc import OidcIssuer, OidcUse
from ringfence.messages.trust import ServiceRole, TrustBundle

log = logging.getLogger(__name__)


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
        self._bundle: TrustBundle | None = None
        self._other_root: str | None = None
        """The root that signed a bundle which was refused for it."""
        self._services: dict[str, list[_Service]] = {}
        """Of the bundle, by their ids: they are looked up for every message."""

    @property
    def version(self) -> int | None:
        """The version of the bundle in force."""
        return self._bundle.version if self._bundle else None

    def load(self, compact: str | bytes, now_s: float) -> bool:
        """Take in a bundle. False where it is not newer than the one in force.

        Raises SignatureError where it is not signed by the pinned root, InvalidMessageError where it is malformed.
        """
        jws = parse(compact)
        try:
            root = public_key(PublicJwk.model_validate(jws.header.jwk, strict=True))
        except ValueError:
            raise InvalidMessageError("a trust bundle carries the root's key in its header (jwk)") from None
        if root.kid != self._fingerprint:
            self._other_root = root.kid
            raise SignatureError(
                f"signed by root {root.kid}, pinned is {self._fingerprint} (RINGFENCE_TRUST_ROOT)"
            )
        bundle = open_signed(
            jws, TrustBundle, lambda iss, kid: root if (iss, kid) == (self.root_id, root.kid) else None,
            audience=self.trust_domain,
        ).claims  # fmt: skip
        if self._bundle is not None and bundle.version <= self._bundle.version:
            return False
        if bundle.exp <= now_s:
            raise InvalidMessageError(
                f"trust bundle {bundle.version} has expired; sign a new one", code="expired"
            )
        self._bundle, self._root = bundle, root
        self._services = {}
        for service in bundle.services:
            known = _Service(frozenset(service.roles), service.keys, service.encryption_keys)
            self._services.setdefault(service.id, []).append(known)
        log.info("trust bundle %d in force", bundle.version)
        return True

    def root_key(self, iss: str, kid: str) -> PublicKey | None:
        """The root's own key, for what only the root signs."""
        if self._root is None or (iss, kid) != (self.root_id, self._root.kid):
            return None
        return self._root

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

    def require(self) -> TrustBundle:
        """The bundle in force. Raises UnavailableError where there is none."""
        if self._bundle is None:
            raise UnavailableError(str(self.unready()))
        return self._bundle
