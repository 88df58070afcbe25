"""Unknown fields, planted: a message with one field that no version knows, at each place where it could have one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ringfence.kernel.crypto.jws import sign
from ringfence.messages.base import Message
from ringfence.messages.registry import BackendSettings, TargetSet
from tests.support.in_memory_registry import InMemoryRegistry

NAME = "added_in_2030"


def planted(message: Any) -> Iterator[Any]:
    """The message with one unknown field, in itself and in each message in it. Those of a backend are its own."""
    if not isinstance(message, BackendSettings):
        yield message.model_copy(update={NAME: {"unless": ["it is Friday"]}})
    for name in type(message).model_fields:
        for value in _planted_in(getattr(message, name)):
            yield message.model_copy(update={name: value})


def _planted_in(value: Any) -> Iterator[Any]:
    if isinstance(value, Message):
        yield from planted(value)
    elif isinstance(value, tuple | list):
        for index, one in enumerate(value):
            for other in _planted_in(one):
                yield (*value[:index], other, *value[index + 1 :])
    elif isinstance(value, dict):
        for key, one in value.items():
            for other in _planted_in(one):
                yield {**value, key: other}


def as_before(ledger: InMemoryRegistry, claims: Any) -> None:
    """Have the record of a command about a target or a provisioner that a registry of before accepted."""
    kind, id = (
        ("target", claims.target_id) if isinstance(claims, TargetSet) else ("user", claims.provisioner_id)
    )
    current = ledger.current(kind, id)  # type: ignore[arg-type]
    before = tuple(one.embedded for one in current.commands) if current else ()
    record = ledger.follow((*before, ledger.embed(claims)), current.revision + 1 if current else 1)
    assert ledger.admit(sign(record, ledger.registry)) is None
    ledger.clock.ms += 1000
