"""The root ceremony: makes the root, the service keys, the trust bundle and the first operator. The root is offline.

The root's private key is needed for nothing else. Keep it off the machines that run services.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ringfence.client.admin.user_keys import KeyPackage
from ringfence.client.errors import checked
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError
from ringfence.kernel.base.private_files import write_private
from ringfence.kernel.base.settings import BusSettings
from ringfence.kernel.crypto.jwe import EncryptionKey
from ringfence.kernel.crypto.jws import parse, sign, verify
from ringfence.kernel.crypto.keys import KeyFileError, SigningKey, public_key, thumbprint
from ringfence.kernel.crypto.service_keys import BEFORE, NEXT
from ringfence.kernel.kafka.record import Outbound
from ringfence.messages.base import KeyRecord, Name, ServiceRole
from ringfence.messages.codes import Code
from ringfence.messages.registry import Entitlements, KeyPossession, UserInvite, UserSet
from ringfence.messages.topics import REGISTRY_COMMAND, TRUST
from ringfence.messages.trust import (
    OidcIssuer,
    Origin,
    SecondPerson,
    SecondPersonMode,
    ServiceIdentity,
    TrustBundle,
)
from ringfence.model.identity.runners import runner_name
from ringfence.model.identity.spiffe_ids import spiffe_id
from ringfence.model.unknown_fields import describe_unknown, unknown_fields

_KEYS_BY_ROLE: tuple[ServiceRole, ...] = ("registry", "policy", "issuer", "revoker", "audit")
"""All replicas of a role share one key. Each gateway has its own, since cuts wait for each of them. Each
runner has its own too, since agents name the runners that they trust."""
SERVICE_ROLES: tuple[ServiceRole, ...] = (*_KEYS_BY_ROLE, "gateway")
ON_DEMAND: tuple[ServiceRole, ...] = ("scim", "signals", "console")
"""Optional services. They have a key from the beginning."""
BY_NAME: tuple[ServiceRole, ...] = ("runner",)
"""Services that not everybody runs, each process with a name and a key of its own (`init --add-runner`)."""
TOKEN_KEY = "issuer-token"  # noqa: S105 - the name of a file
"""Signs access tokens. It is not the key that signs the issuer's messages."""
_SEALED_TO: tuple[ServiceRole, ...] = ("issuer", "gateway")
"""Roles with an encryption key, to which credentials are encrypted."""
SEAL = "-seal"
YEAR_S = 365 * 24 * 3600
SECOND_PERSON_AFTER_S = 3600
"""How long after its signature a bundle requires the second person: it has to be published before."""
_NAME = TypeAdapter(Name)


class CeremonyError(RingfenceError):
    """Raised when the trust root cannot be made or does not exist."""

    code = Code.CEREMONY_FAILED


@dataclass(frozen=True, slots=True)
class TrustFolder:
    """The folder in which `ringfence init` keeps keys and the trust bundle."""

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

    def encryption_key(self, name: str) -> Path:
        """The private key of a service to which credentials are encrypted."""
        return self.service_key(name + SEAL)

    def user_key(self, user_id: str) -> Path:
        """The private key of a user whose key was made here."""
        return self.path / "users" / f"{user_id}.json"

    def agent_key(self, agent_id: str) -> Path:
        """The private key of an agent whose key was made here."""
        return self.path / "agents" / f"{agent_id}.json"

    def fingerprint(self) -> str:
        """The root's fingerprint, which `RINGFENCE_TRUST_ROOT` pins. Raises KeyFileError if there is no root."""
        return SigningKey.load(self.root_key).kid


def make_trust(
    folder: TrustFolder,
    trust_domain: str,
    operator: str,
    *,
    gateways: Sequence[str] = ("gateway",),
    valid_s: int = YEAR_S,
    rp_id: str | None = None,
    origins: tuple[Origin, ...] = (),
) -> str:
    """Make the root, a key for each service and gateway, the first operator's key, and sign the trust bundle.

    `gateways`: the name of each. A revocation waits for the acknowledgement of every gateway, so each has a key of its
    own. `rp_id` and `origins`: see `ringfence.client.admin.origins`.

    Returns the root's fingerprint. Raises InvalidCallError if a name is invalid; CeremonyError if it is taken, or
    if there is a root already: a second one would orphan everything that the first one signed.
    """
    if folder.root_key.exists():
        raise CeremonyError(f"{folder.root_key} exists already; remove it only if nothing was signed with it")
    _check_names(operator, own_keys=gateways)
    before = set(folder.path.rglob("*.j*"))
    try:
        return _make_trust(folder, trust_domain, operator, gateways, valid_s, rp_id, origins)
    except BaseException:
        # Keys without a root are useless, and would stand in the way of the next try.
        for made in set(folder.path.rglob("*.j*")) - before:
            made.unlink(missing_ok=True)
        raise


def _make_trust(
    folder: TrustFolder,
    trust_domain: str,
    operator: str,
    gateways: Sequence[str],
    valid_s: int,
    rp_id: str | None,
    origins: tuple[Origin, ...],
) -> str:
    root = SigningKey.generate(f"spiffe://{trust_domain}/root")
    now_s = int(time.time())
    service_roles: list[tuple[str, ServiceRole]] = [(role, role) for role in (*_KEYS_BY_ROLE, *ON_DEMAND)]
    service_roles += [(name, "gateway") for name in dict.fromkeys(gateways)]
    services = [
        _new_service(folder, trust_domain, name, role, now_s, now_s + valid_s) for name, role in service_roles
    ]
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
        rp_id=rp_id,
        origins=origins,
        second_person=(SecondPersonMode(mode="reported", not_before=now_s),),
    )
    write_private(folder.bundle, sign(bundle, root, header_jwk=True) + "\n")
    root.save(folder.root_key)
    return root.kid


def add_gateways(folder: TrustFolder, gateways: Sequence[str]) -> TrustBundle:
    """Sign the next version of the trust bundle: with these gateways, each with new keys, beside everything in it.

    The end of the bundle stays what it is.

    Returns the bundle. Needs the root's key. Raises InvalidCallError if a name is invalid; CeremonyError if it is
    taken, or there is no trust root, or its bundle has expired (see `ringfence.client.admin.key_rotation`).
    """
    root, bundle = load_root_and_bundle(folder)
    _check_names(own_keys=gateways)
    if taken := _first_taken(bundle, gateways):
        raise CeremonyError(f"{taken} is in the trust bundle already; give the gateway another name")
    return _with_services(folder, bundle, root, [(name, "gateway") for name in dict.fromkeys(gateways)])


def add_runners(folder: TrustFolder, runners: Sequence[str]) -> TrustBundle:
    """Sign the next version of the trust bundle: with these runners, each with a new key, beside everything in it.

    Returns the bundle. Needs the root's key. Raises InvalidCallError if a name is invalid; CeremonyError if it is
    taken, or there is no trust root, or its bundle has expired.
    """
    root, bundle = load_root_and_bundle(folder)
    _check_names(own_keys=runners)
    if taken := _first_taken(bundle, runners):
        raise CeremonyError(f"{taken} is in the trust bundle already; give the runner another name")
    return _with_services(folder, bundle, root, [(name, "runner") for name in dict.fromkeys(runners)])


def add_services(folder: TrustFolder, roles: Sequence[str]) -> TrustBundle:
    """Sign the next version of the trust bundle: with keys for optional services (`ON_DEMAND`) that the bundle lacks.

    Returns the bundle. Needs the root's key. Raises CeremonyError if there is no such service, it is in the bundle
    already, or there is no trust root, or its bundle has expired.
    """
    root, bundle = load_root_and_bundle(folder)
    if unknown := [role for role in roles if role not in ON_DEMAND]:
        raise CeremonyError(
            f"{unknown[0]} is no service that can be added; these can: {', '.join(ON_DEMAND)}"
        )
    if taken := _first_taken(bundle, roles):
        raise CeremonyError(
            f"{taken} is in the trust bundle already; a new key for it: --rotate-service {taken}"
        )
    return _with_services(folder, bundle, root, [(role, role) for role in ON_DEMAND if role in roles])


def missing_on_demand_services(bundle: TrustBundle) -> list[ServiceRole]:
    """The optional services for which a trust bundle has no keys."""
    return [role for role in ON_DEMAND if not any(role in service.roles for service in bundle.services)]


def set_oidc_issuer(folder: TrustFolder, issuer: OidcIssuer) -> TrustBundle:
    """Sign the next version of the trust bundle: with this issuer, which replaces one of the same name.

    Returns the bundle. Needs the root's key. Raises CeremonyError if the issuer lacks what its use needs, or there
    is no trust root.
    """
    if unknown := unknown_fields(issuer):
        raise CeremonyError(describe_unknown(unknown, f"issuer {issuer.issuer}"))
    if issuer.discovery == bool(issuer.keys):
        raise CeremonyError(
            f"{issuer.issuer} needs either pinned keys (--jwks) or discovery (--oidc-discovery)"
        )
    if issuer.discovery and issuer.uses != ("instances",):
        raise CeremonyError("the keys of who speaks for people are pinned: give --jwks, not --oidc-discovery")
    if issuer.discovery and not issuer.issuer.startswith("https://"):
        raise CeremonyError(
            f"discovery goes by HTTPS, and the issuer is {issuer.issuer}; pin its keys (--jwks)"
        )
    root, bundle = load_root_and_bundle(folder)
    if runner_name(bundle.aud, issuer.issuer) is not None:
        raise CeremonyError(
            f"{issuer.issuer} is the name of a runner as an issuer; add one with: ringfence init --add-runner"
        )
    remaining = tuple(one for one in bundle.oidc_issuers if one.issuer != issuer.issuer)
    return sign_next_bundle(folder, bundle, root, int(time.time()), oidc_issuers=(*remaining, issuer))


def remove_oidc_issuer(folder: TrustFolder, issuer: str) -> TrustBundle:
    """Sign the next version of the trust bundle without this issuer: its tokens are invalid from then on.

    Returns the bundle. Needs the root's key. Raises CeremonyError if it is not in the bundle, or there is no trust
    root.
    """
    root, bundle = load_root_and_bundle(folder)
    remaining = tuple(one for one in bundle.oidc_issuers if one.issuer != issuer)
    if len(remaining) == len(bundle.oidc_issuers):
        names_text = ", ".join(one.issuer for one in remaining) or "none"
        raise CeremonyError(f"the trust bundle has no issuer {issuer}; it has {names_text}")
    return sign_next_bundle(folder, bundle, root, int(time.time()), oidc_issuers=remaining)


def set_second_person(folder: TrustFolder, mode: SecondPerson) -> TrustBundle:
    """Sign the next version of the trust bundle: widening commands need a second person (`required`), or are only
    reported.

    `required` begins after `SECOND_PERSON_AFTER_S`: what is appended before the registry reads the bundle would count
    for nothing otherwise. Returns the bundle. Needs the root's key. Raises CeremonyError if the mode is set already, or
    there is no trust root.
    """
    root, bundle = load_root_and_bundle(folder)
    now_s = int(time.time())
    if bundle.second_person and bundle.second_person[-1].mode == mode:
        raise CeremonyError(f"the second person is {mode} already, by trust bundle {bundle.version}")
    begins_s = now_s + (SECOND_PERSON_AFTER_S if mode == "required" else 0)
    modes = (*bundle.second_person, SecondPersonMode(mode=mode, not_before=begins_s))
    return sign_next_bundle(folder, bundle, root, now_s, second_person=modes)


def sign_next_bundle(
    folder: TrustFolder, bundle: TrustBundle, root: SigningKey, now_s: int, **changed: Any
) -> TrustBundle:
    """Sign the version after `bundle`, with the fields in `changed`, and write it to the folder."""
    following = bundle.model_copy(
        update={"iat": now_s, "jti": str(uuid.uuid4()), "version": bundle.version + 1, **changed}
    )
    write_private(folder.bundle, sign(following, root, header_jwk=True) + "\n")
    return following


def _check_names(*names: str, own_keys: Sequence[str]) -> None:
    """Check names of users, and names of gateways or runners (`own_keys`), which become names of key files."""
    for name in (*names, *own_keys):
        with checked(repr(name)):
            _NAME.validate_python(name)
    if taken := sorted({*_KEYS_BY_ROLE, *ON_DEMAND, TOKEN_KEY} & set(own_keys)):
        raise CeremonyError(f"{taken[0]} is the name of a service; give it another")
    if reserved := [name for name in own_keys if name.endswith((SEAL, NEXT)) or SEAL + BEFORE in name]:
        raise CeremonyError(
            f"{reserved[0]} ends in {SEAL} or {NEXT}, or has {SEAL}{BEFORE} in it, as the files of other keys do; "
            "give it another"
        )


def _first_taken(bundle: TrustBundle, names: Sequence[str]) -> str | None:
    """The first of these names that a service of the bundle has."""
    ids = {service.id for service in bundle.services}
    return next((name for name in names if spiffe_id(bundle.aud, "service", name) in ids), None)


def _with_services(
    folder: TrustFolder, bundle: TrustBundle, root: SigningKey, more: Sequence[tuple[str, ServiceRole]]
) -> TrustBundle:
    """Sign the next version of a bundle: with these services beside everything in it. Raises CeremonyError."""
    now_s = int(time.time())
    if bundle.exp <= now_s:
        raise CeremonyError(f"the trust bundle in {folder.bundle} has expired; first sign it anew: --renew")
    new = [_new_service(folder, bundle.aud, name, role, now_s, bundle.exp) for name, role in more]
    return sign_next_bundle(folder, bundle, root, now_s, services=(*bundle.services, *new))


def _new_service(
    folder: TrustFolder, trust_domain: str, name: str, role: ServiceRole, now_s: int, end_s: int
) -> ServiceIdentity:
    """Return a service with fresh keys, and write the private keys to the folder."""
    key = SigningKey.generate(spiffe_id(trust_domain, "service", name))
    key.save(folder.service_key(name))
    sealed_to: tuple[KeyRecord, ...] = ()
    if role in _SEALED_TO:
        encryption_key = EncryptionKey.generate(key.id)
        encryption_key.save(folder.encryption_key(name))
        sealed_to = (encryption_key.record(end_s, now_s - 60),)
    keys = (key.record(end_s, now_s - 60),)
    return ServiceIdentity(id=key.id, roles=(role,), keys=keys, encryption_keys=sealed_to)


def load_root_and_bundle(folder: TrustFolder) -> tuple[SigningKey, TrustBundle]:
    """Load the root's key and the bundle that it signed last. Raises CeremonyError."""
    try:
        root = SigningKey.load(folder.root_key)
        jws = parse(folder.bundle.read_text().strip())
        trust_domain = root.id.removeprefix("spiffe://").partition("/")[0]
        bundle = verify(
            jws, TrustBundle, lambda iss, kid: public_key(root.public) if kid == root.kid else None,
            audience=trust_domain,
        ).claims  # fmt: skip
    except (KeyFileError, OSError, InvalidMessageError) as error:
        raise CeremonyError(f"no trust root in {folder.path} ({error}); run: ringfence init") from None
    return root, bundle


def first_operator(folder: TrustFolder, trust_domain: str, operator: str, name: str) -> UserSet:
    """Return the root's unsigned command that creates the first operator. It expires after an hour.

    Raises CeremonyError if the folder has no key of theirs.
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
        keys=(key.record(now_s + YEAR_S, now_s - 60),),
        entitlements=Entitlements(scope=(), source="root", as_of=now_s),
    )


def second_operator(folder: TrustFolder, package: KeyPackage, name: str) -> UserSet:
    """Return the root's unsigned command that makes somebody an operator, by a package of a key of their own
    (`ringfence key prove`), in answer to an invitation by the root. The root never sees their private key.

    Raises CeremonyError if the package does not verify, or there is no trust root.
    """
    root, bundle = load_root_and_bundle(folder)
    now_ms, owner = int(time.time()) * 1000, spiffe_id(bundle.aud, "user", package.user_id)
    key = public_key(package.jwk)
    try:
        invited = verify(
            parse(package.invitation), UserInvite,
            lambda iss, kid: public_key(root.public) if (iss, kid) == (root.id, root.kid) else None,
            audience=bundle.aud, appended_at_ms=now_ms,
        ).claims  # fmt: skip
        possessed = verify(
            parse(package.possession), KeyPossession,
            lambda iss, kid: key if (iss, kid) == (owner, key.kid) else None,
            audience=bundle.aud, appended_at_ms=now_ms,
        ).claims  # fmt: skip
    except InvalidMessageError as error:
        raise CeremonyError(
            f"the package does not show that {package.user_id} has this key: {error}; the root invites them with: "
            f"ringfence user invite {package.user_id}"
        ) from None
    if (invited.user_id, possessed.user_id, possessed.invitation, thumbprint(possessed.jwk)) != (
        package.user_id,
        package.user_id,
        invited.jti,
        key.kid,
    ):
        raise CeremonyError("invitation and possession in the package are of different people or keys")
    if folder.user_key(package.user_id).exists():
        raise CeremonyError(
            f"{folder.user_key(package.user_id)} is here: one machine that has the keys of both operators is one person"
        )
    now_s = now_ms // 1000
    return UserSet(
        iss=root.id,
        aud=bundle.aud,
        iat=now_s,
        jti=str(uuid.uuid4()),
        exp=now_s + 3600,
        user_id=package.user_id,
        name=name,
        roles=("operator",),
        keys=(package.record(now_s + YEAR_S),),
        entitlements=Entitlements(scope=(), source="root", as_of=now_s),
    )


async def publish_operator(folder: TrustFolder, settings: BusSettings, command: UserSet) -> None:
    """Put the folder's bundle and an operator on Kafka. Needs the root's key. Raises as `publish_trust`."""
    from ringfence.kernel.kafka.producer import Publisher

    root, _ = load_root_and_bundle(folder)
    async with Publisher(settings, root.id) as publisher:
        await publisher.require(TRUST, REGISTRY_COMMAND)
        await publish_bundle(folder, settings)
        await publisher.publish_signed(REGISTRY_COMMAND, f"user/{command.user_id}", command, root)


async def publish_trust(folder: TrustFolder, settings: BusSettings, operator: str, name: str) -> None:
    """Put the trust bundle and the first operator on Kafka. Needs the root's key.

    Raises CeremonyError if `make_trust` has not run, or for another operator; UnavailableError if Kafka does not
    answer.
    """
    await publish_operator(folder, settings, first_operator(folder, settings.trust_domain, operator, name))


async def publish_bundle(folder: TrustFolder, settings: BusSettings) -> None:
    """Put the trust bundle on Kafka.

    Raises CeremonyError if there is none, or if Kafka has a newer one, which everybody follows; UnavailableError
    if Kafka does not answer.
    """
    from ringfence.kernel.kafka.producer import Publisher

    root, bundle = load_root_and_bundle(folder)
    compact, version = folder.bundle.read_text().strip(), str(bundle.version)
    async with Publisher(settings, root.id) as publisher:
        await publisher.require(TRUST)
        await require_newest(folder, settings)
        await (
            await publisher.send(TRUST, TrustBundle.typ, Outbound(version, compact, id=f"trust-{bundle.jti}"))
        )


async def require_newest(folder: TrustFolder, settings: BusSettings) -> None:
    """Compare the folder's bundle with the one in force on Kafka.

    Raises CeremonyError where everybody follows another one, not older: the folder was restored from an old copy,
    or is not the only one. The newest is then written beside. Raises UnavailableError where Kafka does not answer.
    """
    from ringfence.kernel.crypto.trust_store import TrustStore
    from ringfence.kernel.kafka.range_reader import Stretches

    _, bundle = load_root_and_bundle(folder)
    found = TrustStore(bundle.aud, folder.fingerprint())
    async with Stretches(settings) as kafka:
        async for record in kafka.whole(TRUST):
            with contextlib.suppress(InvalidMessageError):
                found.load(record.value, time.time())
    newest = found.compact.decode()
    if found.version is None or found.version < bundle.version or newest == folder.bundle.read_text().strip():
        return
    beside = folder.bundle.with_stem(f"{folder.bundle.stem}-{found.version}")
    write_private(beside, f"{newest}\n")
    raise CeremonyError(
        f"everybody follows trust bundle {found.version} on Kafka; {folder.bundle} is bundle {bundle.version}, made "
        f"without it. The newest is in {beside} now: put it in the place of that file, and sign the change again"
    )
