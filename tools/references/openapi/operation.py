"""What an operation of an HTTP API is: what a caller sends, and each answer. With short names for schemas."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Schema = Mapping[str, Any]
JSON, PROBLEM, HTML, PLAIN = "application/json", "application/problem+json", "text/html", "text/plain"
TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "integer"}
YES_NO: Schema = {"type": "boolean"}


def ref(name: str) -> Schema:
    """A reference to one of the schemas of the document."""
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
    """One answer of an operation. Without `media` it has no body."""

    about: str
    media: str | None = JSON
    schema: Schema | None = None
    also: tuple[str, ...] = ()
    """Further media types, where the body may be of several."""
    codes: tuple[str, ...] = ()
    """Of an error: all codes that it can have."""
    such_as: str | None = None
    """Of an error with more codes than a reader wants to see: one of them, for the example."""
    headers: tuple[str, ...] = ()
    """Names of `HEADERS` that the answer always has."""


HEADERS: Mapping[str, str] = {
    "Allow": "The methods that the path has.",
    "Cache-Control": "How long the answer may be kept: `no-store` for what is of one caller.",
    "DPoP-Nonce": "The nonce that the next proof must have (RFC 9449, 8).",
    "Location": "Where it is now.",
    "Retry-After": "After how many seconds to try again.",
    "WWW-Authenticate": "What kind of credential is expected (RFC 9110, 11.6.1).",
    "Link": '`rel="next"`: where a further reply would be.',
}


def error(
    status_about: str, *codes: str, such_as: str | None = None, headers: tuple[str, ...] = ()
) -> Answer:
    """An error as most services answer it: `error` and `message`."""
    return Answer(status_about, JSON, ref("Error"), codes=codes, such_as=such_as, headers=headers)


def problem(about: str, *codes: str, such_as: str | None = None, headers: tuple[str, ...] = ()) -> Answer:
    """An error as gateways answer agents (RFC 9457)."""
    return Answer(about, PROBLEM, ref("Problem"), codes=codes, such_as=such_as, headers=headers)


UNAUTHENTICATED = error(
    "the token is missing, or does not count", "unauthenticated", headers=("WWW-Authenticate",)
)
NOT_READY = error("the service cannot answer now; try again", such_as="unavailable")
FORBIDDEN = error("a console may not read this", "forbidden")

_BY_AUTH: Mapping[str, Mapping[int, Answer]] = {
    "user": {401: UNAUTHENTICATED, 503: NOT_READY},
    "target": {401: UNAUTHENTICATED, 503: NOT_READY},
    "gateway": {
        401: UNAUTHENTICATED,
        403: error("the gateway has no key to seal to", "forbidden"),
        503: NOT_READY,
    },
    "console": {401: UNAUTHENTICATED, 503: NOT_READY},
    "dpop": {
        401: problem(
            "the proof is missing, or does not count; sign the next one with the nonce of `DPoP-Nonce`",
            such_as="proof_missing",
            headers=("WWW-Authenticate",),
        ),
        403: problem(
            "the message, the socket or the certificate is of somebody else", such_as="socket_other_task"
        ),
        429: problem("too many calls", such_as="waiting_limit", headers=("Retry-After",)),
        503: problem("the gateway cannot decide or publish now; try again", such_as="kafka_unavailable"),
    },
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
    body_is_required: bool = True
    example: Any = None
    """An example of the body."""

    @property
    def id(self) -> str:
        """Its name in programs that are made from the document."""
        words: list[str] = re.findall(r"\w+", f"{self.method.lower()} {self.path}")
        return words[0] + "".join(word[:1].upper() + word[1:] for word in words[1:])

    @property
    def path_parameters(self) -> list[str]:
        """The variables of the path."""
        return re.findall(r"{(\w+)}", self.path)

    def all_answers(self) -> dict[int, Answer]:
        """Its own answers, and those that all operations of its kind of caller have."""
        return {**_BY_AUTH.get(self.auth or "", {}), **self.answers}


@dataclass(frozen=True)
class Api:
    """The API of one service."""

    title: str
    about: str
    port: int
    operations: tuple[Operation, ...]


def ok(
    schema: Schema | None = None,
    *,
    media: str = JSON,
    about: str = "done",
    headers: tuple[str, ...] = (),
    **more: Schema,
) -> dict[int, Answer]:
    """The answer 200: with a schema, or with the members of an object."""
    return {200: Answer(about, media, schema if schema is not None else record(**more), headers=headers)}
