"""Compares answers of services with the OpenAPI documents of docs/reference/openapi."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import jsonschema

FOLDER = Path(__file__).parents[2] / "docs/reference/openapi"


class Document:
    """One document."""

    def __init__(self, name: str) -> None:
        self.content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())

    def operations(self) -> dict[str, dict[str, Any]]:
        """Each operation by `METHOD /path`."""
        return {
            f"{method.upper()} {path}": operation
            for path, methods in self.content["paths"].items()
            for method, operation in methods.items()
        }

    def problems(self, operation: str, answer: httpx.Response) -> list[str]:
        """What an answer has that the document does not say: its status, its media type, its members."""
        described = self.operations()[operation]["responses"]
        status = str(answer.status_code)
        if status not in described:
            return [f"{operation} answered {status}: {answer.text[:300]}"]
        content = described[status].get("content")
        if content is None:
            return []
        ((media, body),) = content.items()
        found = answer.headers.get("content-type", "").partition(";")[0]
        if found != media:
            return [f"{operation} answered {status} with {found} instead of {media}"]
        if not media.endswith("json"):
            return []
        schema = {**body["schema"], "components": self.content["components"]}
        errors = jsonschema.Draft202012Validator(schema).iter_errors(answer.json())
        return [f"{operation}: {status}: {error.json_path}: {error.message[:200]}" for error in errors]


def path_of(operation: str, values: dict[str, str]) -> str:
    """The path of an operation, with values for its variables."""
    return re.sub(r"{(\w+)}", lambda found: values[found[1]], operation.partition(" ")[2])
