"""Keys of people: who may add and end them, what proves that they are theirs, and since when they count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import ValidationError

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.codes import Code
from ringfence.messages.registry import (
    AgentRotateKey,
    TaskConsent,
    UserAddKey,
    UserDisable,
    UserInvite,
)
from ringfence.messages.trust import RootHandover
from ringfence.model.lifecycle import (
    NO_HISTORY,
    WAIT_S,
    KeyProof,
    SignerKey,
)
from ringfence.model.records.key_proofs import verified_key_proof
from tests.support import user_keys
from tests.support.in_memory_registry import START_MS, TD, InMemoryRegistry
from tests.support.key_histories import givers, origin, refused, reread, state
from tests.support.user_keys import add_key, end_key, invitation, new_key, new_passkey, record_of

WAIT_MS = WAIT_S * 1000


@pytest.fixture
def ledger() -> InMemoryRegistry:
    """olga and otto are operators, sam and suzy sponsors; oscar is a third operator."""
    ledger = InMemoryRegistry()
    ledger.organisation()
    ledger.give(ledger.user_set("olga", "oscar", ["operator"]))
    return ledger


def counting(ledger: InMemoryRegistry, user: str) -> set[str]:
    return {key.kid for key in state(ledger, user).keys if key.not_after > ledger.clock.ms // 1000}


# --- adding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [new_key, new_passkey], ids=["key file", "passkey"])
def test_an_operator_adds_a_key_and_the_others_stay(ledger: InMemoryRegistry, make: Any):
    key = make("sam")
    ledger.give(add_key(ledger, "olga", "sam", key))
    assert counting(ledger, "sam") == {key.kid, ledger.key("sam").kid}
    assert state(ledger, "sam").roles == ("sponsor",)


def test_a_person_adds_a_key_with_a_key_file_of_their_own(ledger: InMemoryRegistry):
    key = new_key("sam")
    ledger.give(add_key(ledger, "sam", "sam", key))
    assert key.kid in counting(ledger, "sam")


def test_no_passkey_adds_a_key(ledger: InMemoryRegistry):
    passkey = new_passkey("sam")
    ledger.give(add_key(ledger, "olga", "sam", passkey))
    with pytest.raises(InvalidMessageError) as caught:
        ledger.give(add_key(ledger, "sam", "sam", new_key("sam")), passkey)
    assert caught.value.code == "passkey_not_allowed"


def test_credential_id_of_another_live_passkey_is_refused(ledger: InMemoryRegistry):
    """The adder says the id, and the proof of possession does not cover it. People are found by it at sign-in."""
    passkey, thief = new_passkey("sam"), new_passkey("suzy")
    ledger.give(add_key(ledger, "sam", "sam", passkey))
    claimed = record_of(thief).model_copy(update={"credential_id": record_of(passkey).credential_id})
    assert refused(ledger, add_key(ledger, "suzy", "suzy", thief, key=claimed)) == "credential_taken"
    ledger.give(end_key(ledger, "sam", "sam", passkey.kid))
    ledger.give(add_key(ledger, "suzy", "suzy", thief, key=claimed))
    back = ledger.user_set("olga", "sam", ["sponsor"], keys=(record_of(passkey),))
    assert refused(ledger, back) == "credential_taken"


def test_adding_a_key_to_another_user_needs_an_operator(ledger: InMemoryRegistry):
    assert refused(ledger, add_key(ledger, "suzy", "sam", new_key("sam"))) == "not_operator"


def test_a_stranger_adds_nothing(ledger: InMemoryRegistry):
    with pytest.raises(InvalidMessageError) as caught:
        ledger.give(add_key(ledger, "mallory", "sam", new_key("sam")))
    assert caught.value.code == "key_unknown"


def test_a_key_is_added_to_people_who_may_act(ledger: InMemoryRegistry):
    assert refused(ledger, add_key(ledger, "olga", "nobody", new_key("nobody"))) == "unknown_user"
    ledger.give(ledger.claims(UserDisable, "olga", user_id="sam", reason="left"))
    assert refused(ledger, add_key(ledger, "olga", "sam", new_key("sam"))) == "user_disabled"


def test_a_key_is_added_once_and_has_one_owner(ledger: InMemoryRegistry):
    key = new_key("sam")
    ledger.give(add_key(ledger, "olga", "sam", key))
    assert refused(ledger, add_key(ledger, "olga", "sam", key)) == "key_twice"
    assert refused(ledger, add_key(ledger, "olga", "suzy", key, possession=None)) == "key_taken"


def test_a_person_has_sixteen_keys_at_most(ledger: InMemoryRegistry):
    for _ in range(15):
        ledger.give(add_key(ledger, "olga", "sam", new_key("sam")))
    assert refused(ledger, add_key(ledger, "olga", "sam", new_key("sam"))) == "too_many_keys"
    ledger.give(end_key(ledger, "olga", "sam", ledger.key("sam").kid))
    ledger.give(add_key(ledger, "olga", "sam", new_key("sam")))


def test_a_command_without_its_proofs_is_refused(ledger: InMemoryRegistry):
    for missing in ("invitation", "possession"):
        command = add_key(ledger, "olga", "sam", new_key("sam")).model_copy(update={missing: None})
        assert refused(ledger, command) == "possession_invalid"


# --- what proves that it is theirs ------------------------------------------------------------------------------------


def test_an_invitation_counts_once(ledger: InMemoryRegistry):
    invited = user_keys.invitation(ledger, "olga", "sam")
    ledger.give(add_key(ledger, "olga", "sam", new_key("sam"), invitation=invited))
    assert (
        refused(ledger, add_key(ledger, "olga", "sam", new_key("sam"), invitation=invited))
        == "invitation_used"
    )
    # Nor after the key that it was used for has ended, nor for another operator.
    ledger.clock.ms += 1000
    assert (
        refused(ledger, add_key(ledger, "otto", "sam", new_key("sam"), invitation=invited))
        == "invitation_used"
    )


def test_a_possession_is_of_this_key_this_user_and_this_invitation(ledger: InMemoryRegistry):
    invited, other = (user_keys.invitation(ledger, "olga", "sam") for _ in range(2))
    key = new_key("sam")
    wrong = {
        "by another key": user_keys.possession(ledger, key, "sam", invited, by=new_key("sam")),
        "of another key": user_keys.possession(ledger, new_key("sam"), "sam", invited, by=key),
        "of another user": user_keys.possession(ledger, key, "suzy", invited),
        "in another name": user_keys.possession(ledger, key, "sam", invited, iss=f"spiffe://{TD}/user/suzy"),
        "to another invitation": user_keys.possession(ledger, key, "sam", other),
        "ended": user_keys.possession(
            ledger, key, "sam", invited, iat=START_MS // 1000 - 100, exp=START_MS // 1000 - 1
        ),
    }
    for what, possessed in wrong.items():
        command = add_key(ledger, "olga", "sam", key, invitation=invited, possession=possessed)
        assert refused(ledger, command) == "possession_invalid", what
    ledger.give(add_key(ledger, "olga", "sam", key, invitation=invited))


def test_an_invitation_is_for_this_user_by_who_may_invite_and_in_time(ledger: InMemoryRegistry):
    key, passkey = new_key("sam"), new_passkey("sam")
    ledger.give(add_key(ledger, "olga", "sam", passkey))
    now_s = ledger.clock.ms // 1000
    wrong = {
        "for another": user_keys.invitation(ledger, "olga", "suzy"),
        "by a stranger": user_keys.invitation(ledger, "mallory", "sam"),
        "by no operator": user_keys.invitation(ledger, "suzy", "sam"),
        "by a passkey": user_keys.invitation(ledger, "sam", "sam", passkey),
        "too long": user_keys.invitation(ledger, "olga", "sam", exp=now_s + 24 * 3600 + 60),
        "ended": user_keys.invitation(ledger, "olga", "sam", iat=now_s - 100, exp=now_s - 1),
    }
    for what, invited in wrong.items():
        command = add_key(ledger, "olga", "sam", key, invitation=invited)
        assert refused(ledger, command) == "possession_invalid", what
    ledger.give(add_key(ledger, "olga", "sam", key, invitation=user_keys.invitation(ledger, "sam", "sam")))


def test_the_root_invites_while_it_is_in_office(ledger: InMemoryRegistry):
    """A root that was handed over invites nobody any more: whoever stole it would go on."""
    for user in ("sam", "suzy"):
        invited = user_keys.invitation(ledger, "root", user, ledger.root, iss=ledger.trust.root_id)
        command = add_key(ledger, "olga", user, new_key(user), invitation=invited)
        if user == "sam":
            ledger.give(command)
            continue
        new = SigningKey.generate(ledger.root.id)
        first = ledger.trust.require()
        handover = RootHandover(
            iss=ledger.trust.root_id, aud=TD, iat=START_MS // 1000, jti="handover", next_root=new.public
        )
        following = first.model_copy(
            update={
                "version": first.version + 1,
                "handovers": (sign(handover, ledger.root, header_jwk=True),),
                "former_roots": (ledger.root.record(ledger.clock.ms // 1000),),
            }
        )
        assert ledger.trust.load(sign(following, new, header_jwk=True), START_MS / 1000)
        assert refused(ledger, command) == "possession_invalid"
    assert reread(ledger).user("sam"), "what it signed in its time holds"


def test_the_invitation_of_who_is_no_operator_any_more_is_void(ledger: InMemoryRegistry):
    invited = user_keys.invitation(ledger, "otto", "sam")
    ledger.give(ledger.user_set("olga", "otto", []))
    command = add_key(ledger, "olga", "sam", new_key("sam"), invitation=invited)
    assert refused(ledger, command) == "possession_invalid"


def test_a_passkey_is_added_within_ten_minutes_of_its_signature(ledger: InMemoryRegistry):
    passkey, invited = (
        new_passkey("sam"),
        user_keys.invitation(ledger, "olga", "sam", exp=START_MS // 1000 + 7200),
    )
    possessed = user_keys.possession(ledger, passkey, "sam", invited, exp=START_MS // 1000 + 7200)
    ledger.clock.ms += 700_000
    command = add_key(ledger, "olga", "sam", passkey, invitation=invited, possession=possessed)
    assert refused(ledger, command) == "possession_invalid"
    ledger.give(add_key(ledger, "olga", "sam", passkey, invitation=invited))


def test_a_passkey_is_of_this_organisations_pages(ledger: InMemoryRegistry):
    for wrong in ({"rp_id": "evil.example"}, {"origin": "https://evil.example"}, {"flags": 1}):
        passkey = new_passkey("sam", **wrong)
        assert refused(ledger, add_key(ledger, "olga", "sam", passkey)) in (
            "possession_invalid",
            "rp_id_unexpected",
        )


def test_a_key_is_of_one_kind(ledger: InMemoryRegistry):
    """Neither a key file called a passkey, nor the other way round, nor half of one."""
    passkey, key = new_passkey("sam"), new_key("sam")
    good, plain = user_keys.record_of(passkey), user_keys.record_of(key)
    wrong = [
        (passkey, good.model_copy(update={"credential_id": None})),
        (passkey, good.model_copy(update={"rp_id": None})),
        (passkey, good.model_copy(update={"use": None})),
        (key, plain.model_copy(update={"attested": True})),
        (key, plain.model_copy(update={"use": "webauthn", "credential_id": "AAAA", "rp_id": "localhost"})),
        (passkey, plain.model_copy(update={"kid": passkey.kid})),
    ]
    for signer, record in wrong:
        command = add_key(ledger, "olga", "sam", signer, key=record)
        assert refused(ledger, command) in ("key_invalid", "possession_invalid"), record


def test_only_people_have_passkeys(ledger: InMemoryRegistry):
    passkey = new_passkey("sam")
    record = user_keys.record_of(passkey)
    assert refused(ledger, ledger.register("sam", "bot", "sam", keys=(record,))) == "key_invalid"


def test_another_operator_says_that_a_key_is_attested(ledger: InMemoryRegistry):
    for by, user in (("sam", "sam"), ("olga", "olga")):
        passkey = new_passkey(user)
        record = user_keys.record_of(passkey).model_copy(update={"attested": True})
        assert refused(ledger, add_key(ledger, by, user, passkey, key=record)) == "attestation_not_verified"
    passkey = new_passkey("sam")
    record = user_keys.record_of(passkey).model_copy(update={"attested": True})
    ledger.give(add_key(ledger, "olga", "sam", passkey, key=record))
    assert state(ledger, "sam").keys[0].attested is True


def test_user_set_makes_no_passkey_and_changes_none(ledger: InMemoryRegistry):
    passkey = new_passkey("sam")
    record = user_keys.record_of(passkey)
    assert (
        refused(ledger, ledger.user_set("olga", "sam", ["sponsor"], keys=(record,))) == "possession_invalid"
    )
    ledger.give(add_key(ledger, "olga", "sam", passkey))
    for changed in (
        {"attested": True},
        {"rp_id": "evil.example"},
        {"backup_eligible": True},
        {"aaguid": None},
    ):
        keys = (record.model_copy(update=changed),)
        assert refused(ledger, ledger.user_set("olga", "sam", ["sponsor"], keys=keys)) == "key_changed", (
            changed
        )
    bare = passkey.plain().record(record.not_after)
    assert refused(ledger, ledger.user_set("olga", "sam", ["sponsor"], keys=(bare,))) == "key_changed"
    ledger.give(ledger.user_set("olga", "sam", ["sponsor"], keys=(record,)))
    assert counting(ledger, "sam") == {passkey.kid}


def proof(ledger: InMemoryRegistry, command: UserAddKey) -> KeyProof:
    """What a command embeds, as olga signs it. Raises InvalidMessageError."""
    at_ms = ledger.clock.ms
    people = ledger.directory.chains._people(at_ms, None, NO_HISTORY)
    kid = ledger.key("olga").kid
    signer = SignerKey("olga", kid, people.origin_of("olga", kid))
    return verified_key_proof(command, signer, people, ledger.trust, at_ms)


def test_a_proof_names_its_invitation_and_who_co_signed(ledger: InMemoryRegistry):
    invited = user_keys.invitation(ledger, "otto", "sam")
    claims = parse(invited).unverified_claims(UserInvite)
    found = proof(ledger, add_key(ledger, "olga", "sam", new_key("sam"), invitation=invited))
    assert found == KeyProof(message_id(claims.iss, claims.jti), None)
    found = proof(ledger, add_key(ledger, "olga", "sam", new_key("sam"), cosigned="otto"))
    assert found.endorser is not None
    assert (found.endorser.user_id, found.endorser.kid) == ("otto", ledger.key("otto").kid)


@dataclass(frozen=True)
class NewKey:
    """A new key of sam, olga's invitation, what the key signed in answer, and the ledger that they are of."""

    ledger: InMemoryRegistry
    key: SigningKey
    invited: str
    possessed: str

    def cosigned(self, by: str, user: str = "sam") -> str:
        return user_keys.endorsement(self.ledger, by, user, self.key.kid, self.possessed)

    def possession(self, **fields: Any) -> str:
        return user_keys.possession(self.ledger, self.key, "sam", self.invited, **fields)


@pytest.mark.parametrize(
    ("code", "change"),
    [
        (Code.INVITATION_MISSING, lambda new: {"invitation": None}),
        (Code.INVITATION_OTHER_USER, lambda new: {"invitation": invitation(new.ledger, "olga", "suzy")}),
        (Code.INVITATION_NOT_ALLOWED, lambda new: {"invitation": invitation(new.ledger, "suzy", "sam")}),
        (Code.POSSESSION_MISSING, lambda new: {"possession": None}),
        (Code.POSSESSION_OTHER, lambda new: {"invitation": invitation(new.ledger, "olga", "sam")}),
        (Code.POSSESSION_OTHER, lambda new: {"possession": new.possession(jwk=new_key("sam").public)}),
        (Code.ENDORSEMENT_OTHER, lambda new: {"endorsement": new.cosigned("otto", "suzy")}),
        (Code.ENDORSEMENT_NOT_OPERATOR, lambda new: {"endorsement": new.cosigned("suzy")}),
        (Code.ENDORSEMENT_NOT_APART, lambda new: {"endorsement": new.cosigned("olga")}),
    ],
)
def test_proof_of_a_key_is_refused(
    ledger: InMemoryRegistry, code: Code, change: Callable[[NewKey], dict[str, Any]]
) -> None:
    key, invited = new_key("sam"), invitation(ledger, "olga", "sam")
    possessed = user_keys.possession(ledger, key, "sam", invited)
    good = add_key(ledger, "olga", "sam", key, invitation=invited, possession=possessed)
    assert proof(ledger, good).endorser is None
    with pytest.raises(InvalidMessageError) as refused:
        proof(ledger, good.model_copy(update=change(NewKey(ledger, key, invited, possessed))))
    assert refused.value.code == code


# --- ending -----------------------------------------------------------------------------------------------------------


def test_a_person_or_an_operator_ends_a_key_and_nobody_else(ledger: InMemoryRegistry):
    passkey, key = new_passkey("sam"), new_key("sam")
    ledger.give(add_key(ledger, "sam", "sam", passkey))
    ledger.give(add_key(ledger, "sam", "sam", key))
    assert refused(ledger, end_key(ledger, "suzy", "sam", key.kid)) == "not_operator"
    assert refused(ledger, end_key(ledger, "sam", "sam", new_key("sam").kid)) == "unknown_key"
    ledger.give(end_key(ledger, "sam", "sam", key.kid), passkey)
    ledger.give(end_key(ledger, "olga", "sam", passkey.kid))
    assert counting(ledger, "sam") == {ledger.key("sam").kid}


def test_an_ended_key_signs_nothing_new_and_what_it_signed_stays(ledger: InMemoryRegistry):
    passkey = new_passkey("sam")
    ledger.give(add_key(ledger, "olga", "sam", passkey))
    ledger.give(ledger.register("sam", "bot", "sam"))
    ledger.give(ledger.assign("sam", "bot"), passkey)
    ledger.give(end_key(ledger, "sam", "sam", passkey.kid))
    with pytest.raises(InvalidMessageError) as caught:
        ledger.give(ledger.assign("sam", "bot"), passkey)
    assert caught.value.code == "key_unknown"
    reader = reread(ledger)
    assert len(list(reader.entries("task"))) == 1
    assert len(list(reader.entries("user"))) == len(list(ledger.directory.entries("user")))


def test_a_compromised_key_ends_those_that_it_added(ledger: InMemoryRegistry):
    first, second, third, apart = (new_key("sam") for _ in range(4))
    ledger.give(add_key(ledger, "olga", "sam", apart))
    ledger.give(add_key(ledger, "sam", "sam", first))
    ledger.give(add_key(ledger, "sam", "sam", second), first)
    ledger.give(add_key(ledger, "sam", "sam", third), second)
    ledger.give(end_key(ledger, "olga", "sam", first.kid, compromised=True))
    assert counting(ledger, "sam") == {ledger.key("sam").kid, apart.kid}
    assert set(state(ledger, "sam").compromised or ()) == {first.kid, second.kid, third.kid}
    assert reread(ledger).user("sam")


def test_first_keys_and_keys_of_agents_rest_on_the_key_that_gave_them(ledger: InMemoryRegistry):
    """olga makes the operator o2, o2 makes the sponsor s2, and s2 gives an agent its key and another one."""
    olga, o2, s2 = ledger.key("olga").kid, ledger.key("o2").kid, ledger.key("s2").kid
    ledger.give(ledger.user_set("olga", "o2", ["operator"]))
    ledger.give(ledger.user_set("o2", "s2", ["sponsor"]))
    ledger.give(ledger.register("s2", "bot", "s2"))
    later = SigningKey.generate(f"spiffe://{TD}/agent/bot")
    rotation = ledger.claims(
        AgentRotateKey, "s2", agent_id="bot", key=ledger.key_record(later), overlap_s=3600
    )
    ledger.give(rotation)
    assert givers(origin(ledger, "olga", ledger.key("olga"))) == set()  # the root gave it
    assert givers(origin(ledger, "o2", ledger.key("o2"))) == {("olga", olga)}
    assert origin(ledger, "o2", ledger.key("o2")).vouchers == frozenset()
    for reader in (ledger.directory, reread(ledger)):
        keys = reader.agent_key_history("bot").origins
        assert keys.keys() == {ledger.key("bot", "agent").kid, later.kid}
        for one in keys.values():
            assert givers(one) == {("olga", olga), ("o2", o2), ("s2", s2)}


def test_key_of_agent_given_by_compromised_key_signs_nothing_before_anybody_ends_it(ledger: InMemoryRegistry):
    ledger.give(ledger.register("sam", "bot", "sam"))
    since_ms = ledger.clock.ms
    thief = SigningKey.generate(f"spiffe://{TD}/agent/bot")
    ledger.give(
        ledger.claims(AgentRotateKey, "sam", agent_id="bot", key=ledger.key_record(thief), overlap_s=3600)
    )

    def signs(key: SigningKey) -> bool:
        return ledger.directory.agent_key(key.id, key.kid, ledger.clock.ms // 1000) is not None

    assert signs(thief)
    end = end_key(ledger, "otto", "sam", ledger.key("sam").kid, compromised=True, since_ms=since_ms)
    ledger.give(end)
    assert not signs(thief)
    assert signs(ledger.key("bot", "agent"))  # given before


def test_key_that_rests_on_compromised_key_gives_nothing_before_anybody_ends_it(ledger: InMemoryRegistry):
    ledger.give(ledger.user_set("olga", "o1", ["operator"]))
    since_ms = ledger.clock.ms
    ledger.give(ledger.user_set("olga", "o2", ["operator"]))
    end = end_key(ledger, "otto", "olga", ledger.key("olga").kid, compromised=True, since_ms=since_ms)
    ledger.give(end)
    assert refused(ledger, ledger.user_set("o2", "o3", ["operator"])) == "key_voucher_compromised"
    ledger.give(ledger.user_set("o1", "o3", ["operator"]))
    ledger.give(ledger.claims(UserDisable, "o2", user_id="uma", reason="narrowing"))


def resting(ledger: InMemoryRegistry, user: str) -> SigningKey:
    """A key that olga gave a user after her own was compromised, which otto has said since."""
    since_ms, key = ledger.clock.ms, new_key(user)
    ledger.give(add_key(ledger, "olga", user, key))
    end = end_key(ledger, "otto", "olga", ledger.key("olga").kid, compromised=True, since_ms=since_ms)
    ledger.give(end)
    return key


def test_consent_by_key_that_rests_on_compromised_key_is_refused(ledger: InMemoryRegistry):
    ledger.give(ledger.register("sam", "bot", "sam"))
    thief = resting(ledger, "suzy")
    terms = ledger.terms("bot")
    for key, code in ((thief, "key_voucher_compromised"), (ledger.key("suzy"), None)):
        consent = sign(ledger.claims(TaskConsent, "suzy", terms=terms), key)
        task = ledger.assign("sam", "bot", terms=terms, on_behalf_of="suzy", consent=consent)
        moved = ledger.transfer("sam", "bot", "suzy", consent=ledger.transfer_consent("suzy", "bot", key))
        for command in (task, moved):
            if code:
                assert refused(ledger, command) == code
            else:
                ledger.give(command)


def test_since_of_compromised_key_moves_only_to_earlier(ledger: InMemoryRegistry):
    kid = ledger.key("sam").kid
    day = ledger.clock.ms - 86_400_000
    for since_ms, expected in ((day + 2, day + 2), (day + 3, day + 2), (day + 1, day + 1), (day, day)):
        ledger.give(end_key(ledger, "olga", "sam", kid, compromised=True, since_ms=since_ms))
        assert state(ledger, "sam").compromised == {kid: expected}
    assert reread(ledger).user("sam")
    for since in ({"since_ms": 1000}, {"compromised": True, "since_ms": None}):
        with pytest.raises(ValidationError, match="since_ms"):
            end_key(ledger, "olga", "sam", kid, **since)


def test_end_by_owner_who_is_no_operator_voids_no_key_of_others(ledger: InMemoryRegistry):
    """sam transferred bot and lost all roles; o1 is no operator any more. Each says: my key was always stolen."""
    ledger.give(ledger.register("sam", "bot", "sam"))
    ledger.give(ledger.transfer("sam", "bot", "suzy"))
    ledger.give(ledger.user_set("olga", "o1", ["operator"]))
    ledger.give(ledger.user_set("o1", "petra", ["sponsor"]))
    for user in ("sam", "o1"):
        ledger.give(ledger.user_set("olga", user))
        ended_ms = ledger.clock.ms
        ledger.give(end_key(ledger, user, user, ledger.key(user).kid, compromised=True, since_ms=0))
        assert state(ledger, user).compromised == {ledger.key(user).kid: ended_ms}

    bot = ledger.key("bot", "agent")
    for reader in (ledger.directory, reread(ledger)):
        assert reader.agent_key(bot.id, bot.kid, ledger.clock.ms // 1000)
        assert reader.compromised_giver(reader.key_history("petra").origins[ledger.key("petra").kid]) is None
    # An operator says since when, also afterwards.
    ledger.give(end_key(ledger, "olga", "sam", ledger.key("sam").kid, compromised=True))
    assert ledger.directory.agent_key(bot.id, bot.kid, ledger.clock.ms // 1000) is None


def test_key_that_root_gave_back_rests_on_no_compromised_key(ledger: InMemoryRegistry):
    ledger.give(ledger.user_set("olga", "o2", ["operator"]))
    ledger.give(end_key(ledger, "olga", "o2", ledger.key("o2").kid))
    ledger.clock.ms += 1000
    ledger.give(ledger.user_set("root", "o2", ["operator"]), ledger.root)
    assert givers(origin(ledger, "o2", ledger.key("o2"))) == set()


def test_key_that_root_gave_again_rests_on_no_key_though_it_never_ended(ledger: InMemoryRegistry):
    ledger.give(ledger.user_set("olga", "o2", ["operator"]))
    first, second, third = ledger.key("o2"), new_key("o2"), new_key("o2")
    ledger.give(add_key(ledger, "o2", "o2", second))
    ledger.give(add_key(ledger, "o2", "o2", third))
    olga = ("olga", ledger.key("olga").kid)
    # Other commands of the root give no key.
    ledger.give(end_key(ledger, "root", "o2", third.kid), ledger.root)
    ledger.give(ledger.claims(UserDisable, "root", user_id="o2", reason="to ask them"), ledger.root)
    assert givers(origin(ledger, "o2", first)) == {olga}
    assert givers(origin(ledger, "o2", second)) == {olga, ("o2", first.kid)}
    both = (record_of(first), record_of(second))
    ledger.give(ledger.user_set("root", "o2", ["operator"], keys=both), ledger.root)
    assert givers(origin(ledger, "o2", first)) == givers(origin(ledger, "o2", second)) == set()
    assert givers(origin(ledger, "o2", third)) == {olga, ("o2", first.kid)}
    ledger.give(end_key(ledger, "otto", "o2", first.kid, compromised=True))
    assert counting(ledger, "o2") == {second.kid}
    assert reread(ledger).key_history("o2") == ledger.directory.key_history("o2")


def test_without_it_being_compromised_only_the_key_ends(ledger: InMemoryRegistry):
    first, second = new_key("sam"), new_key("sam")
    ledger.give(add_key(ledger, "sam", "sam", first))
    ledger.give(add_key(ledger, "sam", "sam", second), first)
    ledger.give(end_key(ledger, "sam", "sam", first.kid))
    assert counting(ledger, "sam") == {ledger.key("sam").kid, second.kid}
    # That it was compromised may be found out later.
    ledger.give(end_key(ledger, "sam", "sam", first.kid, compromised=True))
    assert counting(ledger, "sam") == {ledger.key("sam").kid}


def test_keys_that_a_stolen_key_had_add_each_other_end_with_it(ledger: InMemoryRegistry):
    """The attack: a thief adds a second key, by that a third, ends the second, and has the third add it again.

    Each of the two rests on the other then, and on the stolen key neither.
    """
    stolen = ledger.key("sam")
    second, third, fourth = (new_key("sam") for _ in range(3))
    ledger.give(add_key(ledger, "sam", "sam", second))
    ledger.give(add_key(ledger, "sam", "sam", third), second)
    ledger.give(end_key(ledger, "sam", "sam", second.kid), third)
    ledger.clock.ms += 1000
    ledger.give(add_key(ledger, "sam", "sam", second), third)
    ledger.give(add_key(ledger, "sam", "sam", fourth), second)
    assert counting(ledger, "sam") == {stolen.kid, second.kid, third.kid, fourth.kid}
    ledger.give(end_key(ledger, "olga", "sam", stolen.kid, compromised=True))
    assert counting(ledger, "sam") == set()
    assert reread(ledger).user("sam")


def test_all_branches_of_what_a_compromised_key_added_end(ledger: InMemoryRegistry):
    root, left, right, under_left, under_right = (new_key("sam") for _ in range(5))
    ledger.give(add_key(ledger, "sam", "sam", root))
    for key, by in ((left, root), (right, root), (under_left, left), (under_right, right)):
        ledger.give(add_key(ledger, "sam", "sam", key), by)
    ledger.give(end_key(ledger, "sam", "sam", root.kid, compromised=True))
    assert counting(ledger, "sam") == {ledger.key("sam").kid}


def test_a_first_key_was_added_by_no_other(ledger: InMemoryRegistry):
    """olga, an operator, made herself none of her keys: what she signed about others is not of her own keys."""
    ledger.give(add_key(ledger, "olga", "olga", new_key("olga")))
    history = ledger.directory.key_history("sam")
    assert history.added_by(ledger.key("olga").kid) == frozenset()
    assert history.added_by(ledger.key("sam").kid) == frozenset()


def test_a_key_that_is_added_again_rests_on_who_gave_it_before_too(ledger: InMemoryRegistry):
    """olga made a key in sam's name. It ends, and otto gives it back in good faith: olga still has it."""
    lent = new_key("sam")
    ledger.give(add_key(ledger, "olga", "sam", lent))
    ledger.give(end_key(ledger, "sam", "sam", lent.kid))
    ledger.clock.ms += 1000
    ledger.give(add_key(ledger, "otto", "sam", lent))
    again = origin(ledger, "sam", lent)
    assert again.by == "otto"
    assert again.vouchers == {"olga", "otto"}
    assert givers(again) == {("olga", ledger.key("olga").kid), ("otto", ledger.key("otto").kid)}
    assert again.counts_from_ms == again.added_ms + WAIT_MS
    history = ledger.directory.key_history("sam")
    assert (again.again, history.added_again_ms(lent.kid)) == (True, again.added_ms)
    assert history.added_again_ms(ledger.key("sam").kid) == history.added_again_ms("unknown") == 0


def test_a_compromised_key_never_comes_back(ledger: InMemoryRegistry):
    key = ledger.key("sam")
    ledger.give(end_key(ledger, "olga", "sam", key.kid, compromised=True))
    assert refused(ledger, ledger.user_set("olga", "sam", ["sponsor"])) == "key_compromised"
    assert refused(ledger, add_key(ledger, "olga", "sam", key)) == "key_compromised"
    ledger.give(ledger.user_set("olga", "sam", ["sponsor"], keys=()))
    assert refused(ledger, ledger.user_set("olga", "sam", ["sponsor"])) == "key_compromised"


def test_a_held_back_user_set_does_not_undo_the_end_of_a_key(ledger: InMemoryRegistry):
    before = ledger.user_set("olga", "sam", ["sponsor"])
    ledger.clock.ms += 5000
    ledger.give(end_key(ledger, "sam", "sam", ledger.key("sam").kid))
    assert refused(ledger, before) == "overtaken"
