"""Everything that can stand on a topic becomes an event, or a table here says why not.

Every message of `ringfence.messages`, with every outcome that it can have, is looked up in these tables: a new message,
a new outcome or a new step fails the tests until it is said here what audit makes of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args

import orjson
import pytest

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import ExpiringClaims, Message, Topic, typ_header
from ringfence.messages.credential import Reason
from ringfence.messages.lease import EndKind, RevocationRequest
from ringfence.messages.operations import ActionDecided
from ringfence.messages.registry import COMMANDS, PROPOSAL_COMMANDS
from ringfence.messages.topics import ALL, AUDITED
from ringfence.model.records.command_chain import COMMAND_OF_TYP
from tests.support.audit_fixtures import AuditFixtures, steps
from tests.support.audit_records import every_record

NOT_READ: dict[str, str] = {
    "heartbeat": "one a second and service says that all is as it was; who misses one, or finds another table in it, "
    "denies, and says so on service.event",
    "audit.intake": "these are the events, on their way to the chain",
    "audit": "these are the events",
    "audit.checkpoint": "heads of the chains, and who saw them: an event about one would make the next; "
    "`audit verify` reads them",
    "proposal": "commands that wait, with what became of them; the registry says the same on service.event",
    "signal.stream": "what one receiver of signals chose for itself; nothing is issued or ended by it, and what it is "
    "refused is on service.event",
}
"""Topics of which nothing becomes an event."""

NOT_ON_A_TOPIC: dict[str, str] = {
    "ReplyContent": "sealed into a reply that its agent alone can open: reply.sent",
    "IssuerRefusal": "sealed into a reply; the issuer says the same on service.event: credential.refused",
    "CredentialDelivery": "sealed to gateways: delivery.sent",
    "InstanceEnrol": "sent to the registry over HTTP, which says on service.event what came of it",
    "InstanceEnrolment": "embedded in what an instance signs; verified there",
}
"""Messages that stand inside of others, or on no topic."""

ORDERS = {kind: {"revocation.requested"} for kind in get_args(EndKind)} | {"release": {"release.requested"}}

OUTCOMES: dict[str, dict[str, set[str]]] = {
    "TrustBundle": {"": {"trust.changed", "trust.repeated", "trust.version_fell"}},
    "CredentialRequest": {"": {"credential.requested"}},
    "RequestWithdraw": {"": {"withdrawal.requested"}},
    "CredentialDecision": {
        "allowed": {"request.allowed", "break_glass.used"},
        "denied": {"request.refused"},
        "approval_required": {"approval.required", "break_glass.asked"},
    },
    "ApprovalRequest": {"": {"approval.requested"}},
    "ActionRequest": {"": {"action.approval_requested"}},
    "Approval": {"approved": {"approval.given"}, "denied": {"approval.denied"}},
    "ActionApproval": {"approved": {"action.approved"}, "denied": {"action.approval_denied"}},
    "Grant": {"": {"grant.given"}},
    "GrantWithdraw": {"": {"grant.withdrawn"}},
    "BreakGlassReview": {"": {"break_glass.reviewed", "break_glass.review_refused"}},
    "SealedReply": {"": {"reply.sent"}},
    "SealedDelivery": {"": {"delivery.sent"}},
    "Lease": {
        "minting": {"credential.minting"},
        "active": {"credential.issued"},
        "ending": {"lease.ending"},
        "released": {"credential.released"},
        "revoked": {"credential.revoked"},
        "expired": {"lease.expired", "lease.void"},
        "aborted": {"credential.aborted"},
    },
    "LeaseEpoch": {"": {"lease.epoch"}},
    "RevocationRequest": ORDERS,
    "RevocationAck": {"": {"cut.confirmed"}},
    "ActionDecided": {
        "allowed": {"action.allowed"},
        "observed": {"action.observed"},
        "denied": {"action.denied", "action.by_another"},
    },
    "ActionAnswered": {
        "result": {"action.answered", "model.usage_understated"},
        "accepted": {"action.answered"},
        "tool_error": {"action.failed"},
        "rpc_error": {"action.failed"},
        "transport_error": {"action.failed"},
        "none": {"action.failed"},
    },
    "RelayEnded": {"": {"relay.ended"}},
    "ServiceEvent": {
        "started": {"service.started"},
        "stopped": {"service.stopped"},
        "accepted": {"command.accepted", "message.accepted", "session.begun"},
        "refused": {"command.refused", "credential.refused", "message.refused"},
        "replayed": {"message.replayed"},
        "proposed": {"command.proposed"},
        "withdrawn": {"command.withdrawn"},
        "lapsed": {"command.lapsed"},
        "widened": {"command.widened", "command.widened_by_root"},
        "finding": {
            "finding",
            "ceiling.combination",
            "credential.one_person",
            "key.added",
            "key.ending",
            "key.reused",
            "key.reused_late",
            "key.shared",
            "key.taken",
            "token.replayed",
        },
    },
    "DeadLetter": {"": {"record.dead_lettered"}},
    "RunOrder": {"": {"run.ordered"}},
    "RunStop": {"": {"run.stop_ordered"}},
    "Run": {
        "claimed": {"run.claimed", "run.refused"},
        "started": {"run.started"},
        "ended": {"run.ended", "run.remained", "run.not_started"},
        "lost": {"run.lost"},
    },
    "UserRecord": {
        "user.set": {"user.created", "user.changed"},
        "user.disable": {"user.disabled"},
        "user.add-key": {"user.key_added"},
        "user.end-key": {"user.key_ended", "user.key_compromised"},
        "user.review-compromise": {"user.compromise_reviewed"},
        "provisioner.set": {"provisioner.created", "provisioner.changed"},
        "provisioner.link": {"provisioner.linked"},
    },
    "AgentRecord": {
        "agent.register": {"agent.registered"},
        "agent.activate": {"agent.activated"},
        "agent.set-attestation": {"agent.attestation_set"},
        "agent.set-ceiling": {"agent.ceiling_set"},
        "agent.rotate-key": {"agent.key_rotated", "agent.key_compromised"},
        "agent.renew-key": {"agent.key_renewed", "agent.key_renewed_again"},
        "agent.report-reuse": {"agent.key_reused"},
        "agent.transfer": {"agent.transferred"},
        "agent.suspend": {"agent.suspended"},
        "agent.resume": {"agent.resumed"},
        "agent.decommission": {"agent.decommissioned"},
    },
    "TargetRecord": {
        "target.set": {"target.created", "target.changed"},
        "target.remove": {"target.removed"},
    },
    "TaskRecord": {
        "task.assign": {"task.assigned"},
        "task.delegate": {"task.delegated"},
        "task.end": {"task.ended"},
    },
    **{command.__name__: {"": {command.typ}} for command in (*COMMANDS, *PROPOSAL_COMMANDS)},
}
"""What each message becomes, by the outcome that it tells of (of a record: by the command that led to it)."""

OUTCOME_FIELD = {
    "CredentialDecision": "outcome", "Approval": "verdict", "ActionApproval": "verdict", "Lease": "status",
    "RevocationRequest": "kind", "ActionAnswered": "answer", "ServiceEvent": "kind", "Run": "status",
}  # fmt: skip
KINDS = {"UserRecord": "user.", "AgentRecord": "agent.", "TargetRecord": "target.", "TaskRecord": "task."}

OF_REQUEST = ("agent", "act", "sponsor", "on_behalf_of", "task", "request", "request_digest")
OF_DECISION = (*OF_REQUEST, "policy_revision")
OF_LEASE = (*OF_DECISION, "lease")
OF_TASK = ("agent", "act", "sponsor", "on_behalf_of", "task")
OF_AGENT = ("agent", "sponsor")
"""Who answers for it. No task: the agent is changed, whatever it does."""
OF_NOBODY = ()
"""Of what no agent does, and nothing that an agent does."""

FIELDS: dict[str, tuple[str, ...]] = {
    "credential.requested": OF_REQUEST,
    "withdrawal.requested": OF_REQUEST,
    **dict.fromkeys(
        (
            "request.allowed", "request.refused", "approval.required", "approval.requested", "approval.given",
            "approval.denied", "break_glass.asked", "break_glass.used", "break_glass.reviewed",
            "break_glass.review_refused", "reply.sent", "delivery.sent", "credential.refused",
        ),
        OF_DECISION,
    ),
    **dict.fromkeys(
        (
            "credential.minting", "credential.issued", "lease.ending", "credential.released", "credential.revoked",
            "lease.expired", "credential.aborted", "lease.void", "lease.forgotten", "release.requested",
            "message.accepted", "message.refused", "action.allowed", "action.by_another",
            "action.approval_requested", "action.approved", "action.approval_denied",
        ),
        OF_LEASE,
    ),
    "action.answered": (*OF_TASK, "lease", "request", "policy_revision"),
    **dict.fromkeys(
        (
            "action.denied", "action.observed", "action.failed", "relay.ended", "model.usage_understated",
            "grant.given", "grant.withdrawn",
            "task.assign",
            "task.delegate", "task.end", "task.assigned", "task.delegated", "task.ended", "revocation.requested",
            "run.ordered", "run.stop_ordered", "run.claimed", "run.started", "run.ended", "run.remained", "run.lost",
            "run.not_started", "run.refused",
            "cut.confirmed",
        ),
        OF_TASK,
    ),
    "message.replayed": OF_REQUEST,
    "message.expired": OF_REQUEST,
    "message.repeated": OF_LEASE[:-2],
    **dict.fromkeys(
        (
            "agent.register", "agent.activate", "agent.set-attestation", "agent.set-ceiling", "agent.rotate-key",
            "agent.renew-key", "agent.report-reuse", "agent.key_renewed", "agent.key_renewed_again",
            "agent.key_reused", "key.reused", "key.reused_late",
            "agent.transfer", "agent.suspend", "agent.resume", "agent.decommission", "agent.registered",
            "agent.activated", "agent.attestation_set", "agent.ceiling_set", "agent.key_rotated",
            "agent.key_compromised", "agent.transferred", "agent.suspended", "agent.resumed",
            "agent.decommissioned", "record.revision_fell", "command.accepted", "key.ending", "key.shared",
            "key.taken", "token.replayed", "ceiling.combination", "credential.one_person", "command.refused", "finding",
            "command.proposed", "command.withdrawn", "command.lapsed", "command.widened",
            "command.widened_by_root",
        ),
        OF_AGENT,
    ),
    **dict.fromkeys(
        (
            "user.set", "user.disable", "user.add-key", "user.end-key", "user.key_added", "user.key_ended",
            "user.review-compromise", "user.compromise_reviewed",
            "user.key_compromised", "key.added", "provisioner.set", "provisioner.link", "target.set",
            "target.remove",
            "user.created", "user.changed", "user.disabled", "provisioner.created", "provisioner.changed",
            "provisioner.linked", "target.created", "target.changed", "target.removed", "lease.epoch",
            "service.started", "service.stopped", "session.begun", "trust.changed", "trust.repeated",
            "trust.version_fell", "command.second", "command.withdraw",
        ),
        OF_NOBODY,
    ),
    "record.dead_lettered": OF_NOBODY,
    "record.not_believed": OF_NOBODY,
}  # fmt: skip
"""Which words each step has, where audit has read what came before it. All have `verified` and `trace_id` besides."""

SAYS_LESS = (
    "unknown", "by nobody", "no gateway", "another action", "without records", "selector", "revocation {",
    "refused user.set", "refused target.set", "instance enrolled", "repeated: first",
)  # fmt: skip
"""Records, by their names in `every_record`, that are about what audit has not seen, or about no agent."""


Told = dict[str, tuple[Received, dict[str, Any]]]


@pytest.fixture(scope="module")
async def office() -> AuditFixtures:
    return AuditFixtures()


@pytest.fixture(scope="module")
async def told(office: AuditFixtures) -> Told:
    """One record of everything, and the event that it became; also an order of each kind, and words about an agent."""
    records = every_record(office)
    by = office.key("service", "revoker")
    for kind in OUTCOMES["RevocationRequest"]:
        ask = office.claims(RevocationRequest, by, kind=kind, lease_id=office.task, reason="x")
        records[f"order of an unknown lease: {kind}"] = office.signed(_topic("revocation.request"), ask, by)
    return {name: (record, await office.event(record)) for name, record in records.items()}


def _topic(what: str) -> Topic[Any]:
    return next(topic for topic in ALL if topic.what == what)


# --- messages ---


def carried() -> Iterator[tuple[Topic[Any], type[Message]]]:
    for topic in ALL:
        for model in (*topic.models, *topic.also_json):
            yield topic, model


def test_every_topic_is_read_or_it_is_said_why_not() -> None:
    read = {topic.what for topic in AUDITED}
    assert {topic.what for topic in ALL} - read == set(NOT_READ)


def test_every_message_is_in_a_table() -> None:
    """A new message without a word on what audit makes of it ends here."""
    on_audited = {model.__name__ for topic, model in carried() if topic.what not in NOT_READ}
    assert on_audited == set(OUTCOMES) | set(NOT_ON_A_TOPIC)


def test_every_outcome_of_a_message_is_in_the_table() -> None:
    """So does one that can tell of more than it could."""
    models = {model.__name__: model for _, model in carried()}
    for name, field in OUTCOME_FIELD.items():
        assert set(get_args(models[name].model_fields[field].annotation)) == set(OUTCOMES[name]), name
    for name, prefix in KINDS.items():
        typs = {command.typ for command in COMMANDS if command.typ.startswith(prefix)}
        more = {command.typ for command in COMMANDS if command.typ.startswith("provisioner.")}
        assert typs | (more if name == "UserRecord" else set()) == set(OUTCOMES[name]), name


def message_in(record: Received) -> tuple[str, str] | None:
    """The message that a record is, and the outcome that it tells of; None where it is none of its topic's."""
    models = {typ_header(m): m for m in record.topic.models if hasattr(m, "typ")}  # type: ignore[arg-type]
    try:
        jws = parse(record.value)
    except InvalidMessageError:
        return _unsigned(record)
    model = models.get(jws.header.typ)
    if model is None:
        return None
    claims = json.loads(jws.payload)
    if model.__name__ in KINDS:
        return model.__name__, COMMAND_OF_TYP[parse(claims["commands"][-1]["jws"]).header.typ].typ
    return model.__name__, str(claims.get(OUTCOME_FIELD.get(model.__name__, ""), ""))


def _unsigned(record: Received) -> tuple[str, str] | None:
    if record.topic.what == "credential.reply":
        return ("SealedDelivery" if record.value.startswith(b"{") else "SealedReply"), ""
    try:
        claims = orjson.loads(record.value)
    except orjson.JSONDecodeError:
        return None
    match record.topic.what:
        case "dead-letter":
            return "DeadLetter", ""
        case "action" if "answer" in claims:
            return "ActionAnswered", claims["answer"]
        case "action" if "sent_bytes" in claims:
            return "RelayEnded", ""
        case "action":
            return "ActionDecided", _outcome_of(ActionDecided.model_validate_json(record.value))
    return None


def _outcome_of(decided: ActionDecided) -> str:
    return "allowed" if decided.allowed else "observed" if decided.observed else "denied"


COUNTS_FOR_NOTHING = {
    "record.not_believed", "message.expired", "message.replayed", "message.repeated", "record.revision_fell",
}  # fmt: skip


async def test_every_outcome_of_every_message_becomes_the_event_of_the_table(told: Told) -> None:
    seen: dict[tuple[str, str], set[str]] = {}
    for record, event in told.values():
        message, code = message_in(record), event["metadata"]["event_code"]
        if message is None or (code in COUNTS_FOR_NOTHING and message[0] != "ServiceEvent"):
            continue
        if code != "record.not_believed":
            seen.setdefault(message, set()).add(code)
    wanted = {(name, outcome): codes for name, each in OUTCOMES.items() for outcome, codes in each.items()}
    assert seen == wanted


# --- what counts for nothing is an event too ---

UNSIGNED = {
    "credential.reply": "sealed: nobody but its agent can tell two of them apart",
    "action": "gateways do not sign what agents did",
    "dead-letter": "any service writes letters, unsigned",
}
"""Topics on which a message that stands there twice is told twice."""


@pytest.mark.parametrize("topic", AUDITED, ids=lambda topic: topic.what)
async def test_repeated_record_is_audited_as_a_replay(office: AuditFixtures, told: Told, topic) -> None:
    first = next(r for r, e in told.values() if r.topic is topic and _counts(e))
    office.now_ms = first.appended_at_ms  # later on some of the keys count no more
    event = await office.event(office.received(topic, first.value, key=first.key))
    code, status = event["metadata"]["event_code"], event["status"]
    if topic.what in UNSIGNED:
        assert code not in COUNTS_FOR_NOTHING
    elif topic.what == "trust":
        assert code == "trust.version_fell"
    elif topic.what in ("user", "agent", "target", "task"):
        assert code in ("record.revision_fell", "message.repeated")
    else:
        by_service = topic.what in (
            "credential.decision", "approval.request", "lease", "revocation.ack", "service.event", "run",
        )  # fmt: skip
        assert (code, status) == (
            ("message.repeated", "Success") if by_service else ("message.replayed", "Failure")
        )
        assert event["unmapped"]["first_seen"]


def _counts(event: dict[str, Any]) -> bool:
    return event["metadata"]["event_code"] not in COUNTS_FOR_NOTHING


@pytest.mark.parametrize("topic", AUDITED, ids=lambda topic: topic.what)
async def test_record_signed_by_a_stranger_has_no_actor(office: AuditFixtures, told: Told, topic) -> None:
    signed = [r for r, e in told.values() if r.topic is topic and _counts(e) and message_in(r)]
    signed = [r for r in signed if r.value.count(b".") == 2 and not r.value.startswith(b"{")]
    if not signed:
        assert topic.what in UNSIGNED
        return
    head, payload, _ = signed[0].value.decode().split(".")
    forged = f"{head}.{payload}.{'A' * 86}"
    event = await office.event(office.received(topic, forged, key=signed[0].key))
    assert steps([event]) == ["record.not_believed"]
    assert "actor" not in event
    assert event["unmapped"]["verified"] == {"by": None}


EXPIRING = [
    model
    for topic, model in carried()
    if topic in AUDITED and issubclass(model, ExpiringClaims) and model.__name__ not in NOT_ON_A_TOPIC
]
NOT_EXPIRED = {
    "TrustBundle": "one that has ended is the root's last word all the same, and denies everything",
}


@pytest.mark.parametrize("model", EXPIRING, ids=lambda model: model.__name__)
async def test_expired_message_is_audited_with_its_signer(
    office: AuditFixtures, told: Told, model: type[ExpiringClaims]
) -> None:
    if model.__name__ in NOT_EXPIRED:
        return
    record = next(r for r, e in told.values() if (message_in(r) or ("",))[0] == model.__name__ and _counts(e))
    claims = parse(record.value).unverified_claims(model)
    office.now_ms = record.appended_at_ms
    now_s = office.now_ms // 1000
    late = claims.model_copy(update={"iat": now_s - 900, "exp": now_s - 600, "jti": "late"})
    kind, _, name = claims.iss.removeprefix("spiffe://").partition("/")[2].partition("/")
    event = await office.event(office.signed(record.topic, late, office.key(kind, name), key=record.key))
    assert (steps([event]), event["status"]) == (["message.expired"], "Failure")
    assert event["actor"]["user"]["uid"] == claims.iss
    agent = getattr(late, "agent_id", None)
    if agent is not None:
        assert event["unmapped"]["agent"] == agent


# --- fields ---


async def test_every_step_has_the_words_that_are_said_of_it(told: Told) -> None:
    lacking: dict[str, list[str]] = {}
    for name, (_, event) in told.items():
        words, code = event["unmapped"], event["metadata"]["event_code"]
        wanted = ["verified", "trace_id"]
        if not any(text in name for text in SAYS_LESS):
            wanted += FIELDS[code]
        missing = [word for word in wanted if word not in words]
        if missing:
            lacking[f"{name}: {code}"] = missing
    assert not lacking, json.dumps(lacking, indent=1)


async def test_every_step_is_in_the_table_of_words(told: Told) -> None:
    assert {event["metadata"]["event_code"] for _, event in told.values()} == set(FIELDS)


@pytest.mark.parametrize("command", [command.typ for command in COMMANDS])
@pytest.mark.parametrize("kind", ["accepted", "refused", "replayed"])
@pytest.mark.usefixtures("told")  # the office knows the task
async def test_the_registrys_answer_to_each_command_is_an_event(
    office: AuditFixtures, kind: Any, command: str
) -> None:
    why = (Reason(code="not_sponsor", message="sam does not sponsor it"),) if kind != "accepted" else ()
    event = await office.event(
        office.service_event(
            kind, command, reasons=why, ref=f"{kind} {command}", actor=office.key("user", "sam").id,
            agent_id="deploy-bot", task_id=office.task if command.startswith("task.") else None,
        )
    )  # fmt: skip
    code = {"accepted": "command.accepted", "refused": "command.refused", "replayed": "message.replayed"}[
        kind
    ]
    assert steps([event]) == [code]
    assert event["class_uid"] == (3002 if kind == "replayed" else 3004)
    assert event["status"] == ("Success" if kind == "accepted" else "Failure")
    words = event["unmapped"]
    assert (words["agent"], words["given_by"].rpartition("/")[2]) == ("deploy-bot", "sam")
    if command.startswith("task."):
        assert {word for word in OF_TASK if word in words} == set(OF_TASK)
