"""`ringfence adopt` where two people have to sign what widens: it stops at each change until the second signs."""

from __future__ import annotations

import asyncio
import json
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from ringfence.client.admin.trust_setup import (
    load_root_and_bundle,
    publish_bundle,
    publish_operator,
    second_operator,
    sign_next_bundle,
)
from ringfence.client.admin.user_keys import prove
from ringfence.dev.stack import Stack
from ringfence.messages.trust import SecondPersonMode
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.gateway.model_server import respond
from tests.gateway.target import Target
from tests.integration.stack.test_adopt import OPENAI, dotenv_with_key
from tests.support.adopter import PROGRAM, Adopter
from tests.support.stack import now_s, options_of_stack, realm_in


@pytest.fixture
def stack_of_two(kafka: Kafka, redis_server: RedisServer) -> Iterator[Stack]:
    """A stack of one test, whose trust bundle requires a second person later on."""
    mark = f"adopt-{uuid.uuid4().hex[:8]}"
    with (
        tempfile.TemporaryDirectory(prefix="ringfence-adopt-") as folder,
        Stack(options_of_stack(Path(folder), kafka, redis_server, mark)) as running,
    ):
        yield running


@pytest.fixture
async def adopter(stack_of_two: Stack, tmp_path: Path) -> AsyncIterator[Adopter]:
    """A developer. otto is an operator by the root; what widens needs two people from now on."""
    stack = stack_of_two
    async with realm_in(stack) as realm:
        made = await Adopter(stack, tmp_path, uuid.uuid4().hex[:8]).make(by=stack.trust.root_key)
        otto, key = realm.name("otto"), realm.key("user", realm.name("otto"))
        key.save(tmp_path / "otto.json")
        invited = await made.run(*by(stack.trust.root_key), "--json", "user", "invite", otto)
        proven = prove(key, json.loads(invited)["invitation"], now_s())
        await publish_operator(stack.trust, realm.settings, second_operator(stack.trust, proven, "Otto"))
        root, bundle = load_root_and_bundle(stack.trust)
        modes = (*bundle.second_person, SecondPersonMode(mode="required", not_before=now_s()))
        version = sign_next_bundle(stack.trust, bundle, root, now_s(), second_person=modes).version
        await publish_bundle(stack.trust, realm.settings)
        async with httpx.AsyncClient() as http, asyncio.timeout(60):
            probe = f"{stack.url('registry')}/readyz"
            while (await http.get(probe)).json().get("trust_bundle") != version:
                await asyncio.sleep(0.05)
        yield made


def by(key: Path) -> tuple[str, ...]:
    return (*PROGRAM, "--identity", str(key))


async def waiting(adopter: Adopter) -> list[str]:
    """The ids of the proposals that otto may see."""
    listed = await adopter.run(*by(adopter.folder / "otto.json"), "--json", "proposal", "list")
    return [one["id"] for one in json.loads(listed)]


@pytest.mark.timeout(300)
async def test_adoption_stops_at_each_change_until_a_second_person_signs_it(adopter: Adopter) -> None:
    async with Target(respond=respond).serving() as server:
        dotenv, target, words = dotenv_with_key(adopter, server)
        for step in ("target", "entitlement", "agent"):
            printed = await adopter.adopt(*words, status=1)
            assert f"stopped at: {step}" in printed
            assert "waits for a second person" in printed
            # Run again too early, it names the proposal that is there, and makes no other.
            words = ("--target", target)
            (id,) = await waiting(adopter)
            printed = await adopter.adopt(*words, status=1)
            assert f"ringfence proposal second {id[:12]}" in " ".join(printed.split())
            assert await waiting(adopter) == [id]
            assert OPENAI in dotenv.read_text()
            assert not server.requests
            await adopter.run(*by(adopter.folder / "otto.json"), "proposal", "second", id, "--yes")
        await adopter.adopt(*words)
        assert OPENAI not in dotenv.read_text()
        assert server.requests


@pytest.mark.timeout(300)
async def test_undo_withdraws_the_change_that_waits(adopter: Adopter) -> None:
    async with Target(respond=respond).serving() as server:
        dotenv, target, words = dotenv_with_key(adopter, server)
        await adopter.adopt(*words, status=1)
    assert len(await waiting(adopter)) == 1
    await adopter.adopt("--target", target, "--undo")
    assert await waiting(adopter) == []
    assert not adopter.place(target).exists()
    assert OPENAI in dotenv.read_text()
