"""What the offline root does, once and then rarely: keys, the trust bundle, the first operator.

The root's private key is needed for nothing else. Keep it off the machines that run services.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from ringfence.client.errors import checked
from ringfence.kernel.errors import RingfenceError
from ringfence.kernel.jws import sign
from ringfence.kernel.kafka import Publisher
from ringfence.kernel.keys import KeyFileError, SigningKey
from ringfence.kernel.settings import BusSettings
from ringfence.messages.base import Name
from ringfence.messages.registry import Entitlements, UserSet
from ringfence.messages.topics import REGISTRY_COMMAND, TRUST
from ringfence.messages.trust import ServiceIdentity, ServiceRole, TrustBundle
from ringfence.model.identity import spiffe_id

SERVICE_ROLES: tuple[ServiceRole, ...] = ("registry", "policy", "issuer", "revoker", "audit")
TOKEN_KEY = "issuer-token"  # noqa: S105 - the name of a file
"""The key that signs tokens is not the one that signs the issuer's messages."""
_YEAR_S = 365 * 24 * 3600
_A_NAME = TypeAdapter(Name)


class CeremonyError(RingfenceError):
    """The trust root cannot be made, or is not there."""

    code = "ceremony_failed"


@dataclass(frozen=True, slots=True)
class TrustFolder:
    """Where `ringfence init` keeps what it makes."""

    path: Path

    @property
    def root_key(self) -> Path:
        """The offline root's private key."""
        return self.path / "root.json"

    @property
    def bundle(self) -> Path:
        """The signed trust bundle."""
        return self.path / "trust-bundle.jws"

    def service_key(self, name: str) -> Path:
        """The private key of a service."""
        return self.path / "keys" / f"{name}.json"

    def user_key(self, user_id: str) -> Path:
        """The private key of a user whose key was made here."""
        return self.path / "users" / f"{user_id}.json"

    def agent_key(self, agent_id: str) -> Path:
        """The private key of an agent whose key was made here."""
        return self.path / "agents" / f"{agent_id}.json"

    def fingerprint(self) -> str:
        """The root's fingerprint: what `RINGFENCE_TRUST_ROOT` pins. Raises KeyFileError where there is no root."""
        return SigningKey.load(self.root_key).kid


def make_trust(
    folder: TrustFolder,
    trust_domain: str,
    operator: str,
    *,
    gateways: Sequence[str] = ("gateway",),
    valid_s: int = _YEAR_S,
) -> str:
    """Make the root, a key for each service and gateway, the first operator's key, and sign the trust bundle.

    `gateways`: the name of each. A revocation waits for the word of all that are there, so each has a key of its own.

    Returns the root's fingerprint. Raises InvalidCallError where a name cannot be one; CeremonyError where it is taken,
    or where there is a root already: a second one would orphan everything that the first one signed.
    """
    if folder.root_key.exists():
        raise CeremonyError(f"{folder.root_key} exists already; remove it only if nothing was signed with it")
    for name in (operator, *gateways):
        with checked(repr(name)):
            _A_NAME.validate_python(name)
    if taken := sorted({*SERVICE_ROLES, TOKEN_KEY} & set(gateways)):
        raise CeremonyError(f"{taken[0]} is the name of a service; give the gateway another")
    root = SigningKey.generate(f"spiffe://{trust_domain}/root")
    now_s = int(time.time())
    services = []
    named: list[tuple[str, ServiceRole]] = [(role, role) for role in SERVICE_ROLES]
    for name, role in [*named, *((name, "gateway") for name in dict.fromkeys(gateways))]:
        key = SigningKey.generate(spiffe_id(trust_domain, "service", name))
        key.save(folder.service_key(name))
        services.append(
            ServiceIdentity(id=key.id, roles=(role,), keys=(key.record(now_s + valid_s, now_s - 60),))
        )
    SigningKey.generate(spiffe_id(trust_domain, "service", "issuer")).save(folder.service_key(TOKEN_KEY))
    SigningKey.generate(spiffe_id(trust_domain, "user", operator)).save(folder.user_key(operator))
    bundle = TrustBundle(
        iss=root.id,
        aud=trust_domain,
        iat=now_s,
        jti=str(uuid.uuid4()),
        exp=now_s + valid_s,
        version=1,
        services=tuple(services),
    )
    folder.bundle.write_text(sign(bundle, root, header_jwk=True) + "\n")
    root.save(folder.root_key)
    return root.kid


def first_operator(folder: TrustFolder, trust_domain: str, operator: str, name: str) -> UserSet:
    """The root's command that makes the first operator; unsigned, it expires after an hour.

    Raises CeremonyError where the folder has no key of theirs.
    """
    now_s = int(time.time())
    file = folder.user_key(operator)
    if not file.exists():
        raise CeremonyError(
            f"there is no key of operator {operator} ({file}): the trust root was made with another operator; "
            "name that one (ringfence init --operator), or use another folder"
        )
    key = SigningKey.load(file)
    return UserSet(
        iss=f"spiffe://{trust_domain}/root",
        aud=trust_domain,
        iat=now_s,
        jti=str(uuid.uuid4()),
        exp=now_s + 3600,
        user_id=operator,
        name=name,
        roles=("operator",),
        keys=(key.record(now_s + _YEAR_S, now_s - 60),),
        entitlements=Entitlements(scope=(), source="root", as_of=now_s),
    )


async def publish_trust(folder: TrustFolder, settings: BusSettings, operator: str, name: str) -> None:
    """Put the trust bundle and the first operator on Kafka. Needs the root's key.

    Raises CeremonyError where `make_trust` has not run, or for another operator; UnavailableError where Kafka does not
    answer.
    """
    try:
        root = SigningKey.load(folder.root_key)
        bundle = folder.bundle.read_text().strip()
    except (KeyFileError, OSError) as error:
        raise CeremonyError(f"no trust root in {folder.path} ({error}); run: ringfence init") from None
    command = first_operator(folder, settings.trust_domain, operator, name)
    async with Publisher(settings, root.id) as publisher:
        await (await publisher.send(TRUST, "1", bundle, id=f"trust-{root.kid}", type=TrustBundle.typ))
        await publisher.publish_signed(REGISTRY_COMMAND, f"user/{operator}", command, root)
