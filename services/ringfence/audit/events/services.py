"""Authentication events (OCSF class 3002): failed verification, replays, and what services report about themselves.

Every signature is a logon for one act. So a record whose signature fails, or that is a replay, is a failed logon of an
unknown user; a service that starts or stops logs on or off. Answers to requests are Authorize Session events (3003).

Findings of services about shared identity are Detection Findings (2004): a key that two use at once, a key that two
identities own, an identity token that two instances present. One identity must have one runner. So are findings about
separation of duties: a ceiling that allows a forbidden combination, a lease that rests on one person.

Events of runs: orders are Authorize Session events (OCSF class 3003), and runs Authentication events (3002).

The instance of a run logs on when the run starts, and off when it ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ringfence import __version__
from ringfence.audit.events import kinds
from ringfence.audit.events.ocsf import (
    UNKNOWN_USER,
    Copied,
    EventContext,
    OcsfEvent,
    VerifiedMessage,
    event,
    scrubbed,
    user_of,
)
from ringfence.audit.memory import Sighting
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.base.text import with_article
from ringfence.kernel.kafka.record import Received
from ringfence.messages.codes import Code
from ringfence.messages.credential import CredentialDecision, CredentialRequest, Reason
from ringfence.messages.lease import LeaseEpoch
from ringfence.messages.operations import DeadLetter, ServiceEvent
from ringfence.messages.registry import SessionStatement
from ringfence.messages.run import Mount, Run, RunOrder, RunStop
from ringfence.model.identity.spiffe_ids import spiffe_id
from ringfence.model.records.runs import run_id_of

_PLACE = Copied(RunOrder, "pool labels")
_RUN = Copied(Run, "agent run order")
_RUN_TERMS = Copied(Run, "status key_thumbprint backend")


def ordered(signed: VerifiedMessage[RunOrder], subject_fields: Mapping[str, Any]) -> OcsfEvent:
    """A person ordered a run. `subject_fields`: those of its agent and task."""
    claims, agent, signer = signed.claims, signed.claims.agent_id, user_of(signed.claims.iss)
    order_id, command = message_id(claims.iss, claims.jti), scrubbed(" ".join(claims.command))
    fields = {
        **subject_fields,
        "agent": agent,
        "run": run_id_of("", order_id=order_id),
        "order": order_id,
        **_PLACE(claims),
        "argv": command,
        "image": claims.image,
        "mounts": _mounts(claims.mounts),
        "limits": claims.limits.model_dump(),
        "ttl_s": claims.ttl_s,
        "outcome": "requested",
    }
    message = f"{signer['name']} ordered a run of agent {agent} in pool {claims.pool}: {command}"
    user = user_of(spiffe_id(claims.aud, "agent", agent))
    attributes = {"user": user, "actor": {"user": signer}, "privileges": []}
    return event(signed, kinds.RUN_ORDERED, message, attributes, fields, EventContext(agent, claims.task_id))


def stop_ordered(signed: VerifiedMessage[RunStop], subject_fields: Mapping[str, Any]) -> OcsfEvent:
    """A person ordered the end of a run. `subject_fields`: those of its agent and task, as far as they are known."""
    claims, agent = signed.claims, subject_fields.get("agent")
    signer, reason = user_of(claims.iss), scrubbed(claims.reason)
    fields = {**subject_fields, "run": claims.run_id, "comment": reason, "outcome": "requested"}
    user = user_of(spiffe_id(claims.aud, "agent", agent)) if agent else signer
    attributes = {"user": user, "actor": {"user": signer}, "privileges": []}
    message = f"{signer['name']} ordered the end of run {claims.run_id}: {reason}"
    return event(
        signed, kinds.RUN_STOP_ORDERED, message, attributes, fields,
        EventContext(agent or claims.run_id, subject_fields.get("task")),
    )  # fmt: skip


def told(signed: VerifiedMessage[Run], subject_fields: Mapping[str, Any], *, counts: bool) -> OcsfEvent:
    """A runner reported a new state of a run. `counts`: whether the state follows the one before."""
    claims, agent, runner = signed.claims, signed.claims.agent_id, user_of(signed.claims.iss)
    kind, run = kinds.RUNS[claims.status], f"run {claims.run_id}"
    reasons: tuple[Reason, ...] = ()
    message = f"{run} of agent {agent} is {claims.status}, says runner {runner['name']}"
    if not counts:
        kind = kinds.RUN_REFUSED
        why = "it takes the run back, or is about a run of another runner, agent, task or key"
        reasons = (Reason(code=Code.RUN_REFUSED, message=why),)
        message = f"what runner {runner['name']} said of {run} changes nothing: {why}"
    elif claims.refused is not None:
        kind, why = kinds.RUN_NOT_STARTED, scrubbed(claims.refused.message)
        reasons = (Reason(code=claims.refused.code, message=why),)
        message = f"runner {runner['name']} refused to start {run} of agent {agent}: {why}"
    elif claims.remained:
        kind = kinds.RUN_REMAINED
        message = f"{message}, and something of it remained: {scrubbed('; '.join(claims.remained))}"
    exit = claims.exit.model_dump(exclude_none=True) if claims.exit is not None else None
    if exit is not None and "reason" in exit:
        exit["reason"] = scrubbed(exit["reason"])
    fields = {
        **subject_fields,
        **_RUN(claims),
        "given_by": claims.ordered_by,
        "runner": runner["name"],
        **_RUN_TERMS(claims),
        "limits": claims.limits.model_dump(),
        "policy_digest": claims.policy_digest,
        "image": claims.image_digest,
        "mounts": _mounts(claims.mounts),
        "exit": exit,
        "remained": [scrubbed(one) for one in claims.remained] or None,
        "outcome": claims.status if counts and claims.refused is None else "refused",
    }
    attributes = {
        "user": user_of(spiffe_id(claims.aud, "agent", agent)),
        "actor": {"user": runner},
        "service": {"name": "Ringfence run", "uid": signed.record.topic_name},
        **PROTOCOL,
    }
    return event(
        signed, kind, message, attributes, fields, EventContext(agent, claims.task_id), reasons=reasons
    )


def _mounts(mounts: tuple[Mount, ...]) -> list[dict[str, Any]] | None:
    return [mount.model_dump() for mount in mounts] or None


PROTOCOL = {"auth_protocol_id": 99, "auth_protocol": "JWS"}
_ASKS_FOR_A_CREDENTIAL = frozenset({CredentialRequest.typ, CredentialDecision.typ})
_SUBJECT = Copied(ServiceEvent, "agent task request lease")
_DETECTION_TITLES = {
    Code.CEILING_COMBINATION: "A ceiling allows a forbidden combination",
    Code.KEY_REUSED: "A renewed key was used again",
    Code.KEY_REUSED_LATE: "An old copy of a renewed key was used",
    Code.KEY_SHARED: "Two use one key at once",
    Code.KEY_TAKEN: "One key for two identities",
    Code.ONE_PERSON: "One person is behind a lease",
    Code.TOKEN_REPLAYED: "One identity token for two instances",
}
_SEPARATION_OF_DUTIES = frozenset({Code.CEILING_COMBINATION, Code.ONE_PERSON})

# Error messages may quote text of an unverified writer, so events have these texts instead.
_REASON_TEXTS: Mapping[str, str] = {
    Code.NOT_A_JWS: "it is not a JWS in compact serialisation",
    Code.NOT_JSON: "it is not the JSON that belongs there",
    Code.NOT_A_JWE: "it is not a JWE in compact serialisation",
    Code.TOO_LARGE: "it is larger than any message may be",
    Code.TYP_UNEXPECTED: "its typ names another message",
    Code.CLAIMS_INVALID: "its claims are not those of the message",
    Code.AUD_UNEXPECTED: "it is for another trust domain",
    Code.KEY_UNKNOWN: "no key that may sign it signed it",
    Code.ALG_UNEXPECTED: "its alg is not that of the key",
    Code.SIGNATURE_INVALID: "its signature does not verify",
    Code.CHAIN_BROKEN: "the commands that it embeds do not hold",
    Code.ENROLMENT_INVALID: "the enrolment of an instance in it does not hold",
    Code.ENROLMENT_ENDED: "the enrolment of an instance in it is over",
    Code.ISSUER_UNTRUSTED: "the enrolment of an instance in it rests on an issuer that is not believed",
    Code.WRONG_SUBJECT: "it is about another subject than it says",
    Code.TOMBSTONE: "it deletes a record, which no service may do",
}
_FORGERIES = frozenset({
    Code.KEY_UNKNOWN, Code.ALG_UNEXPECTED, Code.SIGNATURE_INVALID, Code.CHAIN_BROKEN, Code.ENROLMENT_INVALID,
    Code.WRONG_SUBJECT, Code.TOMBSTONE,
})  # fmt: skip


def not_believed(record: Received, code: str) -> OcsfEvent:
    """Verification of a record failed, with error `code`. The event names its coordinates, and no writer."""
    reason_text = _REASON_TEXTS.get(code, "it could not be read")
    message = (
        f"a record on {record.topic.what} (partition {record.partition}, offset {record.offset}) was seen and not "
        f"believed: {reason_text}"
    )
    fields = {"verified": {"by": None}, "outcome": "not_believed", "size_bytes": len(record.value)}
    kind = kinds.FORGED if code in _FORGERIES else kinds.MALFORMED
    reasons = (Reason(code=code, message=reason_text),)
    return event(
        record, kind, message, _attributes(record), fields, EventContext(record.topic.what), reasons=reasons
    )


def expired(signed: VerifiedMessage[Any], code: str, fields: Mapping[str, Any]) -> OcsfEvent:
    """The signature of a message holds, but it reached the broker outside its validity."""
    record, signer = signed.record, user_of(signed.claims.iss)
    reason = Reason(code=code, message="it reached the broker outside the time that its signer gave it")
    message = f"{with_article(record.topic.what)} by {signer['name']} counts for nothing: {reason.message}"
    attributes = _attributes(record, signer, actor=signer)
    key = _event_key(fields, signer)
    fields = {**fields, "outcome": "expired"}
    return event(signed, kinds.EXPIRED, message, attributes, fields, EventContext(key), reasons=(reason,))


def replayed(
    signed: VerifiedMessage[Any], first: Sighting, *, same: bool, fields: Mapping[str, Any]
) -> OcsfEvent:
    """A signed message is at other coordinates as well. It is not known who wrote it again.

    A service repeats a record if it does not know whether the record arrived: the `same` content raises no alert then.
    """
    record, signer = signed.record, user_of(signed.claims.iss)
    what, by = with_article(record.topic.what), signer["name"]
    place, key = f"partition {first.partition}, offset {first.offset}", _event_key(fields, signer)
    seen = {"partition": first.partition, "offset": first.offset}
    fields = {**fields, "outcome": "replayed", "first_seen": seen}
    if signer["type"] == "System" and same:
        message = f"{what} record by {by} stands there twice ({place}); it changes nothing"
        return event(signed, kinds.REPEATED, message, _attributes(record, signer), fields, EventContext(key))
    reasons = (Reason(code=Code.REPLAYED, message=f"the same message was seen before, at {place}"),)
    message = f"{what} signed by {by} was replayed, by whom is not known; first at {place}"
    return event(
        signed, kinds.REPLAYED, message, _attributes(record), fields, EventContext(key), reasons=reasons
    )


def reported(
    signed: VerifiedMessage[ServiceEvent], fields: Mapping[str, Any], traceparent: str | None
) -> OcsfEvent:
    """The event of a service event other than an answer to a command, which `registry.answered` builds.

    Args:
        signed: the verified service event.
        fields: those of its subject: agent, sponsor, task, lease and the like, as far as they are known.
        traceparent: the trace of the subject's request, if known.
    """
    claims, enrolled = signed.claims, signed.claims.enrolled
    service = user_of(claims.iss)
    fields = {
        **_SUBJECT(claims),
        **fields,
        "subject": claims.subject,
        "given_by": claims.actor,
        "result": claims.result,
        "instance": enrolled.model_dump(exclude={"enrolled_at"}, exclude_none=True) if enrolled else None,
        "outcome": claims.kind,
        "about": claims.source.model_dump(exclude_none=True) if claims.source is not None else None,
    }
    agent = fields["agent"]
    text = scrubbed("; ".join(reason.message for reason in claims.reasons))
    by = f" by {user_of(claims.actor)['name']}" if claims.actor else ""
    colon_text = f": {text}" if text else ""
    attributes: dict[str, Any] = _attributes(signed.record, service, actor=service)
    match claims.kind:
        case "accepted" | "refused":
            message = f"{service['name']} {claims.kind} {claims.subject}{by}{colon_text}"
            user = user_of(f"spiffe://{claims.aud}/agent/{agent}") if agent else UNKNOWN_USER
            attributes = {"user": user, "actor": {"user": service}, "privileges": []}
            if claims.lease_id:
                attributes["session"] = {"uid": claims.lease_id}
            of_credential = claims.kind == "refused" and claims.subject in _ASKS_FOR_A_CREDENTIAL
            kind = kinds.CREDENTIAL_REFUSED if of_credential else kinds.SERVICES[claims.kind]
        case "started" | "stopped":
            kind, message = kinds.SERVICES[claims.kind], f"service {service['name']} {claims.kind}"
            attributes |= {"logon_type_id": 5, "logon_type": "OS Service"}
        case "replayed":
            kind = kinds.SERVICES[claims.kind]
            message = f"{service['name']} saw a replay of {claims.subject}{by}{colon_text}"
        case _:
            codes = {reason.code for reason in claims.reasons}
            kind = kinds.FINDINGS.get(codes.pop(), kinds.FINDING) if len(codes) == 1 else kinds.FINDING
            message = f"{service['name']} found: {text or claims.subject}"
    return event(
        signed, kind, message, attributes, fields,
        EventContext(
            agent or str(service["name"]), fields["request"] or fields["task"] or claims.ref, traceparent=traceparent
        ),
        reasons=claims.reasons,
    )  # fmt: skip


def is_sign_in(claims: ServiceEvent) -> bool:
    """Return whether a service event reports that a person began a console session."""
    return claims.kind == "accepted" and claims.subject == SessionStatement.typ and claims.actor is not None


def session_begun(signed: VerifiedMessage[ServiceEvent]) -> OcsfEvent:
    """A person signed in at a console: from now on the reporting service answers the console for that person."""
    claims = signed.claims
    service, person = user_of(claims.iss), user_of(claims.actor or "")
    message = f"{person['name']} signed in at the console, and {service['name']} answers it for them"
    session = {"uid": claims.ref}
    attributes = {
        "user": person, "actor": {"user": person, "session": session}, "session": session,
        "service": service_object(signed.record), "logon_type_id": 99, "logon_type": "Console",
        "auth_protocol_id": 99, "auth_protocol": "WebAuthn",
    }  # fmt: skip
    fields = {
        "subject": claims.subject, "given_by": claims.actor, "outcome": claims.kind, "said_by": service["name"],
    }  # fmt: skip
    key = str(person["name"])
    return event(signed, kinds.SESSION, message, attributes, fields, EventContext(key, claims.ref))


def epoch_began(signed: VerifiedMessage[LeaseEpoch]) -> OcsfEvent:
    """A rebuild of Redis from Kafka began: records of the Redis before it that Kafka does not have yet are void."""
    claims, revoker = signed.claims, user_of(signed.claims.iss)
    message = (
        f"{revoker['name']} rebuilds Redis from Kafka: epoch {claims.epoch} begins in partition {claims.partition} of "
        f"{signed.record.topic.what}"
    )
    attributes = _attributes(signed.record, revoker, actor=revoker)
    fields = {"epoch": claims.epoch, "outcome": "began"}
    return event(signed, kinds.EPOCH, message, attributes, fields, EventContext(str(revoker["name"])))


def dead_lettered(record: Received, claims: DeadLetter) -> OcsfEvent:
    """A service dead-lettered a record. The letter is unsigned, so its contents are unverified."""
    source = claims.source
    message = (
        f"{claims.service} is said to have dead-lettered a record of {source.topic} (partition {source.partition}, "
        f"offset {source.offset}): {scrubbed(claims.reason)}"
    )
    about = source.model_dump(exclude_none=True)
    fields = {"about": about, "said_by": claims.service, "outcome": "dead_lettered"}
    reasons = (Reason(code=claims.code, message=claims.reason[:2048]),)
    return event(
        record, kinds.DEAD_LETTER, message, _attributes(record), fields, EventContext(record.topic.what),
        reasons=reasons,
    )  # fmt: skip


def is_detection(claims: ServiceEvent) -> bool:
    """Return whether a service event is a finding with an event kind of its own."""
    return claims.kind == "finding" and bool(claims.reasons) and claims.reasons[0].code in kinds.DETECTIONS


def detected(signed: VerifiedMessage[ServiceEvent], fields: Mapping[str, Any]) -> OcsfEvent:
    """A service found keys or tokens shared between identities, or duties that are not separated.

    `fields`: the known fields of the subject: agent, sponsor, task and the like.
    """
    claims, service = signed.claims, user_of(signed.claims.iss)
    code = Code(claims.reasons[0].code)
    text = scrubbed("; ".join(reason.message for reason in claims.reasons))
    message = f"{service['name']} found: {text}"
    types = ["Separation of Duties" if code in _SEPARATION_OF_DUTIES else "Shared Identity"]
    attributes = {
        "finding_info": {
            "uid": claims.jti, "title": _DETECTION_TITLES[code], "types": types,
            "created_time": claims.at_ms,
        },
        "evidences": [{"actor": {"user": user_of(claims.actor or claims.iss)}}],
    }  # fmt: skip
    fields = {
        "agent": claims.agent_id,
        **fields,
        "subject": claims.subject,
        "given_by": claims.actor,
        "outcome": claims.kind,
        "about": claims.source.model_dump(exclude_none=True) if claims.source is not None else None,
    }
    key, kind = str(fields["agent"] or service["name"]), kinds.DETECTIONS[code]
    return event(signed, kind, message, attributes, fields, EventContext(key, key), reasons=claims.reasons)


def _attributes(
    record: Received, user: dict[str, Any] = UNKNOWN_USER, *, actor: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The attributes of an Authentication event: the logon of a user at the topic of a record."""
    by = {"actor": {"user": actor}} if actor is not None else {}
    return {"user": user, **by, "service": service_object(record), **PROTOCOL}


def service_object(record: Received) -> dict[str, Any]:
    """The OCSF `service` that a record logs on to: its topic."""
    return {"name": f"Ringfence {record.topic.what}", "uid": record.topic_name, "version": __version__}


def _event_key(fields: Mapping[str, Any], signer: dict[str, Any]) -> str:
    return str(fields.get("agent") or signer["name"])
