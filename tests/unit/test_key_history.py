"""Since when a key of a person counts, and who vouches for it, for registry and readers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.messages.registry import (
    EmbeddedCommand,
)
from ringfence.model.lifecycle import (
    WAIT_S,
    CommandRefusedError,
    KeyOrigin,
    SignerKey,
    check_endorsement,
)
from ringfence.model.records.command_chain import ChainError
from ringfence.model.verdict import ALLOWED
from tests.support import user_keys
from tests.support.in_memory_registry import START_MS, InMemoryRegistry
from tests.support.key_histories import givers, origin, refused, reread, state
from tests.support.user_keys import add_key, end_key, new_key, new_passkey
from tests.support.verdicts import reason_of

WAIT_MS = WAIT_S * 1000


@pytest.fixture
def ledger() -> InMemoryRegistry:
    """olga and otto are operators, sam and suzy sponsors; oscar is a third operator."""
    ledger = InMemoryRegistry()
    ledger.organisation()
    ledger.give(ledger.user_set("olga", "oscar", ["operator"]))
    return ledger


# --- since when a key counts, and on whose word it rests --------------------------------------------------------------


def test_the_first_keys_of_a_person_count_at_once(ledger: InMemoryRegistry):
    ledger.give(ledger.user_set("olga", "petra", ["sponsor"], keys=()))
    passkey = new_passkey("petra")
    ledger.give(add_key(ledger, "olga", "petra", passkey))
    first = origin(ledger, "petra", passkey)
    assert (first.first, first.counts_from_ms, first.vouchers) == (True, first.added_ms, frozenset())
    assert origin(ledger, "sam", ledger.key("sam")).first


def test_a_key_that_an_operator_adds_later_waits(ledger: InMemoryRegistry):
    key, listed = new_key("sam"), new_key("sam")
    ledger.give(add_key(ledger, "olga", "sam", key))
    keys = (user_keys.record_of(listed), user_keys.record_of(key))
    ledger.give(ledger.user_set("otto", "sam", ["sponsor"], keys=keys))
    added, by_set = origin(ledger, "sam", key), origin(ledger, "sam", listed)
    assert (added.counts_from_ms, added.vouchers) == (added.added_ms + WAIT_MS, frozenset({"olga"}))
    assert (by_set.counts_from_ms, by_set.vouchers) == (by_set.added_ms + WAIT_MS, frozenset({"otto"}))


def test_all_keys_away_and_a_new_one_is_no_first_key(ledger: InMemoryRegistry):
    key = new_key("sam")
    ledger.give(ledger.user_set("olga", "sam", ["sponsor"], keys=()))
    ledger.give(ledger.user_set("olga", "sam", ["sponsor"], keys=(user_keys.record_of(key),)))
    assert origin(ledger, "sam", key).counts_from_ms == origin(ledger, "sam", key).added_ms + WAIT_MS
    # Nor the old one, which the operator may have found.
    old = ledger.key("sam")
    ledger.give(ledger.user_set("olga", "sam", ["sponsor"]))
    assert origin(ledger, "sam", old).counts_from_ms == origin(ledger, "sam", old).added_ms + WAIT_MS


def test_a_key_that_ended_in_this_very_second_has_ended(ledger: InMemoryRegistry):
    """An operator who ends a sponsor's key and gives back one that they found, within a second, waits as well."""
    key = ledger.key("sam")
    ledger.clock.ms = ledger.clock.ms // 1000 * 1000 + 100
    ended = end_key(ledger, "olga", "sam", key.kid)
    back = ledger.user_set("olga", "sam", ["sponsor"], jti="later")
    ledger.give(ended, passing_ms=300)
    ledger.give(back, passing_ms=300)
    again = origin(ledger, "sam", key)
    assert (again.by, again.counts_from_ms) == ("olga", again.added_ms + WAIT_MS)


@pytest.mark.parametrize("ends_in_s", [-10, 0])
def test_a_key_that_has_ended_is_no_first_key(ledger: InMemoryRegistry, ends_in_s: int):
    ended = new_key("petra").record(ledger.clock.ms // 1000 + ends_in_s)
    ledger.give(ledger.user_set("olga", "petra", ["sponsor"], keys=(ended,)))
    assert ledger.directory.key_history("petra").origins == {}
    key = new_key("petra")
    ledger.give(add_key(ledger, "olga", "petra", key))
    assert origin(ledger, "petra", key).first


def test_the_wait_is_a_day():
    assert WAIT_S == 86_400


def test_a_longer_life_of_a_key_is_no_new_key(ledger: InMemoryRegistry):
    key = ledger.key("sam")
    before = origin(ledger, "sam", key)
    keys = (key.record(START_MS // 1000 + 2 * user_keys.YEARS_S),)
    ledger.give(ledger.user_set("olga", "sam", ["sponsor"], keys=keys))
    assert origin(ledger, "sam", key) == before


def test_a_key_of_ones_own_adds_keys_that_count_as_it_does(ledger: InMemoryRegistry):
    own, lent, of_lent = (new_key("sam") for _ in range(3))
    ledger.give(add_key(ledger, "sam", "sam", own))
    assert origin(ledger, "sam", own).counts_from_ms == origin(ledger, "sam", own).added_ms
    ledger.give(add_key(ledger, "olga", "sam", lent))
    ledger.give(add_key(ledger, "sam", "sam", of_lent), lent)
    child = origin(ledger, "sam", of_lent)
    assert child.counts_from_ms == origin(ledger, "sam", lent).counts_from_ms
    assert child.vouchers == {"olga"}


def test_a_second_operator_lets_it_count_at_once(ledger: InMemoryRegistry):
    key = new_passkey("sam")
    ledger.give(add_key(ledger, "olga", "sam", key, cosigned="otto"))
    added = origin(ledger, "sam", key)
    assert (added.counts_from_ms, added.endorsed_by) == (added.added_ms, "otto")
    assert added.vouchers == {"olga", "otto"}
    assert givers(added) == {("olga", ledger.key("olga").kid), ("otto", ledger.key("otto").kid)}
    assert origin(ledger, "sam", ledger.key("sam")).endorsed_by is None


def test_the_root_and_an_operator_are_two(ledger: InMemoryRegistry):
    key = new_key("sam")
    command = add_key(
        ledger, "root", "sam", key, cosigned="otto", invitation=user_keys.invitation(ledger, "olga", "sam")
    )
    ledger.give(command, ledger.root)
    added = origin(ledger, "sam", key)
    assert added.counts_from_ms == added.added_ms
    assert added.vouchers == {"otto"}
    # The co-signer's key is looked at all the same.
    lent = new_key("otto")
    ledger.give(add_key(ledger, "oscar", "otto", lent))
    other = new_key("sam")
    invited = user_keys.invitation(ledger, "olga", "sam")
    possessed = user_keys.possession(ledger, other, "sam", invited)
    signed = user_keys.endorsement(ledger, "otto", "sam", other.kid, possessed, lent)
    command = add_key(
        ledger, "root", "sam", other, invitation=invited, possession=possessed, endorsement=signed
    )
    assert refused(ledger, command, ledger.root) == "possession_invalid"


def test_a_co_signature_counts_from_the_moment_from_which_its_key_does():
    def signer(user: str, counts_from_ms: int) -> SignerKey:
        kid = f"key of {user}"
        return SignerKey(
            user, kid, KeyOrigin(kid, 0, None, "root", first=False, counts_from_ms=counts_from_ms)
        )

    for late in ("olga", "otto"):
        olga, otto = (signer(name, 1000 if name == late else 0) for name in ("olga", "otto"))
        assert check_endorsement("sam", olga, otto, 1000) == ALLOWED
        verdict = check_endorsement("sam", olga, otto, 999)
        assert f"the key of {late} was added" in reason_of(verdict).message


def test_endorsement_by_an_unentitled_user_is_refused(ledger: InMemoryRegistry):
    for cosigned, by, user in (("olga", "olga", "sam"), ("suzy", "olga", "sam"), ("otto", "olga", "otto"),
                               ("mallory", "olga", "sam"), ("sam", "olga", "sam")):  # fmt: skip
        command = add_key(ledger, by, user, new_key(user), cosigned=cosigned)
        assert refused(ledger, command) == "possession_invalid", cosigned


def test_a_co_signature_is_under_this_key_and_this_possession(ledger: InMemoryRegistry):
    key, other = new_key("sam"), new_key("sam")
    invited = user_keys.invitation(ledger, "olga", "sam")
    possessed = user_keys.possession(ledger, key, "sam", invited)
    elsewhere = user_keys.possession(ledger, key, "sam", user_keys.invitation(ledger, "olga", "sam"))
    wrong = [
        user_keys.endorsement(ledger, "otto", "sam", other.kid, possessed),
        user_keys.endorsement(ledger, "otto", "suzy", key.kid, possessed),
        user_keys.endorsement(ledger, "otto", "sam", key.kid, elsewhere),
        user_keys.endorsement(
            ledger, "otto", "sam", key.kid, possessed, iat=START_MS // 1000 - 100, exp=START_MS // 1000
        ),
    ]
    for signed in wrong:
        command = add_key(
            ledger, "olga", "sam", key, invitation=invited, possession=possessed, endorsement=signed
        )
        assert refused(ledger, command) == "possession_invalid"


def test_an_operator_is_no_second_operator_by_a_key_that_they_lent(ledger: InMemoryRegistry):
    """olga gives otto a key that she has herself, and co-signs as otto, at once and later."""
    lent = new_key("otto")
    ledger.give(add_key(ledger, "olga", "otto", lent))
    for wait_ms in (0, WAIT_MS):
        ledger.clock.ms += wait_ms
        key = new_key("sam")
        invited = user_keys.invitation(ledger, "olga", "sam")
        possessed = user_keys.possession(ledger, key, "sam", invited)
        signed = user_keys.endorsement(ledger, "otto", "sam", key.kid, possessed, lent)
        command = add_key(
            ledger, "olga", "sam", key, invitation=invited, possession=possessed, endorsement=signed
        )
        assert refused(ledger, command) == "possession_invalid"
        # Nor the other way round: otto's lent key adds, olga co-signs.
        command = add_key(ledger, "otto", "sam", new_key("sam"), cosigned="olga")
        assert refused(ledger, command, lent) == "possession_invalid"
    # A third operator does not rest on her word.
    ledger.give(add_key(ledger, "otto", "sam", new_key("sam"), cosigned="oscar"), lent)


def test_a_co_signature_takes_two_keys_that_count(ledger: InMemoryRegistry):
    """oscar gave otto a key not long ago: whoever signs with it may be oscar."""
    lent = new_key("otto")
    ledger.give(add_key(ledger, "oscar", "otto", lent))
    for code in ("possession_invalid", None):
        key = new_key("sam")
        invited = user_keys.invitation(ledger, "olga", "sam")
        possessed = user_keys.possession(ledger, key, "sam", invited)
        signed = user_keys.endorsement(ledger, "otto", "sam", key.kid, possessed, lent)
        command = add_key(
            ledger, "olga", "sam", key, invitation=invited, possession=possessed, endorsement=signed
        )
        if code is None:
            ledger.give(command)
            assert origin(ledger, "sam", key).vouchers == {"olga", "otto", "oscar"}
        else:
            assert refused(ledger, command) == code
            assert (
                refused(ledger, add_key(ledger, "otto", "sam", new_key("sam"), cosigned="olga"), lent) == code
            )
            ledger.clock.ms += WAIT_MS


def test_vouchers_of_a_key_are_followed_to_their_own_keys(ledger: InMemoryRegistry):
    lent, key = new_key("otto"), new_key("sam")
    ledger.give(add_key(ledger, "olga", "otto", lent))
    ledger.give(add_key(ledger, "otto", "sam", key), lent)
    assert origin(ledger, "sam", key).vouchers == {"olga", "otto"}
    assert givers(origin(ledger, "sam", key)) == {("otto", lent.kid), ("olga", ledger.key("olga").kid)}


def test_the_root_is_somebody_else_too(ledger: InMemoryRegistry):
    key = new_key("olga")
    ledger.give(ledger.user_set("root", "olga", ["operator"], keys=(user_keys.record_of(key),)), ledger.root)
    added = origin(ledger, "olga", key)
    assert (added.by, added.counts_from_ms, added.vouchers) == (None, added.added_ms + WAIT_MS, frozenset())
    assert givers(added) == set()


# --- what readers make of it ------------------------------------------------------------------------------------------


def test_a_reader_comes_to_the_same_history_whatever_it_reads_first(ledger: InMemoryRegistry):
    lent, key, passkey = new_key("otto"), new_key("sam"), new_passkey("sam")
    ledger.give(add_key(ledger, "oscar", "otto", lent, cosigned="olga"))
    ledger.give(add_key(ledger, "otto", "sam", key), lent)
    ledger.give(add_key(ledger, "olga", "sam", passkey, cosigned="otto"))
    ledger.give(end_key(ledger, "sam", "sam", ledger.key("sam").kid))
    reader = reread(ledger)
    for user in ("sam", "otto", "olga"):
        assert reader.key_history(user) == ledger.directory.key_history(user)


def test_a_registry_cannot_use_an_invitation_twice_nor_leave_an_end_out(ledger: InMemoryRegistry):
    key, again = new_key("sam"), new_key("sam")
    invited = user_keys.invitation(ledger, "olga", "sam")
    ledger.give(add_key(ledger, "olga", "sam", key, invitation=invited))
    before = ledger.directory.user("sam")
    ledger.give(end_key(ledger, "sam", "sam", key.kid, compromised=True))
    entry = ledger.directory.user("sam")
    assert before is not None
    assert entry is not None
    left_out = ledger.sign_record(before.state, before.record.commands, entry.revision + 1)
    assert (ledger.admit(left_out) or "").startswith("history_changed")

    command = add_key(ledger, "olga", "sam", again, invitation=invited)
    embedded = EmbeddedCommand(jws=ledger.signed(command), appended_at_ms=ledger.clock.ms)
    keys = (user_keys.record_of(again), *entry.state.keys)
    forged = ledger.sign_record(
        entry.state.model_copy(update={"keys": keys}), (*entry.record.commands, embedded), entry.revision + 1
    )
    assert ledger.admit(forged) is None
    with pytest.raises(ChainError):
        ledger.directory.user("sam")


def test_a_registry_cannot_add_a_key_by_itself(ledger: InMemoryRegistry):
    entry = ledger.directory.user("sam")
    assert entry is not None
    keys = (user_keys.record_of(new_key("sam")), *entry.state.keys)
    forged = ledger.sign_record(
        entry.state.model_copy(update={"keys": keys}), entry.record.commands, entry.revision + 1
    )
    ledger.admit(forged)
    with pytest.raises(ChainError):
        ledger.directory.user("sam")


# --- whatever people do -----------------------------------------------------------------------------------------------

PEOPLE = ("olga", "otto", "oscar", "sam")


STEP = st.tuples(
    st.sampled_from(["add", "add", "add", "set", "end", "compromised", "wait"]),
    st.sampled_from(PEOPLE),
    st.integers(0, 9),
    st.sampled_from(PEOPLE),
    st.sampled_from([None, *PEOPLE]),
)


"""What happens, who signs, by which of their keys, to whom, and who co-signs with their first key."""


@given(st.lists(STEP, max_size=14))
@settings(max_examples=60, deadline=None)
def test_no_key_counts_without_two_people_or_a_day(steps: list[tuple[str, str, int, str, str | None]]):
    """Each step as the rules say it to a person: who had a hand in a key is everybody whose key was used for it.

    `holders` is who really has a key: whoever had it added, and whoever has a key that added it.
    """
    ledger = InMemoryRegistry()
    ledger.organisation()
    ledger.give(ledger.user_set("olga", "oscar", ["operator"]))
    keys = {name: [ledger.key(name)] for name in PEOPLE}
    holders = {ledger.key(name).kid: name for name in PEOPLE}
    co_signed: dict[str, set[str]] = {}
    for what, by, number, user, cosigner in steps:
        signer = keys[by][number % len(keys[by])]
        thief = holders[signer.kid]
        try:
            if what == "wait":
                ledger.clock.ms += WAIT_MS // 2
            elif what in ("end", "compromised"):
                kid = keys[user][number % len(keys[user])].kid
                ledger.give(
                    end_key(ledger, by, user, kid, compromised=True if what == "compromised" else None),
                    signer,
                )
            else:
                new = new_key(user)
                if what == "add":
                    invited = user_keys.invitation(ledger, by, user, signer)
                    ledger.give(add_key(ledger, by, user, new, invitation=invited, cosigned=cosigner), signer)
                    if cosigner:
                        co_signed[new.kid] = {thief, cosigner}
                else:
                    roles = list(state(ledger, user).roles)
                    current = [
                        key for key in state(ledger, user).keys if key.not_after > ledger.clock.ms // 1000
                    ]
                    given_keys = (user_keys.record_of(new), *current[:10])
                    ledger.give(ledger.user_set(by, user, roles, keys=given_keys), signer)
                keys[user].append(new)
                holders[new.kid] = thief  # who has it added may have made it
        except (CommandRefusedError, InvalidMessageError):
            continue
    reader = reread(ledger)
    for user in PEOPLE:
        history = reader.key_history(user)
        assert history == ledger.directory.key_history(user)
        for key in keys[user]:
            found = history.origins[key.kid]
            lent_by = holders[key.kid]
            if lent_by == user:
                continue
            # Whoever else may have the key waits a day, or two people who do not rest on each other agreed; and they
            # are known, so that they never count beside it.
            assert lent_by in found.vouchers
            at_once = found.counts_from_ms < found.added_ms + WAIT_MS
            assert not (at_once and found.endorsed_by is None and found.by != user)
            if found.endorsed_by is not None:
                assert len(co_signed[key.kid]) == 2
