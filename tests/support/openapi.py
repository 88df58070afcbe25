"""Compares answers of services with the OpenAPI documents of `tools/references/http_apis.py`.

Benches `watch` the clients with which tests call services, so each answer that any test gets is compared.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import httpx
import jsonschema

from tools.references import http_apis

_PROBES = ("/healthz", "/readyz", "/metrics")
_STREAM = "text/event-stream"


class Document:
    """One document, and the answers that were compared with it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.content: dict[str, Any] = http_apis.document(name)
        self.seen: set[tuple[str, str]] = set()
        """Operation and status of each answer that was compared."""
        self._paths = {
            path: re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path))) for path in self.content["paths"]
        }
        self._validators: dict[str, jsonschema.Draft202012Validator] = {}

    def operations(self) -> dict[str, dict[str, Any]]:
        """Each operation by `METHOD /path`."""
        return {
            f"{method.upper()} {path}": operation
            for path, methods in self.content["paths"].items()
            for method, operation in methods.items()
        }

    def answers(self) -> set[tuple[str, str]]:
        """Operation and status of each answer that the document has, probes left out."""
        return {
            (name, status)
            for name, operation in self.operations().items()
            if not name.endswith(_PROBES)
            for status in operation["responses"]
        }

    def operation_at(self, method: str, path: str) -> str | None:
        """The operation that a request is for; None if the document has none."""
        # A path without variables is meant before one with them (OpenAPI 3.1, 4.8.8.2).
        found = [one for one, pattern in self._paths.items() if one == path or pattern.fullmatch(path)]
        for one in sorted(found, key=lambda one: one.count("{")):
            if method.lower() in self.content["paths"][one]:
                return f"{method} {one}"
            return None
        return None

    def problems(self, operation: str, answer: httpx.Response) -> list[str]:
        """What differs from the document: status, header fields, media type, or a member of the body."""
        described = self.content["paths"][operation.partition(" ")[2]][operation.partition(" ")[0].lower()]
        status = str(answer.status_code)
        where = f"{operation} answered {status}"
        if status not in described["responses"]:
            return [f"{where}: {_text(answer)}"]
        self.seen.add((operation, status))
        response = described["responses"][status]
        found = [
            f"{where} without {name}" for name in response.get("headers", {}) if name not in answer.headers
        ]
        media = answer.headers.get("content-type", "").partition(";")[0]
        content = response.get("content", {})
        if not content and (_text(answer) or media):
            return [*found, f"{where} with a body: {media} {_text(answer)}"]
        if content and media not in content:
            return [
                *found,
                f"{where} with {media or 'no type'} instead of {', '.join(content)}: {_text(answer)}",
            ]
        if not media.endswith("json"):
            return found
        validator = self._validator(f"{operation} {status} {media}", content.get(media, {}).get("schema", {}))
        return found + [
            f"{where}: {error.json_path}: {error.message[:300]}"
            for error in validator.iter_errors(answer.json())
        ]

    def watch(self, client: httpx.AsyncClient, *, below: str = "") -> None:
        """Let every call of a client fail whose answer differs from the document. `below`: a path that comes first."""

        async def compare(answer: httpx.Response) -> None:
            path = answer.request.url.path.removeprefix(below)
            operation = self.operation_at(answer.request.method, path)
            if operation is not None:
                if not answer.headers.get("content-type", "").startswith(_STREAM):
                    await answer.aread()
                problems = self.problems(operation, answer)
                assert not problems, "\n".join(problems)

        client.event_hooks["response"].append(compare)

    def _validator(self, name: str, schema: dict[str, Any]) -> jsonschema.Draft202012Validator:
        if name not in self._validators:
            whole = {**schema, "components": self.content["components"]}
            self._validators[name] = jsonschema.Draft202012Validator(whole)
        return self._validators[name]


@functools.cache
def document(name: str) -> Document:
    """The document of an API, read once in a process."""
    return Document(name)


def path_of(operation: str, values: dict[str, str]) -> str:
    """The path of an operation, with values for its variables."""
    return re.sub(r"{(\w+)}", lambda found: values[found[1]], operation.partition(" ")[2])


def _text(answer: httpx.Response) -> str:
    return answer.text[:300] if answer.is_closed or answer.is_stream_consumed else ""
