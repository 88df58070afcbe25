"""The mark of the process that asks: checked in parts, and published as one pattern."""

from __future__ import annotations

import re

import pytest
from pydantic import TypeAdapter, ValidationError

from ringfence.messages.credential import CredentialRequest, ProcessMark

MARK: TypeAdapter[str] = TypeAdapter(ProcessMark)


@pytest.mark.parametrize("text", ["a" * 8, "a" * 64, "-_" * 4, "é" * 8, "𝒜" * 64])
def test_published_pattern_accepts_what_the_field_accepts(text: str) -> None:
    assert re.fullmatch(_published(), text)
    assert MARK.validate_python(text) == text


@pytest.mark.parametrize("text", ["", "a" * 7, "a" * 65, "é" * 7, "a" * 8 + "\n", "a b c d e", "a.b.c.d.e"])
def test_published_pattern_rejects_what_the_field_rejects(text: str) -> None:
    assert not re.fullmatch(_published(), text)
    with pytest.raises(ValidationError):
        MARK.validate_python(text)


def _published() -> str:
    (field, _) = CredentialRequest.model_json_schema()["properties"]["process"]["anyOf"]
    assert set(field) == {"type", "pattern"}
    return str(field["pattern"])
