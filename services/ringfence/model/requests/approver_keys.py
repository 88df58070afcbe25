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
from ringfence.messages.base import KeyRecord
from ringfence.messages.codes import Code
from ringfence.messages.registry import FloorKey, TargetState
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.lifecycle import KeyOrigin, check_hold
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.requests.facts import RecordContext
from ringfence.model.verdict import ALLOWED, Allowed, Refused, Verdict, refused

AnyApproval = Signed[Approval] | Signed[ActionApproval] | Signed[Grant]


@dataclass(frozen=True, slots=True)
class KeyRefused(Refused):
    """A key does not count for an approval, for this reason."""

    since_ms: int
    """Since when this has been so at the latest: the append time of the command that added the key; 0 of floors."""


KeyVerdict = Allowed | KeyRefused
"""Whether a key counts for an approval."""


@dataclass(frozen=True, slots=True)
class _ApproverKey:
    user_id: str
    key: KeyRecord
    origin: KeyOrigin


def check_approver_key(
    approval: AnyApproval,
    directory: Directory,
    facts: RecordContext,
    verbs: Collection[str],
    *,
    at_ms: int,
    beside: Iterable[str] = (),
) -> KeyVerdict:
    """Check that the key of a verified approval counts for it.

    1. The present records of the signer verify, and have the key.
    2. The key has not ended by `at_ms`.
    3. It is of the kind that the floors of the target demand.
    4. Where somebody else added it, it counts beside these people (`check_key_origin`).

    Args:
        facts: the records of what is approved.
        verbs: the verbs that are approved, at the target of `facts`.
        at_ms: the moment that is judged, an append time.
        beside: the ids of the others who approve the same.
    """
    try:
        signer = _key_of(approval, directory)
    except ChainError as error:
        return _refused(Code.RECORD_UNTRUSTED, str(error))
    entry = directory.user(signer.user_id) if signer is not None else None
    if signer is not None and entry is not None:
        held = check_hold(entry.state, signer.key.kid)
        if isinstance(held, Refused):
            return _refused(Code.RESTS_ON_COMPROMISED, held.reason.message)
    if signer is None:
        message = f"the record of {approval.claims.iss} does not say where this key comes from"
        return _refused(Code.KEY_UNKNOWN, message)
    if at_ms // 1000 >= signer.key.not_after:
        message = f"key {signer.key.kid} of {signer.user_id} has ended since; approve anew with another"
        return _refused(Code.KEY_ENDED, message)
    verdict = check_key_floor(signer.key, facts.target.state, verbs)
    if isinstance(verdict, Refused):
        return KeyRefused(verdict.reason, since_ms=0)
    parties = {*beside, *facts.sponsors, facts.task.state.on_behalf_of}
    return check_key_origin(signer.origin, signer.user_id, directory, parties, at_ms)


def check_key_origin(
    origin: KeyOrigin, user_id: str, directory: Directory, parties: Collection[str], at_ms: int
) -> KeyVerdict:
    """Check that a key of `user_id`, if somebody else added it, counts at `at_ms` beside the people `parties`.

    1. Its delay is over, or a second operator co-signed it.
    2. None of its vouchers takes part.
    3. No key that it rests on was compromised by then.
    """
    if at_ms < origin.counts_from_ms:
        since = utc_text(origin.counts_from_ms / 1000)
        message = (
            f"key {origin.kid} of {user_id} was added by {origin.by or 'the root'} and counts for approvals only from "
            f"{since}; use another key, or have a second operator co-sign a new one (ringfence user endorse-key)"
        )
        return _refused(Code.KEY_TOO_NEW, message, origin.added_ms)
    if beside := sorted(origin.vouchers & set(parties) - {user_id}):
        message = (
            f"key {origin.kid} of {user_id} rests on the word of {', '.join(beside)}, who takes part in this; "
            "use another key, or have somebody else approve"
        )
        return _refused(Code.KEY_BESIDE_VOUCHER, message, origin.added_ms)
    if (giver := directory.compromised_giver(origin)) is not None:
        message = (
            f"key {origin.kid} of {user_id} rests on key {giver.kid} of {giver.user_id}, which was compromised then; "
            f"end it, and have another added: ringfence user end-key {user_id} {origin.kid} --compromised --since TIME"
        )
        return _refused(Code.KEY_VOUCHER_COMPROMISED, message, origin.added_ms)
    return ALLOWED


def check_not_voucher(user_id: str, approvals: Sequence[AnyApproval], directory: Directory) -> Verdict:
    """Check that no key of these approvals rests on the word of `user_id`, who then cannot approve beside them. Raises
    ChainError.
    """
    for approval in approvals:
        signer = _key_of(approval, directory)
        if signer is not None and user_id in signer.origin.vouchers:
            message = (
                f"{signer.user_id} approved with a key that rests on the word of {user_id}; somebody else has to "
                "approve beside that"
            )
            return refused(Code.KEY_BESIDE_VOUCHER, message)
    return ALLOWED


def check_key_floor(key: KeyRecord, target: TargetState, verbs: Collection[str]) -> Verdict:
    """Check that a key is of the kind that the target's floors of these verbs demand."""
    for floor in target.verbs:
        if floor.verb in verbs and floor.key is not None and not _fits(key, floor.key):
            code, wanted = _WANTED[floor.key]
            message = f"{target.target_id} takes approvals of {floor.verb} only by {wanted}; approve with one"
            return refused(code, message)
    return ALLOWED


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


def _refused(code: Code, message: str, since_ms: int = 0) -> KeyRefused:
    return KeyRefused(refused(code, message).reason, since_ms)
