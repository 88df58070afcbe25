"""End to end by ssh, with every service a process: an agent asks for one command, its sponsor approves, and it ends."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ringfence import Agent
from ringfence.client.agent.credentials import IssuedCredential, applied
from ringfence.client.errors import RequestDeniedError
from ringfence.messages.topics import LEASE
from tests.backends import story
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support import secret_canary
from tests.support.servers.ssh import Client, SshServer, SshTarget, lives
from tests.support.stack import RunningStack, first_pending

TARGET = "files"
PING = b"ping\n"


@dataclass
class Office:
    """A running stack with one host, and who has to do with it."""

    realm: RunningStack
    target: SshTarget
    state: Path


def client(variables: dict[str, str]) -> Client:
    """OpenSSH's client, as the agent."""
    return Client(Path(variables["RINGFENCE_SSH_CONFIG"]), TARGET)


@pytest.fixture(scope="module")
async def office(
    kafka: Kafka, redis_server: RedisServer, ssh_server: SshServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Office]:
    target = SshTarget(TARGET, ssh_server, tmp_path_factory.mktemp("files"))
    target.write_secret()
    things = story.Thing.of(TARGET, "ssh", ("read", "write", "shell"), "deploy/**")
    async with story.running(kafka, redis_server, "ssh-story", target.places()) as (realm, folder):
        await story.staff(realm, things)
        yield Office(realm, target, folder)


async def _approved(realm: RunningStack, agent: Agent, resource: str, ttl_s: int) -> IssuedCredential:
    return await story.approved(realm, agent, TARGET, resource, ttl_s)


async def test_one_command_for_as_long_as_the_lease(office: Office) -> None:
    realm = office.realm
    async with realm.as_agent() as agent, realm.seen(LEASE) as seen:
        credential = await _approved(realm, agent, "deploy/a", ttl_s=20)
        assert credential.kind == "ssh"
        with applied(credential) as variables:
            ssh = client(variables)
            assert (await ssh.run(given=PING))[:2] == (0, PING)
            for beyond in ("read b", "write a", "/bin/sh -c id"):
                status, said, told = await ssh.run(command=beyond, given=PING)
                assert (status, said) == (126, b"")
                assert "this credential runs: read a" in told
            async with ssh.open() as session:
                assert await lives(session)
                await asyncio.wait_for(session.wait(), 60)
                assert time.time() >= credential.expires_at
                assert session.returncode == 255
            end = await realm.end_of(agent, seen, credential.lease_id)
            assert (end.status, end.cause and end.cause.kind) == ("expired", "deadline")
            assert f"acme.example.{credential.lease_id}" not in office.target.names()
            status, _, told = await ssh.run()
            assert (status, "Permission denied (publickey)" in told) == (255, True)


async def test_command_missing_on_the_host_is_denied_with_the_reason(office: Office) -> None:
    realm = office.realm
    async with realm.as_agent() as agent:
        with pytest.raises(RequestDeniedError, match="means no command that the host has now"):
            await _approved(realm, agent, "deploy/nothing", ttl_s=60)


async def test_one_command_has_it_and_it_is_released_after(office: Office, tmp_path: Path) -> None:
    realm = office.realm
    script = (
        'ls -l "$(dirname "$RINGFENCE_SSH_CONFIG")"; echo "$RINGFENCE_SSH_CONFIG"; '
        f'echo ping | ssh -F "$RINGFENCE_SSH_CONFIG" {TARGET}; echo ping | $GIT_SSH_COMMAND {TARGET}'
    )
    argv = [
        sys.executable,
        *story.command(realm, tmp_path / "bot.json", f"{TARGET}:read:deploy/a", "sh", "-c", script),
    ]
    async with realm.as_agent() as agent, realm.seen(LEASE) as seen:
        process = await asyncio.create_subprocess_exec(
            *argv, env=os.environ | realm.stack.environment(), stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        async with realm.sponsor() as sam:
            await sam.approve(await first_pending(sam))
        said, told = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 0, told
        _, *files, config, one, other = said.decode().splitlines()
        assert [line.split()[0].rstrip(".") for line in files] == ["-rw-------"] * 4
        assert (one, other) == ("ping", "ping")
        assert not Path(config).parent.exists()
        lease_id = told.decode().partition("lease ")[2].partition(",")[0]
        assert (await realm.end_of(agent, seen, lease_id)).status == "released"
    assert f"acme.example.{lease_id}" not in office.target.names()


async def test_no_secret_is_anywhere_but_with_the_agent(office: Office) -> None:
    realm = office.realm
    async with realm.as_agent() as agent:
        credentials = [await _approved(realm, agent, "deploy/a", ttl_s=600) for _ in range(2)]
        for credential in credentials:
            with applied(credential) as variables:
                assert (await client(variables).run(given=PING))[0] == 0
        await agent.release(credentials[0])
    keys = [json.loads(credential.value)["private_key"] for credential in credentials]
    # The line that holds the secret half: those before and after it are public, or the same in every key.
    secrets = [key.splitlines()[4] for key in [*keys, office.target.server.authority]]
    assert len(set(secrets)) == 3
    assert await secret_canary.on_topics(realm.settings, secrets) == []
    assert await secret_canary.in_redis(realm.stack.redis_url, secrets) == []
    folders = [office.state, office.target.server.folder]
    authority = str(office.target.server.folder / "authority")  # where the test made it
    assert [path for path in secret_canary.in_files(folders, secrets) if path != authority] == []
    # A scan that finds nothing must be able to find something.
    assert "credential.decision" in await secret_canary.on_topics(realm.settings, [story.REASON])
    live = credentials[1].lease_id
    assert await secret_canary.in_leases(realm.stack.settings(), [live], secrets) == []
    assert await secret_canary.in_leases(realm.stack.settings(), [live], [f'"lease_id":"{live}"'])
    assert secret_canary.in_files(folders, [credentials[0].lease_id])
    assert authority in secret_canary.in_files(folders, secrets)
