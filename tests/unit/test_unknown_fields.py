"""What newer writers add is kept, and what cannot be written out again is none of it."""

from __future__ import annotations

import orjson
import pytest
from pydantic import ValidationError

from ringfence.messages.base import Permission
from ringfence.messages.registry import BackendSettings

KEPT = (
    "1",
    "-9223372036854775808",
    "9223372036854775807",
    "1.5",
    "null",
    "true",
    '[{"a": [1, "x"]}]',
    '"9e999"',
)
REFUSED = (
    "9223372036854775808",
    f"-{10**40}",
    f"{10**4000}",
    "1e999",
    "NaN",
    "-Infinity",
    f'[[{{"a": {10**30}}}]]',
)


def with_more(value: str) -> str:
    return f'{{"target": "t", "verbs": ["read"], "resources": ["a"], "added_in_2030": {value}}}'


@pytest.mark.parametrize("value", KEPT)
def test_unknown_field_is_kept(value: str) -> None:
    read = Permission.model_validate_json(with_more(value))
    assert orjson.loads(orjson.dumps(read.model_dump(mode="json")))["added_in_2030"] == orjson.loads(value)


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: value[:30])
def test_numbers_that_are_none_are_refused(value: str) -> None:
    with pytest.raises(ValidationError):
        Permission.model_validate_json(with_more(value))
    with pytest.raises(ValidationError):
        BackendSettings.model_validate_json(f'{{"kind": "jwt", "added_in_2030": {value}}}')
