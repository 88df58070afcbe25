"""Proofs in `user.add-key`: that the user has the new key, and was invited to make it; perhaps a co-signature.

All of it is judged as of the append time of the command that embeds it: the keys of who invited and co-signed, their
roles, and the ends of all three messages. As whatever a passkey signs, its possession is appended within ten minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import digest, message_id
from ringfence.kernel.crypto.jws import KeyFinder, Signed, parse, verify
from ringfence.kernel.crypto.keys import thumbprint
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.crypto.webauthn import VerificationKey
from ringfence.messages.codes import Code, ReceivedCode
from ringfence.messages.registry import KeyEndorsement, KeyPossession, Role, UserAddKey, UserInvite
from ringfence.model.identity.spiffe_ids import spiffe_id, subject_of
from ringfence.model.lifecycle import KeyOrigin, KeyProof, SignerKey, check_endorsement
from ringfence.model.records.user_keys import user_key
from ringfence.model.verdict import Refused


@dataclass(frozen=True, slots=True)
class PeopleThen:
    """The people of a trust domain as of the append time of a command."""

    find_key: KeyFinder
    roles_of: Callable[[str], frozenset[Role]]
    """Returns the roles of an active user."""
    origin_of: Callable[[str, str], KeyOrigin | None]
    """Returns the origin of a user's key: takes the user's id and the `kid`."""


def verified_key_proof(
    command: UserAddKey, signer: SignerKey, people: PeopleThen, trust: TrustStore, at_ms: int
) -> KeyProof:
    """Verify what a `user.add-key` embeds, as of its append time.

    `signer` is who signed the command itself. Raises InvalidMessageError with the reason why it proves nothing.
    """
    if command.invitation is None:
        raise InvalidMessageError("it embeds no invitation", code=Code.INVITATION_MISSING)
    if command.possession is None:
        raise InvalidMessageError("it embeds no possession by the new key", code=Code.POSSESSION_MISSING)
    invitation = _verified_invitation(command.invitation, command.user_id, people, trust, at_ms)
    possession = _verified_possession(command, command.possession, trust, at_ms)
    if possession.invitation != invitation.jti:
        raise InvalidMessageError("the possession answers another invitation", code=Code.POSSESSION_OTHER)
    endorser = None
    if command.endorsement is not None:
        endorser = _verified_endorser(command, command.endorsement, signer, people, trust, at_ms)
    return KeyProof(message_id(invitation.iss, invitation.jti), endorser)


def _verified_invitation(
    compact: str, user_id: str, people: PeopleThen, trust: TrustStore, at_ms: int
) -> UserInvite:
    claims = verify(
        parse(compact), UserInvite, _or_root(people.find_key, trust, at_ms),
        audience=trust.trust_domain, appended_at_ms=at_ms,
    ).claims  # fmt: skip
    if claims.user_id != user_id:
        raise InvalidMessageError(f"the invitation is for {claims.user_id}", code=Code.INVITATION_OTHER_USER)
    inviter = subject_of(trust.trust_domain, claims.iss, "user")
    if (
        claims.iss != trust.root_id
        and inviter != user_id
        and "operator" not in people.roles_of(inviter or "")
    ):
        raise InvalidMessageError(
            f"the invitation is by {claims.iss}, who is neither an operator nor {user_id}",
            code=Code.INVITATION_NOT_ALLOWED,
        )
    return claims


def _verified_possession(command: UserAddKey, compact: str, trust: TrustStore, at_ms: int) -> KeyPossession:
    jws = parse(compact)
    owner = spiffe_id(trust.trust_domain, "user", command.user_id)
    key = user_key((command.key,), command.key.kid, at_ms / 1000, trust)

    def find(iss: str, kid: str) -> VerificationKey | None:
        return key if key is not None and (iss, kid) == (owner, key.kid) else None

    claims = verify(jws, KeyPossession, find, audience=trust.trust_domain, appended_at_ms=at_ms).claims
    if (claims.user_id, thumbprint(claims.jwk)) != (command.user_id, command.key.kid):
        raise InvalidMessageError(
            "the possession is of another key, or for another user", code=Code.POSSESSION_OTHER
        )
    return claims


def _verified_endorser(
    command: UserAddKey,
    compact: str,
    signer: SignerKey,
    people: PeopleThen,
    trust: TrustStore,
    at_ms: int,
) -> SignerKey:
    jws = parse(compact)
    signed: Signed[KeyEndorsement] = verify(
        jws, KeyEndorsement, people.find_key, audience=trust.trust_domain, appended_at_ms=at_ms
    )
    claims = signed.claims
    possession_digest = digest(command.possession or "")
    if (claims.user_id, claims.kid, claims.possession_digest) != (
        command.user_id,
        command.key.kid,
        possession_digest,
    ):
        raise InvalidMessageError(
            "the co-signature is under another key or another possession", code=Code.ENDORSEMENT_OTHER
        )
    user_id = subject_of(trust.trust_domain, claims.iss, "user") or ""
    if "operator" not in people.roles_of(user_id):
        raise InvalidMessageError(
            f"the co-signature is by {claims.iss}, who is no operator", code=Code.ENDORSEMENT_NOT_OPERATOR
        )
    endorser = SignerKey(user_id, jws.header.kid, people.origin_of(user_id, jws.header.kid))
    verdict = check_endorsement(command.user_id, signer, endorser, at_ms)
    if isinstance(verdict, Refused):
        raise InvalidMessageError(verdict.reason.message, code=ReceivedCode(verdict.reason.code))
    return endorser


def _or_root(find: KeyFinder, trust: TrustStore, at_ms: int) -> KeyFinder:
    return lambda iss, kid: trust.root_key(iss, kid, at_ms / 1000) or find(iss, kid)


def unverified_signers(command: UserAddKey) -> tuple[str, ...]:
    """Return who is said to have signed the invitation and the co-signature: only to know whose records to read first.

    Raises InvalidMessageError.
    """
    signers: list[str] = []
    if command.invitation is not None:
        signers.append(parse(command.invitation).unverified_claims(UserInvite).iss)
    if command.endorsement is not None:
        signers.append(parse(command.endorsement).unverified_claims(KeyEndorsement).iss)
    return tuple(signers)
