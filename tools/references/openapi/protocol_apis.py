"""The APIs that follow a protocol of others: SCIM for directories, shared signals for receivers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ringfence.messages.api import PORTS
from tools.references.openapi.operation import (
    JSON,
    TEXT,
    YES_NO,
    Answer,
    Api,
    Operation,
    objects,
    ok,
    record,
    ref,
)
from tools.references.openapi.service_apis import COMMON

SCIM = "application/scim+json"


def _scim_error(about: str, *types: str, headers: tuple[str, ...] = ()) -> Answer:
    """An error of SCIM (RFC 7644, 3.12); `types`: each `scimType` that it can have."""
    return Answer(about, SCIM, ref("ScimError"), codes=types, headers=headers)


_USER, _GROUP, _PAGE_OF = ref("ScimUser"), ref("ScimGroup"), ref("ScimList")
_ALWAYS = {
    401: _scim_error("the token is missing, or does not count", headers=("WWW-Authenticate",)),
    429: _scim_error("too many calls without a valid token; try again later", headers=("Retry-After",)),
}
_404 = {404: _scim_error("there is none")}
_SYNTAX = ("invalidSyntax", "invalidValue")
_WRONG_SEARCH = {400: _scim_error("a parameter is wrong", "invalidFilter", "invalidPath", "invalidValue")}
_READ = {**_WRONG_SEARCH, **_404, **_ALWAYS}
_WRITES = {
    403: _scim_error("the operator did not delegate this to the directory, or the registry refused it"),
    413: _scim_error("the body is larger than 1 MiB"),
    503: _scim_error("the registry did not answer, or is not reached; try again", headers=("Retry-After",)),
    **_ALWAYS,
}
_CREATED = "created; `Location` is its address"
_USER_SCHEMA, _GROUP_SCHEMA = (
    "urn:ietf:params:scim:schemas:core:2.0:User",
    "urn:ietf:params:scim:schemas:core:2.0:Group",
)
_EXAMPLES: Mapping[str, Any] = {
    "User": {"schemas": [_USER_SCHEMA], "userName": "maria@acme.example", "displayName": "Maria", "active": True},
    "Group": {"schemas": [_GROUP_SCHEMA], "displayName": "Developers", "members": []},
}  # fmt: skip
_PATCHES: Mapping[str, Any] = {
    name: {
        "schemas": ["urn:ietf:params:scim:api:messages:2.0:PatchOp"],
        "Operations": [{"op": "replace", "path": path, "value": value}],
    }
    for name, path, value in (("User", "active", False), ("Group", "members", []))
}
_SEARCH = {
    "schemas": ["urn:ietf:params:scim:api:messages:2.0:SearchRequest"],
    "filter": 'userName eq "maria@acme.example"',
    "count": 10,
}
_ATTRIBUTES = {
    "attributes": "only these attributes, with commas between (RFC 7644, 3.9)",
    "excludedAttributes": "all but these attributes, with commas between",
}
_LIST = {
    "filter": "which ones (RFC 7644, 3.4.2.2)",
    "sortBy": "by which attribute they are sorted",
    "sortOrder": "`ascending` or `descending`",
    "startIndex": "the first entry, from 1",
    "count": "the most entries; 200 at most come",
    **_ATTRIBUTES,
}


def _search(path: str, summary: str) -> Operation:
    answers = {**ok(_PAGE_OF, media=SCIM), **_search_errors()}
    return Operation("POST", path, summary, answers, "bearer", body=(SCIM, record()), example=_SEARCH)


def _search_errors() -> dict[int, Answer]:
    wrong = _scim_error("the search is wrong", "invalidFilter", "invalidPath", *_SYNTAX)
    return {400: wrong, 413: _WRITES[413], **_ALWAYS}


def _scim_resources(name: str, resource: Mapping[str, Any]) -> tuple[Operation, ...]:
    path, one = f"/scim/v2/{name}s", name.lower()
    wrong_patch = _scim_error(
        "the patch is wrong", "invalidPath", "mutability", "noTarget", "invalidFilter", *_SYNTAX
    )
    taken = _scim_error("there is one with this name", "uniqueness")
    body = (SCIM, resource)
    # The name of a group is what an operator delegated, and cannot change.
    conflict, immutable = ({}, ("mutability",)) if name == "Group" else ({409: taken}, ())
    wrong = _scim_error("the body is wrong", *_SYNTAX, *immutable)
    return (
        Operation(
            "GET", path, f"The {one}s.", {**ok(_PAGE_OF, media=SCIM), **_WRONG_SEARCH, **_ALWAYS}, "bearer", query=_LIST
        ),
        Operation(
            "POST", path, f"Create a {one}.",
            {201: Answer(_CREATED, SCIM, resource, headers=("Location",)), 400: wrong, 409: taken, **_WRITES},
            "bearer", body=body, example=_EXAMPLES[name], query=_ATTRIBUTES,
        ),
        _search(f"{path}/.search", f"Search {one}s."),
        Operation(
            "GET", f"{path}/{{id}}", f"One {one}.", {**ok(resource, media=SCIM), **_READ}, "bearer", query=_ATTRIBUTES
        ),
        Operation(
            "PUT", f"{path}/{{id}}", f"Replace a {one}.",
            {**ok(resource, media=SCIM), 400: wrong, **_404, **conflict, **_WRITES},
            "bearer", body=body, example=_EXAMPLES[name], query=_ATTRIBUTES,
        ),
        Operation(
            "PATCH", f"{path}/{{id}}", f"Change a {one}.",
            {**ok(resource, media=SCIM), 400: wrong_patch, **_404, **conflict, **_WRITES},
            "bearer", body=(SCIM, record()), example=_PATCHES[name], query=_ATTRIBUTES,
        ),
        Operation(
            "DELETE", f"{path}/{{id}}", f"Remove a {one}.",
            {204: Answer("removed", None), **_404, **{status: one for status, one in _WRITES.items() if status != 413}},
            "bearer",
        ),
    )  # fmt: skip


def _catalogue(name: str, summary: str) -> tuple[Operation, ...]:
    path = f"/scim/v2/{name}"
    refused = {403: _scim_error("it cannot be filtered")}
    return (
        Operation(
            "GET", path, summary, {**ok(_PAGE_OF, media=SCIM), **refused, **_ALWAYS}, "bearer",
            query={"filter": "not possible here (RFC 7644, 4)"},
        ),
        Operation("GET", f"{path}/{{id}}", "One of them.", {**ok(record(), media=SCIM), **_404, **_ALWAYS}, "bearer"),
    )  # fmt: skip


_SCIM_API = Api(
    "SCIM", "Users and groups from a directory: SCIM 2.0 (RFC 7643, RFC 7644).", PORTS["scim"],
    (
        *COMMON,
        Operation(
            "GET", "/scim/v2/ServiceProviderConfig", "What this endpoint can.",
            {**ok(record(schemas=objects(TEXT), patch=record(), filter=record()), media=SCIM), **_ALWAYS}, "bearer",
        ),
        *_catalogue("ResourceTypes", "The types of resources."),
        *_catalogue("Schemas", "The schemas of resources."),
        _search("/scim/v2/.search", "Search users and groups."),
        *_scim_resources("User", _USER),
        *_scim_resources("Group", _GROUP),
    ),
)  # fmt: skip

_STREAM, _STREAM_ID = ref("SignalStream"), {"stream_id": "the stream"}
_STATUS = record(stream_id=TEXT, status=TEXT, optional={"reason": TEXT})
_SUBJECT = record(stream_id=TEXT, subject=record(format=TEXT))
_AN_ID = "f67e39a0a4d34d56b3aa1bc4cff0069f"


def _ssf_error(about: str, *codes: str, headers: tuple[str, ...] = ()) -> Answer:
    """An error in the form of RFC 8935, 2.3: `err` and `description`."""
    return Answer(about, JSON, ref("SignalError"), codes=codes, headers=("Cache-Control", *headers))


_SSF_ALWAYS = {
    401: _ssf_error("the token is missing, or does not count", "authentication_failed", headers=("WWW-Authenticate",)),
    403: _ssf_error("the operator declared no receiver of that name", "access_denied"),
    429: _ssf_error("too many calls without a valid token; try again later", "authentication_failed", headers=("Retry-After",)),
    503: _ssf_error("the service cannot answer now; try again", "unavailable", headers=("Retry-After",)),
}  # fmt: skip
_SSF_404 = {404: _ssf_error("the receiver has no such stream", "not_found")}
_SSF_BODY = {
    400: _ssf_error("the request is wrong; `description` says what", "invalid_request"),
    413: _ssf_error("the body is larger than 1 MiB", "invalid_request"),
}
_OF_ONE = ("Cache-Control",)
_READ_ONE = {**_SSF_404, **_SSF_ALWAYS}
_WRITE_ONE = {**_SSF_BODY, **_READ_ONE}
_DONE = {204: Answer("done", None, headers=_OF_ONE)}
_SOME_SUBJECT = {"stream_id": _AN_ID, "subject": {"format": "opaque", "id": "deploy-bot"}}
_SIGNALS = Api(
    "Signals", "Ends of leases for systems outside: OpenID Shared Signals Framework 1.0.", PORTS["signals"],
    (
        *COMMON,
        Operation(
            "GET", "/.well-known/ssf-configuration", "Metadata of the transmitter.",
            ok(ref("SignalMetadata"), headers=_OF_ONE), None,
        ),
        Operation(
            "GET", "/.well-known/jwks.json", "The keys that verify event tokens.",
            ok(keys=objects(record(kty=TEXT, kid=TEXT, use=TEXT, alg=TEXT)), headers=_OF_ONE), None,
        ),
        Operation(
            "POST", "/ssf/streams", "Create the stream of this receiver.",
            {201: Answer("created", schema=_STREAM, headers=_OF_ONE), **_SSF_BODY, 409: _ssf_error("there is one already", "invalid_request"), **_SSF_ALWAYS},
            "bearer", body=(JSON, record()), body_is_required=False, example={"delivery": {"method": "urn:ietf:rfc:8936"}},
        ),
        Operation(
            "GET", "/ssf/streams", "The stream of an id; without one, a list of the receiver's streams.",
            {**ok({"anyOf": [_STREAM, objects(_STREAM)]}, headers=_OF_ONE), **_READ_ONE}, "bearer", query=_STREAM_ID,
        ),
        Operation(
            "PATCH", "/ssf/streams", "Change some members of the stream.", {**ok(_STREAM, headers=_OF_ONE), **_WRITE_ONE},
            "bearer", body=(JSON, record(stream_id=TEXT)), example={"stream_id": _AN_ID, "description": "the SIEM"},
        ),
        Operation(
            "PUT", "/ssf/streams", "Replace the configuration of the stream.", {**ok(_STREAM, headers=_OF_ONE), **_WRITE_ONE},
            "bearer", body=(JSON, record(stream_id=TEXT)), example={"stream_id": _AN_ID, "delivery": {"method": "urn:ietf:rfc:8936"}},
        ),
        Operation(
            "DELETE", "/ssf/streams", "Delete the stream.", {204: Answer("deleted", None, headers=_OF_ONE), **_READ_ONE},
            "bearer", query=_STREAM_ID, required=("stream_id",),
        ),
        Operation(
            "GET", "/ssf/status", "The status of the stream.", {**ok(_STATUS, headers=_OF_ONE), **_READ_ONE},
            "bearer", query=_STREAM_ID, required=("stream_id",),
        ),
        Operation(
            "POST", "/ssf/status", "Enable, pause or disable the stream.", {**ok(_STATUS, headers=_OF_ONE), **_WRITE_ONE},
            "bearer", body=(JSON, _STATUS), example={"stream_id": _AN_ID, "status": "paused"},
        ),
        Operation(
            "POST", "/ssf/subjects/add", "Add a subject again.", {200: Answer("done", None, headers=_OF_ONE), **_WRITE_ONE},
            "bearer", body=(JSON, _SUBJECT), example=_SOME_SUBJECT,
        ),
        Operation(
            "POST", "/ssf/subjects/remove", "Leave a subject out.", {**_DONE, **_WRITE_ONE},
            "bearer", body=(JSON, _SUBJECT), example=_SOME_SUBJECT,
        ),
        Operation(
            "POST", "/ssf/verify", "Ask for a verification event.",
            {
                204: Answer("it will come", None, headers=_OF_ONE), **_WRITE_ONE,
                429: _ssf_error("asked too often, or too many calls without a valid token", "invalid_request", "authentication_failed", headers=("Retry-After",)),
            },
            "bearer", body=(JSON, record(stream_id=TEXT, optional={"state": TEXT})), example={"stream_id": _AN_ID, "state": "VGhpcyBpcyBhbiBleGFtcGxl"},
        ),
        Operation(
            "POST", "/ssf/poll/{stream_id}", "Take events and acknowledge others (RFC 8936).",
            {**ok(record(sets=record(), optional={"moreAvailable": YES_NO}), headers=_OF_ONE), **_WRITE_ONE},
            "bearer", body=(JSON, record()), body_is_required=False, example={"maxEvents": 10, "ack": []},
        ),
    ),
)  # fmt: skip

PROTOCOL_APIS: Mapping[str, Api] = {"scim": _SCIM_API, "signals": _SIGNALS}
