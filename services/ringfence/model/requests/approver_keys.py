"""Which keys count for approvals: by the floors of a target, and for keys that others added (ADR 0074). Pure.

Policy, issuer and gateway check this for each approval, grant and action approval, by the current records, and audit
for each review of break glass. A key that somebody else added to a user counts 24 hours later, or at once if a second
operator co-signed it. It never counts in a request in which one of its vouchers takes part, so nobody can create a
sponsor for themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ringfence.kernel.base.clock import utc_text
from ringfence.kernel.crypto.jws import Signed, kid_of
from ringfence.messages.approval import ActionApproval, Approval, Grant
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.messages.keys import KeyRecord
from ringfence.messages.registry import FloorKey, TargetState
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.lifecycle import KeyOrigin
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.requests.facts import RecordContext

AnyApproval = Signed[Approval] | Signed[ActionApproval] | Signed[Grant]


@dataclass(frozen=True, slots=True)
class KeyProblem:
    """Why a key does not count for an approval."""

    reason: Reason
    since_ms: int
    """Since when this has been so at the latest: the append time of the command that added the key; 0 of floors."""


@dataclass(frozen=True, slots=True)
class _ApproverKey:
    user_id: str
    key: KeyRecord
    origin: KeyOrigin


def approver_key_problem(
    approval: AnyApproval,
    directory: Directory,
    facts: RecordContext,
    verbs: Collection[str],
    *,
    at_ms: int,
    beside: Iterable[str] = (),
) -> KeyProblem | None:
    """Return why the key of a verified approval does not count for it, or None.

    Args:
        facts: the records of what is approved.
        verbs: the verbs that are approved, at the target of `facts`.
        at_ms: the moment that is judged, an append time.
        beside: the ids of the others who approve the same.
    """
    try:
        signer = _key_of(approval, directory)
    except ChainError as error:
        return KeyProblem(Reason(code=Code.RECORD_UNTRUSTED, message=str(error)[:1000]), 0)
    if signer is None:
        message = f"the record of {approval.claims.iss} does not say where this key comes from"
        return KeyProblem(Reason(code=Code.KEY_UNKNOWN, message=message), 0)
    if at_ms // 1000 >= signer.key.not_after:
        message = f"key {signer.key.kid} of {signer.user_id} has ended since; approve anew with another"
        return KeyProblem(Reason(code=Code.KEY_ENDED, message=message), 0)
    if (reason := floor_problem(signer.key, facts.target.state, verbs)) is not None:
        return KeyProblem(reason, 0)
    parties = {*beside, *facts.sponsors, facts.task.state.on_behalf_of}
    return origin_problem(signer.origin, signer.user_id, directory, parties, at_ms)


def origin_problem(
    origin: KeyOrigin, user_id: str, directory: Directory, parties: Collection[str], at_ms: int
) -> KeyProblem | None:
    """Return why a key that somebody else added does not count at `at_ms` beside these people, or None."""
    if at_ms < origin.counts_from_ms:
        since = utc_text(origin.counts_from_ms / 1000)
        message = (
            f"key {origin.kid} of {user_id} was added by {origin.by or 'the root'} and counts for approvals only from "
            f"{since}; use another key, or have a second operator co-sign a new one (ringfence user endorse-key)"
        )
        return _problem(Code.KEY_TOO_NEW, message, origin)
    if beside := sorted(origin.vouchers & set(parties) - {user_id}):
        message = (
            f"key {origin.kid} of {user_id} rests on the word of {', '.join(beside)}, who takes part in this; "
            "use another key, or have somebody else approve"
        )
        return _problem(Code.KEY_BESIDE_VOUCHER, message, origin)
    if (giver := directory.compromised_giver(origin)) is not None:
        message = (
            f"key {origin.kid} of {user_id} rests on key {giver.kid} of {giver.user_id}, which was compromised then; "
            f"end it, and have another added: ringfence user end-key {user_id} {origin.kid} --compromised --since TIME"
        )
        return _problem(Code.KEY_VOUCHER_COMPROMISED, message, origin)
    return None


def lent_by(user_id: str, approvals: Sequence[AnyApproval], directory: Directory) -> Reason | None:
    """Return the reason why `user_id` cannot approve beside these approvals, or None: a key of one of them rests on the
    word of `user_id`.
    """
    for approval in approvals:
        signer = _key_of(approval, directory)
        if signer is not None and user_id in signer.origin.vouchers:
            message = (
                f"{signer.user_id} approved with a key that rests on the word of {user_id}; somebody else has to "
                "approve beside that"
            )
            return Reason(code=Code.KEY_BESIDE_VOUCHER, message=message)
    return None


def floor_problem(key: KeyRecord, target: TargetState, verbs: Collection[str]) -> Reason | None:
    """Return why a key is not of the kind that the floors of these verbs demand, or None."""
    for floor in target.verbs:
        if floor.verb in verbs and floor.key is not None and not _fits(key, floor.key):
            code, wanted = _WANTED[floor.key]
            message = f"{target.target_id} takes approvals of {floor.verb} only by {wanted}; approve with one"
            return Reason(code=code, message=message)
    return None


_WANTED: dict[FloorKey, tuple[Code, str]] = {
    "attested": (Code.KEY_NOT_ATTESTED, "a passkey whose attestation an operator verified"),
    "file": (Code.KEY_NOT_FILE, "a key file"),
}


def _fits(key: KeyRecord, wanted: FloorKey) -> bool:
    if wanted == "file":
        return key.use is None
    return key.use == "webauthn" and key.attested is True


def _key_of(approval: AnyApproval, directory: Directory) -> _ApproverKey | None:
    """Return the key that signed an approval, as its signer's present record has it. Raises ChainError."""
    user_id = subject_of(approval.claims.aud, approval.claims.iss, "user")
    if user_id is None:
        return None
    kid = kid_of(approval.compact)
    entry = directory.user(user_id)
    origin = directory.key_history(user_id).origins.get(kid)
    key = next((one for one in entry.state.keys if one.kid == kid), None) if entry else None
    return _ApproverKey(user_id, key, origin) if key is not None and origin is not None else None


def _problem(code: Code, message: str, origin: KeyOrigin) -> KeyProblem:
    return KeyProblem(Reason(code=code, message=message[:1000]), origin.added_ms)
