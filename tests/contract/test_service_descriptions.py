"""The AsyncAPI documents of services: what each consumes and publishes, as the topics and the messages' schemas say."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ringfence.kernel.kafka.acls import Operation, ResourceType, acls
from ringfence.messages.base import Claims, Message
from ringfence.messages.topics import by_name
from tools.schemas.generate import SERVICES, message_name, models, service_description

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT / "schemas"
TOPICS = by_name("ringfence")
CHANNELS = yaml.safe_load((SCHEMAS / "asyncapi.yaml").read_text())["channels"]
NO_SETTINGS = {"RINGFENCE_CONFIG": os.devnull, "PATH": os.environ["PATH"]}


@functools.cache
def read(role: str) -> Any:
    return yaml.safe_load(service_description(role))


def operations(document: Any, action: str) -> Iterator[tuple[str, list[str]]]:
    """Of each operation: the channel's address, and the names of the schemas that its payload may have."""
    for operation in document["operations"].values():
        if operation["action"] == action:
            channel = document["channels"][operation["channel"]["$ref"].removeprefix("#/channels/")]
            yield (
                channel["address"],
                [
                    name
                    for message in channel["messages"].values()
                    for name in payload_names(document, message["$ref"])
                ],
            )


def payload_names(document: Any, message: str) -> list[str]:
    payload = document["components"]["messages"][message.removeprefix("#/components/messages/")]["payload"]
    schema = document["components"]["schemas"][schema_name(payload)]
    return [schema_name(one) for one in schema["anyOf"]] if "anyOf" in schema else [schema_name(payload)]


def schema_name(reference: Any) -> str:
    return str(reference["$ref"]).removeprefix("#/components/schemas/")


def published_models(role: str) -> dict[str, set[str]]:
    """By address, the names of the messages that this service's description says it publishes."""
    found = dict[str, set[str]]()
    for address, names in operations(read(role), "send"):
        found.setdefault(address, set()).update(names)
    return found


FASTSTREAM = """
import runpy, sys
for role in sys.argv[1:]:
    sys.argv = ["faststream", "docs", "gen", f"ringfence.{role}.app:described", "--factory", "--yaml", "--out", role]
    try:
        runpy.run_module("faststream", run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
"""
"""The command `faststream docs gen` for each service, in one process: its imports take longest."""


def test_faststream_makes_the_same_without_keys_or_a_broker(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FASTSTREAM, *SERVICES],
        cwd=tmp_path, env=NO_SETTINGS, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for role in SERVICES:
        assert (tmp_path / role).read_text() == service_description(role), role


@pytest.mark.parametrize("role", SERVICES)
def test_channels_are_those_of_the_whole(role: str) -> None:
    known = {channel["address"]: set(channel["messages"]) for channel in CHANNELS.values()}
    document = read(role)
    assert {channel["address"] for channel in document["channels"].values()} <= set(known)
    classes = {model.__name__: model for model in models().values()}
    for action in ("receive", "send"):
        for address, names in operations(document, action):
            carried = {message_name(classes[name]) for name in names}
            if action == "receive":
                assert carried == known[address], "who consumes a topic is given all that it carries"
            assert carried <= known[address]


@pytest.mark.parametrize("role", SERVICES)
def test_payloads_are_those_of_the_published_schemas(role: str) -> None:
    schemas = read(role)["components"]["schemas"]
    classes = {model.__name__: model for model in models().values()}
    compared = 0
    for name, model in classes.items():
        if name in schemas:
            published = json.loads((SCHEMAS / f"{message_name(model)}.schema.json").read_text())
            assert plain(schemas[name]) == plain(published), name
            compared += 1
            for inner, schema in published.get("$defs", {}).items():
                assert plain(schemas[inner]) == plain(schema), f"{name}: {inner}"
    assert compared >= 3


def plain(schema: Any) -> Any:
    """A schema without what depends on where it stands."""
    text = json.dumps({key: value for key, value in schema.items() if key not in ("$schema", "$defs")})
    text = text.replace("#/components/schemas/", "#/$defs/")
    return json.loads(text.replace('"additionalProperties": {}', '"additionalProperties": true'))


@pytest.mark.parametrize("role", SERVICES)
def test_consumed_and_published_topics_match_the_acls(role: str) -> None:
    """`read_by` names more: tables and histories are followed without a group. `written_by` is the same."""
    granted = {
        operation: {
            acl.name
            for acl in acls("ringfence")
            if acl.party == role and acl.resource_type == ResourceType.TOPIC and acl.operation == operation
        }
        for operation in (Operation.READ, Operation.WRITE)
    }
    consumed = {address for address, _ in operations(read(role), "receive")}
    assert consumed
    assert consumed <= granted[Operation.READ]
    assert set(published_models(role)) == granted[Operation.WRITE]


@pytest.mark.parametrize("role", SERVICES)
def test_a_service_publishes_what_it_may_sign(role: str) -> None:
    for address, names in published_models(role).items():
        for model in TOPICS[address].models:
            if _is_signed_by_services(model):
                assert (model.__name__ in names) == (role in model.signed_by), (address, model.__name__)


def _is_signed_by_services(model: type[Message]) -> bool:
    return issubclass(model, Claims) and bool(model.signed_by)


def test_every_service_that_consumes_in_a_group_is_described() -> None:
    declared = {file.parent.name for file in (ROOT / "services/ringfence").glob("*/subscribers.py")}
    assert declared == set(SERVICES)
