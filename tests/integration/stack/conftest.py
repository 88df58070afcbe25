"""The whole stack for the tests of this folder, started once, on the broker of this run.

It ends after the last of them: without anything to do it takes a fifth of a core, most of that for the embedded broker,
which its consumers have to ask again and again.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from ringfence.dev.stack import Stack
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.stack import RunningStack, options_of_stack, realm_in


@pytest.fixture(scope="package")
def stack(kafka: Kafka, redis_server: RedisServer) -> Iterator[Stack]:
    """All services as processes. Tests share it: use names of your own (`realm`)."""
    with (
        tempfile.TemporaryDirectory(prefix="ringfence-stack-") as folder,
        Stack(options_of_stack(Path(folder), kafka, redis_server, "stack")) as running,
    ):
        yield running


@pytest.fixture
async def realm(stack: Stack) -> AsyncIterator[RunningStack]:
    """A small organisation of this test's own."""
    async with realm_in(stack) as made:
        yield made
