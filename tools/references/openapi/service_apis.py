"""The APIs of registry, policy, issuer, revoker, audit, gateways and runners."""

from __future__ import annotations

from collections.abc import Mapping

from ringfence.messages.api import GATEWAY_PORT, PORTS
from tools.references.openapi.operation import (
    JSON,
    NUMBER,
    PLAIN,
    TEXT,
    YES_NO,
    Answer,
    Api,
    Operation,
    error,
    maybe,
    objects,
    ok,
    problem,
    record,
    ref,
)

JOSE = "application/jose"
_NOT_FOUND = {404: error("there is none that the caller may see", "not_found")}
_WRONG_QUERY = {
    400: error("a parameter is wrong; the message says which, and what it has to be", "query_invalid")
}
_WRONG_CURSOR = {
    400: error(
        "a parameter is wrong, or the cursor is lost: begin the listing again", "query_invalid", "cursor_lost"
    )
}
_NO_PROOF = {
    400: error("no checkpoint covers it yet; ask again in a few seconds", "no_proof", "query_invalid")
}
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
    Operation("GET", "/healthz", "Whether the process answers.", ok(record(status=TEXT)), None),
    Operation(
        "GET", "/readyz", "Whether the service is ready, why not, and what it denies.",
        {**ok(ref("Ready")), 503: Answer("not ready", schema=ref("Ready"))}, None,
    ),
    Operation("GET", "/metrics", "Metrics in the format of Prometheus.", ok({"type": "string"}, media="text/plain"), None),
)  # fmt: skip


def _list(kind: str, query: Mapping[str, str] | None = None) -> tuple[Operation, ...]:
    entry, in_pages = ref(f"{kind.title()}Entry"), "limit" in (query or {})
    of_page = {"after": maybe(TEXT), "count": NUMBER} if in_pages else {}
    answer = ok(record(**{f"{kind}s": objects(entry)}, optional=of_page))
    return (
        Operation(
            "GET",
            f"/v1/{kind}s",
            f"The {kind}s that the caller may see" + ("; with `limit` page by page." if in_pages else "."),
            {**answer, **(_WRONG_QUERY if in_pages else {})},
            query={**_RECORDS, **(query or {})},
        ),
        Operation("GET", f"/v1/{kind}s/{{id}}", f"One {kind}.", {**ok(entry), **_NOT_FOUND}, query=_RECORDS),
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
            "limit": "the most entries of a page; without it all come", "after": _PAGE["after"],
        }),
        Operation(
            "GET", "/v1/proposals", "Widening commands that wait for a second person, and that the caller may see.",
            ok(proposals=objects(record(
                id=TEXT, status=TEXT, typ=TEXT, subject=TEXT, author=TEXT, at_ms=NUMBER, ends_at_ms=NUMBER,
                revision=NUMBER, by=maybe(TEXT), code=maybe(TEXT), may_second={"type": "array", "items": TEXT},
                command=TEXT,
            ))),
            query={"all": "`1`: also those of the last day that no longer wait"},
        ),
        Operation(
            "GET", "/v1/proposals/{proposal_id}/evidence",
            "The signed messages by which the sign page shows a proposal, for its author and who may second it.",
            {**ok(trust=TEXT, records=objects(TEXT), commands=objects(TEXT)), **_NOT_FOUND},
        ),
        Operation("GET", "/v1/trust", "The trust bundle in force.", ok(trust=TEXT), "console"),
        Operation(
            "GET", "/v1/passkeys/{credential_id}", "Whose passkey made an assertion.",
            {**ok(user_id=TEXT, kid=TEXT), **_WRONG_QUERY, **_NOT_FOUND}, "console",
            {"nonce": "what it signed: base64url of 32 bytes", "assertion": "base64url of the JSON of `ad`, `cd` and `sig`"},
            required=("nonce", "assertion"),
        ),
        Operation(
            "POST", "/v1/enrol", "Enrol the key of a running instance. The signed body says who sends it.",
            {
                **ok(enrolment=TEXT, headers=("Cache-Control",)),
                400: error("refused; `error` says why", such_as="instance_unmatched"),
                413: error("the body is too large", "too_large"),
                503: error("the registry cannot answer now; try again", such_as="unavailable"),
            }, None,
            body=(JOSE, TEXT), example="HEADER.CLAIMS.SIGNATURE",
        ),
    ),
)  # fmt: skip

_AGENT_FILTERS = {
    "agent": "only this agent", "sponsor": "only agents of this sponsor", "status": "only with this status",
    "target": "only with this target in the ceiling", "orphans": "`1`: only orphans", "unused": "`1`: only with unused verbs",
    "standing": "`1`: only with standing leases", "keys_ending": "`1`: only with a last key that ends soon",
    "keys_within_s": "how soon, in seconds",
}  # fmt: skip
_EVALUATION = record(decision=YES_NO, optional={"context": record()})
_QUESTION = {
    "subject": {"type": "agent", "id": "deploy-bot"}, "action": {"name": "deploy"},
    "resource": {"type": "staging", "id": "env/web"}, "context": {"task_id": "2f1c6f0e-8f0b-4d2c-9a57-3f1f4f0d9b1a"},
}  # fmt: skip
_AUTHZEN_ERRORS = {
    400: Answer("the question is not understood; the text says why", PLAIN, TEXT),
    401: Answer("the token is missing, or does not count", PLAIN, TEXT, headers=("WWW-Authenticate",)),
    403: Answer("the question is about another target", PLAIN, TEXT),
    413: Answer("the question is too large", PLAIN, TEXT),
    500: Answer("the question could not be answered, which is no yes", PLAIN, TEXT),
    503: Answer("policy cannot answer now; try again", PLAIN, TEXT),
}
"""AuthZEN 1.0, 10.1.2: an error is a status and a sentence."""
_POLICY = Api(
    "Policy", "Open approvals, decisions, grants, the inventory; decisions for others by AuthZEN.", PORTS["policy"],
    (
        *COMMON,
        Operation(
            "GET", "/v1/approvals", "Requests that wait for a person, the most urgent first; with `limit` page by page.",
            {
                **ok(record(approvals=objects(ref("PendingApproval")), optional={"after": maybe(TEXT), "counts": record(mine=NUMBER, others=NUMBER)})),
                **_WRONG_QUERY,
            },
            query={
                "limit": "the most entries of a page; without it all come", "after": _PAGE["after"],
                "show": "of a page: `mine` (the caller can approve), `others` or `all`", "agent": "of a page: only of this agent",
            },
        ),
        Operation("GET", "/v1/approvals/{request_id}", "One of them.", {**ok(ref("PendingApproval")), **_NOT_FOUND}),
        Operation(
            "GET", "/v1/approvals/{request_id}/evidence", "The signed messages by which the sign page shows the question.",
            {**ok(trust=TEXT, question=TEXT, records=objects(TEXT)), **_NOT_FOUND},
        ),
        Operation("GET", "/v1/action-approvals", "Single actions that wait for a person.", ok(actions=objects(ref("PendingAction")))),
        Operation("GET", "/v1/action-approvals/{request_id}", "One of them.", {**ok(ref("PendingAction")), **_NOT_FOUND}),
        Operation(
            "GET", "/v1/action-approvals/{request_id}/evidence", "The signed messages by which the sign page shows it.",
            {**ok(trust=TEXT, records=objects(TEXT)), **_NOT_FOUND},
        ),
        Operation("GET", "/v1/decisions/{request_id}", "The decision on a request.", {**ok(ref("Decision")), **_NOT_FOUND}),
        Operation(
            "GET", "/v1/decisions/{request_id}/explanation", "Why it was decided so, side by side.", {**ok(record(request_id=TEXT)), **_NOT_FOUND},
            query={"partition": "of the decision, for one that policy has forgotten", "offset": "of the decision"},
        ),
        Operation("GET", "/v1/bundle", "The revision of the policy bundle.", ok(revision=TEXT)),
        Operation("GET", "/v1/grants", "Approvals in advance.", ok(grants=objects(ref("Grant")))),
        Operation("GET", "/v1/grants/{grant_id}", "One of them.", {**ok(ref("Grant")), **_NOT_FOUND}),
        Operation("GET", "/v1/agents/{agent_id}/usage", "What an agent may, holds and used.", {**ok(ref("Usage")), **_NOT_FOUND}),
        Operation(
            "GET", "/v1/agents/{agent_id}/ceiling-report", "What policy knows of a ceiling that somebody proposes, signed.",
            {**ok(report=TEXT), **_WRONG_QUERY, **_NOT_FOUND},
            query={"ceiling": "a JSON list of permissions", "people": "the ids of its author and sponsors, by commas"},
            required=("ceiling",),
        ),
        Operation(
            "POST", "/v1/combinations", "Which forbidden combinations a ceiling would allow by itself; nothing changes.",
            {
                **ok(combinations=objects(TEXT)),
                400: error("the body is no ceiling; the message says why", "question_invalid"),
                403: error("the caller is neither operator, auditor nor sponsor, or a console", "forbidden"),
                413: error("the body is too large", "too_large"),
            },
            body=(JSON, record(ceiling=objects(ref("Permission")))),
            example={"ceiling": [{"target": "web", "verbs": ["push", "merge"], "resources": ["**"]}]},
        ),
        Operation(
            "GET", "/v1/inventory", "Agents page by page; the first page has sums over all.",
            {
                **ok(record(at_ms=NUMBER, agents=objects(record(id=TEXT)), after=maybe(TEXT), cursor=TEXT, gaps=objects(TEXT), optional={"totals": record()})),
                **_WRONG_QUERY,
            },
            query={**_PAGE, **_AGENT_FILTERS},
        ),
        Operation(
            "GET", "/v1/inventory/changes", "Agents that changed after a cursor.",
            {**ok(at_ms=NUMBER, agents=objects(record(id=TEXT, fits=YES_NO)), cursor=TEXT, gaps=objects(TEXT)), **_WRONG_CURSOR},
            query={"after": "the cursor that the inventory gave", **_AGENT_FILTERS}, required=("after",),
        ),
        Operation(
            "GET", "/v1/reach", "Which agents could act at a target now.",
            {**ok(at_ms=NUMBER, exists=YES_NO, agents=objects(record(id=TEXT)), after=maybe(TEXT), gaps=objects(TEXT)), **_WRONG_QUERY},
            query={"target": "the target", "verb": "only this verb", "resource": "only this resource", "after": _PAGE["after"]},
            required=("target",),
        ),
        Operation(
            "GET", "/.well-known/authzen-configuration", "Metadata of AuthZEN 1.0.",
            ok(policy_decision_point=TEXT, access_evaluation_endpoint=TEXT, access_evaluations_endpoint=TEXT), None,
        ),
        Operation(
            "POST", "/access/v1/evaluation", "The decision that a request would get now (AuthZEN 1.0).",
            {
                **ok(_EVALUATION), **_AUTHZEN_ERRORS,
            },
            "target", body=(JSON, ref("AuthzenQuestion")), example=_QUESTION,
        ),
        Operation(
            "POST", "/access/v1/evaluations", "Several such decisions in one call, 64 at most.",
            {
                **ok({"anyOf": [record(evaluations=objects(_EVALUATION)), _EVALUATION]}, about="an answer to each question; to a body without `evaluations` a single one"),
                **_AUTHZEN_ERRORS,
            },
            "target", body=(JSON, record(optional={"evaluations": objects(record()), "options": record()})),
            example={**{name: _QUESTION[name] for name in ("subject", "context")}, "evaluations": [{name: _QUESTION[name] for name in ("action", "resource")}]},
        ),
    ),
)  # fmt: skip

_ISSUER_METADATA = record(issuer=TEXT, jwks_uri=TEXT, introspection_endpoint=TEXT)
_ISSUER = Api(
    "Issuer", "For resource servers: metadata, keys and introspection of tokens. For gateways: credentials that are sealed to them.", PORTS["issuer"],
    (
        *COMMON,
        Operation("GET", "/.well-known/openid-configuration", "OpenID Connect Discovery 1.0.", ok(_ISSUER_METADATA), None),
        Operation("GET", "/.well-known/oauth-authorization-server", "Authorization server metadata (RFC 8414).", ok(_ISSUER_METADATA), None),
        Operation("GET", "/.well-known/jwks.json", "The keys that verify tokens (RFC 7517).", ok(keys=objects(record(kty=TEXT, kid=TEXT))), None),
        Operation(
            "POST", "/oauth2/introspect", "Whether a token is active (RFC 7662); only its own target learns it.",
            {
                **ok(active=YES_NO, headers=("Cache-Control",)),
                400: Answer("there is no form field `token`, or the form is too large (RFC 6749, 5.2)", schema=ref("OAuthError"), codes=("invalid_request",)),
            },
            "target", body=("application/x-www-form-urlencoded", record(token=TEXT)), example={"token": "HEADER.CLAIMS.SIGNATURE"},
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
            "GET", "/v1/leases", "Leases that have not ended, 1,000 at most.", ok(leases=objects(ref("LeaseEntry")), more=YES_NO),
            query={
                "agent": "only of this agent", "task": "only of this task and its parts", "target": "only for this target",
                "user": "only on behalf of this user", "sponsor": "only of agents of this sponsor", "status": "only with this status",
                "overdue": "`1`: cut, and the credential is not removed yet",
            },
        ),
        Operation("GET", "/v1/leases/{id}", "One lease, as long as Redis keeps it.", {**ok(ref("LeaseEntry")), **_NOT_FOUND}, query=_RECORDS),
        Operation(
            "GET", "/v1/runs", "Runs, 1,000 at most; the latest first.", ok(runs=objects(ref("RunEntry")), more=YES_NO),
            query={"all": "`1`: also those that are over", "agent": "only of this agent", "task": "only of this task", "runner": "only on this runner"},
        ),
        Operation("GET", "/v1/runs/{id}", "One run, by its id or its order's.", {**ok(ref("RunEntry")), **_NOT_FOUND}),
        Operation("GET", "/v1/pools", "Pools with a runner that was heard lately.", ok(pools=objects(record(name=TEXT))), query={"label": "`NAME=VALUE`, repeatable"}),
    ),
)  # fmt: skip

_AUDIT = Api(
    "Audit", "Events, traces, reports and proofs.", PORTS["audit"],
    (
        *COMMON,
        Operation(
            "GET", "/v1/trace/{id}", "Everything about a lease, request, task, agent, user or run, as a tree.",
            {**ok(id=TEXT, kind=TEXT, truncated=YES_NO, roots=objects(record())), **_NOT_FOUND, **_WRONG_QUERY},
            query={"kind": "what the id is of, where several have it", "limit": _PAGE["limit"]},
        ),
        Operation(
            "GET", "/v1/events", "The latest events; or later or older ones.",
            {**ok(events=objects(ref("AuditEvent")), after=maybe(TEXT), before=maybe(TEXT), looked_at_ms=maybe(NUMBER)), **_WRONG_CURSOR},
            query={"after": "later events than this cursor's", "before": "older events than this cursor's", "limit": _PAGE["limit"], **_FILTERS},
        ),
        Operation(
            "GET", "/v1/export", "Events to the byte as on the topic, as text.", {**ok(record(events=objects(TEXT), **_LIST_REPORT)), **_WRONG_CURSOR},
            query={**_PAGE, **_SPAN, **_FILTERS},
        ),
        Operation(
            "GET", "/v1/actions", "What gateways allowed and blocked, in groups.",
            {**ok(record(groups=objects(record()), unknown_destinations=objects(record()), **_REPORT)), **_WRONG_CURSOR},
            query={**_PAGE, **_SPAN, "agent": _FILTERS["agent"], "target": _FILTERS["target"], "step_ms": "adds counts over time, in steps of so many milliseconds"},
        ),
        Operation(
            "GET", "/v1/model-usage", "What requests to language models used, by day, agent, task, target and model.",
            {**ok(record(groups=objects(record()), **_REPORT)), **_WRONG_CURSOR},
            query={**_PAGE, **_SPAN, "agent": _FILTERS["agent"], "task": _FILTERS["task"]},
        ),
        Operation(
            "GET", "/v1/approval-history", "How people answered requests of agents before: equal answers by their number.",
            {**ok(agents=record()), **_WRONG_QUERY},
            query={"agent": "an agent; at most 100 of them", "since_ms": _SPAN["since_ms"], "except": "a request whose answers are left out; at most 1000 of them"},
            required=("agent",),
        ),
        Operation("GET", "/v1/break-glass", "Uses of break glass, and their reviews.", ok(uses=objects(record())), query={"unreviewed": "any value: only those without a review"}),
        Operation(
            "GET", "/v1/coverage/leases", "How many leases lead back to a person.",
            {**ok(record(total=NUMBER, agents=record(), **_REPORT)), **_WRONG_CURSOR},
            query={**_PAGE, **_SPAN, "short_s": "what counts as short-lived, in seconds"},
        ),
        Operation(
            "GET", "/v1/coverage/actions", "How many actions lead back to a person.",
            {**ok(record(total=NUMBER, agents=record(), **_REPORT)), **_WRONG_CURSOR}, query={**_PAGE, **_SPAN},
        ),
        Operation(
            "GET", "/v1/who", "Who used a permission at a target.", {**ok(record(lines=objects(record()), **_REPORT)), **_WRONG_CURSOR},
            query={**_PAGE, **_SPAN, "target": "the target", "verb": "only this verb", "resource": "only this resource"}, required=("target",),
        ),
        Operation("GET", "/v1/checkpoints", "The signed checkpoints of all chains.", ok(checkpoints=objects(TEXT))),
        Operation(
            "GET", "/v1/checkpoints/{tree}/consistency", "The proof that a chain only grew (RFC 9162).",
            {**ok(proof=objects(TEXT), checkpoint=TEXT), **_NO_PROOF},
            query={"from": "the size of the tree that the caller knows"}, required=("from",),
        ),
        Operation(
            "GET", "/v1/events/{uid}/proof", "The proof that an event is in its chain (RFC 9162).",
            {**ok(event=TEXT, leaf_index=NUMBER, leaf_hash=TEXT, proof=objects(TEXT), checkpoint=TEXT), **_NOT_FOUND, **_NO_PROOF},
        ),
    ),
)  # fmt: skip

_GATEWAY = Api(
    "Gateway, for people", "Whether a lease or a target can be used at this gateway.", PORTS["gateway"],
    (
        *COMMON,
        Operation(
            "GET", "/v1/leases/{lease_id}", "Whether a lease can be used here now, and if not, why.",
            {**ok(lease_id=TEXT, status=TEXT, usable=YES_NO, reason=maybe(TEXT)), **_NOT_FOUND},
        ),
        Operation(
            "GET", "/v1/targets/{target_id}", "Whether requests to a target can be sent from here, and if not, why.",
            {**ok(target_id=TEXT, revision=NUMBER, problem=maybe(TEXT)), **_NOT_FOUND},
        ),
    ),
)  # fmt: skip

_REPLY_ERRORS = {
    400: problem("the query is wrong", "query_invalid"),
    404: problem("there is no such request of the caller", "request_unknown", "api_path_unknown"),
}
_AGENTS = Api(
    "Gateway, for agents", "Requests of agents without Kafka: [HTTP access](../http-access.md). Its host is `ringfence` by a proxy, or the gateway itself.", GATEWAY_PORT,
    (
        Operation(
            "POST", "/v1/requests", "Post one signed message: a request, a withdrawal or a release.",
            {
                202: Answer("verified and published", schema=record(id=TEXT, optional={"status": TEXT})),
                400: problem("the message does not count", such_as="not_a_jws"),
                409: problem("another message with its `iss` and `jti` was posted", "id_taken"),
                413: problem("the message is too large", "too_large"),
                415: problem("it is not `application/jose`", "content_type_unexpected"),
            },
            "dpop", body=(JOSE, TEXT), example="HEADER.CLAIMS.SIGNATURE",
        ),
        Operation(
            "GET", "/v1/requests/{id}", "The sealed reply to a request; with `wait`, once it comes.",
            {
                200: Answer("a sealed reply", JOSE, TEXT, headers=("Link",)),
                202: Answer("no reply yet", schema=record(id=TEXT, status=TEXT), headers=("Retry-After",)),
                **_REPLY_ERRORS,
            },
            "dpop", query={"wait": "how long to wait for a reply, such as `30s`", "after": "the number of the reply before"},
        ),
        Operation(
            "GET", "/v1/tasks/{id}", "A task of the caller's: its terms, and the leases that requests may use here.",
            {**ok(ref("TaskView")), 404: problem("there is no such task of the caller", "task_unknown", "api_path_unknown")}, "dpop",
        ),
        Operation("GET", "/v1/trust", "The signed trust bundle.", {200: Answer("a JWS", JOSE, TEXT)}, None),
    ),
)  # fmt: skip

_RUNNER = Api("Runner", "The runner has no API of its own.", PORTS["runner"], COMMON)

SERVICE_APIS: Mapping[str, Api] = {
    "registry": _REGISTRY, "policy": _POLICY, "issuer": _ISSUER, "revoker": _REVOKER, "audit": _AUDIT,
    "gateway": _GATEWAY, "gateway-agents": _AGENTS, "runner": _RUNNER,
}  # fmt: skip
