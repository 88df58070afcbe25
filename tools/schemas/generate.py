"""Writes the published contract into `schemas/`: AsyncAPI 3, a JSON Schema and a golden example for each message.

python -m tools.schemas.generate schemas docs/topics.md
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from ringfence.messages.base import Claims, Message, Topic, typ_header
from ringfence.messages.credential import SealedDelivery
from tools.schemas.examples import EXAMPLES
from ringfence.messages.topics import ALL


SERVICES = ("registry", "policy", "issuer", "revoker", "audit", "signals", "runner")
"""Those that consume in consumer groups."""


def message_name(model: type[Message]) -> str:
    """The name of a message in files and in AsyncAPI: its `typ`, or its class in kebab case."""
    if issubclass(model, Claims):
        return model.typ
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in model.__name__).lstrip("-")


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a message's claims or JSON."""
    text = json.dumps(model.model_json_schema()).replace(
        '"additionalProperties": {}', '"additionalProperties": true'
    )
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **json.loads(text)}


def _content_type(topic: Topic[Any]) -> str:
    return "application/json" if topic.encoding == "json" else "application/jose"


def _message(model: type[Message], topic: Topic[Any] | None) -> dict[str, Any]:
    name = message_name(model)
    entry: dict[str, Any] = {
        "name": name,
        "title": model.__name__,
        "summary": (model.__doc__ or "").strip().splitlines()[0],
        "contentType": _content_type(topic) if topic else "application/json",
        "payload": {"$ref": f"./{name}.schema.json"},
    }
    if model is SealedDelivery:
        entry["contentType"] = "application/jose+json"
    if issubclass(model, Claims):
        clear = topic is not None and model in topic.in_the_clear
        entry["contentType"] = "application/json" if clear else "application/jose"
        entry["description"] = (
            "JSON, signed: the record's header `signature` is the compact JWS without its payload, which is the "
            "value to the byte (RFC 7515, appendix F)"
            if clear
            else "A JWS in compact serialisation"
        ) + f"; header `typ`: `{typ_header(model)}`."
    return entry


def asyncapi() -> dict[str, Any]:
    """The AsyncAPI 3 document of all topics, for the default prefix."""
    channels: dict[str, Any] = {}
    messages: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    for topic in ALL:
        names = [message_name(model) for model in topic.models]
        messages |= {name: _message(model, topic) for name, model in zip(names, topic.models, strict=True)}
        messages |= {message_name(model): _message(model, None) for model in topic.also_json}
        kept = _kept(topic)
        channels[topic.what] = {
            "address": topic.name("ringfence"),
            "description": f"Key: {topic.key}. Kept: {kept}. Written by {', '.join(topic.written_by)}; "
            f"read by {', '.join(topic.read_by)}.",
            "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in names},
        }
        operations[f"receive.{topic.what}"] = {
            "action": "receive",
            "channel": {"$ref": f"#/channels/{topic.what}"},
        }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Ringfence",
            "version": "1.0.0",
            "description": "Credential broker for AI agents. Record headers are CloudEvents 1.0 attributes "
            "(`ce_id`, `ce_type`, `ce_source`, `ce_time`, `ce_specversion`, `content-type`) and `traceparent`.",
        },
        "channels": channels,
        "operations": operations,
        "components": {"messages": messages},
    }


def models() -> dict[str, type[Message]]:
    """Every published message by its name."""
    return {message_name(m): m for topic in ALL for m in (*topic.models, *topic.also_json)}


def compact_json(value: Any, indent: int = 0) -> str:
    """JSON with each object and list that fits on one line of 120 characters on one line."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or len(line) + indent <= 120:
        return line
    begin, end = ("{", "}") if isinstance(value, dict) else ("[", "]")
    entries = (
        [f"{json.dumps(key)}: {compact_json(one, indent + 1)}" for key, one in value.items()]
        if isinstance(value, dict)
        else [compact_json(one, indent + 1) for one in value]
    )
    inner = " " * (indent + 1)
    return f"{begin}\n{inner}" + f",\n{inner}".join(entries) + f"\n{' ' * indent}{end}"


def write(folder: Path) -> None:
    """Write all files, and delete those of messages that are gone."""
    files: dict[str, str] = {
        "asyncapi.yaml": yaml.safe_dump(asyncapi(), sort_keys=False, width=120, allow_unicode=True)
    }
    for name, model in models().items():
        files[f"{name}.schema.json"] = compact_json(json_schema(model)) + "\n"
        example = EXAMPLES[model].model_dump(mode="json", exclude_none=True)
        files[f"{name}.example.json"] = compact_json(example) + "\n"
    _replace_files(folder, files)


def service_description(role: str) -> str:
    """The AsyncAPI document of a service, as `faststream docs gen` makes it."""
    application = importlib.import_module(f"ringfence.{role}.app").described()
    return str(application.schema.to_specification().to_yaml())


def _replace_files(folder: Path, files: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if old.name not in files and old.suffix in {".json", ".yaml"}:
            old.unlink()
    for name, text in files.items():
        (folder / name).write_text(text)


_TABLE_BEGIN, _TABLE_END = "<!-- topics: generated by `make schemas` -->", "<!-- topics end -->"


def topic_table() -> str:
    """All topics as a Markdown table."""
    rows = ["| topic | key | messages | kept | written by | read by |", "|---|---|---|---|---|---|"]
    for topic in ALL:
        names = ", ".join(f"`{message_name(model)}`" for model in topic.models)
        cells = (
            f"`{topic.name('ringfence')}`",
            topic.key,
            names,
            _kept(topic),
            ", ".join(topic.written_by),
            ", ".join(topic.read_by),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _kept(topic: Topic[Any]) -> str:
    if topic.retention_s is None:
        return "compacted"
    hours = topic.retention_s // 3600
    return f"{hours // 24} d" if hours % 24 == 0 else f"{hours} h"


def renew_table(page: str) -> str:
    """Renew the topic table between the markers of a page. Raises ValueError where the markers are missing."""
    before, _, rest = page.partition(_TABLE_BEGIN)
    _, found, after = rest.partition(_TABLE_END)
    if not found:
        raise ValueError(f"the page lacks the lines {_TABLE_BEGIN} and {_TABLE_END}")
    return f"{before}{_TABLE_BEGIN}\n{topic_table()}\n{_TABLE_END}{after}"


def main() -> None:
    """Write the folder, and renew the topic table of a page where one is named."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.schemas.generate", description="Writes schemas/."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("page", type=Path, nargs="?", help="its topic table is renewed")
    options = parser.parse_args()
    write(options.folder)
    if options.page:
        options.page.write_text(renew_table(options.page.read_text()))


if __name__ == "__main__":
    main()
