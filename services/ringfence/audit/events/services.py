"""Authentication events (OCSF class 3002): failed verification, replays, and what services report about themselves.

Every signature is a logon for one act. So a record whose signature fails, or that is a replay, is a failed logon of an
unknown user; a service that starts or stops logs on or off. Answers to requests are Authorize Session events (3003).

Findings of services about shared identity are Detection Findings (2004): a key that two use at once, a key that two
identities own, an identity token that two instances present. One identity must have one runner.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ringfence import __version__
from ringfence.audit.events.ocsf import (
    AUTHENTICATION,
    AUTHORIZE_SESSION,
    DENIED,
    DETECTION_FINDING,
    FAILURE,
    HIGH,
    LOW,
    MEDIUM,
    NEW,
    UNKNOWN_USER,
    EventKind,
    OcsfEvent,
    event,
    event_kind,
    scrubbed,
    user_of,
)
from ringfence.audit.memory import Sighting
from ringfence.kernel.base.text import with_article
from ringfence.messages.credential import CredentialDecision, CredentialRequest, Reason
from ringfence.messages.lease import LeaseEpoch
from ringfence.messages.operations import DeadLetter, ServiceEvent
from ringfence.messages.registry import SessionStatement

if TYPE_CHECKING:
    from ringfence.kernel.kafka.record import Received

_A = AUTHENTICATION
_STARTED = event_kind("service.started", _A, 1)
_STOPPED = event_kind("service.stopped", _A, 2)
_SESSION = event_kind("session.begun", _A, 1)
_REPLAY_REPORTED = event_kind("message.replayed", _A, 1, severity=MEDIUM, status=FAILURE, action=DENIED)
_FINDING = event_kind("finding", _A, "Finding", severity=HIGH, status=FAILURE, alert=True)
_KEY_ENDING = event_kind("key.ending", _A, "Warn", severity=MEDIUM, alert=True)
_KEY_ADDED = event_kind("key.added", _A, "Warn", severity=MEDIUM, alert=True)
_DEAD_LETTER = event_kind(
    "record.dead_lettered", _A, "Dead Letter", severity=LOW, status=FAILURE, action=DENIED
)
_MALFORMED = event_kind("record.not_believed", _A, 1, severity=MEDIUM, status=FAILURE, action=DENIED)
_FORGED = event_kind("record.not_believed", _A, 1, severity=HIGH, status=FAILURE, action=DENIED, alert=True)
_EXPIRED = event_kind("message.expired", _A, 1, severity=LOW, status=FAILURE, action=DENIED)
_REPLAYED = event_kind("message.replayed", _A, 1, severity=MEDIUM, status=FAILURE, action=DENIED, alert=True)
_EPOCH = event_kind("lease.epoch", _A, "Rebuild", severity=LOW)
_REPEATED = event_kind("message.repeated", _A, "Repeat")
_ABOUT_KEYS: Mapping[str, EventKind] = {"key_ending": _KEY_ENDING, "key_added": _KEY_ADDED}
_OUTCOMES: Mapping[str, EventKind] = {
    "accepted": event_kind("message.accepted", AUTHORIZE_SESSION, "Accept"),
    "refused": event_kind(
        "message.refused", AUTHORIZE_SESSION, "Refuse", severity=LOW, status=FAILURE, action=DENIED
    ),
}
_CREDENTIAL_REFUSED = event_kind(
    "credential.refused", AUTHORIZE_SESSION, 1, severity=LOW, status=FAILURE, action=DENIED
)
_ASKS_FOR_A_CREDENTIAL = frozenset({CredentialRequest.typ, CredentialDecision.typ})

_PROTOCOL = {"auth_protocol_id": 99, "auth_protocol": "JWS"}
_SHARED_IDENTITY_KINDS = {
    "key_shared": event_kind("key.shared", DETECTION_FINDING, 1, severity=HIGH, status=NEW, alert=True),
    "key_taken": event_kind("key.taken", DETECTION_FINDING, 1, severity=MEDIUM, status=NEW, alert=True),
    "token_replayed": event_kind(
        "token.replayed", DETECTION_FINDING, 1, severity=HIGH, status=NEW, alert=True
    ),
}
_SHARED_IDENTITY_TITLES = {
    "key_shared": "Two use one key at once",
    "key_taken": "One key for two identities",
    "token_replayed": "One identity token for two instances",
}

# Error messages may quote text of an unverified writer, so events have these texts instead.
_REASON_TEXTS: Mapping[str, str] = {
    "not_a_jws": "it is not a JWS in compact serialisation",
    "not_json": "it is not the JSON that belongs there",
    "not_a_jwe": "it is not a JWE in compact serialisation",
    "too_large": "it is larger than any message may be",
    "typ_unexpected": "its typ names another message",
    "claims_invalid": "its claims are not those of the message",
    "aud_unexpected": "it is for another trust domain",
    "key_unknown": "no key that may sign it signed it",
    "alg_unexpected": "its alg is not that of the key",
    "signature_invalid": "its signature does not verify",
    "chain_broken": "the commands that it embeds do not hold",
    "enrolment_invalid": "the enrolment of an instance in it does not hold",
    "enrolment_ended": "the enrolment of an instance in it is over",
    "issuer_untrusted": "the enrolment of an instance in it rests on an issuer that is not believed",
    "wrong_subject": "it is about another subject than it says",
    "tombstone": "it deletes a record, which nobody may",
}
_FORGERIES = frozenset(
    {
        "key_unknown",
        "alg_unexpected",
        "signature_invalid",
        "chain_broken",
        "enrolment_invalid",
        "wrong_subject",
        "tombstone",
    }
)


def not_believed(record: Received, code: str) -> OcsfEvent:
    """Verification of a record failed, with error `code`. The event names its coordinates, and no writer."""
    reason_text = _REASON_TEXTS.get(code, "it could not be read")
    message = (
        f"a record on {record.topic.what} (partition {record.partition}, offset {record.offset}) was seen and not "
        f"believed: {reason_text}"
    )
    attributes = {"user": UNKNOWN_USER, "service": _service_object(record), **_PROTOCOL}
    fields = {"verified": {"by": None}, "outcome": "not_believed", "size_bytes": len(record.value)}
    kind = _FORGED if code in _FORGERIES else _MALFORMED
    reason = Reason(code=code, message=reason_text)
    return event(record, kind, message, attributes, fields, key=record.topic.what, reasons=(reason,))


def expired(
    record: Received, iss: str, code: str, fields: dict[str, Any], verified: dict[str, Any]
) -> OcsfEvent:
    """The signature of a message holds, but it reached the broker outside its validity."""
    signer = user_of(iss)
    reason = Reason(code=code, message="it reached the broker outside the time that its signer gave it")
    message = f"{with_article(record.topic.what)} by {signer['name']} counts for nothing: {reason.message}"
    attributes = {"user": signer, "actor": {"user": signer}, "service": _service_object(record), **_PROTOCOL}
    event_fields = {**fields, "outcome": "expired", "verified": verified}
    return event(
        record, _EXPIRED, message, attributes, event_fields, key=_event_key(fields, signer), reasons=(reason,)
    )


def replayed(
    record: Received,
    iss: str,
    first: Sighting,
    *,
    same: bool,
    fields: dict[str, Any],
    verified: dict[str, Any],
) -> OcsfEvent:
    """A signed message is at other coordinates as well. It is not known who wrote it again.

    A service repeats a record if it does not know whether the record arrived: the `same` content raises no alert then.
    """
    signer = user_of(iss)
    by_service = signer["type"] == "System"
    place = f"partition {first.partition}, offset {first.offset}"
    fields = {
        **fields,
        "outcome": "replayed",
        "first_seen": {"partition": first.partition, "offset": first.offset},
        "verified": verified,
    }
    if by_service and same:
        message = (
            f"{with_article(record.topic.what)} record by {signer['name']} stands there twice ({place}); "
            "it changes nothing"
        )
        attributes = {"user": signer, "service": _service_object(record), **_PROTOCOL}
        return event(record, _REPEATED, message, attributes, fields, key=_event_key(fields, signer))
    reason = Reason(code="replayed", message=f"the same message was seen before, at {place}")
    message = (
        f"{with_article(record.topic.what)} signed by {signer['name']} was replayed, by whom is not known; "
        f"first at {place}"
    )
    attributes = {"user": UNKNOWN_USER, "service": _service_object(record), **_PROTOCOL}
    return event(
        record, _REPLAYED, message, attributes, fields, key=_event_key(fields, signer), reasons=(reason,)
    )


def reported(
    record: Received,
    claims: ServiceEvent,
    fields: dict[str, Any],
    verified: dict[str, Any],
    traceparent: str | None,
) -> OcsfEvent:
    """The event of a service event other than an answer to a command, which `registry.answered` builds.

    Args:
        record: the record on `service.event`.
        claims: its verified claims.
        fields: those of its subject: agent, sponsor, task, lease and the like, as far as they are known.
        verified: the field `unmapped.verified`.
        traceparent: the trace of the subject's request, if known.
    """
    service = user_of(claims.iss)
    event_fields = {
        "agent": claims.agent_id,
        "task": claims.task_id,
        "request": claims.request_id,
        "lease": claims.lease_id,
        **fields,
        "subject": claims.subject,
        "given_by": claims.actor,
        "result": claims.result,
        "instance": claims.enrolled.model_dump(exclude={"enrolled_at"}, exclude_none=True)
        if claims.enrolled
        else None,
        "outcome": claims.kind,
        "about": claims.source.model_dump(exclude_none=True) if claims.source is not None else None,
        "verified": verified,
    }
    agent = event_fields["agent"]
    rest: dict[str, Any] = {
        "key": agent or str(service["name"]),
        "correlation": event_fields["request"] or event_fields["task"] or claims.ref,
        "reasons": claims.reasons,
        "traceparent": traceparent,
    }
    text = scrubbed("; ".join(reason.message for reason in claims.reasons))
    by = f" by {user_of(claims.actor)['name']}" if claims.actor else ""
    if claims.kind in _OUTCOMES:
        message = f"{service['name']} {claims.kind} {claims.subject}{by}" + (f": {text}" if text else "")
        user = user_of(f"spiffe://{claims.aud}/agent/{agent}") if agent else UNKNOWN_USER
        attributes: dict[str, Any] = {"user": user, "actor": {"user": service}, "privileges": []}
        if claims.lease_id:
            attributes["session"] = {"uid": claims.lease_id}
        kind = _OUTCOMES[claims.kind]
        if claims.kind == "refused" and claims.subject in _ASKS_FOR_A_CREDENTIAL:
            kind = _CREDENTIAL_REFUSED
        return event(record, kind, message, attributes, event_fields, **rest)
    attributes = {
        "user": service,
        "actor": {"user": service},
        "service": _service_object(record),
        **_PROTOCOL,
    }
    match claims.kind:
        case "started" | "stopped":
            kind = _STARTED if claims.kind == "started" else _STOPPED
            message = f"service {service['name']} {claims.kind}"
            attributes |= {"logon_type_id": 5, "logon_type": "OS Service"}
        case "replayed":
            kind = _REPLAY_REPORTED
            message = f"{service['name']} saw a replay of {claims.subject}{by}" + (
                f": {text}" if text else ""
            )
        case _:
            codes = {reason.code for reason in claims.reasons}
            kind = _ABOUT_KEYS.get(next(iter(codes)), _FINDING) if len(codes) == 1 else _FINDING
            message = f"{service['name']} found: {text or claims.subject}"
    return event(record, kind, message, attributes, event_fields, **rest)


def is_sign_in(claims: ServiceEvent) -> bool:
    """Return whether a service event reports that a person began a console session."""
    return claims.kind == "accepted" and claims.subject == SessionStatement.typ and claims.actor is not None


def session_begun(record: Received, claims: ServiceEvent, verified: dict[str, Any]) -> OcsfEvent:
    """A person signed in at a console: from now on the reporting service answers the console for that person."""
    service, person = user_of(claims.iss), user_of(claims.actor or "")
    message = f"{person['name']} signed in at the console, and {service['name']} answers it for them"
    attributes = {
        "user": person,
        "actor": {"user": person, "session": {"uid": claims.ref}},
        "session": {"uid": claims.ref},
        "service": _service_object(record),
        "logon_type_id": 99,
        "logon_type": "Console",
        "auth_protocol_id": 99,
        "auth_protocol": "WebAuthn",
    }
    fields = {
        "subject": claims.subject, "given_by": claims.actor, "outcome": claims.kind, "said_by": service["name"],
        "verified": verified,
    }  # fmt: skip
    return event(
        record, _SESSION, message, attributes, fields, key=str(person["name"]), correlation=claims.ref
    )


def epoch_began(record: Received, claims: LeaseEpoch, verified: dict[str, Any]) -> OcsfEvent:
    """A rebuild of Redis from Kafka began: records of the former Redis that Kafka does not have yet are void."""
    revoker = user_of(claims.iss)
    message = (
        f"{revoker['name']} rebuilds Redis from Kafka: epoch {claims.epoch} begins in partition {claims.partition} of "
        f"{record.topic.what}"
    )
    attributes = {
        "user": revoker,
        "actor": {"user": revoker},
        "service": _service_object(record),
        **_PROTOCOL,
    }
    fields = {"epoch": claims.epoch, "outcome": "began", "verified": verified}
    return event(record, _EPOCH, message, attributes, fields, key=str(revoker["name"]))


def dead_lettered(record: Received, claims: DeadLetter) -> OcsfEvent:
    """A service dead-lettered a record. The letter is unsigned, so its contents are unverified."""
    source = claims.source
    message = (
        f"{claims.service} is said to have dead-lettered a record of {source.topic} (partition {source.partition}, "
        f"offset {source.offset}): {scrubbed(claims.reason)}"
    )
    attributes = {"user": UNKNOWN_USER, "service": _service_object(record), **_PROTOCOL}
    fields = {
        "about": source.model_dump(exclude_none=True),
        "said_by": claims.service,
        "outcome": "dead_lettered",
        "verified": {"by": None},
    }
    reason = Reason(code=claims.code, message=claims.reason[:2048])
    return event(record, _DEAD_LETTER, message, attributes, fields, key=record.topic.what, reasons=(reason,))


def _service_object(record: Received) -> dict[str, Any]:
    return {"name": f"Ringfence {record.topic.what}", "uid": record.topic_name, "version": __version__}


def _event_key(fields: dict[str, Any], signer: dict[str, Any]) -> str:
    return str(fields.get("agent") or signer["name"])


def is_shared_identity(claims: ServiceEvent) -> bool:
    """Whether a service event is a finding about shared identity."""
    return (
        claims.kind == "finding" and bool(claims.reasons) and claims.reasons[0].code in _SHARED_IDENTITY_KINDS
    )


def shared_identity(
    record: Received, claims: ServiceEvent, fields: Mapping[str, Any], verified: dict[str, Any]
) -> OcsfEvent:
    """A service found keys or tokens shared between identities.

    `fields`: the known fields of the subject: agent, sponsor, task and the like.
    """
    code = claims.reasons[0].code
    message = f"{user_of(claims.iss)['name']} found: {scrubbed(claims.reasons[0].message)}"
    attributes = {
        "finding_info": {
            "uid": claims.jti, "title": _SHARED_IDENTITY_TITLES[code], "types": ["Shared Identity"],
            "created_time": claims.at_ms,
        },
        "evidences": [{"actor": {"user": user_of(claims.actor or claims.iss)}}],
    }  # fmt: skip
    event_fields = {
        "agent": claims.agent_id,
        **fields,
        "subject": claims.subject,
        "given_by": claims.actor,
        "outcome": claims.kind,
        "about": claims.source.model_dump(exclude_none=True) if claims.source is not None else None,
        "verified": verified,
    }
    key = str(event_fields["agent"] or user_of(claims.iss)["name"])
    return event(
        record,
        _SHARED_IDENTITY_KINDS[code],
        message,
        attributes,
        event_fields,
        key=key,
        correlation=key,
        reasons=claims.reasons,
    )
