"""Signed messages: what verifies, and everything that must not. Held against PyJWT as an independent reading."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, ClassVar, cast

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError, create_model

from ringfence.kernel.base.errors import InvalidMessageError, SignatureError
from ringfence.kernel.base.validation_problems import explain
from ringfence.kernel.crypto import jws
from ringfence.kernel.crypto.claims import MAX_LIFE_S, ExpiredError
from ringfence.kernel.crypto.jws import (
    kid_of,
    parse,
    sign,
    sign_payload,
    unverified_time,
    verify,
    verify_payload,
)
from ringfence.kernel.crypto.keys import PublicKey, SigningKey, b64decode, b64encode, public_key
from ringfence.messages.api import ApiToken
from ringfence.messages.base import Claims
from ringfence.messages.credential import CredentialRequest
from ringfence.messages.lease import RevocationRequest
from ringfence.messages.registry import AgentResume, UserDisable
from tools.schemas.examples import EXAMPLES

TD = "acme.example"
NOW_S = 1_790_000_000
LEASE = "0c6f2f2e-55a3-5f0e-8f4e-2f2e55a35f0e"


class TaskEndless(Claims):
    """A message without an end."""

    typ: ClassVar[str] = "task.endless"


class _Many(BaseModel):
    many: Annotated[list[int], Field(min_length=2)]


def command(key: SigningKey, **changed: Any) -> UserDisable:
    fields: dict[str, Any] = {
        "iss": key.id, "aud": TD, "iat": NOW_S, "exp": NOW_S + 60, "jti": "j1", "user_id": "maria", "reason": "left",
    }  # fmt: skip
    return UserDisable(**(fields | changed))


def open_as(
    compact: str | bytes, key: SigningKey, model: type[Any] = UserDisable, at_s: float | None = NOW_S + 1
) -> Any:
    def find(iss: str, kid: str) -> PublicKey | None:
        return public_key(key.public) if (iss, kid) == (key.id, key.kid) else None

    at_ms = None if at_s is None else int(at_s * 1000)
    return verify(parse(compact), model, find, audience=TD, appended_at_ms=at_ms)


@pytest.fixture(params=["ES256", "EdDSA"])
def key(request: pytest.FixtureRequest) -> SigningKey:
    return SigningKey.generate(f"spiffe://{TD}/user/olga", request.param)


def pyjwk(key: SigningKey) -> Any:
    return jwt.PyJWK({**key.public.model_dump(exclude_none=True), "alg": key.alg})


@pytest.mark.parametrize(
    ("model", "says"),
    [(ApiToken, "not an api: "), (UserDisable, "not a user.disable: "), (AgentResume, "not an agent.")],
)
def test_unexpected_type_is_named_in_good_grammar(model: type[Claims], says: str):
    key = SigningKey.generate(f"spiffe://{TD}/user/olga")
    with pytest.raises(InvalidMessageError) as refused:
        open_as(sign_payload(model, b"{}", key), key, model)
    assert str(refused.value).startswith(says)


def test_no_header_of_a_strangers_is_kept_that_is_longer_than_any_of_ours() -> None:
    """A topic takes a million bytes a record, and whoever writes there chooses them."""
    jws._remembered_header.cache_clear()  # it may be full of what other tests signed
    for number in range(3):
        header = json.dumps({"alg": "ES256", "typ": "x", "kid": "k" * 100_000 + str(number)}).encode()
        assert parse(f"{b64encode(header)}.e30.AA").header.kid.endswith(str(number))
    assert jws._remembered_header.cache_info().currsize == 0
    root = SigningKey.generate(f"spiffe://{TD}/root")
    parse(sign(command(root), root, header_jwk=True))
    assert jws._remembered_header.cache_info().currsize == 1


def test_own_signature_verifies_in_pyjwt(key: SigningKey) -> None:
    compact = sign(command(key), key)
    options: Any = {"verify_exp": False, "verify_iat": False}
    decoded = jwt.decode_complete(compact, pyjwk(key), algorithms=[key.alg], audience=TD, options=options)
    assert decoded["header"] == {"alg": key.alg, "kid": key.kid, "typ": "ringfence.user.disable+jwt"}
    assert decoded["payload"] == command(key).model_dump()


def test_pyjwt_signature_verifies_here() -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    key = SigningKey._of(f"spiffe://{TD}/user/olga", private)
    headers = {"kid": key.kid, "typ": "ringfence.user.disable+jwt"}
    compact = jwt.encode(command(key).model_dump(), private, algorithm="ES256", headers=headers)
    assert open_as(compact, key).claims == command(key)


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
def test_unknown_fields_are_kept_and_known_ones_are_typed_strictly(key: SigningKey) -> None:
    signed = open_as(sign(command(key, colour="blue"), key), key)
    assert signed.claims.model_dump()["colour"] == "blue"
    wrong = command(key).model_copy(update={"iat": str(NOW_S)})
    with pytest.raises(InvalidMessageError, match="iat"):
        open_as(sign(wrong, key), key)


def test_one_message_is_never_taken_for_another(key: SigningKey) -> None:
    with pytest.raises(InvalidMessageError, match="typ") as refused:
        open_as(sign(command(key), key), key, RevocationRequest)
    assert refused.value.code == "typ_unexpected"


def test_another_trust_domain_is_refused(key: SigningKey) -> None:
    with pytest.raises(InvalidMessageError, match="trust domain"):
        open_as(sign(command(key, aud="other.example"), key), key)


def test_another_key_under_the_same_kid_is_refused(key: SigningKey) -> None:
    thief = SigningKey.generate(key.id, key.alg)
    head, body, _ = sign(command(key), key).split(".")
    forged = f"{head}.{body}.{b64encode(thief.sign(f'{head}.{body}'.encode()))}"
    with pytest.raises(SignatureError, match="does not verify"):
        open_as(forged, key)


def test_a_key_that_nobody_knows_is_refused(key: SigningKey) -> None:
    thief = SigningKey.generate(key.id, key.alg)
    with pytest.raises(SignatureError, match="no valid key"):
        open_as(sign(command(thief), thief), key)


@pytest.mark.parametrize("alg", ["none", "HS256", "RS256", "ES384"])
def test_the_header_does_not_choose_the_algorithm(key: SigningKey, alg: str) -> None:
    _, body, tail = sign(command(key), key).split(".")
    head = b64encode(json.dumps({"alg": alg, "kid": key.kid, "typ": "ringfence.user.disable+jwt"}).encode())
    with pytest.raises(SignatureError, match="alg"):
        open_as(f"{head}.{body}.{tail}", key)


def test_a_header_with_demands_that_we_do_not_know_is_refused(key: SigningKey) -> None:
    _, body, tail = sign(command(key), key).split(".")
    fields = {"alg": key.alg, "kid": key.kid, "typ": "ringfence.user.disable+jwt", "crit": ["exp"]}
    with pytest.raises(InvalidMessageError, match="not a JWS"):
        parse(f"{b64encode(json.dumps(fields).encode())}.{body}.{tail}")


def test_expiry_is_judged_by_the_append_time(key: SigningKey) -> None:
    compact = sign(command(key), key)
    assert open_as(compact, key, at_s=NOW_S + 59.999)
    with pytest.raises(ExpiredError, match="after its exp"):
        open_as(compact, key, at_s=NOW_S + 60)
    assert open_as(compact, key, at_s=None), "without an append time nothing expires"


def test_a_life_without_end_is_refused(key: SigningKey) -> None:
    with pytest.raises(ExpiredError, match="sign it shorter"):
        open_as(sign(command(key, exp=NOW_S + MAX_LIFE_S + 1), key), key)


def test_a_clock_far_ahead_is_refused(key: SigningKey) -> None:
    with pytest.raises(ExpiredError, match="set the clock"):
        open_as(sign(command(key, iat=NOW_S + 3600, exp=NOW_S + 3660), key), key)


@pytest.mark.parametrize(
    "text", ["", ".", "..", "a.b", "a.b.c.d", "é.a.b", "YQ.YQ.YQ", "bnVsbA.YQ.YQ", "eyJ9.e30.YQ", "[" * 5000]
)
def test_garbage_is_no_jws(text: str) -> None:
    with pytest.raises(InvalidMessageError):
        parse(text)


def test_deeply_nested_json_in_the_header_is_refused() -> None:
    with pytest.raises(InvalidMessageError):
        parse(f"{b64encode(b'[' * 100_000)}.e30.YQ")


def test_the_key_that_a_message_names_is_told_by_its_header_alone(key: SigningKey) -> None:
    assert kid_of(sign(command(key), key)) == key.kid
    for none in ("", "a.b.c", "eyJ9.e30.YQ", "e30.e30.YQ"):
        with pytest.raises(InvalidMessageError):
            kid_of(none)


@pytest.mark.parametrize(("nbf", "counts"), [(NOW_S, True), (NOW_S + 3600, False), ("soon", False)])
def test_message_before_its_nbf_is_rejected(key: SigningKey, nbf: Any, counts: bool) -> None:
    """RFC 7519, 4.1.5: writers of their own may set it, though nothing here does."""
    compact = sign(command(key, nbf=nbf), key)
    if counts:
        assert open_as(compact, key)
        return
    with pytest.raises(ExpiredError, match="nbf") as refused:
        open_as(compact, key)
    assert refused.value.code == "not_yet"


@pytest.mark.parametrize(
    "header",
    [
        rb'{"alg":"ES256","typ":"ringfence.user.disable+jwt","kid":"\ud800"}',
        b'{"alg":"ES256","typ":"ringfence.user.disable+jwt","kid":"k","kid":"another"}',
        '{"alg":"ES256","typ":"ringfence.user.disable+jwt","kid":"k"}'.encode("utf-16"),
        b'{"alg":"ES256","typ":"ringfence.user.disable+jwt","kid":"\xed\xa0\x80"}',
        b'{"alg":"ES256","typ":"ringfence.user.disable+jwt","kid":"k","n":NaN}',
    ],
    ids=["half a character", "twice", "utf-16", "half a character in utf-8", "no number"],
)
def test_a_header_that_not_all_would_read_alike_is_refused(header: bytes) -> None:
    """What is quoted of it goes into letters and events, which are UTF-8."""
    with pytest.raises(InvalidMessageError, match="not a JWS"):
        parse(f"{b64encode(header)}.e30.AA")


def test_a_huge_message_is_refused_before_it_is_read() -> None:
    with pytest.raises(InvalidMessageError, match="limit"):
        parse(b"a" * 600_000)


@given(st.binary(max_size=80))
def test_base64url_has_one_spelling(data: bytes) -> None:
    assert b64decode(b64encode(data)) == data


@pytest.mark.parametrize("text", ["YR", "YQ=", "YQ==", " YQ", "Y Q", "YQ\n", "a", "_/", "+A"])
def test_other_spellings_of_base64url_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        b64decode(text)


@given(st.integers(min_value=0), st.integers(min_value=0, max_value=7))
def test_no_flipped_bit_verifies(position: int, bit: int) -> None:
    key = FLIPPED_KEY
    raw = bytearray(FLIPPED.encode())
    raw[position % len(raw)] ^= 1 << bit
    with pytest.raises(InvalidMessageError):
        open_as(bytes(raw), key)


# --- limits, to the second and the byte -------------------------------------------------------------------------------


def refusal(compact: str | bytes, key: SigningKey, **how: Any) -> InvalidMessageError:
    with pytest.raises(InvalidMessageError) as caught:
        open_as(compact, key, **how)
    return caught.value


def test_a_writers_clock_may_be_half_a_minute_ahead(key: SigningKey) -> None:
    for fields in ({"iat": NOW_S + 31}, {"iat": NOW_S, "nbf": NOW_S + 31}):
        compact = sign(command(key, **{"exp": NOW_S + 60, **fields}), key)
        assert open_as(compact, key, at_s=NOW_S + 1)
        early = refusal(compact, key, at_s=NOW_S + 0.999)
        assert early.code == ("not_yet" if "nbf" in fields else "iat_in_future")


def test_times_are_read_in_the_unit_in_which_they_are_given(key: SigningKey) -> None:
    error = refusal(sign(command(key, iat=NOW_S + 101, exp=NOW_S + 200), key), key, at_s=NOW_S + 1)
    assert "100 s ahead" in error.message
    assert "61.5 s after" in refusal(sign(command(key), key), key, at_s=NOW_S + 121.5).message


def test_a_life_is_a_day_at_most(key: SigningKey) -> None:
    assert MAX_LIFE_S == 86_400
    assert open_as(sign(command(key, exp=NOW_S + MAX_LIFE_S), key), key)
    error = refusal(sign(command(key, exp=NOW_S + MAX_LIFE_S + 1), key), key)
    assert (error.code, "86400 s" in error.message) == ("life_too_long", True)


def test_expired_message_has_the_code_expired(key: SigningKey) -> None:
    assert refusal(sign(command(key), key), key, at_s=NOW_S + 60).code == "expired"


def test_a_message_that_does_not_expire_is_judged_by_its_beginning(key: SigningKey) -> None:
    claims = TaskEndless(iss=key.id, aud=TD, iat=NOW_S, jti="j")
    compact = sign(claims, key)
    assert open_as(compact, key, TaskEndless, NOW_S + 10**9).claims == claims
    assert refusal(compact, key, model=TaskEndless, at_s=NOW_S - 31).code == "iat_in_future"


def test_a_message_has_half_a_mebibyte_at_most(key: SigningKey) -> None:
    head, _, tail = sign(command(key), key).split(".")
    room = 512 * 1024 - len(head) - len(tail) - 2
    body = b64encode(b" " * (room * 3 // 4 - 2))
    assert parse(f"{head}.{body}.{tail}").payload.isspace()
    with pytest.raises(InvalidMessageError) as caught:
        parse("a" * (512 * 1024 + 1))
    assert (caught.value.code, "524288" in caught.value.message) == ("too_large", True)
    with pytest.raises(InvalidMessageError) as caught:
        parse("a" * (512 * 1024))
    assert caught.value.code == "not_a_jws"


# --- what stands in a refusal -----------------------------------------------------------------------------------------


def test_every_refusal_has_its_code(key: SigningKey) -> None:
    thief = SigningKey.generate(key.id, key.alg)
    head, body, _ = sign(command(key), key).split(".")
    forged = f"{head}.{body}.{b64encode(thief.sign(f'{head}.{body}'.encode()))}"
    other_alg = b64encode(
        json.dumps({"alg": "none", "kid": key.kid, "typ": "ringfence.user.disable+jwt"}).encode()
    )
    found = {
        "aud": refusal(sign(command(key, aud="other.example"), key), key),
        "key": refusal(sign(command(thief), thief), key),
        "alg": refusal(f"{other_alg}.{body}.AA", key),
        "signature": refusal(forged, key),
        "claims": refusal(sign_payload(UserDisable, b"{}", key), key),
        "jws": refusal("x", key),
    }
    assert {name: error.code for name, error in found.items()} == {
        "aud": "aud_unexpected",
        "key": "key_unknown",
        "alg": "alg_unexpected",
        "signature": SignatureError.code,
        "claims": "claims_invalid",
        "jws": "not_a_jws",
    }
    assert "other.example" in found["aud"].message
    assert TD in found["aud"].message
    assert thief.kid in found["key"].message
    assert key.id in found["key"].message
    assert "user.disable" in found["key"].message
    assert "none" in found["alg"].message
    assert key.alg in found["alg"].message
    assert key.id in found["signature"].message


def test_unexpected_typ_names_both_types(key: SigningKey) -> None:
    error = refusal(sign(command(key), key), key, model=AgentResume)
    assert error.code == "typ_unexpected"
    assert "ringfence.user.disable+jwt" in error.message
    assert "ringfence.agent.resume+jwt" in error.message


def test_invalid_claims_are_named_without_values(key: SigningKey) -> None:
    secret = "hunter2-and-more"
    error = refusal(
        sign_payload(
            UserDisable, json.dumps({"iss": 1, "aud": TD, "jti": secret, "iat": secret}).encode(), key
        ),
        key,
    )
    for name in ("iss", "iat", "exp", "user_id"):
        assert f"{name}: " in error.message
    assert secret not in error.message
    assert error.message.count("; ") == 4, "no more than five"
    assert len(refusal(sign_payload(UserDisable, b"[]", key), key).message) < 600


def test_error_of_the_whole_message_is_reported_as_it(key: SigningKey) -> None:
    assert "it: " in refusal(sign_payload(UserDisable, b"[]", key), key).message


def test_members_of_a_list_are_named_and_the_list_is_not_blamed_as_well() -> None:
    with pytest.raises(ValidationError) as caught:
        _Many.model_validate({"many": [1, "x", "y"]})
    assert explain(caught.value).count("many") == 2
    for part in ("many.1: ", "many.2: "):
        assert part in explain(caught.value)


def test_a_list_of_nothing_but_mistakes_is_not_called_too_short() -> None:
    with pytest.raises(ValidationError) as caught:
        _Many.model_validate({"many": ["x", "y"]})
    assert "many: " not in explain(caught.value)
    with pytest.raises(ValidationError) as caught:
        _Many.model_validate({"many": []})
    assert explain(caught.value).startswith("many: ")


def test_long_explanation_is_truncated() -> None:
    inner = create_model("Inner", **{f"{'x' * 70}{n}": (int, ...) for n in range(6)})  # type: ignore[call-overload]
    outer = "y" * 100
    model = create_model("Outer", **{outer: (inner, ...)})  # type: ignore[call-overload]
    with pytest.raises(ValidationError) as caught:
        model.model_validate({outer: {}})
    assert len(explain(caught.value)) == 500
    assert explain(caught.value).startswith("y" * 80 + "." + "x" * 70 + "0: "), (
        "a name has 80 letters at most"
    )


def test_absent_claim_is_not_serialised(key: SigningKey) -> None:
    claims = cast(CredentialRequest, EXAMPLES[CredentialRequest])
    assert None in dict(claims).values()
    assert b"null" not in parse(sign(claims, key)).payload


def test_only_what_is_said_too_often_is_left_out() -> None:
    with pytest.raises(ValidationError) as caught:
        _Many.model_validate({"many": ["x"] * 3000})
    said = explain(caught.value)
    assert len(said) <= 500
    assert said.count("many.") == 5


# --- other ways in ----------------------------------------------------------------------------------------------------


def payload_of(compact: str, key: SigningKey, model: type[Claims] = UserDisable) -> dict[str, Any]:
    def find(iss: str, kid: str) -> PublicKey | None:
        return public_key(key.public) if (iss, kid) == (key.id, key.kid) else None

    return verify_payload(parse(compact), model, find, audience=TD)


def test_a_payload_that_verifies_is_given_as_it_is(key: SigningKey) -> None:
    assert payload_of(sign(command(key, colour="blue"), key), key)["colour"] == "blue"
    assert payload_of(sign(command(key, exp=NOW_S - 10), key), key)["exp"] == NOW_S - 10


def test_a_payload_is_verified_as_a_message_is(key: SigningKey) -> None:
    thief = SigningKey.generate(key.id, key.alg)
    head, body, _ = sign(command(key), key).split(".")
    forged = f"{head}.{body}.{b64encode(thief.sign(f'{head}.{body}'.encode()))}"
    for compact, model, code in (
        (forged, UserDisable, SignatureError.code),
        (sign(command(thief), thief), UserDisable, "key_unknown"),
        (sign(command(key, aud="other.example"), key), UserDisable, "aud_unexpected"),
        (sign(command(key), key), AgentResume, "typ_unexpected"),
        (sign_payload(UserDisable, b"{}", key), UserDisable, "claims_invalid"),
        (sign_payload(UserDisable, b"[]", key), UserDisable, "claims_invalid"),
        (sign_payload(UserDisable, b"{", key), UserDisable, "claims_invalid"),
    ):
        with pytest.raises(InvalidMessageError) as caught:
            payload_of(compact, key, model)
        assert caught.value.code == code


def test_verified_message_is_checked_again_for_key_and_time(key: SigningKey) -> None:
    jws_ = parse(sign(command(key), key))
    before = open_as(jws_.compact, key).claims

    def again(found: PublicKey | None, at_s: int = NOW_S, audience: str = TD) -> Any:
        return verify(
            jws_,
            UserDisable,
            lambda iss, kid: found,
            audience=audience,
            appended_at_ms=at_s * 1000,
            verified=before,
        )

    mine = public_key(key.public)
    assert again(mine) == (before, jws_.compact)
    for args in ((None,), (mine, NOW_S + 60), (mine, NOW_S, "other.example")):
        with pytest.raises(InvalidMessageError):
            again(*args)


def test_a_name_twice_is_read_in_two_ways(key: SigningKey) -> None:
    parse(sign(command(key), key)).check_one_reading()
    twice = sign_payload(UserDisable, b'{"iss":"a","iss":"b"}', key)
    with pytest.raises(InvalidMessageError) as caught:
        parse(twice).check_one_reading()
    assert caught.value.code == "ambiguous"


def test_a_header_shows_a_key_only_where_it_is_asked_to(key: SigningKey) -> None:
    assert parse(sign(command(key), key)).header.jwk is None
    compact = sign(command(key), key, header_jwk=True)
    header = json.loads(b64decode(compact.partition(".")[0]))
    assert header == {
        "alg": key.alg, "kid": key.kid, "typ": "ringfence.user.disable+jwt",
        "jwk": key.public.model_dump(exclude_none=True),
    }  # fmt: skip
    assert parse(compact).header.jwk == header["jwk"]
    assert open_as(compact, key).claims == command(key)


@pytest.mark.parametrize("name", ["crit", "b64"])
def test_demands_of_a_header_are_refused(key: SigningKey, name: str) -> None:
    fields = {"alg": key.alg, "kid": key.kid, "typ": "ringfence.user.disable+jwt", name: ["x"]}
    with pytest.raises(InvalidMessageError) as caught:
        parse(f"{b64encode(json.dumps(fields).encode())}.e30.AA")
    assert caught.value.code == "not_a_jws"


@pytest.mark.parametrize("name", ["alg", "kid", "typ"])
@pytest.mark.parametrize("value", [None, 1])
def test_a_header_without_a_part_is_none(key: SigningKey, name: str, value: Any) -> None:
    fields = {"alg": key.alg, "kid": key.kid, "typ": "ringfence.user.disable+jwt", name: value}
    head = b64encode(json.dumps({k: v for k, v in fields.items() if v is not None}).encode())
    for take in (parse, kid_of):
        with pytest.raises(InvalidMessageError) as caught:
            take(f"{head}.e30.AA")
        assert caught.value.code == "not_a_jws"


def test_a_digest_is_of_the_very_text(key: SigningKey) -> None:
    compact = sign(command(key), key)
    assert open_as(compact, key).digest == hashlib.sha256(compact.encode()).hexdigest()


FLIPPED_KEY = SigningKey.generate(f"spiffe://{TD}/user/olga")
FLIPPED = sign(command(FLIPPED_KEY), FLIPPED_KEY)


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (b'{"iat": 1790000000, "jti": 5}', 1_790_000_000),
        (b'{"iat": "1790000000"}', None),
        (b'{"exp": 1790000000}', None),
        (b"[]", None),
        (b"null", None),
        (b"iat", None),
    ],
)
def test_unverified_time_is_read_from_any_payload(key: SigningKey, payload: bytes, said: int | None) -> None:
    """Of whatever shape it is: for what is kept or dropped before anything of it is verified."""
    head = sign(command(key), key).split(".")[0]
    assert unverified_time(parse(f"{head}.{b64encode(payload)}.{b64encode(bytes(64))}")) == said
