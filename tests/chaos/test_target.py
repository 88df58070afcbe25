"""What is told of the target is so: a session works, ends with its user, and what is left is found."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from redis.asyncio import Redis

from ringfence.client.agent.credentials import IssuedCredential, Secret
from ringfence.dev.processes import free_port
from tests.chaos.proxy import Link
from tests.chaos.target import TARGET, ValkeyDoor, leftovers, target_behind
from tests.support.servers.redis_target import ValkeyTarget


@dataclass
class Made:
    """A target, a way to do everything there, and a credential."""

    target: ValkeyTarget
    own: Redis
    credential: IssuedCredential

    @property
    def user(self) -> str:
        return f"ringfence.acme.example.{self.credential.lease_id}"


@pytest.fixture
async def made(tmp_path: Path) -> AsyncIterator[Made]:
    async with Link("target", free_port()) as link, target_behind(link, tmp_path) as target:
        lease_id = str(uuid.uuid4())
        async with Redis.from_url(target.server.url) as own:
            await own.execute_command(
                "ACL", "SETUSER", f"ringfence.acme.example.{lease_id}", "on", ">secret", "+ping"
            )
            credential = IssuedCredential(
                lease_id=lease_id, request_id="r", kind="redis", token_type=None, expires_at=0, target=TARGET, scope=(),
                secret=Secret(f"redis://ringfence.acme.example.{lease_id}:secret@{target.address}/0"), task_id="t",
                agent_id="bot", sponsor="sam", on_behalf_of="maria", delivery="agent",
            )  # fmt: skip
            yield Made(target, own, credential)


async def test_a_credential_works_until_its_user_is_gone(made: Made) -> None:
    door = ValkeyDoor()
    assert await door.opens(made.credential) is True
    await made.own.execute_command("ACL", "DELUSER", made.user)
    assert await door.opens(made.credential) is False
    await door.forget(made.credential)


async def test_a_session_that_was_ended_is_begun_anew_while_the_user_is_there(made: Made) -> None:
    door = ValkeyDoor()
    assert await door.opens(made.credential) is True
    await made.own.execute_command("CLIENT", "KILL", "USER", made.user)
    assert await door.opens(made.credential) is True
    await door.forget(made.credential)


async def test_unavailable_target_answers_neither_yes_nor_no(made: Made) -> None:
    door = ValkeyDoor()
    made.target.server.stop()
    assert await door.opens(made.credential) is None
    await door.forget(made.credential)


async def test_leftover_user_is_found(made: Made) -> None:
    (left,) = await leftovers(made.target)
    assert (left.target_id, left.lease_id) == (TARGET, made.credential.lease_id)
    await made.own.execute_command("ACL", "DELUSER", made.user)
    assert await leftovers(made.target) == []


async def test_services_have_their_rights_by_the_link_alone(made: Made) -> None:
    url = made.target.secret_file.read_text().strip()
    async with Redis.from_url(url) as service:
        assert made.user.encode() in await service.execute_command("ACL", "USERS")
    assert made.target.address not in url
