"""An agent renews the key in its file by a gateway's HTTP API."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest

from ringfence.client.agent.agent import Agent
from ringfence.client.errors import RefusedError
from ringfence.kernel.crypto.keys import SigningKey
from tests.support.benches.agent_api_bench import by_gateway
from tests.support.world import World


async def test_key_file_is_renewed_by_the_gateway_and_the_former_key_ends(
    world: World, tmp_path: Path
) -> None:
    async with by_gateway(world, tmp_path) as settings:
        bot = await world.agent("bot", sponsor=await world.user("sam", roles=("sponsor",)))
        file = tmp_path / "bot.json"
        bot.key.save(file)
        os.utime(file, (0, 0))
        async with Agent.connect(file, settings) as agent:
            assert SigningKey.load(file).kid == agent.connection.key.kid != bot.key.kid
            await agent.release(str(uuid.uuid4()))
        async with Agent.connect(bot.key, settings) as former:
            with pytest.raises(RefusedError) as refused:
                await former.release(str(uuid.uuid4()))
            assert refused.value.code == "key_ended"
