"""A service as a FastStream application, which describes in AsyncAPI what the service consumes and publishes.

`described()` in each `app.py` makes it, without settings, keys or a broker, for `faststream docs gen` and
`make schemas`. It reads nothing: `Runtime` does. No service serves a page of it. Such pages load scripts from
elsewhere, and FastStream's route `/try` lets anybody publish.
"""

from __future__ import annotations

import functools
import json
import operator
from typing import Any, Final

from faststream import FastStream
from faststream.exceptions import SetupError
from faststream.kafka import KafkaBroker
from faststream.specification import AsyncAPI, Specification

from ringfence.kernel.kafka.faststream_adapter import GroupRouter
from ringfence.messages.base import ServiceRole, Topic

PREFIX: Final = "ringfence"
"""The topic prefix of descriptions: the default of `RINGFENCE_TOPIC_PREFIX`."""


async def placeholder(*_: object) -> Any:
    """In place of a handler, for a router that is only described. Raises SetupError."""
    raise SetupError("this application describes a service and does not run it; run: ringfence serve")


def describe(role: ServiceRole, router: GroupRouter) -> FastStream:
    broker = KafkaBroker(
        "localhost:9092", description="`RINGFENCE_KAFKA` says where it is.", consumer_only=True, logger=None
    )
    broker.include_router(router, prefix=PREFIX)
    for topic, models in router.publishes.items():
        broker.publisher(
            topic.name(PREFIX),
            schema=functools.reduce(operator.or_, models),
            description=f"Key: {topic.key}.",
        )
    topics = {
        *router.publishes,
        *(topic for g in router.groups for one in g.subscribers for topic in one.reads),
    }
    document = _ServiceDocument(
        {topic.name(PREFIX): topic for topic in topics},
        title=f"Ringfence {role}",
        version="1.0.0",
        description=f"What the service {role} consumes in consumer groups, and what it publishes. Tables and histories "
        "that it follows are not among them. Record headers are as in the description of all topics.",
    )
    return FastStream(broker, specification=document, logger=None)


class _ServiceDocument(AsyncAPI):
    """FastStream's document, corrected and in the same order each time."""

    def __init__(self, topics: dict[str, Topic[Any]], **options: Any) -> None:
        super().__init__(**options)
        self._topics = topics

    def to_specification(self) -> Specification:
        specification = super().to_specification()
        return _JsonDocument(specification.title, self._corrected(specification.to_jsonable()))

    def _corrected(self, document: dict[str, Any]) -> dict[str, Any]:
        """Upstream keeps subscribers in weak sets, in any order. It says that all is JSON, and correlates by a header
        that our records do not have.
        """
        messages = document["components"]["messages"]
        for channel in document["channels"].values():
            topic = self._topics[channel["address"]]
            for reference in channel["messages"].values():
                message = messages[reference["$ref"].rpartition("/")[2]]
                del message["correlationId"]
                if topic.encoding != "jwe":  # there each message has a type of its own
                    message["contentType"] = f"application/{'json' if topic.encoding == 'json' else 'jose'}"
        del document["defaultContentType"]
        for part in (document["components"], document):
            for name in ("channels", "operations", "messages", "schemas"):
                if name in part:
                    part[name] = dict(sorted(part[name].items()))
        return {"asyncapi": document["asyncapi"], **document}


class _JsonDocument:
    """A `Specification` of FastStream that is ready."""

    def __init__(self, title: str, document: dict[str, Any]) -> None:
        self._title, self._document = title, document

    @property
    def title(self) -> str:
        return self._title

    def to_jsonable(self) -> dict[str, Any]:
        return self._document

    def to_json(self) -> str:
        return json.dumps(self._document)

    def to_yaml(self) -> str:
        """Raises ImportError without PyYAML, which the command line of FastStream reports."""
        import yaml

        return str(yaml.safe_dump(self._document, sort_keys=False, width=120, allow_unicode=True))
