"""Orders of runs: who may order one, by which key, of what."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from pydantic import ValidationError

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.registry import (
    AgentSuspend,
    Delegation,
    GroupDelegation,
    ProvisionerSet,
    TaskEnd,
    UserDisable,
)
from ringfence.messages.run import Mount, RunOrder
from ringfence.model.lifecycle import subject_key
from ringfence.model.requests.run_orders import MAX_ORDER_BYTES, check_order, order_id_of, verified_order
from tests.support.in_memory_registry import InMemoryRegistry
from tests.support.run_place import WIDE, Place
from tests.support.runs import LIMITS
from tests.support.unknown_field_cases import planted
from tests.support.user_keys import add_key, end_key, new_key
from tests.support.verdicts import code_of


@pytest.fixture
def place() -> Place:
    return Place()


# --- who may order a run ----------------------------------------------------------------------------------------------


def ordered(place: Place, by: str = "uma", **fields: Any) -> RunOrder:
    given: dict[str, Any] = {
        "pool": "reviews", "agent_id": "bot", "task_id": place.task, "command": ("review",), "limits": LIMITS,
        "ttl_s": 600, **fields,
    }  # fmt: skip
    return place.ledger.claims(RunOrder, by, **given)


def against(
    place: Place, order: RunOrder, at_s: float | None = None, key: SigningKey | None = None
) -> str | None:
    kid = (key or place.ledger.key("uma")).kid
    return code_of(check_order(order, kid, place.ledger.directory, place.now_s if at_s is None else at_s))


def test_a_run_is_ordered_by_who_answers_for_its_task(place: Place) -> None:
    ledger = place.ledger
    terms = ledger.terms("bot", scope=(WIDE,))
    change = ledger.give(
        ledger.assign("suzy", "bot", terms=terms, on_behalf_of="uma", consent=ledger.consent("uma", terms))
    )
    assert change is not None
    task = subject_key(change.state)[1]
    for by, code in (
        ("uma", None), ("suzy", None), ("sam", None), ("adam", "not_entitled"), ("olga", "not_entitled"),
        ("nobody", "user_disabled"),
    ):  # fmt: skip
        assert against(place, ordered(place, by, task_id=task)) == code, by
    assert against(place, ordered(place, "suzy")) == "not_entitled", "it is of no task of hers"
    ledger.give(ledger.claims(UserDisable, "olga", user_id="uma", reason="x"))
    assert against(place, ordered(place)) == "user_disabled"


def test_an_order_of_what_cannot_run_starts_nothing(place: Place) -> None:
    ledger = place.ledger
    entry = ledger.directory.task(place.task)
    assert entry is not None
    end_s = entry.state.not_after
    assert (against(place, ordered(place), end_s - 1), against(place, ordered(place), end_s)) == (
        None,
        "task_ended",
    )
    assert against(place, ordered(place, task_id=str(uuid.uuid4()))) == "task_unknown"
    assert against(place, ordered(place, agent_id="nobody")) == "agent_unknown"
    assert against(place, ordered(place, agent_id="other")) == "task_other_agent"
    for limited in planted(ordered(place, mounts=(Mount(name="sources"),))):
        assert against(place, limited) == "unknown_field"
    ledger.give(ledger.claims(TaskEnd, "uma", task_id=place.task, reason="done"))
    assert against(place, ordered(place)) == "task_ended"
    ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x"))
    assert against(place, ordered(place)) == "agent_suspended"


def test_order_by_a_provisioner_agent_or_untrusted_user_is_refused(place: Place) -> None:
    """A provisioner signs like a user, and is none. What rests on a record that does not hold starts nothing."""
    ledger = place.ledger
    delegation = Delegation(source="hr", groups=(GroupDelegation(group="dev"),))
    key = ledger.key_record(ledger.key("scim"))
    ledger.give(
        ledger.claims(
            ProvisionerSet, "olga", provisioner_id="scim", name="S", keys=(key,), delegation=delegation
        )
    )
    assert against(place, ordered(place, "scim")) == "user_disabled"
    assert against(place, ordered(place, iss=ledger.key("bot", "agent").id)) == "user_disabled"
    entry = ledger.directory.agent("bot")
    assert entry is not None
    forged = ledger.sign_record(entry.state, (*entry.record.commands, ledger.embed(_by_stranger(ledger))), 9)
    assert ledger.admit(forged) is None
    assert against(place, ordered(place)) == "record_untrusted"


def test_order_by_key_that_rests_on_compromised_key_starts_nothing(place: Place) -> None:
    ledger = place.ledger
    since_ms, thief = ledger.clock.ms, new_key("uma")
    ledger.give(add_key(ledger, "olga", "uma", thief))
    assert against(place, ordered(place), key=thief) is None
    kid = ledger.key("olga").kid
    ledger.give(end_key(ledger, "otto", "olga", kid, compromised=True, since_ms=since_ms))
    assert against(place, ordered(place), key=thief) == "key_voucher_compromised"
    assert against(place, ordered(place)) is None


def test_order_by_key_that_is_compromised_since_before_starts_nothing(place: Place) -> None:
    """An order that waits for a free place, or its task's time, while its key is ended."""
    ledger = place.ledger
    at_s = ledger.clock.ms / 1000
    thief = ledger.key("uma")
    ledger.give(add_key(ledger, "olga", "uma", new_key("uma")))
    ledger.give(end_key(ledger, "olga", "uma", thief.kid, compromised=True, since_ms=int(at_s * 1000)))
    assert against(place, ordered(place), at_s, thief) == "key_compromised"
    assert against(place, ordered(place), at_s - 1, thief) is None, "ordered before it was in other hands"


def _by_stranger(ledger: InMemoryRegistry) -> AgentSuspend:
    return ledger.claims(AgentSuspend, "stranger", agent_id="bot", reason="x")


def test_an_order_is_verified_as_of_its_append_time(place: Place) -> None:
    ledger, order = place.ledger, ordered(place)
    assert MAX_ORDER_BYTES == 192 * 1024
    compact, at_ms = ledger.signed(order), ledger.clock.ms
    assert verified_order(compact, ledger.directory, at_ms).claims == order
    assert order_id_of(order) == message_id(order.iss, order.jti)
    thief, agent = SigningKey.generate(order.iss), ledger.key("bot", "agent")
    for forged, late_ms, code in (
        (sign(order, thief), 0, "key_unknown"),
        (sign(order.model_copy(update={"iss": agent.id}), agent), 0, "key_unknown"),
        (compact, 600_000, "expired"),
        ("x" * (MAX_ORDER_BYTES + 1), 0, "too_large"),
        ("x" * MAX_ORDER_BYTES, 0, "not_a_jws"),
        (compact[:-8] + "AAAAAAAA", 0, "signature_invalid"),
    ):
        with pytest.raises(InvalidMessageError) as refused:
            verified_order(forged, ledger.directory, at_ms + late_ms)
        assert refused.value.code == code


def test_an_order_counts_by_a_key_in_its_time_and_a_record_that_holds(place: Place) -> None:
    ledger = place.ledger
    end_s = place.now_s + 60
    ledger.give(ledger.user_set("olga", "uma", keys=(ledger.key("uma").record(end_s),)))
    order = ordered(place)
    compact = ledger.signed(order)
    assert verified_order(compact, ledger.directory, end_s * 1000 - 1).claims == order
    with pytest.raises(InvalidMessageError) as refused:
        verified_order(compact, ledger.directory, end_s * 1000)
    assert refused.value.code == "key_unknown"
    entry = ledger.directory.user("uma")
    assert entry is not None
    commands = (*entry.record.commands, ledger.embed(ledger.user_set("sam", "uma")))
    assert ledger.admit(ledger.sign_record(entry.state, commands, 9)) is None
    with pytest.raises(InvalidMessageError, match="only an operator") as refused:
        verified_order(compact, ledger.directory, ledger.clock.ms)
    assert refused.value.code == "chain_broken"


def test_an_order_names_no_path_of_a_host_and_no_command_of_nothing(place: Place) -> None:
    wrong: tuple[dict[str, Any], ...] = (
        {"command": ()}, {"command": ("a\0b",)}, {"image": "reviewer:latest"}, {"ttl_s": 0}, {"ttl_s": 86_401},
        {"pool": "../x"},
    )  # fmt: skip
    for fields in wrong:
        with pytest.raises(ValidationError):
            ordered(place, **fields)
    for name in ("/etc", "../etc", "a/b", "~"):
        with pytest.raises(ValidationError):
            Mount(name=name)
