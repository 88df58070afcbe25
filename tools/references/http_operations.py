"""The operations of the HTTP APIs: what a caller sends, and what comes back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from ringfence.console.security import QUESTION_PATH
from ringfence.console.views.pages import PAGES
from ringfence.messages.api import CONSOLE_PORT, GATEWAY_PORT, PORTS
from ringfence.messages.audit import AuditEvent
from ringfence.messages.lease import Lease
from ringfence.messages.permission import Permission
from ringfence.messages.registry import AgentState, TargetState, TaskState, UserState
from ringfence.messages.run import Run

Schema = Mapping[str, Any]
JSON = "application/json"
TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "integer"}
YES_NO: Schema = {"type": "boolean"}
ANY: Schema = {}


def ref(name: str) -> Schema:
    """A reference to one of `SCHEMAS`."""
    return {"$ref": f"#/components/schemas/{name}"}


def objects(schema: Schema) -> Schema:
    """An array."""
    return {"type": "array", "items": schema}


def maybe(schema: Schema) -> Schema:
    """A value that may be null."""
    return {"anyOf": [schema, {"type": "null"}]}


def record(*, optional: Mapping[str, Schema] | None = None, **required: Schema) -> Schema:
    """An object with these members; others may come in later versions."""
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


@dataclass(frozen=True)
class Answer:
    """One answer of an operation. Without `media` it has no body, or one that is not described."""

    about: str
    media: str | None = JSON
    schema: Schema | None = None


_ERROR = ref("Error")
_BY_AUTH: Mapping[str, Mapping[int, Answer]] = {
    "user": {401: Answer("the token is missing, or does not count", schema=_ERROR)},
    "target": {401: Answer("the token is missing, or does not count", schema=_ERROR)},
    "gateway": {401: Answer("the token is missing, or does not count", schema=_ERROR)},
    "console": {401: Answer("the token is missing, or does not count", schema=_ERROR)},
    "bearer": {
        401: Answer("the token is missing, or does not count", None),
        429: Answer("too many calls without a valid token; try again later", None),
    },
    "dpop": {
        401: Answer(
            "the proof is missing, or does not count; `DPoP-Nonce` has the nonce for the next one",
            "application/problem+json",
            ref("Problem"),
        )
    },
    "session": {},
}


@dataclass(frozen=True)
class Operation:
    """One method of one path."""

    method: str
    path: str
    summary: str
    answers: Mapping[int, Answer]
    auth: str | None = "user"
    query: Mapping[str, str] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    body: tuple[str, Schema] | None = None

    @property
    def id(self) -> str:
        """Its name in programs that are made from the document."""
        words: list[str] = re.findall(r"\w+", f"{self.method.lower()} {self.path}")
        return words[0] + "".join(word[:1].upper() + word[1:] for word in words[1:])

    def all_answers(self) -> dict[int, Answer]:
        """Its own answers, and those that all operations of its kind of caller have."""
        return {**(_BY_AUTH[self.auth] if self.auth else {}), **self.answers}


@dataclass(frozen=True)
class Api:
    """The API of one service."""

    title: str
    about: str
    port: int
    operations: tuple[Operation, ...]


def _ok(
    schema: Schema | None = None, *, media: str = JSON, about: str = "done", **more: Schema
) -> dict[int, Answer]:
    return {200: Answer(about, media, schema if schema is not None else record(**more))}


_NOT_FOUND = {404: Answer("there is none that the caller may see", schema=_ERROR)}
_WRONG_QUERY = {
    400: Answer("a parameter is wrong; the message says which, and what it has to be", schema=_ERROR)
}
_NO_PROOF = {400: Answer("no checkpoint covers the event yet; ask again in a few seconds", schema=_ERROR)}
_NOT_YET = {503: Answer("the service is still reading; ask again when it is ready", schema=_ERROR)}
_RECORDS = {"records": "`1` adds the signed record, so that the caller can verify it"}
_PAGE = {"after": "the cursor of the page before", "limit": "the most entries of a page"}
_SPAN = {"since_ms": "from then on, in milliseconds since 1970", "until_ms": "up to then; now if not given"}
_REPORT = {"until_ms": NUMBER, "looked_at_ms": maybe(objects(NUMBER)), "after": maybe(TEXT)}
_LIST_REPORT = {**_REPORT, "looked_at_ms": maybe(NUMBER)}
_FILTERS = {
    "agent": "only of this agent",
    "task": "only of this task",
    "run": "only of this run",
    "request": "only of this request",
    "lease": "only of this lease",
    "target": "only at this target",
    "sponsor": "only with this sponsor",
    "on_behalf_of": "only on behalf of this user",
    "class": "only of this OCSF class",
    "code": "event codes, with commas between; `*` may end one",
    "status": "only with this status",
    "severity": "this severity or a higher one",
}

COMMON = (
    Operation("GET", "/healthz", "Whether the process answers.", _ok(record(status=TEXT)), None),
    Operation(
        "GET", "/readyz", "Whether the service is ready, why not, and what it denies.",
        {**_ok(ref("Ready")), 503: Answer("not ready", schema=ref("Ready"))}, None,
    ),
    Operation("GET", "/metrics", "Metrics in the format of Prometheus.", _ok({"type": "string"}, media="text/plain"), None),
)  # fmt: skip


def _list(kind: str, query: Mapping[str, str] | None = None) -> tuple[Operation, ...]:
    entry = ref(f"{kind.title()}Entry")
    return (
        Operation(
            "GET",
            f"/v1/{kind}s",
            f"The {kind}s that the caller may see.",
            _ok(record(**{f"{kind}s": objects(entry)})),
            query={**_RECORDS, **(query or {})},
        ),
        Operation("GET", f"/v1/{kind}s/{{id}}", f"One {kind}.", {**_ok(entry), **_NOT_FOUND}, query=_RECORDS),
    )


_REGISTRY = Api(
    "Registry", "Users, agents, targets and tasks; the enrolment of running instances.", PORTS["registry"],
    (
        *COMMON,
        *_list("user"),
        *_list("agent"),
        *_list("target"),
        *_list("task", {
            "agent": "only of this agent", "parent": "only parts of this task", "status": "`active` or `ended`",
            "beyond_limit": "`1`: only those that last longer than a new one may",
        }),
        Operation("GET", "/v1/trust", "The trust bundle in force.", _ok(trust=TEXT), "console"),
        Operation("GET", "/v1/passkeys/{credential_id}", "Whose passkey it is.", {**_ok(user_id=TEXT, kid=TEXT), **_NOT_FOUND}, "console"),
        Operation(
            "POST", "/v1/enrol", "Enrol the key of a running instance. The signed body says who sends it.",
            {**_ok(enrolment=TEXT), 400: Answer("refused; `error` says why", schema=_ERROR)}, None,
            body=("application/jose", TEXT),
        ),
    ),
)  # fmt: skip

_EVALUATION = record(decision=YES_NO, optional={"context": record()})
_POLICY = Api(
    "Policy", "Open approvals, decisions, grants, the inventory; decisions for others by AuthZEN.", PORTS["policy"],
    (
        *COMMON,
        Operation("GET", "/v1/approvals", "Requests that wait for a person.", _ok(approvals=objects(ref("PendingApproval")))),
        Operation("GET", "/v1/approvals/{request_id}", "One of them.", {**_ok(ref("PendingApproval")), **_NOT_FOUND}),
        Operation(
            "GET", "/v1/approvals/{request_id}/evidence", "The signed messages by which the sign page shows the question.",
            {**_ok(trust=TEXT, question=TEXT, records=objects(TEXT)), **_NOT_FOUND},
        ),
        Operation("GET", "/v1/action-approvals", "Single actions that wait for a person.", _ok(actions=objects(record(request_id=TEXT)))),
        Operation("GET", "/v1/action-approvals/{request_id}", "One of them.", {**_ok(record(request_id=TEXT)), **_NOT_FOUND}),
        Operation(
            "GET", "/v1/action-approvals/{request_id}/evidence", "The signed messages by which the sign page shows it.",
            {**_ok(trust=TEXT, records=objects(TEXT)), **_NOT_FOUND},
        ),
        Operation("GET", "/v1/decisions/{request_id}", "The decision on a request.", {**_ok(ref("Decision")), **_NOT_FOUND}),
        Operation(
            "GET", "/v1/decisions/{request_id}/explanation", "Why it was decided so, side by side.", {**_ok(record(request_id=TEXT)), **_NOT_FOUND},
            query={"partition": "of the decision, for one that policy has forgotten", "offset": "of the decision"},
        ),
        Operation("GET", "/v1/bundle", "The revision of the policy bundle.", _ok(revision=TEXT)),
        Operation("GET", "/v1/grants", "Approvals in advance.", _ok(grants=objects(ref("Grant")))),
        Operation("GET", "/v1/grants/{grant_id}", "One of them.", {**_ok(ref("Grant")), **_NOT_FOUND}),
        Operation("GET", "/v1/agents/{agent_id}/usage", "What an agent may, holds and used.", {**_ok(ref("Usage")), **_NOT_FOUND}),
        Operation(
            "GET", "/v1/inventory", "Agents page by page; the first page has sums over all.",
            {**_ok(at_ms=NUMBER, agents=objects(record(id=TEXT)), after=maybe(TEXT), cursor=TEXT, gaps=objects(TEXT)), **_WRONG_QUERY, **_NOT_YET},
            query={
                **_PAGE, "agent": "only this agent", "sponsor": "only agents of this sponsor", "status": "only with this status",
                "target": "only with this target in the ceiling", "orphans": "`1`: only orphans", "unused": "`1`: only with unused verbs",
                "standing": "`1`: only with standing leases", "keys_ending": "`1`: only with a last key that ends soon",
                "keys_within_s": "how soon, in seconds",
            },
        ),
        Operation(
            "GET", "/v1/inventory/changes", "Agents that changed after a cursor.",
            {**_ok(at_ms=NUMBER, agents=objects(record(id=TEXT, fits=YES_NO)), cursor=TEXT, gaps=objects(TEXT)), **_WRONG_QUERY, **_NOT_YET},
            query={"after": "the cursor that the inventory gave"}, required=("after",),
        ),
        Operation(
            "GET", "/v1/reach", "Which agents could act at a target now.",
            {**_ok(at_ms=NUMBER, exists=YES_NO, agents=objects(record(id=TEXT)), after=maybe(TEXT), gaps=objects(TEXT)), **_WRONG_QUERY, **_NOT_YET},
            query={"target": "the target", "verb": "only this verb", "resource": "only this resource", "after": _PAGE["after"]},
            required=("target",),
        ),
        Operation(
            "GET", "/.well-known/authzen-configuration", "Metadata of AuthZEN 1.0.",
            _ok(policy_decision_point=TEXT, access_evaluation_endpoint=TEXT, access_evaluations_endpoint=TEXT), None,
        ),
        Operation(
            "POST", "/access/v1/evaluation", "The decision that a request would get now (AuthZEN 1.0).",
            {
                **_ok(_EVALUATION), 400: Answer("the question is not understood", "text/plain", TEXT),
                401: Answer("the token is missing, or does not count", "text/plain", TEXT),
                403: Answer("the question is about another target", "text/plain", TEXT),
            },
            "target", body=(JSON, ref("AuthzenQuestion")),
        ),
        Operation(
            "POST", "/access/v1/evaluations", "Several such decisions in one call, 64 at most.",
            {
                **_ok(evaluations=objects(_EVALUATION)), 400: Answer("the question is not understood", "text/plain", TEXT),
                401: Answer("the token is missing, or does not count", "text/plain", TEXT),
            },
            "target", body=(JSON, record(optional={"evaluations": objects(ref("AuthzenQuestion")), "options": record()})),
        ),
    ),
)  # fmt: skip

_ISSUER_METADATA = record(issuer=TEXT, jwks_uri=TEXT, introspection_endpoint=TEXT)
_ISSUER = Api(
    "Issuer", "For resource servers: metadata, keys and introspection of tokens. For gateways: credentials that are sealed to them.", PORTS["issuer"],
    (
        *COMMON,
        Operation("GET", "/.well-known/openid-configuration", "OpenID Connect Discovery 1.0.", _ok(_ISSUER_METADATA), None),
        Operation("GET", "/.well-known/oauth-authorization-server", "Authorization server metadata (RFC 8414).", _ok(_ISSUER_METADATA), None),
        Operation("GET", "/.well-known/jwks.json", "The keys that verify tokens (RFC 7517).", _ok(keys=objects(record(kty=TEXT, kid=TEXT))), None),
        Operation(
            "POST", "/oauth2/introspect", "Whether a token is active (RFC 7662); only its own target learns it.",
            {**_ok(active=YES_NO), 400: Answer("there is no form field `token`", schema=record(error=TEXT, error_description=TEXT))},
            "target", body=("application/x-www-form-urlencoded", record(token=TEXT)),
        ),
        Operation(
            "GET", "/v1/leases/{lease_id}/sealed-credential", "The credential of a live lease, sealed to the gateway that asks.",
            {200: Answer("a JWE in JSON", "application/jose+json", record()), **_NOT_FOUND}, "gateway",
        ),
    ),
)  # fmt: skip

_REVOKER = Api(
    "Revoker", "Leases and runs.", PORTS["revoker"],
    (
        *COMMON,
        Operation(
            "GET", "/v1/leases", "Leases that have not ended, 1,000 at most.", _ok(leases=objects(ref("LeaseEntry")), more=YES_NO),
            query={
                "agent": "only of this agent", "task": "only of this task and its parts", "target": "only for this target",
                "user": "only on behalf of this user", "sponsor": "only of agents of this sponsor", "status": "only with this status",
                "overdue": "`1`: cut, and the credential is not removed yet",
            },
        ),
        Operation("GET", "/v1/leases/{id}", "One lease, as long as Redis keeps it.", {**_ok(ref("LeaseEntry")), **_NOT_FOUND}, query=_RECORDS),
        Operation(
            "GET", "/v1/runs", "Runs, 1,000 at most; the latest first.", _ok(runs=objects(ref("RunEntry")), more=YES_NO),
            query={"all": "`1`: also those that are over", "agent": "only of this agent", "task": "only of this task", "runner": "only on this runner"},
        ),
        Operation("GET", "/v1/runs/{id}", "One run, by its id or its order's.", {**_ok(ref("RunEntry")), **_NOT_FOUND}),
        Operation("GET", "/v1/pools", "Pools with a runner that was heard lately.", _ok(pools=objects(record(name=TEXT))), query={"label": "`NAME=VALUE`, repeatable"}),
    ),
)  # fmt: skip

_AUDIT = Api(
    "Audit", "Events, traces, reports and proofs.", PORTS["audit"],
    (
        *COMMON,
        Operation(
            "GET", "/v1/trace/{id}", "Everything about a lease, request, task, agent, user or run, as a tree.",
            {**_ok(id=TEXT, kind=TEXT, truncated=YES_NO, roots=objects(record())), **_NOT_FOUND, **_WRONG_QUERY},
            query={"kind": "what the id is of, where several have it", "limit": _PAGE["limit"]},
        ),
        Operation(
            "GET", "/v1/events", "Events in the order of the trail.", {**_ok(events=objects(ref("AuditEvent")), after=maybe(TEXT)), **_WRONG_QUERY},
            query={**_PAGE, **_FILTERS},
        ),
        Operation(
            "GET", "/v1/export", "Events to the byte as on the topic, as text.", {**_ok(record(events=objects(TEXT), **_LIST_REPORT)), **_WRONG_QUERY, **_NOT_YET},
            query={**_PAGE, **_SPAN, **_FILTERS},
        ),
        Operation(
            "GET", "/v1/actions", "What gateways allowed and blocked, in groups.",
            {**_ok(record(groups=objects(record()), unknown_destinations=objects(record()), **_REPORT)), **_WRONG_QUERY, **_NOT_YET},
            query={**_PAGE, **_SPAN, "agent": _FILTERS["agent"], "target": _FILTERS["target"], "step_ms": "adds counts over time, in steps of so many milliseconds"},
        ),
        Operation(
            "GET", "/v1/approval-history", "How people answered requests of agents before: equal answers by their number.",
            {**_ok(agents=record()), **_WRONG_QUERY, **_NOT_YET},
            query={"agent": "an agent; at most 100 of them", "since_ms": _SPAN["since_ms"], "except": "a request whose answers are left out; at most 1000 of them"},
            required=("agent",),
        ),
        Operation("GET", "/v1/break-glass", "Uses of break glass, and their reviews.", _ok(uses=objects(record())), query={"unreviewed": "any value: only those without a review"}),
        Operation(
            "GET", "/v1/coverage/leases", "How many leases lead back to a person.",
            {**_ok(record(total=NUMBER, agents=record(), **_REPORT)), **_WRONG_QUERY, **_NOT_YET},
            query={**_PAGE, **_SPAN, "short_s": "what counts as short-lived, in seconds"},
        ),
        Operation(
            "GET", "/v1/coverage/actions", "How many actions lead back to a person.",
            {**_ok(record(total=NUMBER, agents=record(), **_REPORT)), **_WRONG_QUERY, **_NOT_YET}, query={**_PAGE, **_SPAN},
        ),
        Operation(
            "GET", "/v1/who", "Who used a permission at a target.", {**_ok(record(lines=objects(record()), **_REPORT)), **_WRONG_QUERY, **_NOT_YET},
            query={**_PAGE, **_SPAN, "target": "the target", "verb": "only this verb", "resource": "only this resource"}, required=("target",),
        ),
        Operation("GET", "/v1/checkpoints", "The signed checkpoints of all chains.", _ok(checkpoints=objects(TEXT))),
        Operation(
            "GET", "/v1/checkpoints/{tree}/consistency", "The proof that a chain only grew (RFC 9162).",
            {**_ok(proof=objects(TEXT), checkpoint=TEXT), **_NOT_FOUND, **_WRONG_QUERY},
            query={"from": "the size of the tree that the caller knows"}, required=("from",),
        ),
        Operation(
            "GET", "/v1/events/{uid}/proof", "The proof that an event is in its chain (RFC 9162).",
            {**_ok(event=TEXT, leaf_index=NUMBER, leaf_hash=TEXT, proof=objects(TEXT), checkpoint=TEXT), **_NOT_FOUND, **_NO_PROOF},
        ),
    ),
)  # fmt: skip

_GATEWAY = Api(
    "Gateway, for people", "Whether a lease can be used at this gateway.", PORTS["gateway"],
    (
        *COMMON,
        Operation(
            "GET", "/v1/leases/{lease_id}", "Whether a lease can be used here now, and if not, why.",
            {**_ok(lease_id=TEXT, status=TEXT, usable=YES_NO, reason=maybe(TEXT)), **_NOT_FOUND},
        ),
    ),
)  # fmt: skip

_PROBLEM = ref("Problem")
_AGENT_ERRORS = {
    404: Answer("there is no such request of the caller", "application/problem+json", _PROBLEM),
    429: Answer(
        "too many calls; `Retry-After` says when to come again", "application/problem+json", _PROBLEM
    ),
}
_AGENTS = Api(
    "Gateway, for agents", "Requests of agents without Kafka: [HTTP access](../http-access.md). Its host is `ringfence` by a proxy, or the gateway itself.", GATEWAY_PORT,
    (
        Operation(
            "POST", "/v1/requests", "Post one signed message: a request, a withdrawal or a release.",
            {
                202: Answer("verified and published", schema=record(id=TEXT, optional={"status": TEXT})),
                400: Answer("the message does not count", "application/problem+json", _PROBLEM),
                413: Answer("the message is too large", "application/problem+json", _PROBLEM),
                415: Answer("it is not `application/jose`", "application/problem+json", _PROBLEM),
                429: _AGENT_ERRORS[429],
            },
            "dpop", body=("application/jose", TEXT),
        ),
        Operation(
            "GET", "/v1/requests/{id}", "The sealed reply to a request; with `wait`, once it comes.",
            {200: Answer("a sealed reply", "application/jose", TEXT), 202: Answer("no reply yet", schema=record(id=TEXT, status=TEXT)), **_AGENT_ERRORS},
            "dpop", query={"wait": "how long to wait for a reply, such as `30s`", "after": "the number of the reply before"},
        ),
        Operation("GET", "/v1/trust", "The signed trust bundle.", {200: Answer("a JWS", "application/jose", TEXT)}, None),
    ),
)  # fmt: skip

_SCIM = "application/scim+json"
_USER, _GROUP, _SEARCH, _PAGE_OF = ref("ScimResource"), ref("ScimResource"), record(), ref("ScimList")
_SCIM_404 = {404: Answer("there is none", _SCIM, ref("ScimError"))}
_SCIM_400 = {400: Answer("the resource is wrong", _SCIM, ref("ScimError"))}
_SCIM_409 = {409: Answer("there is one with this name", _SCIM, ref("ScimError"))}


def _scim_resources(name: str) -> tuple[Operation, ...]:
    path, one = f"/scim/v2/{name}s", name.lower()
    query = {
        "filter": "RFC 7644, 3.4.2.2",
        "startIndex": "the first entry, from 1",
        "count": "the most entries",
    }
    return (
        Operation("GET", path, f"The {one}s.", _ok(_PAGE_OF, media=_SCIM), "bearer", query=query),
        Operation(
            "POST",
            path,
            f"Create a {one}.",
            {201: Answer("created", _SCIM, _USER), **_SCIM_400, **_SCIM_409},
            "bearer",
            body=(_SCIM, _USER),
        ),
        Operation(
            "POST",
            f"{path}/.search",
            f"Search {one}s.",
            _ok(_PAGE_OF, media=_SCIM),
            "bearer",
            body=(_SCIM, _SEARCH),
        ),
        Operation("GET", f"{path}/{{id}}", f"One {one}.", {**_ok(_USER, media=_SCIM), **_SCIM_404}, "bearer"),
        Operation(
            "PUT",
            f"{path}/{{id}}",
            f"Replace a {one}.",
            {**_ok(_USER, media=_SCIM), **_SCIM_400, **_SCIM_404},
            "bearer",
            body=(_SCIM, _USER),
        ),
        Operation(
            "PATCH",
            f"{path}/{{id}}",
            f"Change a {one}.",
            {**_ok(_USER, media=_SCIM), **_SCIM_400, **_SCIM_404},
            "bearer",
            body=(_SCIM, record()),
        ),
        Operation(
            "DELETE",
            f"{path}/{{id}}",
            f"Remove a {one}.",
            {204: Answer("removed", None), **_SCIM_404},
            "bearer",
        ),
    )


_SCIM_API = Api(
    "SCIM", "Users and groups from a directory: SCIM 2.0 (RFC 7643, RFC 7644).", PORTS["scim"],
    (
        *COMMON,
        Operation("GET", "/scim/v2/ServiceProviderConfig", "What this endpoint can.", _ok(record(), media=_SCIM), "bearer"),
        Operation("GET", "/scim/v2/ResourceTypes", "The types of resources.", _ok(_PAGE_OF, media=_SCIM), "bearer"),
        Operation("GET", "/scim/v2/ResourceTypes/{id}", "One of them.", {**_ok(record(), media=_SCIM), **_SCIM_404}, "bearer"),
        Operation("GET", "/scim/v2/Schemas", "The schemas of resources.", _ok(_PAGE_OF, media=_SCIM), "bearer"),
        Operation("GET", "/scim/v2/Schemas/{id}", "One of them.", {**_ok(record(), media=_SCIM), **_SCIM_404}, "bearer"),
        Operation("POST", "/scim/v2/.search", "Search users and groups.", _ok(_PAGE_OF, media=_SCIM), "bearer", body=(_SCIM, _SEARCH)),
        *_scim_resources("User"),
        *_scim_resources("Group"),
    ),
)  # fmt: skip

_STREAM, _STREAM_ID = ref("SignalStream"), {"stream_id": "the stream"}
_SSF_404 = {404: Answer("the receiver has no such stream", None)}
_SSF_400 = {400: Answer("the request is wrong", None)}
_SIGNALS = Api(
    "Signals", "Ends of leases for systems outside: OpenID Shared Signals Framework 1.0.", PORTS["signals"],
    (
        *COMMON,
        Operation("GET", "/.well-known/ssf-configuration", "Metadata of the transmitter.", _ok(issuer=TEXT, jwks_uri=TEXT, configuration_endpoint=TEXT), None),
        Operation("GET", "/.well-known/jwks.json", "The keys that verify event tokens.", _ok(keys=objects(record(kty=TEXT, kid=TEXT))), None),
        Operation("POST", "/ssf/streams", "Create the stream of this receiver.", {201: Answer("created", schema=_STREAM), **_SSF_400, 409: Answer("there is one already", None)}, "bearer", body=(JSON, record())),
        Operation("GET", "/ssf/streams", "The stream, or a list of it.", {**_ok({"anyOf": [_STREAM, objects(_STREAM)]}), **_SSF_404}, "bearer", query=_STREAM_ID),
        Operation("PATCH", "/ssf/streams", "Change some members of the stream.", {**_ok(_STREAM), **_SSF_400, **_SSF_404}, "bearer", body=(JSON, record(stream_id=TEXT))),
        Operation("PUT", "/ssf/streams", "Replace the configuration of the stream.", {**_ok(_STREAM), **_SSF_400, **_SSF_404}, "bearer", body=(JSON, record(stream_id=TEXT))),
        Operation("DELETE", "/ssf/streams", "Delete the stream.", {204: Answer("deleted", None), **_SSF_404}, "bearer", query=_STREAM_ID, required=("stream_id",)),
        Operation("GET", "/ssf/status", "The status of the stream.", {**_ok(stream_id=TEXT, status=TEXT), **_SSF_404}, "bearer", query=_STREAM_ID, required=("stream_id",)),
        Operation("POST", "/ssf/status", "Set it.", {**_ok(stream_id=TEXT, status=TEXT), **_SSF_400, **_SSF_404}, "bearer", body=(JSON, record(stream_id=TEXT, status=TEXT))),
        Operation("POST", "/ssf/subjects/add", "Add a subject again.", {200: Answer("done", None), **_SSF_400, **_SSF_404}, "bearer", body=(JSON, record(stream_id=TEXT, subject=record()))),
        Operation("POST", "/ssf/subjects/remove", "Leave a subject out.", {204: Answer("done", None), **_SSF_400, **_SSF_404}, "bearer", body=(JSON, record(stream_id=TEXT, subject=record()))),
        Operation("POST", "/ssf/verify", "Ask for a verification event.", {204: Answer("it will come", None), **_SSF_400, **_SSF_404, 429: Answer("asked too often", None)}, "bearer", body=(JSON, record(stream_id=TEXT))),
        Operation("POST", "/ssf/poll/{stream_id}", "Take events and acknowledge others (RFC 8936).", {**_ok(sets=record(), moreAvailable=YES_NO), **_SSF_400, **_SSF_404}, "bearer", body=(JSON, record())),
    ),
)  # fmt: skip

_HTML = "text/html"
_SEE_OTHER = {303: Answer("to another page; without a session to the sign-in", None)}


def _console_page(path: str, summary: str) -> Operation:
    return Operation("GET", path, summary, {200: Answer("a page", _HTML, TEXT), **_SEE_OTHER}, "session")


_CONSOLE = Api(
    "Console", "The web application of people: [the console](../console.md). It is for browsers, and no contract for programs.", CONSOLE_PORT,
    (
        Operation("GET", "/healthz", "Whether the process answers.", _ok(record(status=TEXT)), None),
        Operation("GET", "/readyz", "Whether the console is ready.", {**_ok(record()), 503: Answer("not ready", schema=record())}, None),
        COMMON[2],
        Operation("GET", "/static/{name}", "Scripts and styles.", {200: Answer("a file", None), 404: Answer("there is none", None)}, None),
        Operation("GET", "/sign-in", "The page for signing in.", {200: Answer("a page", _HTML, TEXT)}, None),
        Operation("POST", "/sign-in/find", "Whose passkey it is.", {**_ok(record()), 400: Answer("wrong", None), 404: Answer("nobody's", None)}, None, body=(JSON, record(credential_id=TEXT))),
        Operation("POST", "/sign-in/begin", "The statement to sign.", {**_ok(typ=TEXT, claims=record()), 400: Answer("wrong", None)}, None, body=(JSON, record(user_id=TEXT))),
        Operation("POST", "/sign-in/finish", "Begin the session.", {**_ok(user_id=TEXT), 403: Answer("not for this browser", None)}, None, body=(JSON, record(statement=TEXT))),
        Operation("POST", "/sign-out", "End the session.", _SEE_OTHER, "session"),
        Operation("POST", "/sign/{kind}", "Compose a question, and lead to the sign page with it.", {**_SEE_OTHER, 400: Answer("wrong", _HTML, TEXT)}, "session"),
        Operation("POST", "/offer", "Make an offer of an agent, and lead to its page.", _SEE_OTHER, "session"),
        Operation("GET", QUESTION_PATH + "{path}", "A question, for the sign page.", {**_ok(record()), 404: Answer("there is none", None)}, None),
        Operation("POST", QUESTION_PATH + "{path}", "Its answer.", {**_ok(record()), 404: Answer("there is none", None)}, None, body=(JSON, record())),
        Operation("GET", "/live", "Server-sent events of a page.", {200: Answer("events", "text/event-stream"), 204: Answer("there is nothing to wait for", None)}, "session"),
        Operation("GET", "/", "To the open approvals.", _SEE_OTHER, None),
        Operation("GET", "/trace", "To the page of one trace.", _SEE_OTHER, None),
        *(_console_page(path, f"{(make.__doc__ or '').strip().splitlines()[0]}") for path, make in PAGES.items()),
    ),
)  # fmt: skip

_RUNNER = Api("Runner", "The runner has no API of its own.", PORTS["runner"], COMMON)

APIS: Mapping[str, Api] = {
    "registry": _REGISTRY, "policy": _POLICY, "issuer": _ISSUER, "revoker": _REVOKER, "audit": _AUDIT,
    "gateway": _GATEWAY, "gateway-agents": _AGENTS, "scim": _SCIM_API, "signals": _SIGNALS, "runner": _RUNNER,
    "console": _CONSOLE,
}  # fmt: skip


def _model(model: type[BaseModel]) -> dict[str, Any]:
    """The members of a message, without the constraints that only writers need."""
    properties = model.model_json_schema()["properties"]
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
    "ScimResource": record(schemas=objects(TEXT), optional={"id": TEXT, "meta": record()}),
    "ScimList": record(schemas=objects(TEXT), totalResults=NUMBER, optional={"Resources": objects(record())}),
    "ScimError": record(schemas=objects(TEXT), status=TEXT, optional={"detail": TEXT, "scimType": TEXT}),
    "SignalStream": record(stream_id=TEXT, iss=TEXT, delivery=record()),
}  # fmt: skip
