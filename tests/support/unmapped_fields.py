"""Whether the fields in `unmapped` of an event are those of the reference (docs/reference/unmapped-fields.json)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema_rs import Draft202012Validator

_FILE = Path(__file__).parents[2] / "docs/reference/unmapped-fields.json"


@cache
def _validator() -> Draft202012Validator:
    schema: dict[str, Any] = json.loads(_FILE.read_text())
    return Draft202012Validator({**schema, "additionalProperties": False})


def undescribed(event: dict[str, Any]) -> list[str]:
    """Each field that the reference does not have, or has with another type."""
    code = event["metadata"]["event_code"]
    return [
        f"{code}: unmapped.{'.'.join(map(str, error.instance_path))}: {error.message}"
        for error in _validator().iter_errors(event["unmapped"])
    ]
