"""The schemas that the OpenAPI documents share, and an example of each that a caller meets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, TypeAdapter

from ringfence.client.approvals.action_approvals import PendingAction
from ringfence.messages.audit import AuditEvent
from ringfence.messages.base import Permission
from ringfence.messages.lease import Lease
from ringfence.messages.registry import AgentState, TargetState, TaskState, UserState
from ringfence.messages.run import Run
from tools.references.openapi.operation import (
    NUMBER,
    TEXT,
    YES_NO,
    Schema,
    maybe,
    objects,
    record,
    ref,
)


def _model(model: type[Any]) -> dict[str, Any]:
    """The members of a message, without the constraints that only writers need."""
    properties = TypeAdapter(model).json_schema()["properties"]
    return {"type": "object", "properties": {name: _kind(one) for name, one in properties.items()}}


def _kind(schema: dict[str, Any]) -> Schema:
    about = {"description": schema["description"]} if "description" in schema else {}
    if "type" in schema and schema["type"] in ("string", "integer", "number", "boolean"):
        return {"type": schema["type"], **about}
    if schema.get("type") == "array":
        return {"type": "array", **about}
    return dict(about)


def _entry(state: type[BaseModel]) -> Schema:
    return record(id=TEXT, revision=NUMBER, state=_model(state), optional={"record": TEXT})


SCHEMAS: Mapping[str, Schema] = {
    "Error": record(error=TEXT, message=TEXT),
    "OAuthError": record(error=TEXT, error_description=TEXT),
    "Message": record(message=TEXT),
    "Problem": record(type=TEXT, title=TEXT, status=NUMBER, optional={"code": TEXT, "detail": TEXT}),
    "Ready": record(status=TEXT, reasons=objects(TEXT), denies=objects(TEXT), optional={"warnings": objects(TEXT)}),
    "Permission": _model(Permission),
    "UserEntry": _entry(UserState),
    "AgentEntry": _entry(AgentState),
    "TargetEntry": _entry(TargetState),
    "TaskEntry": _entry(TaskState),
    "PendingApproval": record(
        request_id=TEXT, agent_id=TEXT, request=TEXT, required=objects(TEXT), expires_at=NUMBER, you_can_give=objects(TEXT),
        optional={"about": record(), "ttl_s": NUMBER, "delivery": TEXT, "revisions": record(), "reasons": objects(record()), "approvals": objects(TEXT)},
    ),
    "Decision": record(request_id=TEXT, agent_id=TEXT, outcome=TEXT, source=record(), reasons=objects(record())),
    "Grant": record(
        grant_id=TEXT, agent_id=TEXT, task_id=TEXT, scope=objects(ref("Permission")), count=NUMBER, ttl_s=NUMBER, by=TEXT,
        given_at=NUMBER, ends_at=NUMBER, used=NUMBER, status=TEXT,
    ),
    "Usage": record(
        agent_id=TEXT, registered_at=NUMBER, since=NUMBER, ceiling=objects(ref("Permission")), used=objects(record()),
        never_used=objects(record()), held=objects(record()), keys_seen=objects(record()), narrower=maybe(objects(ref("Permission"))),
    ),
    "AuthzenQuestion": record(
        subject=record(type=TEXT, id=TEXT), action=record(name=TEXT), resource=record(type=TEXT, id=TEXT), context=record(task_id=TEXT),
    ),
    "LeaseEntry": {**_model(Lease), "required": ["id", "written_by", "written_at", "agent_id", "status", "deadline"]},
    "RunEntry": {**_model(Run), "required": ["id", "runner", "over", "agent_id", "status"]},
    "AuditEvent": {**_model(AuditEvent), "required": ["class_uid", "time", "message", "metadata", "unmapped"]},
    "ScimUser": record(
        schemas=objects(TEXT), userName=TEXT,
        optional={"id": TEXT, "externalId": TEXT, "displayName": TEXT, "active": YES_NO, "emails": objects(record()), "meta": record()},
    ),
    "ScimGroup": record(
        schemas=objects(TEXT), displayName=TEXT, optional={"id": TEXT, "externalId": TEXT, "members": objects(record(value=TEXT)), "meta": record()},
    ),
    "ScimList": record(
        schemas=objects(TEXT), totalResults=NUMBER, optional={"Resources": objects(record()), "startIndex": NUMBER, "itemsPerPage": NUMBER}
    ),
    "ScimError": record(schemas=objects(TEXT), status=TEXT, optional={"detail": TEXT, "scimType": TEXT}),
    "SignalError": record(err=TEXT, description=TEXT),
    "SignalMetadata": record(
        spec_version=TEXT, issuer=TEXT, jwks_uri=TEXT, delivery_methods_supported=objects(TEXT), configuration_endpoint=TEXT, status_endpoint=TEXT,
        add_subject_endpoint=TEXT, remove_subject_endpoint=TEXT, verification_endpoint=TEXT, authorization_schemes=objects(record(spec_urn=TEXT)),
        default_subjects=TEXT,
    ),
    "SignalStream": record(
        stream_id=TEXT, iss=TEXT, aud=TEXT, delivery=record(method=TEXT, optional={"endpoint_url": TEXT}), events_supported=objects(TEXT),
        events_delivered=objects(TEXT), min_verification_interval=NUMBER, optional={"events_requested": objects(TEXT), "description": TEXT},
    ),
    "TaskView": record(
        task_id=TEXT, agent_id=TEXT, purpose=TEXT, status=TEXT, ends_at=NUMBER, on_behalf_of=TEXT, scope=objects(ref("Permission")),
        leases=objects(record(lease_id=TEXT, target=TEXT, scope=objects(ref("Permission")), ends_at=NUMBER)),
    ),
    "PendingAction": {**_model(PendingAction), "required": ["request_id", "agent", "task_id", "target", "verb", "resource"]},
}  # fmt: skip
