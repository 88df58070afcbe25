"""Why a reader refuses a record, a consent, a key or a run, a row for each code. Registries may lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest

from ringfence.kernel.crypto.jws import sign
from ringfence.messages.codes import Code
from ringfence.messages.enrolment import InstanceRef
from ringfence.messages.lease import Selector
from ringfence.messages.registry import (
    AgentState,
    AgentSuspend,
    AnyRecord,
    RequestRule,
    TargetRecord,
    TaskState,
    UserState,
    VerbFloor,
)
from ringfence.model.http_targets import RequestMap
from ringfence.model.identity.runners import runner_issuer
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.leases.lifecycle import follow
from ringfence.model.lifecycle import Actor, Context, KeyOrigin, apply
from ringfence.model.records.consent import nonce_of, verified_consent
from ringfence.model.records.instances import check_ref, open_enrolment
from ringfence.model.records.runs import run_violations
from ringfence.model.requests.approver_keys import check_key_floor, check_key_origin
from ringfence.model.verdict import ALLOWED
from ringfence.revoker.revocations.verification import RevocationVerifier
from tests.support.in_memory_registry import TD, TOPICS, InMemoryRegistry
from tests.support.leases import CAUSE, lease
from tests.support.oidc_tokens import TokenIssuer
from tests.support.runs import OneRun, Runners
from tests.support.verdicts import refusal_code
from tools.schemas.examples import EXAMPLES

ISSUER: Final = TokenIssuer("https://login.acme.example", "ES256")
NOTHING: Final[Any] = None
"""A part that no row reaches."""
NO_SUCH: Final = "00000000-0000-5000-8000-000000000000"


class Reader:
    """A reader of sam's agents bot, which was suspended, and robot. `before`: the record of bot before that."""

    def __init__(self) -> None:
        self.ledger = ledger = InMemoryRegistry()
        ledger.organisation()
        for agent in ("bot", "robot"):
            ledger.give(ledger.register("sam", agent, "sam"))
        self.before = self.record("agent", "bot")
        ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x"))
        self.assigned = ledger.assign("uma", "robot")
        change = ledger.give(self.assigned)
        assert change is not None
        assert isinstance(change.state, TaskState)
        self.task = change.state
        self.runners = Runners(ledger)
        self.selector = self.runners.admits("robot")
        self.run = OneRun(self.runners, "robot", self.task.task_id)

    def record(self, kind: SubjectKind, id: str) -> AnyRecord:
        entry = self.ledger.directory.entry(kind, id)
        assert entry is not None
        return entry.record

    def user(self, id: str) -> UserState:
        entry = self.ledger.directory.user(id)
        assert entry is not None
        return entry.state

    def reads(self, record: AnyRecord | None, kind: SubjectKind = "agent", key: str = "bot") -> str:
        """The code of the alarm that a new record raises, at a reader who has read all others."""
        alarms: list[Any] = []
        reader = self.ledger.reader(alarms.append)
        for known in ("user", "agent"):
            for entry in self.ledger.directory.entries(known):
                reader.on_records([self.received(known, entry.record, entry.record.sub.rpartition("/")[2])])
        assert alarms == []
        reader.on_records([self.received(kind, record, key)])
        (alarm,) = alarms
        return str(alarm.code)

    def received(self, kind: str, record: AnyRecord | None, key: str) -> Any:
        value = sign(record, self.ledger.registry) if record is not None else b""
        return self.ledger.received(TOPICS[kind], key, value)

    def consents(
        self, *, user: UserState | None = None, issuer: TokenIssuer = ISSUER, **claims: Any
    ) -> object:
        """Verify uma's ID token as her consent to the terms of a task."""
        ledger, terms = self.ledger, self.assigned.terms
        bundle = ledger.trust.require()
        trusting = bundle.model_copy(
            update={"version": bundle.version + 1, "oidc_issuers": (ISSUER.pinned("users"),)}
        )
        ledger.trust.load(sign(trusting, ledger.root, header_jwk=True), ledger.clock.ms / 1000)
        given = {"sub": "uma", "nonce": nonce_of(terms), **claims}
        token = issuer.token(issuer.claims(TD, ledger.clock.ms / 1000, **given))
        return verified_consent(token, terms, user or self.user("uma"), ledger.trust, ledger.clock.ms)

    def acts(self, run: Any, **fields: Any) -> object:
        """The violations of an instance of a run, which acts for robot within its task."""
        given = {"agent_id": "robot", "task_id": self.task.task_id, "kid": self.run.key.kid, **fields}
        (reason,) = run_violations(self.instance(), run, now_s=self.run.now_s, **given)
        return reason

    def told(self, *, key: str | None = None, **fields: Any) -> object:
        """Verify what a runner says of a run."""
        return self.ledger.directory.runs.verified(
            self.runners.record(self.run.said("started", **fields), key=key)
        )

    def enrols(self, *, at_s: int | None = None, **fields: Any) -> object:
        """Verify the enrolment of the run's instance."""
        compact = self.run.enrolment(self.selector, **fields)
        return open_enrolment(compact, self.ledger.trust, self.run.now_s if at_s is None else at_s)

    def agent(self, id: str) -> AgentState:
        entry = self.ledger.directory.agent(id)
        assert entry is not None
        return entry.state

    def instance(self) -> InstanceRef:
        """The instance of the run."""
        return InstanceRef(
            instance_id=NO_SUCH, issuer=runner_issuer(TD, "runner-1"), subject=self.run.key.id, selector="0" * 64,
            not_after=self.run.deadline_s, run=self.run.ref,
        )  # fmt: skip


def origin(**fields: Any) -> KeyOrigin:
    """The origin of a key of sam, which olga added; it counts from 0 ms on."""
    given: dict[str, Any] = {
        "kid": "k", "added_ms": 0, "by": "olga", "by_kid": "o", "first": False, "counts_from_ms": 0, **fields,
    }  # fmt: skip
    return KeyOrigin(**given)


def floor(reader: Reader, key: Any) -> object:
    """Check sam's key file for an approval at a target that demands another kind of key."""
    example = EXAMPLES[TargetRecord]
    assert isinstance(example, TargetRecord)
    target = example.state.model_copy(update={"verbs": (VerbFloor(verb="deploy", key=key),)})
    record = reader.ledger.key_record(reader.ledger.key("sam"))
    return check_key_floor(
        record.model_copy(update={"use": "webauthn" if key == "file" else None}), target, ("deploy",)
    )


REFUSALS: Final[dict[Code, Callable[[Reader], object]]] = {
    # Records
    Code.WRONG_KEY: lambda reader: reader.reads(reader.record("agent", "robot")),
    Code.WRONG_SUBJECT: lambda reader: reader.reads(
        reader.record("user", "sam").model_copy(update={"sub": f"spiffe://{TD}/agent/sam"}), "user", "sam"
    ),
    Code.TYP_UNEXPECTED: lambda reader: reader.reads(reader.record("user", "sam"), key="sam"),
    Code.REVISION_FELL: lambda reader: reader.reads(reader.before),
    Code.HISTORY_CHANGED: lambda reader: reader.reads(reader.ledger.follow(reader.before.commands, 3)),
    Code.TOMBSTONE: lambda reader: reader.reads(None),
    Code.CHAIN_BROKEN: lambda reader: reader.ledger.chains().verify(
        reader.before.model_copy(update={"state": reader.before.state.model_copy(update={"sponsor": "suzy"})})
    ),
    Code.TASK_EXISTS: lambda reader: apply(
        reader.task,
        reader.assigned,
        Context(Actor("uma", frozenset()), 0, reader.task.task_id, lambda user: frozenset()),
    ),
    # Consents by ID tokens
    Code.ISSUER_NOT_PINNED: lambda reader: reader.consents(
        issuer=TokenIssuer("https://other.example", "ES256")
    ),
    Code.SIGNATURE_INVALID: lambda reader: reader.consents(issuer=TokenIssuer(ISSUER.issuer, "ES256")),
    Code.CONSENT_OTHER_TERMS: lambda reader: reader.consents(nonce="other"),
    Code.USER_DISABLED: lambda reader: reader.consents(
        user=reader.user("uma").model_copy(update={"status": "disabled"})
    ),
    Code.USER_MISMATCH: lambda reader: reader.consents(sub="sam"),
    # Keys of approvers
    Code.KEY_NOT_ATTESTED: lambda reader: floor(reader, "attested"),
    Code.KEY_NOT_FILE: lambda reader: floor(reader, "file"),
    Code.KEY_TOO_NEW: lambda reader: check_key_origin(
        origin(counts_from_ms=1), "sam", reader.ledger.directory, (), 0
    ),
    Code.KEY_BESIDE_VOUCHER: lambda reader: check_key_origin(
        origin(vouchers=frozenset({"olga"})), "sam", reader.ledger.directory, ("olga",), 0
    ),
    # Runs
    Code.RUN_UNKNOWN: lambda reader: reader.acts(None),
    Code.RUN_ENDED: lambda reader: reader.acts(reader.run.said("ended")),
    Code.RUN_NOT_STARTED: lambda reader: reader.acts(reader.run.said("claimed")),
    Code.RUN_NOT_UNDERSTOOD: lambda reader: reader.acts(reader.run.said("started", only_once=True)),
    Code.RUN_MISMATCH: lambda reader: reader.acts(reader.run.said("started"), kid="other"),
    Code.INSTANCE_OTHER_TASK: lambda reader: reader.acts(reader.run.said("started"), task_id=NO_SUCH),
    Code.RUN_ID_UNEXPECTED: lambda reader: reader.told(run_id=NO_SUCH),
    Code.RUN_TOO_LONG: lambda reader: reader.told(deadline=2**40),
    Code.KEY_UNEXPECTED: lambda reader: reader.told(key=NO_SUCH),
    # Instances
    Code.ENROLMENT_INVALID: lambda reader: open_enrolment("x", reader.ledger.trust, 0),
    Code.ENROLMENT_ENDED: lambda reader: reader.enrols(at_s=reader.run.deadline_s),
    Code.ISSUER_UNTRUSTED: lambda reader: reader.enrols(issuer="https://other.example"),
    Code.INSTANCE_VOID: lambda reader: check_ref(reader.instance(), reader.agent("bot")),
    # Targets
    Code.REQUEST_MAP_INVALID: lambda reader: RequestMap(
        [RequestRule(method="GET", path="/a/../b", verb="read", resource="x")]
    ),
    # Revocations
    Code.SUBJECT_UNKNOWN: lambda reader: RevocationVerifier(
        NOTHING, reader.ledger.directory, patience_s=0
    ).check_subject(Selector(agent_id="nobody")),
    # Leases
    Code.LEASE_STATE: lambda reader: follow(
        lease(status="revoked").claims, "active", by=f"spiffe://{TD}/service/revoker", cause=CAUSE
    ),
}


@pytest.fixture(scope="module")
def reader() -> Reader:
    """A refused record changes nothing, so all rows share it."""
    return Reader()


@pytest.mark.parametrize(("code", "ask"), REFUSALS.items(), ids=REFUSALS)
def test_record_is_refused(code: Code, ask: Callable[[Reader], object], reader: Reader) -> None:
    assert refusal_code(lambda: ask(reader)) == code


def test_the_record_without_the_change_is_accepted(reader: Reader) -> None:
    assert reader.consents()
    reader.ledger.chains().verify(reader.before)
    ledger = reader.ledger.directory
    assert check_key_origin(origin(), "sam", ledger, ("olga",), 0) == ALLOWED
