"""Checks that only the registry makes when a command arrives, a row for each refusal."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import pytest

from ringfence.kernel.base.clock import LAST_MOMENT_S, utc_text
from ringfence.kernel.crypto.claims import LEEWAY_S
from ringfence.kernel.crypto.jws import MAX_JWS_BYTES, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.registry import (
    AgentDecommission,
    AgentRotateKey,
    AgentSetCeiling,
    AgentSuspend,
    AgentTransfer,
    BackendSettings,
    Command,
    TaskAssign,
    TaskConsent,
    TaskDelegate,
    TaskEnd,
    TaskState,
    UserDisable,
)
from ringfence.model.lifecycle import CommandRefusedError
from ringfence.registry.domain import (
    MAX_ENDS_BYTES,
    MAX_NARROWING_BYTES,
    MAX_PARTS,
    MAX_RECORD_BYTES,
    TASK_MAX_S,
    check_size,
    keys_of,
    only_reduces,
    task_is_longer,
    uses_consent,
)
from tests.support.in_memory_registry import InMemoryRegistry, permission
from tests.support.user_keys import add_key, end_key, invitation, new_passkey, possession, record_of

Make = Callable[[InMemoryRegistry], Any]
LONG = tuple(
    permission(*(f"env/{number:060}" for number in range(50)), verbs=(f"verb-{n}",)) for n in range(4)
)
"""A ceiling that takes more space than a command that only reduces may have."""


@pytest.fixture
def ledger() -> InMemoryRegistry:
    """sam sponsors bot, an active agent, and idle, which is suspended. uma and adam are users, gone is disabled."""
    ledger = InMemoryRegistry()
    ledger.organisation()
    ledger.give(ledger.target_set("olga", "staging"))
    for name in ("bot", "idle"):
        ledger.give(ledger.register("sam", name, "sam", ceiling=(permission("env/**"),)))
    ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="idle", reason="x"))
    ledger.give(ledger.user_set("olga", "gone"))
    ledger.give(ledger.claims(UserDisable, "olga", user_id="gone", reason="left"))
    return ledger


def consented(ledger: InMemoryRegistry, agent: str, user: str) -> TaskAssign:
    terms = ledger.terms(agent)
    return ledger.assign("sam", agent, terms=terms, on_behalf_of=user, consent=ledger.consent(user, terms))


def at_reserved_host(kind: str, **settings: str) -> Make:
    """A target at the address by which agents reach the gateway's own API."""
    backend = BackendSettings.model_validate({"kind": kind, **settings})
    delivery = "agent" if kind == "ssh" else "gateway"
    return lambda ledger: ledger.target_set("olga", "other", backend=backend, delivery=delivery)


def of_size(ledger: InMemoryRegistry, size: int) -> AgentSuspend:
    """A signed command of exactly so many bytes, or as few more as base64 allows."""
    padding = 0
    while True:
        claims = ledger.claims(
            AgentSuspend, "sam", agent_id="bot", reason="x", jti="j", padding="x" * padding
        )
        missing = size - len(ledger.signed(claims))
        if missing <= 0:
            return claims
        padding += max(1, missing * 3 // 4)


def after_a_change(ledger: InMemoryRegistry) -> Any:
    """A command with a consent to an earlier revision of the agent."""
    command = ledger.transfer("sam", "bot", "suzy")
    ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=()))
    return command


SAMS_PASSKEY, OTHER_PASSKEY, SUZYS_PASSKEY = (new_passkey(user) for user in ("sam", "sam", "suzy"))
SAMS_ID = record_of(SAMS_PASSKEY).credential_id


def claiming(ledger: InMemoryRegistry, user: str, passkey: Any) -> Any:
    """The command by which a user adds a passkey under the credential id of sam's."""
    key = record_of(passkey).model_copy(update={"credential_id": SAMS_ID})
    return add_key(ledger, user, user, passkey, key=key)


def after_sams_passkey(make: Make) -> Make:
    def with_passkey(ledger: InMemoryRegistry) -> Any:
        ledger.give(add_key(ledger, "sam", "sam", SAMS_PASSKEY))
        return make(ledger)

    return with_passkey


def sams_record_again(ledger: InMemoryRegistry) -> Any:
    """A command that leaves sam's keys as they are, and renames sam."""
    state = ledger.memory.user("sam")
    assert state is not None
    return ledger.user_set("olga", "sam", ["sponsor"], keys=state.keys, name="Samuel")


def after_suzy_took_the_id_of_an_ended_passkey(ledger: InMemoryRegistry, passing_ms: int = 1000) -> Any:
    ledger.give(end_key(ledger, "sam", "sam", SAMS_PASSKEY.kid), passing_ms=passing_ms)
    ledger.give(claiming(ledger, "suzy", SUZYS_PASSKEY), passing_ms=passing_ms)
    return sams_record_again(ledger)


def sams_passkey_comes_back(ledger: InMemoryRegistry) -> Any:
    after_suzy_took_the_id_of_an_ended_passkey(ledger)
    keys = (ledger.key_record(ledger.key("sam")), record_of(SAMS_PASSKEY))
    return ledger.user_set("olga", "sam", ["sponsor"], keys=keys)


def ending_at(at_s: int, ledger: InMemoryRegistry, kind: str) -> Any:
    """A command that gives a key with this end to a user or an agent."""
    key = ledger.key_record(ledger.key("new", kind)).model_copy(update={"not_after": at_s})
    if kind == "user":
        return ledger.user_set("olga", "new", keys=(key,))
    return ledger.claims(AgentRotateKey, "sam", agent_id="bot", key=key)


def after_a_compromise(make: Make) -> Make:
    """olga's key is compromised since before it made o2 an operator; o2 has not been ended yet."""

    def compromised(ledger: InMemoryRegistry) -> Any:
        since_ms = ledger.clock.ms
        ledger.give(ledger.user_set("olga", "o2", ["operator"]))
        kid = ledger.key("olga").kid
        ledger.give(end_key(ledger, "otto", "olga", kid, compromised=True, since_ms=since_ms))
        return make(ledger)

    return compromised


def ending_of_a_task(by: str) -> Make:
    """The end of a task that uma gave to sam's agent."""

    def make(ledger: InMemoryRegistry) -> Any:
        change = ledger.give(ledger.assign("uma", "bot"))
        assert change is not None
        assert isinstance(change.state, TaskState)
        return ledger.claims(TaskEnd, by, task_id=change.state.task_id, reason="done")

    return make


def signed_before_the_last_change(ledger: InMemoryRegistry, before_s: int = 1) -> Any:
    change_s = ledger.clock.ms // 1000
    ledger.give(ledger.user_set("olga", "uma", name="Uma U."))
    return ledger.user_set("olga", "uma", name="Uma V.", iat=change_s - before_s)


def with_the_possession_of_another_key(ledger: InMemoryRegistry) -> Any:
    new, other = new_passkey("sam"), new_passkey("sam")
    invited = invitation(ledger, "sam", "sam")
    return add_key(
        ledger, "sam", "sam", new, invitation=invited, possession=possession(ledger, other, "sam", invited)
    )


def after_use_of_the_consent(ledger: InMemoryRegistry) -> Any:
    first = consented(ledger, "bot", "uma")
    ledger.give(first)
    return first.model_copy(update={"jti": "again"})


def with_a_consent_that_was_used(ledger: InMemoryRegistry) -> Any:
    """A task that uma gives herself, which needs none."""
    first = consented(ledger, "bot", "uma")
    ledger.give(first)
    return ledger.assign("uma", "bot", terms=first.terms, consent=first.consent)


def with_a_consent_by_another_key(ledger: InMemoryRegistry) -> Any:
    """A task that uma gives herself, with a consent that does not verify, and has an unknown field."""
    terms = ledger.terms("bot")
    forged = sign(ledger.claims(TaskConsent, "uma", terms=terms, only_once=True), ledger.key("mallory"))
    return ledger.assign("uma", "bot", terms=terms, consent=forged)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda r: of_size(r, MAX_NARROWING_BYTES + 1), "too_large"),
        (after_sams_passkey(lambda r: claiming(r, "suzy", SUZYS_PASSKEY)), "credential_taken"),
        (after_sams_passkey(lambda r: claiming(r, "sam", OTHER_PASSKEY)), "credential_taken"),
        (after_sams_passkey(sams_passkey_comes_back), "credential_taken"),
        (lambda r: add_key(r, "sam", "sam", new_passkey("sam", rp_id="evil.example")), "rp_id_unexpected"),
        (lambda r: ending_at(LAST_MOMENT_S + 1, r, "user"), "key_invalid"),
        (lambda r: ending_at(LAST_MOMENT_S + 1, r, "agent"), "key_invalid"),
        (after_a_compromise(lambda r: r.user_set("o2", "o3", ["operator"])), "key_voucher_compromised"),
        (after_use_of_the_consent, "consent_used"),
        (ending_of_a_task("suzy"), "not_entitled"),
        (signed_before_the_last_change, "overtaken"),
        (with_the_possession_of_another_key, "possession_invalid"),
        (lambda r: r.register("sam", "new", "sam", keys=(r.key_record(r.key("bot", "agent")),)), "key_taken"),
        (
            lambda r: r.claims(
                AgentRotateKey, "sam", agent_id="bot", key=r.key_record(r.key("idle", "agent"))
            ),
            "key_taken",
        ),
        (lambda r: r.target_set("olga", "prod", keys=(r.key_record(r.key("sam")),)), "key_taken"),
        (lambda r: r.target_set("olga", "ringfence"), "name_reserved"),
        (at_reserved_host("jwt", url="https://RINGFENCE:8443"), "name_reserved"),
        (at_reserved_host("http", url="https://Ringfence"), "name_reserved"),
        (at_reserved_host("ssh", address="ringfence:22"), "name_reserved"),
        (lambda r: r.user_set("olga", "root"), "name_reserved"),
        (
            lambda r: r.target_set(
                "olga", "prod", backend=BackendSettings.model_validate({"kind": "jwt", "nonsense": 1})
            ),
            "target_settings_invalid",
        ),
        (after_a_change, "consent_stale"),
        (lambda r: r.claims(AgentTransfer, "sam", agent_id="bot", sponsor="suzy"), "consent_missing"),
        (lambda r: r.claims(AgentTransfer, "olga", agent_id="bot", sponsor="suzy"), "consent_missing"),
        (lambda r: consented(r, "nobody", "uma"), "unknown_agent"),
        (lambda r: consented(r, "idle", "uma"), "agent_suspended"),
        (
            lambda r: r.assign(
                "uma", "bot", terms=r.terms("bot", not_after=r.clock.ms // 1000 + TASK_MAX_S + 61)
            ),
            "task_too_long",
        ),
    ],
)
def test_a_command_is_refused_with_its_code_and_changes_nothing(
    ledger: InMemoryRegistry, make: Make, code: str
) -> None:
    command = make(ledger)
    before = {
        kind: [one.revision for one in ledger.directory.entries(kind)] for kind in ("agent", "target", "task")
    }
    with pytest.raises(CommandRefusedError) as refused:
        ledger.give(command)
    assert refused.value.code == code
    assert before == {
        kind: [one.revision for one in ledger.directory.entries(kind)] for kind in ("agent", "target", "task")
    }


@pytest.mark.parametrize(
    "make",
    [
        lambda r: of_size(r, MAX_NARROWING_BYTES),
        lambda r: r.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=LONG),
        lambda r: r.claims(AgentTransfer, "olga", agent_id="bot", sponsor="suzy", without_consent=True),
        lambda r: r.transfer("sam", "bot", "suzy"),
        lambda r: consented(r, "bot", "uma"),
        lambda r: r.target_set("olga", "prod", keys=(r.key_record(r.key("prod", "target")),)),
        lambda r: r.claims(AgentRotateKey, "sam", agent_id="bot", key=r.key_record(r.key("next", "agent"))),
        ending_of_a_task("sam"),
        lambda r: signed_before_the_last_change(r, 0),
        after_sams_passkey(sams_record_again),
        after_sams_passkey(after_suzy_took_the_id_of_an_ended_passkey),
        after_sams_passkey(lambda r: after_suzy_took_the_id_of_an_ended_passkey(r, passing_ms=0)),
        lambda r: ending_at(LAST_MOMENT_S, r, "user"),
        lambda r: ending_at(LAST_MOMENT_S, r, "agent"),
        lambda r: ends_of_keys(r, r.key("bot", "agent").kid),
        with_a_consent_that_was_used,
        with_a_consent_by_another_key,
        after_a_compromise(lambda r: r.claims(UserDisable, "o2", user_id="uma", reason="left")),
        after_a_compromise(lambda r: r.user_set("otto", "o3", ["operator"])),
    ],
)
def test_a_command_that_nothing_speaks_against_is_accepted(ledger: InMemoryRegistry, make: Make) -> None:
    change = ledger.give(make(ledger))
    assert change is not None
    assert change.commands


def refused(ledger: InMemoryRegistry, command: Any) -> str:
    with pytest.raises(CommandRefusedError) as caught:
        ledger.give(command)
    return str(caught.value)


@pytest.mark.parametrize(("by", "remedy"), [("olga", "without_consent"), ("sam", "consent-transfer bot")])
def test_a_refused_transfer_names_the_remedy_that_its_signer_has(
    ledger: InMemoryRegistry, by: str, remedy: str
) -> None:
    assert remedy in refused(ledger, ledger.claims(AgentTransfer, by, agent_id="bot", sponsor="suzy"))


def test_a_refused_task_names_the_latest_end(ledger: InMemoryRegistry) -> None:
    latest_s = ledger.clock.ms // 1000 + TASK_MAX_S
    terms = ledger.terms("bot", not_after=latest_s + LEEWAY_S + 1)
    assert f"which is {utc_text(latest_s)} " in refused(ledger, ledger.assign("uma", "bot", terms=terms))


def test_a_refused_key_names_what_is_wrong_with_its_proof(ledger: InMemoryRegistry) -> None:
    assert "it embeds no" not in refused(ledger, with_the_possession_of_another_key(ledger))


def test_a_key_ends_in_the_second_in_which_its_end_was_appended(ledger: InMemoryRegistry) -> None:
    ledger.clock.ms += 500
    ended_s = ledger.clock.ms // 1000
    change = ledger.give(end_key(ledger, "sam", "sam", ledger.key("sam").kid))
    assert change is not None
    ends = [key.not_after for key in getattr(change.state, "keys", ())]
    assert ends == [ended_s]
    assert type(ends[0]) is int


def test_a_record_drops_the_command_that_another_replaces(ledger: InMemoryRegistry) -> None:
    ceilings = ((permission("env/a"),), (permission("env/b"),))
    changes = [
        ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=ceiling))
        for ceiling in ceilings
    ]
    assert [(len(one.commands), one.revision) for one in changes if one] == [(2, 2), (2, 3)]


def test_limits_are_30_days_32_parts_8_kib_and_three_quarters_of_a_record() -> None:
    assert (TASK_MAX_S, MAX_PARTS) == (30 * 86_400, 32)
    assert (MAX_NARROWING_BYTES, MAX_RECORD_BYTES, MAX_JWS_BYTES) == (8 * 1024, 384 * 1024, 512 * 1024)
    assert isinstance(MAX_RECORD_BYTES, int)
    assert MAX_JWS_BYTES - MAX_ENDS_BYTES == 6 * MAX_NARROWING_BYTES


def test_a_command_for_what_is_already_so_changes_nothing(ledger: InMemoryRegistry) -> None:
    again = ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x")
    first = ledger.give(again)
    assert first is not None
    assert first.revision == 2
    assert ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x")) is None


def test_a_command_at_the_moment_of_the_last_is_accepted_and_one_before_is_not(
    ledger: InMemoryRegistry,
) -> None:
    last_ms = ledger.clock.ms
    ledger.give(ledger.user_set("olga", "first"), at_ms=last_ms, passing_ms=0)
    ledger.give(ledger.user_set("olga", "second"), at_ms=last_ms, passing_ms=0)
    with pytest.raises(CommandRefusedError) as refused:
        ledger.give(ledger.user_set("olga", "third"), at_ms=last_ms - 1)
    assert refused.value.code == "too_early"


def test_no_task_is_given_for_a_user_whose_record_does_not_verify(
    ledger: InMemoryRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger.memory, "user", lambda user_id: None)
    with pytest.raises(CommandRefusedError) as refused:
        ledger.give(consented(ledger, "bot", "uma"))
    assert refused.value.code == "user_disabled"


def test_a_task_of_an_agent_whose_record_does_not_verify_can_be_ended(
    ledger: InMemoryRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = ending_of_a_task("uma")(ledger)
    monkeypatch.setattr(ledger.memory, "agent", lambda agent_id: None)
    change = ledger.give(end)
    assert change is not None
    assert change.state.status == "ended"


@pytest.mark.parametrize("kind", ["user", "agent"])
def test_a_command_at_the_moment_of_a_change_of_its_signer_is_refused(
    ledger: InMemoryRegistry, kind: str
) -> None:
    change_ms = ledger.clock.ms
    if kind == "user":
        ledger.give(ledger.user_set("olga", "sam", ["sponsor"], name="Samuel"), at_ms=change_ms, passing_ms=0)
        command: Any = ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x")
    else:
        task = ledger.give(consented(ledger, "bot", "uma"))
        assert task is not None
        change_ms = ledger.clock.ms
        narrower = ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=(permission("env/staging"),))
        ledger.give(narrower, at_ms=change_ms, passing_ms=0)
        terms = ledger.terms("idle", scope=(permission("env/staging"),))
        command = ledger.claims(TaskDelegate, "sam", terms=terms, parent=getattr(task.state, "task_id", ""))
        command = command.model_copy(update={"iss": ledger.key("bot", "agent").id})
    with pytest.raises(CommandRefusedError) as refused:
        ledger.give(command, at_ms=change_ms)
    assert refused.value.code == "too_early"


# --- sizes, lengths and kinds ---


@pytest.mark.parametrize(
    ("make", "limit"),
    [
        (lambda r: r.claims(AgentSuspend, "sam", agent_id="bot", reason="x"), MAX_JWS_BYTES),
        (lambda r: ends_of_keys(r, "k"), MAX_ENDS_BYTES),
        (lambda r: r.register("sam", "new", "sam"), MAX_RECORD_BYTES),
    ],
    ids=["takes away", "ends keys", "grants"],
)
def test_a_record_has_room_left_for_commands_that_take_away(
    ledger: InMemoryRegistry, make: Make, limit: int
) -> None:
    check_size(make(ledger), limit)
    with pytest.raises(CommandRefusedError) as refused:
        check_size(make(ledger), limit + 1)
    assert refused.value.code == "record_too_large"
    assert MAX_RECORD_BYTES < MAX_ENDS_BYTES < MAX_JWS_BYTES


def ends_of_keys(ledger: InMemoryRegistry, *kids: str, reason: str = "stolen") -> AgentRotateKey:
    return ledger.claims(
        AgentRotateKey, "sam", agent_id="bot", replaces=kids, compromised=True, reason=reason
    )


def test_record_full_of_a_thiefs_keys_has_room_for_their_ends(ledger: InMemoryRegistry) -> None:
    """As many of the smallest keys as fit, none of which another replaced."""
    key = SigningKey.generate(ledger.key("bot", "agent").id, "EdDSA").record(ledger.clock.ms // 1000 + 3600)
    rotation = ledger.embed(
        ledger.claims(AgentRotateKey, "sam", agent_id="bot", key=key, overlap_s=1, replaces=(key.kid,))
    )
    bot = ledger.directory.agent("bot")
    assert bot is not None

    def record(keys: int, ended: int) -> str:
        kids = (key.kid,) * ended
        ends = [kids[at : at + 64] for at in range(0, ended, 64)]
        return ledger.sign_record(
            bot.state.model_copy(update={"keys": (key,) * keys, "replaced": kids, "compromised": kids}),
            [rotation] * keys + [ledger.embed(ends_of_keys(ledger, *one)) for one in ends],
        )

    most = bisect_left(range(1000), MAX_RECORD_BYTES, key=lambda keys: len(record(keys, 0)))
    assert most > 250
    check_size(ends_of_keys(ledger, key.kid), len(record(most, most)))
    longest = ends_of_keys(ledger, *(key.kid,) * 64, reason="x" * 2048)
    assert len(ledger.signed(longest)) < MAX_NARROWING_BYTES


def test_record_full_of_ends_of_keys_has_room_for_suspensions_and_end_of_the_agent(
    ledger: InMemoryRegistry,
) -> None:
    bot = ledger.directory.agent("bot")
    assert bot is not None
    longest = {"agent_id": "bot", "reason": "x" * 2048, "padding": "x" * 3500}
    before = len(bot.compact)
    for command in (
        ledger.claims(AgentSuspend, "sam", **longest),
        ledger.claims(AgentSuspend, "olga", **longest),
        ledger.claims(AgentDecommission, "olga", **longest),
    ):
        assert len(ledger.signed(command)) > MAX_NARROWING_BYTES * 9 // 10
        ledger.give(command)
    bot = ledger.directory.agent("bot")
    assert bot is not None
    assert MAX_ENDS_BYTES + len(bot.compact) - before < MAX_JWS_BYTES


@pytest.mark.parametrize(
    ("make", "reduces"),
    [
        (lambda r: r.claims(AgentSuspend, "sam", agent_id="bot", reason="x"), True),
        (
            lambda r: r.claims(TaskEnd, "sam", task_id="c1a5e6f0-1b2c-5d3e-8f40-e6f01b2c5d3e", reason="x"),
            True,
        ),
        (lambda r: r.claims(AgentRotateKey, "sam", agent_id="bot", compromised=True), True),
        (lambda r: r.claims(AgentRotateKey, "sam", agent_id="bot", key=record_of(r.key("sam"))), False),
        (lambda r: r.register("sam", "new", "sam"), False),
        (lambda r: r.assign("uma", "bot"), False),
        (lambda r: r.user_set("olga", "uma"), False),
        (lambda r: r.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=()), False),
    ],
)
def test_only_commands_that_can_widen_nothing_count_as_reducing(
    ledger: InMemoryRegistry, make: Make, reduces: bool
) -> None:
    command: Command = make(ledger)
    assert only_reduces(command) is reduces


@pytest.mark.parametrize(("over_s", "longer"), [(0, False), (LEEWAY_S, False), (LEEWAY_S + 1, True)])
def test_a_task_is_too_long_beyond_the_limit_and_the_leeway(over_s: int, longer: bool) -> None:
    assert task_is_longer(1000 + 500 + over_s, 1_000_000, 500) is longer


@pytest.mark.parametrize(
    ("fields", "signer", "used"),
    [
        ({"consent": "a.b.c"}, "sam", True),
        ({"id_token": "a.b.c"}, "sam", True),
        ({"consent": "a.b.c"}, "uma", False),
        ({}, "sam", False),
    ],
)
def test_a_consent_is_used_up_by_a_task_for_another_only(
    ledger: InMemoryRegistry, fields: dict[str, str], signer: str, used: bool
) -> None:
    command = ledger.assign("sam", "bot", on_behalf_of="uma").model_copy(update=fields)
    assert uses_consent(command, signer) is used


def test_the_keys_of_a_subject_are_all_that_its_record_names(ledger: InMemoryRegistry) -> None:
    user, agent, target = (
        ledger.directory.user("sam"), ledger.directory.agent("bot"), ledger.directory.target("staging"),
    )  # fmt: skip
    assert user
    assert agent
    assert target
    assert keys_of(user.state) == {ledger.key("sam").kid}
    assert keys_of(agent.state) == {ledger.key("bot", "agent").kid}
    assert keys_of(target.state) == frozenset()
    task = ledger.give(consented(ledger, "bot", "uma"))
    assert task is not None
    assert keys_of(task.state) == frozenset()
