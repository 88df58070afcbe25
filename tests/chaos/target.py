"""A real target with state: a Valkey of which the ACL users are the credentials. Nothing else of Ringfence is in it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError

from ringfence.client.agent.credentials import IssuedCredential
from ringfence.dev.processes import LOOPBACK
from tests.chaos.history import Leftover
from tests.chaos.proxy import Link
from tests.support.servers.redis_target import ValkeyTarget, valkey_target

TARGET = "cache"
_ANSWER_WITHIN_S = 5.0


@contextlib.asynccontextmanager
async def target_behind(link: Link, folder: Path) -> AsyncIterator[ValkeyTarget]:
    """The server. Services reach it by the link; those who use credentials reach it directly."""
    async with valkey_target(TARGET, folder) as target:
        link.upstream = target.server.port
        target.write_secret(f"{LOOPBACK}:{link.port}")
        yield target


async def leftovers(target: ValkeyTarget) -> list[Leftover]:
    """The users that are there."""
    return [
        Leftover(TARGET, user.rpartition(".")[2], f"the ACL user {user}") for user in await target.users()
    ]


class ValkeyDoor:
    """One connection for each credential, kept open: it is a session, and must end as the credential does."""

    def __init__(self) -> None:
        self._sessions: dict[str, Redis] = {}

    async def opens(self, credential: IssuedCredential) -> bool | None:
        """Use the session, and where that was ended, log in anew."""
        for _ in range(2):
            client = self._sessions.get(credential.lease_id) or self._session(credential)
            try:
                await client.execute_command("PING")
            except AuthenticationError:
                return False
            except (RedisError, OSError):
                await client.connection_pool.disconnect()
                continue
            return True
        return None

    async def forget(self, credential: IssuedCredential) -> None:
        """Close the session."""
        client = self._sessions.pop(credential.lease_id, None)
        if client is not None:
            with contextlib.suppress(RedisError, OSError):
                await client.aclose()

    def _session(self, credential: IssuedCredential) -> Redis:
        client: Redis = Redis.from_url(
            credential.value,
            socket_connect_timeout=_ANSWER_WITHIN_S,
            socket_timeout=_ANSWER_WITHIN_S,
            retry=Retry(NoBackoff(), 0),
            max_connections=1,
        )
        self._sessions[credential.lease_id] = client
        return client
