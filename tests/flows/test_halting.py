"""What halts a consumer: a bad deploy of a service, and nothing that a stranger could do."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from ringfence.kernel.bus import MAX_INVALID_SIGNED
from ringfence.kernel.keys import SigningKey, b64encode
from ringfence.messages.base import typ_header
from ringfence.messages.credential import CredentialDecision
from ringfence.messages.lease import Lease
from ringfence.messages.operations import DeadLetter
from ringfence.messages.topics import DEAD_LETTER
from tests.flows.desk import another, opened_desks
from tests.world import World


def of_no_shape(key: SigningKey, typ: str, aud: str, **claims: Any) -> str:
    """What a newer version of a service might write that nobody here can read: truly signed."""
    head = {"alg": key.alg, "kid": key.kid, "typ": typ}
    body = {"iss": key.id, "aud": aud, "iat": int(time.time()), "jti": uuid.uuid4().hex, **claims}
    text = ".".join(b64encode(json.dumps(part).encode()) for part in (head, body))
    return f"{text}.{b64encode(key.sign(text.encode()))}"


async def buried(world: World, count: int) -> None:
    """Return once so many records are dead-lettered."""
    letters = await world.records(DEAD_LETTER)

    def enough() -> bool | None:
        found = [DeadLetter.model_validate_json(record.value) for record in letters]
        return len([letter for letter in found if letter.service == "issuer"]) >= count or None

    await world.until(enough, f"{count} dead letters")


async def test_a_bad_deploy_halts_its_readers_and_a_stranger_stops_nobody(world: World) -> None:
    async with opened_desks(world) as first, world.running("issuer"):
        desk = await another(first)
        policy, typ = world.key("policy"), typ_header(CredentialDecision)
        stranger = SigningKey.generate(policy.id)
        one = of_no_shape(policy, typ, world.td)
        lease = of_no_shape(world.key("issuer"), typ_header(Lease), world.td)
        many = range(MAX_INVALID_SIGNED + 5)
        # What a stranger can do: garbage, their own signature, one true record again and again, others from elsewhere.
        for _ in many:
            await desk.append_decision("garbage")
            await desk.append_decision(of_no_shape(stranger, typ, world.td))
            await desk.append_decision(one)
            await desk.append_decision(lease)
        await buried(world, 4 * len(many))
        await desk.issued("read")
        assert world.runtimes["issuer"].unready() == []

        for _ in many:
            await desk.append_decision(of_no_shape(policy, typ, world.td, request_id=1))
        await world.until(lambda: world.runtimes["issuer"].unready() or None, "that it is halted")
        ready = await world.get("issuer", "/readyz")
        assert ready.status_code == 503
        assert "look at its dead letters" in ready.json()["reasons"][0]
