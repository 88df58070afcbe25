"""Runs: what their runners say of them, whom their instances may act for, and that nobody else has a say in it."""

from __future__ import annotations

import json
import uuid
from functools import partial
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from starlette.applications import Starlette

from ringfence.cli.shared.attestation import parse_selectors, show_selector
from ringfence.client.admin.trust_setup import CeremonyError, TrustFolder, make_trust, set_oidc_issuer
from ringfence.gateway.domain import Sender
from ringfence.gateway.state.leases import ENDED_KEPT_MS, REVOCATIONS_KEPT_MS
from ringfence.issuer.http import IssuerHttp
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import derived_id, digest
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Message
from ringfence.messages.enrolment import (
    AttestationSelector,
    ClaimName,
    ClaimPattern,
    InstanceEnrolment,
    RunRef,
)
from ringfence.messages.lease import Lease
from ringfence.messages.registry import (
    AgentSetAttestation,
    TaskDelegate,
)
from ringfence.messages.run import Run, RunLimits, RunStatus
from ringfence.messages.topics import RUN
from ringfence.messages.trust import IssuerUrl, OidcIssuer, OidcKey
from ringfence.model.identity.attestation import problem, selector_id
from ringfence.model.identity.runners import runner_issuer, runner_name, runner_selector
from ringfence.model.lifecycle import CommandRefusedError
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.instances import EnrolmentError, open_enrolment, ref_of
from ringfence.model.records.runs import KEPT_MS, RunTable, run_id_of, run_violations
from ringfence.model.unknown_fields import is_understood
from ringfence.model.verdict import ALLOWED
from tests.support.in_memory_registry import TD
from tests.support.run_place import WIDE, Place
from tests.support.runs import LIFE_S, OneRun, claims_of
from tests.support.unknown_field_cases import NAME, planted
from tests.support.verdicts import code_of

STATUSES: tuple[RunStatus, ...] = ("claimed", "started", "ended", "lost")


@pytest.fixture
def place() -> Place:
    return Place()


@pytest.fixture
def started(place: Place) -> Place:
    place.run.go("claimed", "started")
    return place


FORWARD = {
    ("claimed", "started"), ("claimed", "ended"), ("claimed", "lost"), ("started", "ended"), ("started", "lost"),
}  # fmt: skip


# --- the table --------------------------------------------------------------------------------------------------------


def told(place: Place, *said: Run) -> Run | None:
    """What a table knows of the run after these records of it."""
    table = RunTable(place.ledger.trust)
    for one in said:
        table.on_records([place.runners.record(one)])
    return table.get(place.run.id)


@pytest.mark.parametrize("first", STATUSES)
@pytest.mark.parametrize("second", STATUSES)
def test_a_run_goes_forward_and_never_back(place: Place, first: RunStatus, second: RunStatus) -> None:
    run = place.run
    known = told(place, run.said(first), run.said(second))
    assert known is not None
    assert known.status == (second if (first, second) in FORWARD else first)


def test_the_id_of_a_run_follows_from_its_order_or_its_runner() -> None:
    order_id = str(uuid.uuid4())
    assert (
        run_id_of("a", order_id=order_id) == derived_id("run", order_id) == run_id_of("b", order_id=order_id)
    )
    assert run_id_of("a", nonce="n") == derived_id("run", "a", "n") != run_id_of("b", nonce="n")


def test_the_table_says_which_records_counted_and_tells_of_those_alone(place: Place) -> None:
    table, run, heard = RunTable(place.ledger.trust), place.run, list[Run]()
    table.on_change(heard.append)
    said: tuple[tuple[int, RunStatus], ...] = ((0, "claimed"), (7, "started"), (9, "claimed"))
    claimed, started, again = (
        place.runners.record(run.said(status))._replace(offset=offset, partition=2) for offset, status in said
    )
    assert table.counted(run.id, 2, 0) is None, "it is not read yet"
    table.on_records([claimed])
    assert table.counted(run.id, 2, 0) is True
    assert table.counted(run.id, 2, 1) is None
    assert table.counted(run.id, 1, 0) is None
    table.on_records([started, again])
    assert [table.counted(run.id, 2, offset) for offset in (0, 7, 8, 9, 10)] == [
        True,
        True,
        False,
        False,
        None,
    ]
    assert table.counted(str(uuid.uuid4()), 2, 7) is False
    assert heard == [run.said("claimed"), run.said("started")]


def test_the_run_of_an_instance_is_found_by_it_alone(started: Place) -> None:
    runs, instance = started.ledger.directory.runs, started.leased().instance
    assert instance is not None
    assert runs.of(instance) == started.run.said("started")
    assert runs.of(instance.model_copy(update={"run": None})) is None
    assert runs.of(None) is None


def test_claimed_fields_of_a_run_cannot_change(place: Place) -> None:
    run = place.run
    first = run.said("claimed")
    changes: dict[str, Any] = {
        "agent_id": "other", "task_id": place.second, "deadline": run.deadline_s + 3600, "backend": "none",
        "limits": RunLimits(memory_bytes=2**40, cpu_millis=1, pids=1), "policy_digest": "0" * 64,
        "image_digest": f"sha256:{'0' * 64}",
    }  # fmt: skip
    for name, value in changes.items():
        assert told(place, first, run.said("started", **{name: value})) == first, name
    started = run.said("started")
    stolen = run.said("ended", key_thumbprint=SigningKey.generate("spiffe://x/agent/y").kid)
    assert told(place, first, started, stolen) == started


def test_run_record_of_another_signer_is_ignored(place: Place) -> None:
    run, runners = place.run, place.runners
    other = runners.keys["runner-2"]
    run.go("claimed", "started")
    forged = (
        runners.record(run.said("ended"), other),  # with the runner's name, and another's key
        runners.record(run.said("ended", iss=other.id), other),  # another runner, about a run of the first
        runners.record(run.said("ended", iss=place.ledger.registry.id), place.ledger.registry),
        runners.record(run.said("ended"), SigningKey.generate(run.by.id)),
        runners.record(run.said("ended", aud="other.example")),
        runners.record(run.said("ended"), key=str(uuid.uuid4())),
        runners.record(run.said("ended", run_id=str(uuid.uuid4()))),
        place.ledger.received(RUN, run.id, b""),
        place.ledger.received(RUN, run.id, b"x"),
    )
    for record in forged:
        place.ledger.directory.on_records([record])
        assert place.ledger.directory.runs.get(run.id) == run.said("started"), record.value
        assert record.key == run.id or place.ledger.directory.runs.get(record.key or "") is None
        assert place.ledger.directory.runs.counted(run.id, record.partition, record.offset) is False
    for record, code in (
        (forged[5], "key_unexpected"),
        (forged[6], "run_id_unexpected"),
        (forged[0], "key_unknown"),
    ):
        with pytest.raises(InvalidMessageError) as refused:
            place.ledger.directory.runs.verified(record)
        assert refused.value.code == code
    run.go("ended")
    assert place.ledger.directory.runs.get(run.id) == run.said("ended")


def test_an_ordered_run_is_of_who_claimed_it_first(place: Place) -> None:
    order_id = str(uuid.uuid4())
    of_order: dict[str, Any] = {
        "nonce": None,
        "order_id": order_id,
        "run_id": run_id_of("", order_id=order_id),
    }
    first = place.run.said("claimed", **of_order)
    second = OneRun(place.runners, "bot", place.task, runner="runner-2").said("started", **of_order)
    table = RunTable(place.ledger.trust)
    table.on_records([place.runners.record(first), place.runners.record(second)])
    assert table.get(first.run_id) == first


def test_a_run_has_one_origin_and_once_started_a_key(place: Place) -> None:
    for wrong in ({"order_id": str(uuid.uuid4())}, {"nonce": None}, {"key_thumbprint": None}):
        with pytest.raises(ValidationError):
            place.run.said("started", **wrong)


def test_a_runner_that_the_next_bundle_brings_is_believed_from_its_first_record_on(place: Place) -> None:
    late = SigningKey.generate(f"spiffe://{TD}/service/runner-3")
    record = place.runners.record(
        place.run.said("started", iss=late.id, run_id=run_id_of(late.id, nonce="n1")), late
    )
    table = RunTable(place.ledger.trust)
    table.on_records([record])
    assert table.get(run_id_of(late.id, nonce="n1")) is None
    place.runners.keys["runner-3"] = late
    place.runners.trust(version=3)
    table.on_records([])
    assert table.get(run_id_of(late.id, nonce="n1")) is not None


def test_a_directory_looks_again_at_runs_when_the_next_bundle_comes(place: Place) -> None:
    late = SigningKey.generate(f"spiffe://{TD}/service/runner-3")
    run_id = run_id_of(late.id, nonce="n1")
    directory = place.ledger.directory
    directory.on_records([place.runners.record(place.run.said("started", iss=late.id, run_id=run_id), late)])
    place.runners.keys["runner-3"] = late
    place.runners.trust(version=3)
    directory.on_records([])
    assert directory.runs.get(run_id) is not None


def test_run_record_signed_by_an_ended_key_is_ignored(place: Place) -> None:
    place.run.go("claimed", "started")
    place.runners.trust(version=3, runner_1=place.now_s)
    place.run.go("ended")
    known = place.ledger.directory.runs.get(place.run.id)
    assert known is not None
    assert known.status == "started", "it was said while the key counted"


def test_run_whose_deadline_is_later_than_a_day_is_refused(place: Place) -> None:
    appended_s = place.ledger.clock.ms // 1000
    for later_s, there in ((86_400 + 61, False), (2**53 - 1 - appended_s, False), (86_400, True)):
        place.runners.tell(place.run.said("claimed", deadline=appended_s + later_s))
        assert (place.ledger.directory.runs.get(place.run.id) is not None) == there


def test_runs_of_one_runner_beyond_limit_are_refused_until_others_end(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringfence.model.records.runs.MAX_RUNS", 2)
    table = place.ledger.directory.runs
    runs = [OneRun(place.runners, "bot", place.task, nonce=f"many-{n}") for n in range(4)]
    for run in runs[:3]:
        run.go("claimed", "started")
    assert [table.get(run.id) is not None for run in runs[:3]] == [True, True, False]
    other = OneRun(place.runners, "bot", place.task, nonce="other", runner="runner-2")
    other.go("claimed")
    assert table.get(other.id) is not None, "of another runner"
    runs[0].go("ended")
    runs[2].go("claimed")
    assert table.get(runs[2].id) is not None
    place.ledger.clock.ms += (LIFE_S + 1) * 1000  # past the deadlines of both
    OneRun(place.runners, "bot", place.task, nonce="later").go("claimed")
    assert table.get(run_id_of(place.run.by.id, nonce="later")) is not None


def test_runs_of_long_ago_are_forgotten(place: Place) -> None:
    table, run = RunTable(place.ledger.trust), place.run
    table.on_records([place.runners.record(run.said("ended"))])
    other = OneRun(place.runners, "bot", place.task, nonce="n2")
    assert KEPT_MS == 8 * 86_400_000, "longer than an order for one is on Kafka"
    # At the last moment it is there; it is looked for once an hour.
    kept_until_ms = run.deadline_s * 1000 + KEPT_MS
    for at_ms, there in (
        (kept_until_ms, True),
        (kept_until_ms + 3_599_999, True),
        (kept_until_ms + 3_600_000, False),
    ):
        table.on_records([place.runners.record(other.said("claimed"))._replace(appended_at_ms=at_ms)])
        assert (table.get(run.id) is not None) == there, at_ms
        assert run_violations(
            place.leased().instance,
            table.get(run.id),
            agent_id="bot",
            task_id=place.task,
            kid=None,
            now_s=place.now_s,
        )


# --- the enrolment ----------------------------------------------------------------------------------------------------


def opens(place: Place, enrolment: str, at_s: int | None = None) -> str | None:
    """The code of why an enrolment does not hold, or None."""
    try:
        open_enrolment(enrolment, place.ledger.trust, place.now_s if at_s is None else at_s)
    except EnrolmentError as error:
        return error.code
    return None


def test_a_runner_enrols_the_key_that_was_made_inside(place: Place) -> None:
    run = place.run
    found = open_enrolment(run.enrolment(place.selector), place.ledger.trust, place.now_s)
    assert (found.run, found.key.kid, found.sub) == (run.ref, run.key.kid, run.key.id)
    assert ref_of(found).run == run.ref
    said = claims_of(run.token())
    assert said["aud"] == f"spiffe://{TD}/enrol/{run.key.kid}"
    assert said["exp"] <= run.deadline_s
    assert (said["run_id"], said["task_id"]) == (run.id, place.task)


def test_a_registry_that_lies_makes_no_other_instance_of_a_run(place: Place) -> None:
    run, selector = place.run, place.selector
    thief = SigningKey.generate(run.key.id)
    lies: dict[str, dict[str, Any]] = {
        "another task": {"run": RunRef(run_id=run.id, task_id=place.second)},
        "another run": {"run": RunRef(run_id=str(uuid.uuid4()), task_id=place.task)},
        "no run": {"run": None},
        "another agent": {"sub": f"spiffe://{TD}/agent/other"},
        "longer": {"key": run.key.record(run.deadline_s + 1, run.now_s - 60)},
        "another key": {"key": thief.record(run.deadline_s, run.now_s - 60)},
        "not bound": {"key_bound": False},
    }
    for what, lie in lies.items():
        assert opens(place, run.enrolment(selector, **lie)) == "enrolment_invalid", what
    honest = run.enrolment(selector)
    bare = parse(honest).unverified_claims(InstanceEnrolment).model_copy(update={"token": None})
    assert opens(place, sign(bare, place.ledger.registry)) == "enrolment_invalid"
    assert opens(place, honest) is None


def test_a_token_is_for_one_agent_run_task_and_key(place: Place) -> None:
    run, selector = place.run, place.selector
    wrong: dict[str, dict[str, Any]] = {
        "agent": {"agent_id": "other"},
        "task": {"run": RunRef(run_id=run.id, task_id=place.second)},
        "run": {"run": RunRef(run_id=str(uuid.uuid4()), task_id=place.task)},
        "key": {"kid": SigningKey.generate(run.key.id).kid},
        "ended": {"deadline_s": run.now_s - 3600, "now_s": run.now_s - 3601},
    }
    for what, fields in wrong.items():
        token = run.token(**fields)
        assert opens(place, run.enrolment(selector, token)) == "enrolment_invalid", what


def test_no_other_runner_and_no_other_service_enrols_for_a_runner(place: Place) -> None:
    run, selector = place.run, place.selector
    mine = OneRun(place.runners, "bot", place.task, runner="runner-2")
    mine.key = run.key
    token = mine.token()
    assert opens(place, run.enrolment(selector, token)) == "enrolment_invalid"
    assert (
        opens(place, mine.enrolment(selector, token, issuer=runner_issuer(TD, "runner-1")))
        == "enrolment_invalid"
    )
    registry = place.ledger.registry
    run.by = registry
    assert opens(place, run.enrolment(selector, issuer=runner_issuer(TD, "registry"))) == "issuer_untrusted"
    with pytest.raises(ValueError, match="no runner"):
        mine.by = run.key
        mine.token()


def test_a_runners_key_that_has_ended_enrols_nobody_whenever_it_signed(place: Place) -> None:
    """As of the append time of what the instance signs: what came before stays what it was."""
    enrolment, before_s = place.run.enrolment(place.selector), place.now_s
    place.runners.trust(version=3, runner_1=before_s + 10)
    assert opens(place, enrolment, before_s + 9) is None
    assert opens(place, enrolment, before_s + 10) == "issuer_untrusted"


def test_an_issuer_that_is_no_runner_names_no_run(place: Place) -> None:
    ledger, run = place.ledger, place.run
    issuer = "https://platform.acme.example"
    bundle = parse(ledger.trust.compact).unverified_claims(type(ledger.trust.require()))
    bundle = bundle.model_copy(
        update={
            "version": 3,
            "oidc_issuers": (OidcIssuer(issuer=issuer, uses=("instances",), discovery=True),),
        }
    )
    ledger.trust.load(sign(bundle, ledger.root, header_jwk=True), place.now_s)
    assert opens(place, run.enrolment(place.selector, issuer=issuer, token=None, run=None)) is None
    assert opens(place, run.enrolment(place.selector, issuer=issuer, token=None)) == "enrolment_invalid"


def test_a_run_in_an_enrolment_with_an_unknown_field_is_none(place: Place) -> None:
    for limited in planted(place.run.ref):
        assert opens(place, place.run.enrolment(place.selector, run=limited)) == "run_not_understood"


# --- the selector -----------------------------------------------------------------------------------------------------


def test_the_id_of_a_selector_is_the_digest_of_its_set_members() -> None:
    plain = AttestationSelector(issuer="https://x.example", claims={"sub": "a"})
    assert selector_id(plain) == "694bf4b1a595e9d3650cb789456b9d3d498fc8f299bff0fddbbb4341e6dedb7f"
    assert selector_id(plain) != selector_id(plain.model_copy(update={"runner": "r"}))


def test_a_selector_for_runs_is_written_by_the_runners_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE_TRUST_DOMAIN", "acme.example")
    (found,) = parse_selectors(["runner=runner-1 life=30m"], "bot")
    assert found == runner_selector("acme.example", "runner-1", "bot", max_life_s=1800)
    assert show_selector(found) == "runner=runner-1 sub=spiffe://acme.example/agent/bot life=1800s"
    assert parse_selectors([show_selector(found)]) == (found,)
    assert problem(found) is None


class EarlierSelector(Message):
    """A selector as a version reads it that knows of no runners."""

    issuer: IssuerUrl
    claims: dict[ClaimName, ClaimPattern]
    key_bound: bool = False
    max_life_s: int = 3600


def test_a_reader_of_before_lets_no_runs_in_and_knows_the_selector_of_their_leases() -> None:
    selector = runner_selector(TD, "runner-1", "bot")
    earlier = EarlierSelector.model_validate_json(selector.model_dump_json())
    assert not is_understood(earlier)
    fields = json.dumps(
        earlier.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    assert digest(fields) == selector_id(selector)


def test_a_selector_for_runs_lets_no_other_in(place: Place) -> None:
    good = runner_selector(TD, "runner-1", "bot")
    for changed in (
        {"key_bound": False},
        {"claims": {"task_id": place.task}},
        {"issuer": "https://token.actions.githubusercontent.com"},
        {"runner": "runner-2"},
    ):
        selector = good.model_copy(update=changed)
        with pytest.raises(CommandRefusedError) as refused:
            place.runners.admits("bot", **changed)
        assert refused.value.code == "selector_too_wide", selector


@pytest.mark.parametrize("runner", [None, "runner-2"])
def test_an_agent_that_names_no_such_runner_has_no_such_runs(started: Place, runner: str | None) -> None:
    compact, lease = started.request(), started.leased()
    assert (started.policy(compact), started.gateway(lease), started.revoker(lease)) == ([], [], None)
    if runner:
        started.runners.admits("bot", runner)
    else:
        plain = AttestationSelector(issuer="https://x.example", claims={"sub": "a"})
        started.ledger.give(
            started.ledger.claims(AgentSetAttestation, "sam", agent_id="bot", attestation=(plain,))
        )
    assert started.policy(compact) == ["instance_void"]
    assert started.issuer(compact) == (["instance_void"], True)
    assert started.gateway(lease) == ["instance_void"]
    assert started.revoker(lease) == "scope_narrowed"


def test_the_name_of_a_runner_is_no_issuers(tmp_path: Any) -> None:
    folder = TrustFolder(tmp_path)
    make_trust(folder, TD, "olga")
    key = OidcKey(kid="k", kty="OKP", alg="EdDSA", crv="Ed25519", x="x" * 43)
    with pytest.raises(CeremonyError, match="name of a runner"):
        set_oidc_issuer(folder, OidcIssuer(issuer=runner_issuer(TD, "r"), uses=("instances",), keys=(key,)))
    for issuer, name in (
        (runner_issuer(TD, "r"), "r"), (runner_issuer("other.example", "r"), None), (f"https://{TD}/runner/r/x", None),
        (f"http://{TD}/runner/r", None),
    ):  # fmt: skip
        assert runner_name(TD, issuer) == name


# --- whom the instance of a run may act for: policy, issuer, gateway and revoker, each by itself ----------------------


def test_the_instance_of_a_run_that_has_started_acts_within_its_task(started: Place) -> None:
    compact = started.request()
    assert started.policy(compact) == []
    lease = started.issuer(compact)
    assert isinstance(lease, Lease)
    assert lease.instance is not None
    assert lease.instance.run == started.run.ref
    assert lease.key_thumbprint == started.run.key.kid
    assert (started.gateway(started.leased()), started.revoker(started.leased())) == ([], None)


def test_instance_acts_within_no_other_task_of_its_agent(started: Place) -> None:
    compact = started.request(started.second)
    assert started.policy(compact) == ["instance_other_task"]
    assert started.issuer(compact) == (["instance_other_task"], True), (
        "where policy lies, the issuer does not"
    )
    lied = started.leased(task_id=started.second)
    assert started.gateway(lied) == ["instance_other_task"], "nor does the gateway where both do"
    assert started.revoker(lied) == "run_ended"


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        ((), "run_unknown"),
        (("claimed",), "run_not_started"),
        (("claimed", "started", "ended"), "run_ended"),
        (("claimed", "started", "lost"), "run_ended"),
        (("claimed", "lost"), "run_ended"),
    ],
)
def test_without_a_run_that_has_started_it_gets_nothing(
    place: Place, statuses: tuple[RunStatus, ...], code: str
) -> None:
    place.run.go(*statuses)
    compact, lease = place.request(), place.leased()
    found = run_violations(
        lease.instance, place.ledger.directory.runs.get(place.run.id), agent_id="bot", task_id=place.task, kid=None,
        now_s=place.now_s,
    )  # fmt: skip
    assert [place.run.id in reason.message for reason in found] == [True]
    assert place.policy(compact) == [code]
    assert place.issuer(compact) == ([code], False), "policy may not have heard of it"
    assert place.gateway(lease) == [code]
    assert place.revoker(lease) == "run_ended"


def test_after_the_deadline_of_the_run_nothing_counts(started: Place) -> None:
    lease = started.leased(deadline=started.now_s + 2 * LIFE_S)
    assert started.gateway(lease) == []
    started.ledger.clock.ms += LIFE_S * 1000
    assert started.gateway(lease) == ["run_ended"]


@pytest.mark.parametrize("what", ["agent", "task", "runner", "key"])
def test_a_run_of_something_else_is_none(place: Place, what: str) -> None:
    """As if another run stood under its id."""
    run = place.run
    lease = place.leased()
    fields: dict[str, Any] = {
        "agent": {"agent_id": "other"}, "task": {"task_id": place.second},
        "runner": {"iss": place.runners.keys["runner-2"].id},
        "key": {"key_thumbprint": SigningKey.generate(run.key.id).kid},
    }[what]  # fmt: skip
    said = run.said("started", **fields)
    found = run_violations(
        lease.instance, said, agent_id="bot", task_id=place.task, kid=lease.key_thumbprint, now_s=place.now_s
    )
    assert [reason.code for reason in found] == ["run_mismatch"]
    plain = run_violations(
        lease.instance, run.said("started"), agent_id="bot", task_id=place.task, kid=lease.key_thumbprint,
        now_s=place.now_s,
    )  # fmt: skip
    assert plain == ()


def test_another_key_than_the_one_that_its_run_began_with_asks_for_nothing(place: Place) -> None:
    """Its runner enrolled two keys for one run."""
    place.run.go("claimed")
    other = SigningKey.generate(place.run.key.id).kid
    place.runners.tell(place.run.said("started", key_thumbprint=other))
    assert place.policy(place.request()) == ["run_mismatch"]


def test_a_lease_by_another_key_than_the_runs_is_none(started: Place) -> None:
    """Of an issuer that was taken over."""
    lied = started.leased(key_thumbprint=SigningKey.generate(started.run.key.id).kid)
    assert started.gateway(lied) == ["run_mismatch"]
    assert started.revoker(lied) == "run_ended"


def test_a_started_run_with_an_unknown_field_lets_nobody_act_and_an_end_is_one(place: Place) -> None:
    run = place.run
    lease = place.leased()
    for status, code in (("started", "run_not_understood"), ("ended", "run_ended")):
        for limited in planted(run.said(status)):  # type: ignore[arg-type]
            (reason,) = run_violations(
                lease.instance,
                limited,
                agent_id="bot",
                task_id=place.task,
                kid=run.key.kid,
                now_s=place.now_s,
            )
            assert reason.code == code
            assert (NAME in reason.message) == (status == "started")
    place.runners.tell(next(planted(run.said("started"))))
    compact = place.request()
    assert place.policy(compact) == ["run_not_understood"]
    assert place.issuer(compact) == (["run_not_understood"], False)
    assert place.gateway(lease) == ["run_not_understood"]


def test_an_instance_that_is_of_no_run_is_asked_for_none(place: Place) -> None:
    lease = place.leased()
    assert lease.instance is not None
    plain = lease.instance.model_copy(update={"run": None})
    assert run_violations(plain, None, agent_id="bot", task_id=place.second, kid=None, now_s=0) == ()
    assert run_violations(None, None, agent_id="bot", task_id=place.second, kid=None, now_s=0) == ()


def test_an_instance_hands_no_task_on(started: Place) -> None:
    """A command that rests on an enrolment could be verified by nobody later."""
    ledger = started.ledger
    claims = ledger.claims(
        TaskDelegate, "agent/bot", iss=started.run.key.id, parent=started.task,
        terms=ledger.terms("other", scope=(WIDE,)),
    )  # fmt: skip
    with pytest.raises((InvalidMessageError, ChainError)):
        ledger.give(claims, started.run.key)


# --- introspection ----------------------------------------------------------------------------------------------------


class OfAnyTarget:
    """Stands for what introspection asks beside the runs: a valid token for `staging`, whose lease is active."""

    is_cut, active = False, True

    def __init__(self, claims: dict[str, Any]) -> None:
        self._claims = claims

    def target(self, authorization: str | None) -> str:
        return "staging"

    def verified(self, token: str) -> dict[str, Any]:
        return self._claims

    async def look(self, lease_id: str, selector_keys: Any) -> OfAnyTarget:
        return self


async def is_active(place: Place, **claims: Any) -> bool:
    said: dict[str, Any] = {
        "jti": "l", "client_id": "bot", "task": place.task, "sponsor": "sam", "on_behalf_of": "uma",
        "authorization_details": [{"target": "staging"}], **claims,
    }  # fmt: skip
    asked: Any = OfAnyTarget(said)
    http = IssuerHttp(
        issuer_url="https://issuer.example", authenticator=asked, keys=asked, store=asked,
        runs=place.ledger.directory.runs,
    )  # fmt: skip
    transport = httpx.ASGITransport(app=Starlette(routes=http.routes()))
    async with httpx.AsyncClient(transport=transport, base_url="http://issuer") as client:
        answer = await client.post("/oauth2/introspect", data={"token": "t"})
    return bool(answer.json()["active"])


async def test_a_token_of_a_run_is_active_while_the_run_goes_on(place: Place) -> None:
    of_run = {"instance": {"id": "i", "iss": "x", "sub": "y", "run": place.run.id}}
    assert not await is_active(place, **of_run)
    for status, active in (("claimed", False), ("started", True), ("ended", False)):
        place.run.go(status)  # type: ignore[arg-type]
        assert await is_active(place, **of_run) is active, status
    assert await is_active(place)
    assert await is_active(place, instance={"id": "i", "iss": "x", "sub": "y"})
    limited = OneRun(place.runners, "bot", place.task, nonce="n3")
    place.runners.tell(next(planted(limited.said("started"))))
    assert not await is_active(place, instance={"run": limited.id})


# --- the gateway's own table of leases --------------------------------------------------------------------------------


def test_leases_of_a_run_are_cut_at_its_end(started: Place) -> None:
    table = started.table
    cut: list[str] = []
    lease, other = started.leased(), started.leased(instance=None)
    for one in (lease, other):
        table.apply(one)
        table.watch(one.lease_id, partial(cut.append, one.lease_id))
    table.end_run(str(uuid.uuid4()))
    assert cut == []
    table.end_run(started.run.id)
    assert cut == [lease.lease_id]
    assert code_of(table.check_live(lease)) == "run_ended"
    assert not table.is_live(lease.lease_id, started.ledger.clock.ms)
    assert table.check_live(other) == ALLOWED
    assert started.gateway(lease) == ["run_ended"]


def test_a_lease_counts_where_its_runs_key_is_shown_and_on_no_other_socket(started: Place) -> None:
    by_run, by_agent = started.leased(), started.leased(instance=None)
    run, other = started.run.id, str(uuid.uuid4())
    for lease, socket, expected in (
        (by_run, run, []),
        (by_agent, run, ["socket_other_run"]),
        (by_run, other, ["socket_other_run"]),
        (by_run, None, ["lease_of_run"]),
        (by_agent, None, []),
    ):
        by_handle = Sender("bot", started.task, lease.lease_id, socket)
        assert started.gateway(lease, by_handle) == expected
    # Without a handle only leases that count are candidates; if there are others alone, the answer says so.
    assert started.gateway(by_run, Sender("bot", started.task, None, run)) == []
    assert started.gateway(by_run, Sender("bot", started.task)) == []
    chosen = started.chosen(Sender("bot", started.task, None, run))
    assert chosen == by_run.lease_id
    assert started.chosen(Sender("bot", started.task)) == by_agent.lease_id
    assert started.gateway(by_run, Sender("bot", started.task, None, other)) == ["socket_other_run"]
    started.table.revoke(by_agent.lease_id, 0)
    assert started.gateway(by_run, Sender("bot", started.task)) == ["lease_of_run"]
    # A certificate shows the agent, and not the key of the run.
    assert started.gateway(by_run, Sender("bot", None, by_run.lease_id)) == ["lease_of_run"]
    assert started.gateway(by_run, Sender("bot", None, by_run.lease_id, key_proved=True)) == []


def test_runs_that_ended_long_ago_are_not_kept(started: Place) -> None:
    clock = started.ledger.clock
    started.table.end_run(started.run.id)
    lease = started.leased(deadline=started.now_s + 30 * 86_400)
    started.table.apply(lease)
    for later_ms, code in ((REVOCATIONS_KEPT_MS, "run_ended"), (ENDED_KEPT_MS, None)):
        clock.ms += later_ms
        started.table.sweep()
        assert code_of(started.table.check_live(lease)) == code, "`authorize` knows of its end all the same"


def test_a_record_changes_the_version_that_cached_decisions_rest_on(started: Place) -> None:
    before = started.ledger.directory.version
    started.run.go("ended")
    assert started.ledger.directory.version != before


def test_replacing_the_run_of_a_lease_changes_its_terms(started: Place) -> None:
    lease = started.leased()
    started.table.apply(lease)
    assert lease.instance is not None
    free = lease.model_copy(update={"seq": 2, "instance": lease.instance.model_copy(update={"run": None})})
    started.table.apply(free)
    assert started.table.get(lease.lease_id) == lease
