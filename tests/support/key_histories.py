"""Histories of the keys of a person, as the directory of a test ledger has them."""

from __future__ import annotations

import pytest

from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Claims
from ringfence.messages.registry import (
    UserState,
)
from ringfence.model.lifecycle import (
    CommandRefusedError,
    KeyOrigin,
)
from ringfence.model.records.directory import Directory
from tests.support.in_memory_registry import InMemoryRegistry


def refused(ledger: InMemoryRegistry, claims: Claims, key: SigningKey | None = None) -> str:
    """The code with which a command is refused."""
    with pytest.raises(CommandRefusedError) as caught:
        ledger.give(claims, key)
    assert str(caught.value)
    return caught.value.code


def state(ledger: InMemoryRegistry, user: str) -> UserState:
    entry = ledger.directory.user(user)
    assert entry is not None
    return entry.state


def origin(ledger: InMemoryRegistry, user: str, key: SigningKey) -> KeyOrigin:
    return ledger.directory.key_history(user).origins[key.kid]


def givers(one: KeyOrigin) -> set[tuple[str, str]]:
    """The keys on which a key rests: (user id, `kid`) of each."""
    return {(giver.user_id, giver.kid) for giver in one.givers}


def reread(ledger: InMemoryRegistry) -> Directory:
    """A reader that starts with the present records alone, in any order."""
    reader = ledger.reader()
    for kind in ("target", "task", "agent", "user"):
        for entry in ledger.directory.entries(kind):
            assert ledger.admit(entry.compact.decode(), reader) is None
    return reader
