"""Examples of every message are read as they are published, with what a newer writer adds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ringfence.kernel.crypto.jws import parse, sign, verify
from ringfence.kernel.crypto.keys import SigningKey, public_key
from ringfence.messages.base import Claims
from tools.schemas.generate import models

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "schemas"
EXAMPLES = sorted(PUBLISHED.glob("*.example.json"))


def name_of(file: Path) -> str:
    return file.name.removesuffix(".example.json")


def lost(before: Any, after: Any, at: str = "") -> list[str]:
    """Where the second lacks, or says otherwise, what the first says. New fields are no loss."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [place for key in before for place in lost(before[key], after.get(key), f"{at}.{key}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [place for i, one in enumerate(before) for place in lost(one, after[i], f"{at}[{i}]")]
    return [] if before == after else [at]


@pytest.mark.parametrize("file", EXAMPLES, ids=name_of)
def test_an_example_is_read_and_written_out_again_without_loss(file: Path) -> None:
    text = file.read_text()
    message = models()[name_of(file)].model_validate_json(text)
    again = json.loads(message.model_dump_json(exclude_none=True))
    assert lost(json.loads(text), again) == []


@pytest.mark.parametrize("file", EXAMPLES, ids=name_of)
def test_field_of_a_newer_writer_is_kept(file: Path) -> None:
    text = json.dumps(json.loads(file.read_text()) | {"added_in_2030": {"x": [1]}})
    again = json.loads(models()[name_of(file)].model_validate_json(text).model_dump_json(exclude_none=True))
    assert again["added_in_2030"] == {"x": [1]}


@pytest.mark.parametrize(
    "file", [file for file in EXAMPLES if issubclass(models()[name_of(file)], Claims)], ids=name_of
)
def test_a_signed_example_is_opened(file: Path) -> None:
    """By its `typ`, as it travels."""
    model = models()[name_of(file)]
    assert issubclass(model, Claims)
    claims = model.model_validate_json(file.read_text())
    key = SigningKey.generate(claims.iss)
    opened = verify(
        parse(sign(claims, key)), model, lambda iss, kid: public_key(key.public), audience=claims.aud
    )
    assert opened.claims == claims


def test_no_message_lacks_an_example() -> None:
    assert {name_of(file) for file in EXAMPLES} == set(models())
