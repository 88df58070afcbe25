"""Records of a registry that lies: signed with its key, and made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from ringfence.messages.registry import (
    AnyRecord,
    EmbeddedCommand,
)
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.records.command_chain import ChainError
from tests.support.in_memory_registry import InMemoryRegistry


def the(ledger: InMemoryRegistry, kind: SubjectKind, id: str) -> AnyRecord:
    entry = ledger.directory.entry(kind, id)
    assert entry is not None
    return entry.record


def forged(
    ledger: InMemoryRegistry, old: AnyRecord, commands: tuple[EmbeddedCommand, ...], **state: Any
) -> AnyRecord:
    """The next revision of a record, with these commands and a state that is changed like this."""
    record: AnyRecord = ledger.record(old.state.model_copy(update=state), commands, old.revision + 1)
    return record


def broken(ledger: InMemoryRegistry, record: AnyRecord, **users: Any) -> str:
    with pytest.raises(ChainError) as caught:
        ledger.chains(users).verify(record)
    assert caught.value.code == "chain_broken"  # somebody lied: nothing that is still to come makes it good
    return str(caught.value)
