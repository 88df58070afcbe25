"""Signatures by passkeys: what verifies, and everything that must not. Compared with fido2, which is by others."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import struct
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from fido2.cose import ES256
from fido2.server import Fido2Server
from fido2.utils import websafe_encode
from fido2.webauthn import Aaguid, AttestedCredentialData, PublicKeyCredentialRpEntity
from joserfc import jws as jose_jws
from joserfc.errors import JoseError
from joserfc.jwk import ECKey

from ringfence.kernel.base.errors import InvalidMessageError, SignatureError
from ringfence.kernel.crypto.claims import LEEWAY_S, ExpiredError
from ringfence.kernel.crypto.jws import is_by_passkey, parse, sign, sign_count, verify, verify_payload
from ringfence.kernel.crypto.keys import SigningKey, b64decode, b64encode, public_key, valid_key
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.crypto.webauthn import (
    MAX_AGE_S,
    MAX_ASSERTION_BYTES,
    WEBAUTHN_ALG,
    PasskeyKey,
    challenge_of,
)
from ringfence.messages.base import Claims
from ringfence.messages.registry import MAX_SESSION_S, SessionStatement, UserEndKey
from ringfence.messages.topics import ALL
from ringfence.messages.trust import Origin
from ringfence.model.records.user_keys import user_key
from tests.support.passkeys import (
    ATTESTED_DATA,
    BACKED_UP,
    BACKUP_ELIGIBLE,
    EXTENSION_DATA,
    ORIGINS,
    RP_ID,
    SESSION_ORIGIN,
    SIGN_ORIGIN,
    USER_PRESENT,
    USER_VERIFIED,
    SoftwarePasskey,
    third_part,
)
from tools.schemas.examples import EXAMPLES

TD = "acme.example"
NOW_S = 1_790_000_000
AT_S = NOW_S + 1
SAM = f"spiffe://{TD}/user/sam"
PRESENT_AND_VERIFIED = USER_PRESENT | USER_VERIFIED
PASSKEY = SoftwarePasskey.make(SAM)


def end_key(**changed: Any) -> UserEndKey:
    fields: dict[str, Any] = {
        "iss": SAM, "aud": TD, "iat": NOW_S, "exp": NOW_S + 3600, "jti": "j1", "user_id": "sam", "kid": "k",
        "reason": "lost",
    }  # fmt: skip
    return UserEndKey(**(fields | changed))


def statement(**changed: Any) -> SessionStatement:
    fields: dict[str, Any] = {
        "iss": SAM, "aud": TD, "iat": NOW_S, "exp": NOW_S + MAX_SESSION_S, "jti": "s1", "user_id": "sam",
        "console_kid": "k", "cookie_digest": "0" * 64,
    }  # fmt: skip
    return SessionStatement(**(fields | changed))


def read(
    compact: str,
    model: type[Any] = UserEndKey,
    *,
    at_s: float = AT_S,
    times: bool = True,
    passkey: SoftwarePasskey = PASSKEY,
    origins: tuple[Origin, ...] = ORIGINS,
    **record: Any,
) -> Any:
    """What a reader makes of a message by `passkey`, whose record has these fields."""

    def find(iss: str, kid: str) -> PasskeyKey | None:
        known = passkey.record(NOW_S + 10 * MAX_SESSION_S).model_copy(update=record)
        return PasskeyKey.of(known, origins, at_s) if (iss, kid) == (SAM, passkey.kid) else None

    at_ms = int(at_s * 1000) if times else None
    return verify(parse(compact), model, find, audience=TD, appended_at_ms=at_ms).claims


def with_tail(tail: bytes, claims: Claims | None = None) -> str:
    head, body, _ = sign(claims or end_key(), PASSKEY).split(".")
    return f"{head}.{body}.{b64encode(tail)}"


def parts_of(compact: str) -> tuple[bytes, bytes, bytes]:
    """Authenticator data, client data and signature of an assertion."""
    members = json.loads(parse(compact).signature)
    ad, cd, sig = (b64decode(members[name]) for name in ("ad", "cd", "sig"))
    return ad, cd, sig


def over(client_data: Callable[[bytes], bytes]) -> str:
    """A message whose assertion has other client data, and a true signature over them."""
    challenge = challenge_of(parse(sign(end_key(), PASSKEY)).signing_input)
    return with_tail(
        PASSKEY.assertion(client_data(PASSKEY.client_data(challenge)), PASSKEY.authenticator_data())
    )


# --- what verifies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "passkey",
    [
        PASSKEY,
        PASSKEY.but(sign_count=2**32 - 1),
        PASSKEY.but(flags=PRESENT_AND_VERIFIED | 0x22),  # bits that are reserved for future use
        PASSKEY.but(flags=PRESENT_AND_VERIFIED | EXTENSION_DATA, extensions=b"\xa1\x61a\x01"),
        PASSKEY.but(members={"somethingNew": {"a": [1]}, "androidPackageName": "x"}),
    ],
)
def test_a_passkey_signs_what_it_may(passkey: SoftwarePasskey) -> None:
    assert read(sign(end_key(), passkey)) == end_key()


def test_client_data_may_leave_cross_origin_out() -> None:
    assert read(over(lambda data: data.replace(b',"crossOrigin":false', b""))) == end_key()


@pytest.mark.parametrize("flags", [BACKUP_ELIGIBLE, BACKUP_ELIGIBLE | BACKED_UP])
def test_a_passkey_that_is_backed_up_signs_where_its_record_says_so(flags: int) -> None:
    compact = sign(end_key(), PASSKEY.but(flags=PRESENT_AND_VERIFIED | flags))
    assert read(compact, backup_eligible=True) == read(compact, backup_eligible=None) == end_key()


def test_the_largest_assertion_is_the_largest() -> None:
    """An assertion's signature has 70 to 72 bytes, so a few have to be made until one has exactly this size."""
    size = len(parse(sign(end_key(), PASSKEY.but(members={"pad": ""}))).signature)
    pad = (MAX_ASSERTION_BYTES - size) * 3 // 4 - 8
    found = {0: False, 1: False}
    for number in range(2000):
        compact = sign(end_key(), PASSKEY.but(members={"pad": "x" * (pad + number % 20)}))
        over = len(parse(compact).signature) - MAX_ASSERTION_BYTES
        if over == 0:
            assert read(compact) == end_key()
        elif over == 1:
            with pytest.raises(SignatureError, match="the limit is 4096"):
                read(compact)
        if over in found:
            found[over] = True
        if all(found.values()):
            return
    raise AssertionError(f"not all sizes came up: {found}")


# --- the format -------------------------------------------------------------------------------------------------------


def _reordered(ad: str, cd: str, sig: str) -> str:
    return f'{{"cd":"{cd}","ad":"{ad}","sig":"{sig}"}}'


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (_reordered, "canonical JSON"),
        (lambda ad, cd, sig: f'{{"ad":"{ad}", "cd":"{cd}","sig":"{sig}"}}', "canonical JSON"),
        (lambda ad, cd, sig: f'{{"ad":"{ad}","cd":"{cd}","sig":"{sig}"}}\n', "canonical JSON"),
        (lambda ad, cd, sig: f'{{"ad":"{ad}","cd":"{cd}","sig":"{sig}","x":1}}', "canonical JSON"),
        (lambda ad, cd, sig: f'{{"ad":"{ad}","ad":"{ad}","cd":"{cd}","sig":"{sig}"}}', "canonical JSON"),
        (lambda ad, cd, sig: f'{{"ad":"{ad}","cd":"{cd}","sig":""}}', "canonical JSON"),
        (lambda ad, cd, sig: f'{{"ad":"{ad}","cd":"{cd}"}}', "canonical JSON"),
        (lambda ad, cd, sig: f'{{"ad":"\\u0053{ad[1:]}","cd":"{cd}","sig":"{sig}"}}', "canonical JSON"),
        (lambda ad, cd, sig: f'{{"ad":"{ad}==","cd":"{cd}","sig":"{sig}"}}', "canonical JSON"),
        (lambda ad, cd, sig: f'{{"ad":"{ad[:-1]}B","cd":"{cd}","sig":"{sig}"}}', "canonical base64url"),
        (lambda ad, cd, sig: "x", "canonical JSON"),
    ],
)  # fmt: skip
def test_a_third_part_that_is_not_canonical_is_refused(
    written: Callable[[str, str, str], str], says: str
) -> None:
    ad, cd, sig = (b64encode(part) for part in parts_of(sign(end_key(), PASSKEY)))
    assert len(ad) % 4 == 2  # so its last character has bits that belong to nothing
    assert read(with_tail(f'{{"ad":"{ad}","cd":"{cd}","sig":"{sig}"}}'.encode())) == end_key()
    with pytest.raises(SignatureError, match=says):
        read(with_tail(written(ad, cd, sig).encode()))


def test_base64_with_loose_bits_is_no_jws() -> None:
    compact = sign(end_key(), PASSKEY)
    for padding in range(3):
        tail = parse(compact).signature + b" " * padding
        text = base64.urlsafe_b64encode(tail).decode()
        if text.endswith("="):
            head, body, _ = compact.split(".")
            with pytest.raises(InvalidMessageError, match="not a JWS"):
                parse(f"{head}.{body}.{text}")
            return
    raise AssertionError("no padding was needed")


@pytest.mark.parametrize(
    ("passkey", "says"),
    [
        (PASSKEY.but(members={"challenge": b64encode(bytes(32))}), "challenge"),
        (PASSKEY.but(members={"challenge": None}), "challenge"),
        (PASSKEY.but(origin="https://evil.example"), "no sign origin https://evil.example"),
        (PASSKEY.but(origin=f"{SIGN_ORIGIN}/"), "no sign origin"),
        (PASSKEY.but(origin=SIGN_ORIGIN.upper()), "no sign origin"),
        (PASSKEY.but(origin=SESSION_ORIGIN), f"no sign origin {SESSION_ORIGIN}"),
        (PASSKEY.but(members={"origin": [SIGN_ORIGIN]}), "no sign origin"),
        (PASSKEY.but(rp_id="evil.example"), "another rpId"),
        (PASSKEY.but(rp_id="LOCALHOST"), "another rpId"),
        (PASSKEY.but(flags=USER_PRESENT), "did not verify the user"),
        (PASSKEY.but(flags=USER_VERIFIED), "did not verify the user"),
        (PASSKEY.but(flags=PRESENT_AND_VERIFIED | BACKED_UP), "not eligible"),
        (PASSKEY.but(flags=PRESENT_AND_VERIFIED | BACKUP_ELIGIBLE), "never changes"),
        (PASSKEY.but(flags=PRESENT_AND_VERIFIED | ATTESTED_DATA), "attested credential data"),
        (PASSKEY.but(flags=PRESENT_AND_VERIFIED | EXTENSION_DATA), "lacks the extensions"),
        (PASSKEY.but(flags=PRESENT_AND_VERIFIED | EXTENSION_DATA, extensions=b"\x80"), "lacks the extensions"),
        (PASSKEY.but(extensions=b"\xa0"), "belong to nothing"),
        (PASSKEY.but(members={"type": "webauthn.create"}), "not webauthn.get"),
        (PASSKEY.but(members={"type": "payment.get"}), "not webauthn.get"),
        (PASSKEY.but(members={"crossOrigin": True}), "inside a page of another origin"),
        (PASSKEY.but(members={"crossOrigin": None}), "inside a page of another origin"),
        (PASSKEY.but(members={"crossOrigin": 0}), "inside a page of another origin"),
        (PASSKEY.but(members={"topOrigin": SIGN_ORIGIN}), "inside a page of another origin"),
        (PASSKEY.but(members={"topOrigin": None}), "inside a page of another origin"),
    ],
)  # fmt: skip
def test_other_assertions_are_refused(passkey: SoftwarePasskey, says: str) -> None:
    with pytest.raises(SignatureError, match=says) as refused:
        read(sign(end_key(), passkey))
    assert refused.value.code == "signature_invalid"


def test_backup_eligibility_that_a_record_has_does_not_go_away() -> None:
    with pytest.raises(SignatureError, match="never changes"):
        read(sign(end_key(), PASSKEY), backup_eligible=True)


@pytest.mark.parametrize(
    "client_data",
    [
        lambda data: b'{"type":"webauthn.create",' + data[1:],
        lambda data: data[:-1] + b',"origin":"https://evil.example"}',
        lambda data: data[:-1] + b',"more":{"a":1,"a":2}}',
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data + b"x",
        lambda data: b"[" + data + b"]",
        lambda data: data[:-1] + b',"n":NaN}',
        lambda data: data[:-1] + b',"s":"\xff"}',
        lambda data: b"",
    ],
)
def test_client_data_that_two_readers_read_differently_are_refused(
    client_data: Callable[[bytes], bytes],
) -> None:
    if client_data(b"{}") == b"":
        with pytest.raises(SignatureError, match="canonical JSON"):
            read(over(client_data))
        return
    with pytest.raises(SignatureError, match="one way only"):
        read(over(client_data))


def test_authenticator_data_that_are_too_short_are_refused() -> None:
    _, cd, _ = parts_of(sign(end_key(), PASSKEY))
    for size in (1, 32, 33, 36):
        data = PASSKEY.authenticator_data()[:size]
        with pytest.raises(SignatureError, match="too short"):
            read(with_tail(PASSKEY.assertion(cd, data)))


def der(r: bytes, s: bytes) -> bytes:
    body = b"\x02" + bytes([len(r)]) + r + b"\x02" + bytes([len(s)]) + s
    return b"\x30" + bytes([len(body)]) + body


def test_only_strict_der_is_a_signature() -> None:
    ad, cd, sig = parts_of(sign(end_key(), PASSKEY))
    r, s = (number.to_bytes((number.bit_length() + 8) // 8) for number in decode_dss_signature(sig))
    assert der(r, s) == sig
    raw = b"".join(number.to_bytes(32) for number in decode_dss_signature(sig))
    length = len(sig) - 2
    for other in (
        raw,
        der(b"\0" + r, s),
        der(r, b"\0" + s),
        der(bytes([0xFF]) + r, s),
        sig + b"\0",
        sig[:-1],
        b"\x30\x81" + bytes([length]) + sig[2:],
        b"\x31" + sig[1:],
        der(b"\0", b"\0"),
        b"0",
        PASSKEY.but().der(ad, cd + b" "),
        SoftwarePasskey.make(SAM).der(ad, cd),
    ):
        with pytest.raises(SignatureError, match="not the passkey's"):
            read(with_tail(third_part(ad, cd, other)))
    assert read(with_tail(third_part(ad, cd, sig))) == end_key()


def test_changed_message_does_not_verify() -> None:
    head, body, tail = sign(end_key(), PASSKEY).split(".")
    for changed in (
        {"reason": "found"},
        {"exp": NOW_S + 7200},
        {"iat": NOW_S - 1},
        {"aud": "x"},
        {"more": 1},
    ):
        other = sign(end_key(**changed), PASSKEY).split(".")[1]
        with pytest.raises(InvalidMessageError) as refused:
            read(f"{head}.{other}.{tail}")
        assert refused.value.code == ("aud_unexpected" if "aud" in changed else "signature_invalid")
    header = json.loads(b64decode(head)) | {"cty": "x"}
    other_head = b64encode(json.dumps(header, separators=(",", ":")).encode())
    with pytest.raises(SignatureError, match="challenge"):
        read(f"{other_head}.{body}.{tail}")


def test_an_assertion_for_another_trust_domain_is_refused() -> None:
    with pytest.raises(InvalidMessageError, match="this trust domain is"):
        read(sign(end_key(aud="other.example"), PASSKEY))
    with pytest.raises(SignatureError, match="no valid key"):
        read(sign(end_key(iss="spiffe://other.example/user/sam"), PASSKEY))


# --- which keys sign in which format ----------------------------------------------------------------------------------


def test_a_plain_message_by_the_key_of_a_passkey_is_refused() -> None:
    with pytest.raises(SignatureError) as refused:
        read(sign(end_key(), PASSKEY.plain()))
    assert refused.value.code == "alg_unexpected"


def test_passkey_format_by_an_ordinary_key_is_rejected() -> None:
    compact = sign(end_key(), PASSKEY)
    key = public_key(PASSKEY.public)
    with pytest.raises(SignatureError) as refused:
        verify(parse(compact), UserEndKey, lambda iss, kid: key, audience=TD)
    assert refused.value.code == "alg_unexpected"
    head, body, tail = compact.split(".")
    plain = b64encode(json.dumps(json.loads(b64decode(head)) | {"alg": "ES256"}).encode())
    for find in (
        lambda iss, kid: key,
        lambda iss, kid: PasskeyKey.of(PASSKEY.record(AT_S + 9), ORIGINS, AT_S),
    ):
        with pytest.raises(SignatureError):
            verify(parse(f"{plain}.{body}.{tail}"), UserEndKey, find, audience=TD)


def test_only_the_look_up_of_peoples_keys_finds_passkeys() -> None:
    trust = TrustStore(TD, "pin")
    record, file = PASSKEY.record(AT_S + 9, AT_S - 9), SigningKey.generate(SAM)
    keys = (record, file.record(AT_S + 9))
    assert valid_key(keys, PASSKEY.kid, AT_S) is None
    found = user_key(keys, PASSKEY.kid, AT_S, trust)
    assert isinstance(found, PasskeyKey)
    assert (found.kid, found.rp_id, found.at_s, found.origins) == (PASSKEY.kid, RP_ID, AT_S, ())
    assert user_key(keys, file.kid, AT_S, trust) == public_key(file.public)
    assert user_key(keys, "other", AT_S, trust) is None
    for at_s in (AT_S - 9.001, AT_S + 9):
        assert user_key(keys, PASSKEY.kid, at_s, trust) is None
    for at_s in (AT_S - 9, AT_S + 8.999):
        assert isinstance(user_key(keys, PASSKEY.kid, at_s, trust), PasskeyKey)
    # Whatever a record has besides, the key of a passkey signs nothing plain.
    both = (PASSKEY.plain().record(AT_S + 99), record)
    assert isinstance(user_key(both, PASSKEY.kid, AT_S, trust), PasskeyKey)
    assert user_key(both, PASSKEY.kid, AT_S + 50, trust) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"use": None},
        {"rp_id": None},
        {"kid": "other"},
        {"not_after": AT_S},
        {"not_before": AT_S + 1},
        {"jwk": SigningKey.generate(SAM, "EdDSA").public},
        {"jwk": PASSKEY.public.model_copy(update={"x": "AA"})},
    ],
)
def test_other_records_have_no_passkey(changed: dict[str, Any]) -> None:
    record = PASSKEY.record(AT_S + 9)
    assert PasskeyKey.of(record, ORIGINS, AT_S) is not None
    assert PasskeyKey.of(record.model_copy(update=changed), ORIGINS, AT_S) is None


def test_an_ed25519_key_is_no_passkey() -> None:
    key = SigningKey.generate(SAM, "EdDSA")
    fields = PASSKEY.record(AT_S + 9).model_dump() | {"kid": key.kid, "jwk": key.public}
    assert PasskeyKey.of(type(PASSKEY.record(1)).model_validate(fields), ORIGINS, AT_S) is None


def test_algorithm_is_read_from_the_header() -> None:
    assert is_by_passkey(sign(end_key(), PASSKEY))
    assert not is_by_passkey(sign(end_key(), PASSKEY.plain()))
    with pytest.raises(InvalidMessageError):
        is_by_passkey("x.y.z")


def test_other_libraries_take_no_passkeys_message_for_a_plain_one() -> None:
    """RFC 7515, 4.1.1: an algorithm that a reader does not know is refused, whatever the key."""
    compact = sign(end_key(), PASSKEY)
    jwk = PASSKEY.public.model_dump(exclude_none=True)
    for algorithms in (["ES256"], [WEBAUTHN_ALG], ["ES256", WEBAUTHN_ALG]):
        with pytest.raises((jwt.InvalidTokenError, NotImplementedError)):
            jwt.decode(compact, jwt.PyJWK(jwk | {"alg": "ES256"}).key, algorithms=algorithms, audience=TD)
        with pytest.raises(JoseError):
            jose_jws.deserialize_compact(compact, ECKey.import_key(jwk), algorithms=algorithms)
    plain = sign(end_key(), PASSKEY.plain())
    assert jose_jws.deserialize_compact(plain, ECKey.import_key(jwk), algorithms=["ES256"]).payload


# --- what passkeys may sign -------------------------------------------------------------------------------------------

MAY_SIGN = {
    "approval", "action.approval", "grant", "grant.withdraw", "break_glass.review", "revocation.request",
    "user.end-key", "agent.suspend", "agent.resume", "agent.transfer", "agent.set-ceiling", "task.assign", "task.end",
    "command.second", "command.withdraw",
}  # fmt: skip
EMBEDDED = {"key.possession", "agent.transfer-consent", "task.consent"}


def every_message() -> set[type[Claims]]:
    found, todo = set[type[Claims]](), [Claims]
    while todo:
        for model in todo.pop().__subclasses__():
            todo.append(model)
            if hasattr(model, "typ") and model.__module__.startswith("ringfence.messages"):
                found.add(model)
    return found


def test_a_passkey_may_sign_these_and_nothing_else() -> None:
    assert {model for topic in ALL for model in topic.models if issubclass(model, Claims)} <= every_message()
    uses = {model.typ: model.passkey_use for model in every_message()}
    assert {typ for typ, use in uses.items() if use == "sign"} == MAY_SIGN | EMBEDDED
    assert {typ for typ, use in uses.items() if use == "session"} == {"session.statement"}
    assert set(uses.values()) == {None, "sign", "session"}


SIGNED = [example for example in EXAMPLES.values() if isinstance(example, Claims)]


@pytest.mark.parametrize("example", SIGNED, ids=lambda example: example.typ)
def test_other_message_types_reject_passkeys(example: Claims) -> None:
    claims = example.model_copy(update={"iss": SAM, "aud": TD, "iat": NOW_S})
    if hasattr(claims, "exp"):
        claims = claims.model_copy(update={"exp": NOW_S + 60})
    for origin in (SIGN_ORIGIN, SESSION_ORIGIN):
        compact = sign(claims, PASSKEY.but(origin=origin))
        with pytest.raises(SignatureError) as no_service:
            verify_payload(
                parse(compact), type(claims),
                lambda iss, kid: PasskeyKey.of(PASSKEY.record(AT_S + 9), ORIGINS, AT_S), audience=TD,
            )  # fmt: skip
        assert no_service.value.code == "passkey_not_allowed"
        if claims.typ in MAY_SIGN and origin == SIGN_ORIGIN:
            assert read(compact, type(claims)) == claims
            continue
        with pytest.raises(SignatureError) as refused:
            read(compact, type(claims))
        expected = "signature_invalid" if claims.typ in MAY_SIGN else "passkey_not_allowed"
        assert refused.value.code == expected


def test_a_session_statement_is_signed_on_a_session_origin_alone() -> None:
    assert read(sign(statement(), PASSKEY.but(origin=SESSION_ORIGIN)), SessionStatement) == statement()
    with pytest.raises(SignatureError, match=f"no session origin {SIGN_ORIGIN}"):
        read(sign(statement(), PASSKEY), SessionStatement)


def test_a_session_statement_counts_until_its_end() -> None:
    compact = sign(statement(), PASSKEY.but(origin=SESSION_ORIGIN))
    assert read(compact, SessionStatement, at_s=NOW_S + MAX_SESSION_S - 1) == statement()
    with pytest.raises(ExpiredError):
        read(compact, SessionStatement, at_s=NOW_S + MAX_SESSION_S)
    with pytest.raises(ValueError, match="a session lasts"):
        statement(exp=NOW_S + MAX_SESSION_S + 1)


def test_a_session_statement_is_no_other_message() -> None:
    """Whatever claims are put beside it: the type stands in the header, which was signed."""
    compact = sign(statement(), PASSKEY.but(origin=SESSION_ORIGIN))
    _, body, tail = compact.split(".")
    with pytest.raises(InvalidMessageError) as refused:
        read(compact)
    assert refused.value.code == "typ_unexpected"
    other = sign(end_key(), PASSKEY).split(".")
    for mixed in (f"{other[0]}.{body}.{tail}", f"{other[0]}.{other[1]}.{tail}"):
        with pytest.raises(InvalidMessageError):
            read(mixed)


# --- origins and time -------------------------------------------------------------------------------------------------


def test_an_origin_with_both_uses_would_be_of_each() -> None:
    """`ringfence init` makes none such; a verifier takes the use that an entry names."""
    only_session = tuple(one for one in ORIGINS if one.use == "session")
    with pytest.raises(SignatureError, match="no sign origin"):
        read(sign(end_key(), PASSKEY), origins=only_session)
    with pytest.raises(SignatureError, match="no sign origin"):
        read(sign(end_key(), PASSKEY), origins=())


@pytest.mark.parametrize("times", [True, False])
def test_a_message_is_appended_within_ten_minutes(times: bool) -> None:
    compact = sign(end_key(), PASSKEY)
    assert read(compact, at_s=NOW_S + MAX_AGE_S, times=times) == end_key()
    with pytest.raises(ExpiredError, match="sign it anew") as refused:
        read(compact, at_s=NOW_S + MAX_AGE_S + 0.1, times=times)
    assert refused.value.code == "passkey_too_late"
    assert MAX_AGE_S == 600


def test_the_ten_minutes_are_those_of_passkeys() -> None:
    file = SigningKey.generate(SAM)
    jws, at_ms = parse(sign(end_key(), file)), (NOW_S + MAX_AGE_S + 1) * 1000
    key = public_key(file.public)
    assert (
        verify(jws, UserEndKey, lambda iss, kid: key, audience=TD, appended_at_ms=at_ms).claims == end_key()
    )


@pytest.mark.parametrize("times", [True, False])
def test_a_message_that_is_dated_ahead_cannot_be_kept_for_later(times: bool) -> None:
    ahead = end_key(iat=NOW_S + LEEWAY_S, exp=NOW_S + 3600)
    assert read(sign(ahead, PASSKEY), at_s=NOW_S, times=times) == ahead
    with pytest.raises(ExpiredError) as refused:
        read(sign(ahead, PASSKEY), at_s=NOW_S - 1, times=times)
    assert refused.value.code == "iat_in_future"


def test_the_own_end_of_a_message_is_told_first() -> None:
    with pytest.raises(ExpiredError) as refused:
        read(sign(end_key(exp=NOW_S + 60), PASSKEY), at_s=NOW_S + MAX_AGE_S + 1)
    assert refused.value.code == "expired"


def test_a_late_message_is_refused_for_its_signature_first() -> None:
    compact = sign(end_key(), PASSKEY.but(origin=SESSION_ORIGIN))
    with pytest.raises(SignatureError):
        read(compact, at_s=NOW_S + MAX_AGE_S + 1)


def test_a_message_that_was_verified_before_is_held_against_origins_and_time_again() -> None:
    jws = parse(sign(end_key(), PASSKEY))

    def again(at_s: float, origins: tuple[Origin, ...] = ORIGINS) -> Any:
        key = PasskeyKey.of(PASSKEY.record(NOW_S + 9999), origins, at_s)
        return verify(jws, UserEndKey, lambda iss, kid: key, audience=TD, verified=end_key()).claims

    assert again(AT_S) == end_key()
    with pytest.raises(ExpiredError):
        again(NOW_S + MAX_AGE_S + 1)
    with pytest.raises(SignatureError, match="no sign origin"):
        again(AT_S, ())


# --- another reader ---------------------------------------------------------------------------------------------------

CREDENTIAL_ID = b"credential"
_X, _Y = (b64decode(part or "") for part in (PASSKEY.public.x, PASSKEY.public.y))
KNOWN = AttestedCredentialData.create(Aaguid.NONE, CREDENTIAL_ID, ES256({1: 2, 3: -7, -1: 1, -2: _X, -3: _Y}))
SERVER = Fido2Server(
    PublicKeyCredentialRpEntity(name="x", id=RP_ID), verify_origin=lambda origin: origin == SIGN_ORIGIN
)


def accepted_by_fido2(tail: bytes, signing_input: bytes) -> bool:
    """Whether Yubico's library accepts an assertion, on the sign origin."""
    try:
        members = json.loads(tail)
        SERVER.authenticate_complete(
            {"challenge": websafe_encode(challenge_of(signing_input)), "user_verification": "required"},
            [KNOWN],
            {
                "id": websafe_encode(CREDENTIAL_ID),
                "rawId": websafe_encode(CREDENTIAL_ID),
                "type": "public-key",
                "response": {
                    "authenticatorData": members["ad"], "clientDataJSON": members["cd"], "signature": members["sig"],
                },
            },
        )  # fmt: skip
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error):
        return False
    return True


def accepted(tail: bytes, signing_input: bytes) -> bool:
    key = PasskeyKey.of(PASSKEY.record(AT_S + 9).model_copy(update={"backup_eligible": None}), ORIGINS, AT_S)
    assert key is not None
    return key.problem(tail, signing_input, "sign") is None


def stricter(ad: bytes, cd: bytes) -> bool:
    """Whether Ringfence has a reason to refuse that the library has not."""
    members = json.loads(cd)
    flags = ad[32]
    return bool(
        members.get("crossOrigin", False) is not False
        or "topOrigin" in members
        or flags & ATTESTED_DATA
        or (flags & BACKED_UP and not flags & BACKUP_ELIGIBLE)
    )


def test_thousands_of_assertions_are_read_as_another_library_reads_them() -> None:
    """Each is signed truly over whatever it says; then some have a bit that is wrong anywhere."""
    dice = random.Random(27)
    counted = {(ours, theirs): 0 for ours in (True, False) for theirs in (True, False)}
    for number in range(4000):
        signing_input = f"header.{number}".encode()
        flags = PRESENT_AND_VERIFIED
        for bit in (USER_PRESENT, USER_VERIFIED, BACKUP_ELIGIBLE, BACKED_UP, ATTESTED_DATA, 0x02, 0x20):
            flags ^= bit if dice.random() < 0.06 else 0
        extensions = b""
        if dice.random() < 0.2:
            extensions = dice.choice([b"\xa0", b"\xa1\x61a\x01", b"\xa1\x61a\xa1\x61b\xf5"])
            flags ^= EXTENSION_DATA if dice.random() < 0.9 else 0
        members: dict[str, Any] = {}
        wrong: dict[str, list[Any]] = {
            "type": ["webauthn.create"], "challenge": [b64encode(bytes(32)), ""], "crossOrigin": [True, None],
            "origin": [SESSION_ORIGIN, "https://evil.example", f"{SIGN_ORIGIN}/"], "topOrigin": [SIGN_ORIGIN],
            "later": [1, None, {"a": "b"}],
        }  # fmt: skip
        for name, values in wrong.items():
            if dice.random() < 0.05:
                members[name] = dice.choice(values)
        passkey = PASSKEY.but(
            flags=flags, extensions=extensions, members=members, sign_count=dice.randrange(2**32),
            rp_id=RP_ID if dice.random() < 0.95 else "evil.example",
        )  # fmt: skip
        cd, ad = passkey.client_data(challenge_of(signing_input)), passkey.authenticator_data()
        tail = passkey.assertion(cd, ad)
        if dice.random() < 0.3:
            parts = [ad, cd, passkey.der(ad, cd)]
            which = dice.randrange(3)
            changed = bytearray(parts[which])
            changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
            parts[which] = bytes(changed)
            tail = third_part(*parts)
        ours, theirs = accepted(tail, signing_input), accepted_by_fido2(tail, signing_input)
        counted[ours, theirs] += 1
        if ours != theirs:
            assert theirs, f"only Ringfence accepts {tail!r}"
            members_of_tail = json.loads(tail)
            assert stricter(b64decode(members_of_tail["ad"]), b64decode(members_of_tail["cd"])), tail
    assert counted[True, False] == 0
    assert min(counted[True, True], counted[False, False], counted[False, True]) > 100, counted


def test_sign_count_is_read_for_the_trail_only() -> None:
    for count in (0, 1, 2**32 - 1):
        compact = sign(end_key(), PASSKEY.but(sign_count=count))
        assert sign_count(compact) == count
        assert read(compact) == end_key(), "and decides nothing"
    assert sign_count(sign(end_key(), PASSKEY.plain())) is None
    assert sign_count(with_tail(b"{}")) is None


def test_the_format_is_as_it_was_first_published() -> None:
    """A message of a fixed key, made elsewhere. Records rest on this text for good; see docs/adr/0072."""
    signing_input = b"eyJhIjoxfQ.eyJiIjoyfQ"
    assert (
        challenge_of(signing_input) == hashlib.sha256(b"ringfence.webauthn.v1\x00" + signing_input).digest()
    )
    assert parse(sign(end_key(), PASSKEY)).header.alg == "urn:ringfence:webauthn:ES256"
    head = json.loads(b64decode(sign(end_key(), PASSKEY).split(".")[0]))
    assert list(head) == ["alg", "kid", "typ"]
    assert head["kid"] == PASSKEY.kid
