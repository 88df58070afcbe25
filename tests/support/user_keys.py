"""New keys of people, as everybody who takes part signs them: invitation, possession, co-signature, command."""

from __future__ import annotations

import json
from typing import Any

from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey, b64encode
from ringfence.messages.base import KeyRecord
from ringfence.messages.registry import KeyEndorsement, KeyPossession, UserAddKey, UserEndKey, UserInvite
from ringfence.model.lifecycle import KeyHistory, KeyOrigin
from ringfence.model.lifecycle.holds import AT_ONCE_S
from tests.support.in_memory_registry import START_MS, TD, InMemoryRegistry
from tests.support.passkeys import SoftwarePasskey
from tests.support.world import Party, World

YEARS_S = 10 * 365 * 86_400


def new_key(user: str) -> SigningKey:
    """A key file of a user that nobody has yet."""
    return SigningKey.generate(f"spiffe://{TD}/user/{user}")


def new_passkey(user: str, **more: Any) -> SoftwarePasskey:
    """A passkey of a user that nobody has yet."""
    return SoftwarePasskey.make(f"spiffe://{TD}/user/{user}", **more)


def record_of(key: SigningKey) -> KeyRecord:
    return key.record(START_MS // 1000 + YEARS_S)


def invitation(
    ledger: InMemoryRegistry, by: str, user: str, key: SigningKey | None = None, **fields: Any
) -> str:
    """An invitation that `by` signs, with their key or another one."""
    return sign(ledger.claims(UserInvite, by, **{"user_id": user, **fields}), key or ledger.key(by))


def possession(
    ledger: InMemoryRegistry,
    key: SigningKey,
    user: str,
    invited: str,
    by: SigningKey | None = None,
    **fields: Any,
) -> str:
    """What the new key (or another one) signs in answer to an invitation."""
    jti = jti_of(invited)
    given = {"user_id": user, "jwk": key.public, "invitation": jti, "iss": f"spiffe://{TD}/user/{user}"}
    return sign(ledger.claims(KeyPossession, user, **{**given, **fields}), by or key)


def jti_of(invited: str) -> str:
    return parse(invited).unverified_claims(UserInvite).jti


def endorsement(
    ledger: InMemoryRegistry,
    by: str,
    user: str,
    kid: str,
    possessed: str,
    key: SigningKey | None = None,
    **fields: Any,
) -> str:
    """A second operator's signature under a new key."""
    given = {"user_id": user, "kid": kid, "possession_digest": digest(possessed)}
    return sign(ledger.claims(KeyEndorsement, by, **{**given, **fields}), key or ledger.key(by))


def add_key(
    ledger: InMemoryRegistry,
    by: str,
    user: str,
    new: SigningKey,
    /,
    *,
    cosigned: str | None = None,
    **fields: Any,
) -> UserAddKey:
    """The command by which `by` adds a new key to a user; `cosigned`: by whom."""
    invited = fields.pop("invitation", None) or invitation(ledger, by, user)
    possessed = fields.pop("possession", None) or possession(ledger, new, user, invited)
    given: dict[str, Any] = {
        "user_id": user,
        "key": record_of(new),
        "invitation": invited,
        "possession": possessed,
        "endorsement": endorsement(ledger, cosigned, user, new.kid, possessed) if cosigned else None,
    }
    return ledger.claims(UserAddKey, by, **{**given, **fields})


def end_key(ledger: InMemoryRegistry, by: str, user: str, kid: str, **fields: Any) -> UserEndKey:
    """The end of a key; of a compromised one, which was for a month, unless the fields say otherwise."""
    given = {"user_id": user, "kid": kid, "reason": "a test"}
    since = {"since_ms": ledger.clock.ms - AT_ONCE_S * 1000} if fields.get("compromised") else {}
    return ledger.claims(UserEndKey, by, **{**given, **since, **fields})


# For tests of rules without records: an approval of which only the header is read, and the origin of its key.


def said_by(kid: str) -> str:
    """A compact JWS with this `kid`, which verifies nowhere."""
    header = b64encode(json.dumps({"alg": "ES256", "kid": kid, "typ": "any"}).encode())
    return f"{header}.e30.e30"


def first_key(kid: str) -> KeyHistory:
    """The history of a user who has had this one key from the start."""
    return KeyHistory({kid: KeyOrigin(kid, 0, "olga", "key of olga", first=True, counts_from_ms=0)})


# The same in a world with services.


async def give_key(world: World, by: Party, user: Party, *cosigners: Party) -> Party:
    """Add a new key file to a user by `user.add-key`, as `by`; who has it from then on."""
    new = world.party("user", user.name)
    command = add_key_in(world, by, new, *cosigners)
    await world.accepted(command, by)
    return new


async def give_attested_passkey(world: World, by: Party, user: Party, *cosigners: Party) -> Party:
    """As `give_key`, a passkey of which `by`, an operator, says that it is attested."""
    new = Party(user.name, SoftwarePasskey.make(user.id))
    record = new.key_record().model_copy(update={"attested": True})
    await world.accepted(add_key_in(world, by, new, *cosigners, key=record), by)
    return new


def add_key_in(
    world: World, by: Party, new: Party, *cosigners: Party, key: KeyRecord | None = None
) -> UserAddKey:
    """The command by which `by` adds the key of `new`, with a co-signature if somebody is named.

    `key`: its record, if that is not the usual one.
    """
    invited = world.claims(UserInvite, by, user_id=new.name)
    possessed = sign(
        world.claims(KeyPossession, new, user_id=new.name, jwk=new.key.public, invitation=invited.jti),
        new.key,
    )
    signed = [
        sign(
            world.claims(
                KeyEndorsement, one, user_id=new.name, kid=new.key.kid, possession_digest=digest(possessed)
            ),
            one.key,
        )
        for one in cosigners
    ]
    return world.claims(
        UserAddKey, by, user_id=new.name, key=key or new.key_record(), invitation=sign(invited, by.key),
        possession=possessed, endorsement=signed[0] if signed else None,
    )  # fmt: skip
