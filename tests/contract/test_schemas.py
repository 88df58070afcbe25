"""What is published in schemas/: sound by itself, and true for the examples beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema.validators import Draft202012Validator
from pydantic import TypeAdapter, ValidationError

from ringfence.messages.lease import Lease
from ringfence.messages.topics import ALL
from tools.schemas.generate import models, renew_table

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT / "schemas"


def read(name: str) -> Any:
    return json.loads((SCHEMAS / name).read_text())


@pytest.mark.parametrize("name", sorted(models()))
def test_an_example_is_what_its_schema_describes(name: str) -> None:
    schema = read(f"{name}.schema.json")
    Draft202012Validator.check_schema(schema)
    example = read(f"{name}.example.json")
    validator = Draft202012Validator(schema)
    assert [error.message for error in validator.iter_errors(example)] == []
    for field in schema["required"]:
        without = {key: value for key, value in example.items() if key != field}
        assert not validator.is_valid(without), f"{field} is required"


@pytest.mark.parametrize("name", sorted(models()))
def test_a_model_accepts_its_example_as_json_and_as_objects(name: str) -> None:
    model, text = models()[name], (SCHEMAS / f"{name}.example.json").read_text()
    message = model.model_validate_json(text)
    assert model.model_validate(json.loads(text)) == message
    assert TypeAdapter(model).validate_python(json.loads(text)) == message
    assert json.loads(message.model_dump_json(exclude_none=True)).items() <= json.loads(text).items()


def test_objects_are_validated_as_strictly_as_json() -> None:
    lease = read("lease.example.json")
    for changes in (
        {"seq": "1"},
        {"seq": 1.0},
        {"act": "bot"},
        {"act": [1]},
        {"scope": [{**lease["scope"][0], "verbs": "read"}]},
    ):
        with pytest.raises(ValidationError):
            Lease.model_validate({**lease, **changes})
        with pytest.raises(ValidationError):
            Lease.model_validate_json(json.dumps({**lease, **changes}))


def test_asyncapi_names_every_topic_and_every_message() -> None:
    document = yaml.safe_load((SCHEMAS / "asyncapi.yaml").read_text())
    assert {c["address"] for c in document["channels"].values()} == {topic.name("ringfence") for topic in ALL}
    messages = document["components"]["messages"]
    assert set(messages) == set(models())
    for message in messages.values():
        assert (SCHEMAS / message["payload"]["$ref"]).is_file()
    for channel in document["channels"].values():
        for reference in channel["messages"].values():
            assert reference["$ref"].removeprefix("#/components/messages/") in messages
    for operation in document["operations"].values():
        assert operation["channel"]["$ref"].removeprefix("#/channels/") in document["channels"]


def test_the_published_topic_table_is_up_to_date() -> None:
    page = (ROOT / "docs/topics.md").read_text()
    assert renew_table(page) == page, "run: make schemas"


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks the lines"):
        renew_table("# Topics\n")
