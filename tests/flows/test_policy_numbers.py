"""Numbers that one library takes and another cannot write: a request that has one ends as garbage, and stops nobody."""

from __future__ import annotations

import itertools
import json

from ringfence.kernel.crypto.jws import sign_payload
from ringfence.messages.credential import CredentialRequest
from ringfence.messages.topics import CREDENTIAL_REQUEST
from tests.support.benches.policy_bench import READ, PolicyBench
from tests.support.world import World

NUMBERS = (f"{10**40}", "1e999", f'[{{"deep": -{2**63 + 1}}}]')


async def test_a_number_beyond_64_bits_in_what_nobody_knows_stops_nobody(world: World) -> None:
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        for number, place in itertools.product(NUMBERS, ("request", "permission", "reply_key")):
            claims, _ = office.request(READ)
            body = json.loads(claims.model_dump_json(exclude_none=True))
            where = {"request": body, "permission": body["scope"][0], "reply_key": body["reply_key"]}[place]
            where["added_in_2030"] = "HERE"
            payload = json.dumps(body).replace('"HERE"', number)
            sent = await office.send(
                CREDENTIAL_REQUEST, sign_payload(CredentialRequest, payload.encode(), office.bot.key)
            )
            assert (await office.letter(sent)).code == "claims_invalid", (number, place)
        assert (await office.final(await office.ask(READ))).outcome == "allowed"
