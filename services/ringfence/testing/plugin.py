"""The pytest fixture. Its module is loaded by `pytest_plugins = ["ringfence.testing"]`."""

from __future__ import annotations

import pytest

from ringfence.testing.in_memory import InMemoryRingfence


@pytest.fixture
def in_memory_ringfence() -> InMemoryRingfence:
    """A Ringfence of one test, with its five people and nothing else."""
    return InMemoryRingfence()
