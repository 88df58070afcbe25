"""New limits and refusals concern new commands only: records that were made before them stay valid for every reader."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ringfence.kernel.base.clock import LAST_MOMENT_S
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Claims
from ringfence.messages.codes import Code
from ringfence.messages.registry import BackendSettings, TargetRemove, TaskEnd, UserDisable
from ringfence.model.identity.spiffe_ids import SubjectKind, spiffe_id
from ringfence.model.records.directory import Directory
from ringfence.model.requests.facts import load_records, violations_of
from ringfence.registry import domain
from ringfence.registry.domain import TASK_MAX_S
from tests.support.in_memory_registry import TD, InMemoryRegistry
from tests.support.unknown_field_cases import NAME
from tests.support.user_keys import add_key, end_key, new_passkey
from tests.support.user_keys import record_of as key_record_of
from tests.unit import test_id_token_consent as id_tokens
from tests.unit.test_delegation import NARROW, ledger, made, part, refused  # noqa: F401 - a fixture

DAY_S = 86_400
YEAR_S = 365 * DAY_S
OF_0_1 = {
    "consent_used", "key_taken", "record_too_large", "too_early", "too_large", "too_many_parts", "unknown_agent",
    "user_disabled",
}  # fmt: skip
"""What the registry's own rules refused in 0.1.0."""
OF_A_NEW_FIELD = {
    "consent_stale", "rp_id_unexpected", "endorsement_not_apart", "revision_stale", "second_listed",
    "limit_beyond_ceiling",
}  # fmt: skip
"""About a field that commands of before do not have: no record of before can lack what it asks for."""
OF_A_MODE = {"second_missing", "second_not_entitled"}
"""Of a mode in the trust bundle, which has a beginning: commands of before are judged by none."""


@dataclass(frozen=True)
class Limit:
    """A limit that 0.1.0 did not have."""

    before: Callable[[InMemoryRegistry], tuple[SubjectKind, str]]
    """Makes a record that the limit would have prevented. Returns kind and id of its subject."""
    today: Callable[[InMemoryRegistry], Claims]
    """The same command, given today."""
    stop: Callable[[InMemoryRegistry, str], Claims]
    """A command that takes something away from that subject."""


def long_task(ledger: InMemoryRegistry) -> Any:  # noqa: F811
    terms = ledger.terms("bot", not_after=ledger.clock.ms // 1000 + YEAR_S)
    return ledger.assign("uma", "bot", terms=terms)


def long_task_of_before(ledger: InMemoryRegistry) -> tuple[SubjectKind, str]:  # noqa: F811
    ledger.task_max_s = 10 * YEAR_S
    task = made(ledger, long_task(ledger))
    ledger.task_max_s = TASK_MAX_S
    return "task", task


def misspelt(ledger: InMemoryRegistry) -> Any:  # noqa: F811
    backend = BackendSettings.model_validate({"kind": "jwt", "ulr": "https://shop.example"})
    return ledger.target_set("olga", "shop", backend=backend)


def not_understood(ledger: InMemoryRegistry) -> Any:  # noqa: F811
    return ledger.target_set("olga", "shop", **{NAME: "a limit"})


def with_reserved_name(ledger: InMemoryRegistry) -> Any:  # noqa: F811
    return ledger.target_set("olga", "ringfence")


def by_unverified_address(ledger: InMemoryRegistry) -> Any:  # noqa: F811
    terms = ledger.terms("bot")
    claims = id_tokens.claims_of(ledger, terms, sub="x", email="uma@acme.example")
    return id_tokens.assign(ledger, id_tokens.ISSUER.token(claims), terms)


def address_of_before(ledger: InMemoryRegistry) -> tuple[SubjectKind, str]:  # noqa: F811
    issuer = id_tokens.ISSUER.pinned("users").model_copy(
        update={"user_claim": "email", "user_suffix": "@acme.example", "emails_verified": True}
    )
    id_tokens.trusting(ledger, issuer)
    task = made(ledger, by_unverified_address(ledger))
    id_tokens.trusting(ledger, issuer.model_copy(update={"emails_verified": None}))
    return "task", task


def with_endless_key(ledger: InMemoryRegistry) -> Any:  # noqa: F811
    key = ledger.key_record(SigningKey.generate(spiffe_id(TD, "user", "ursula"))).model_copy(
        update={"not_after": LAST_MOMENT_S + 1}
    )
    return ledger.user_set("olga", "ursula", keys=(key,))


SAMS_PASSKEY = new_passkey("sam")


def with_credential_id_of_another(ledger: InMemoryRegistry) -> Any:  # noqa: F811
    passkey = new_passkey("suzy")
    key = key_record_of(passkey).model_copy(
        update={"credential_id": key_record_of(SAMS_PASSKEY).credential_id}
    )
    return add_key(ledger, "suzy", "suzy", passkey, key=key)


def credential_id_of_before(ledger: InMemoryRegistry) -> tuple[SubjectKind, str]:  # noqa: F811
    ledger.give(add_key(ledger, "sam", "sam", SAMS_PASSKEY))
    ledger.give_as_before(with_credential_id_of_another(ledger))
    return "user", "suzy"


def by_key_of_compromised_giver(ledger: InMemoryRegistry) -> Any:  # noqa: F811
    return ledger.user_set("o2", "ursula")


def key_of_compromised_giver_of_before(ledger: InMemoryRegistry) -> tuple[SubjectKind, str]:  # noqa: F811
    since_ms, kid = ledger.clock.ms, ledger.key("olga").kid
    ledger.give(ledger.user_set("olga", "o2", ["operator"]))
    ledger.give(end_key(ledger, "otto", "olga", kid, compromised=True, since_ms=since_ms))
    ledger.give_as_before(by_key_of_compromised_giver(ledger))
    return "user", "ursula"


def record_of(
    command: Callable[[InMemoryRegistry], Claims], kind: SubjectKind, id: str
) -> Callable[[InMemoryRegistry], tuple[SubjectKind, str]]:
    """A record as a registry wrote it that did not refuse this command yet."""

    def before(ledger: InMemoryRegistry) -> tuple[SubjectKind, str]:  # noqa: F811
        ledger.give_as_before(command(ledger))
        return kind, id

    return before


def end(ledger: InMemoryRegistry, task: str) -> Claims:  # noqa: F811
    return ledger.claims(TaskEnd, "uma", task_id=task, reason="done")


def remove(ledger: InMemoryRegistry, target: str) -> Claims:  # noqa: F811
    return ledger.claims(TargetRemove, "olga", target_id=target, reason="done")


def disable(ledger: InMemoryRegistry, user: str) -> Claims:  # noqa: F811
    return ledger.claims(UserDisable, "otto", user_id=user, reason="done")


LIMITS = {
    "task_too_long": Limit(long_task_of_before, long_task, end),
    "target_settings_invalid": Limit(record_of(misspelt, "target", "shop"), misspelt, remove),
    "name_reserved": Limit(record_of(with_reserved_name, "target", "ringfence"), with_reserved_name, remove),
    "unknown_field": Limit(record_of(not_understood, "target", "shop"), not_understood, remove),
    "key_invalid": Limit(record_of(with_endless_key, "user", "ursula"), with_endless_key, disable),
    "email_unverified": Limit(address_of_before, by_unverified_address, end),
    "credential_taken": Limit(credential_id_of_before, with_credential_id_of_another, disable),
    "key_voucher_compromised": Limit(
        key_of_compromised_giver_of_before, by_key_of_compromised_giver, disable
    ),
}


def test_no_limit_of_the_registry_is_left_out() -> None:
    codes = {Code[name] for name in re.findall(r"\bCode\.(\w+)", Path(domain.__file__).read_text())}
    assert codes == OF_0_1 | OF_A_NEW_FIELD | OF_A_MODE | LIMITS.keys(), (
        "prove for a new one that records of before stay valid"
    )


@pytest.mark.parametrize("code", LIMITS)
def test_a_record_of_before_stays_valid_and_can_be_ended(code: str, ledger: InMemoryRegistry) -> None:  # noqa: F811
    limit = LIMITS[code]
    kind, id = limit.before(ledger)
    entry = ledger.directory.entry(kind, id)
    assert entry is not None
    # A command of today with the same content is refused: the record is one that the limit would have prevented.
    assert refused(ledger, limit.today(ledger)) == code
    again = started_anew(ledger).entry(kind, id)
    assert again is not None
    assert (again.state, again.revision) == (entry.state, entry.revision)
    assert ledger.give(limit.stop(ledger, id)) is not None
    assert ledger.alarms == []


def test_a_long_task_of_before_is_worked_on_and_its_parts_are_too(ledger: InMemoryRegistry) -> None:  # noqa: F811
    ledger.task_max_s = 10 * YEAR_S
    task = made(ledger, long_task(ledger))
    not_after = ledger.clock.ms // 1000 + YEAR_S // 2
    handed_on = made(ledger, part(ledger, "bot", task, "second", not_after=not_after))
    ledger.task_max_s = TASK_MAX_S
    reader = started_anew(ledger)
    later_s = ledger.clock.ms // 1000 + 100 * DAY_S
    for agent, of in (("bot", task), ("second", handed_on)):
        records = load_records(reader, agent, of, "staging")
        assert violations_of(records, NARROW, later_s, 10 * YEAR_S) == ()
    # And no longer than they were to last.
    records = load_records(reader, "bot", task, "staging")
    assert violations_of(records, NARROW, later_s + YEAR_S, 10 * YEAR_S) != ()


def started_anew(ledger: InMemoryRegistry) -> Directory:  # noqa: F811
    """A reader that reads all records from the beginning."""
    reader = ledger.reader()
    for kind in ("user", "target", "agent", "task"):
        for entry in ledger.directory.entries(kind):
            assert ledger.admit(entry.compact.decode(), reader) is None
    return reader
