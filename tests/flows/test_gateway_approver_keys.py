"""Whose key lets an action pass at the gateway: floors for a kind of key, and keys that others added or co-signed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import pytest

from ringfence.client.approvals.action_approvals import PendingAction
from ringfence.client.errors import RefusedError
from ringfence.kernel.crypto.jws import sign
from ringfence.messages.approval import ActionApproval
from ringfence.messages.registry import BackendSettings, UserEndKey, VerbFloor
from ringfence.messages.topics import APPROVAL_RESPONSE
from tests.flows.test_gateway_approvals import RULES, WIDE, Actor, Stage, receivers, stage, waits
from tests.support.passkeys import add_passkey
from tests.support.user_keys import give_attested_passkey, give_key
from tests.support.world import Party

__all__ = ["receivers", "stage"]

VERBS = (
    VerbFloor(verb="read"),
    VerbFloor(verb="merge", ask="sponsor", key="attested"),
    VerbFloor(verb="wipe", ask="sponsor", key="file"),
)


@dataclass
class Keys:
    """The keys of sam, the sponsor; the operators are apart from who vouched for them."""

    file: Party
    passkey: Party
    """Added by sam, and attested by nobody."""
    alone: Party
    """Attested, and added by one operator: it waits."""
    cosigned: Party
    """Attested, and added by the operator olga with the co-signature of otto."""
    otto: Party


@pytest.fixture(scope="module")
async def keys(stage: Stage) -> Keys:
    world, sam = stage.world, stage.sam
    otto = await world.user("otto", ("operator",), WIDE)
    return Keys(
        file=sam,
        passkey=await add_passkey(world, sam),
        alone=await give_attested_passkey(world, world.operator, sam),
        cosigned=await give_attested_passkey(world, world.operator, sam, otto),
        otto=otto,
    )


async def set_floors(stage: Stage, verbs: Sequence[VerbFloor] = VERBS) -> None:
    backend = BackendSettings.model_validate({"kind": "jwt", "url": f"https://localhost:{stage.target.port}"})
    await stage.world.target("hub", backend=backend, requests=RULES, verbs=verbs)


@dataclass
class Held:
    """A request that the gateway holds for its answer."""

    stage: Stage
    actor: Actor
    pending: PendingAction
    sending: asyncio.Task[httpx.Response]

    async def answer(self, who: Party) -> str | None:
        """Have `who` say yes on Kafka, whatever the client says. Returns why that has no effect, or None."""
        world = self.stage.world
        yes = world.claims(
            ActionApproval, who, verdict="approved", agent_id=self.actor.bot.name, request=self.pending.request,
            request_digest=self.pending.digest,
        )  # fmt: skip
        await world.send(APPROVAL_RESPONSE, self.actor.bot.name, sign(yes, who.key))
        refused = asyncio.create_task(world.event_where(lambda e: e.kind == "refused" and e.ref == yes.jti))
        done, _ = await asyncio.wait((refused, self.sending), return_when=asyncio.FIRST_COMPLETED)
        if refused in done:
            assert not self.sending.done()
            return refused.result().reasons[0].code
        refused.cancel()
        return None


@asynccontextmanager
async def held(stage: Stage, actor: Actor, method: str, path: str) -> AsyncIterator[Held]:
    sending = asyncio.create_task(actor.send(method, path, b"" if method == "DELETE" else b"x"))
    async with stage.sponsor() as watching:
        pending = await waits(watching, actor)
    try:
        yield Held(stage, actor, pending, sending)
    finally:
        sending.cancel()


def passed(stage: Stage, path: str) -> bool:
    return any(target == path for target, _ in stage.puts())


async def test_a_floor_for_attested_keys_takes_no_other(stage: Stage, keys: Keys) -> None:
    await set_floors(stage)
    actor = await stage.actor()
    async with held(stage, actor, "PUT", "/dev/attested") as waiting:
        for key, code in (
            (keys.file, "key_not_attested"),
            (keys.passkey, "key_not_attested"),
            (keys.alone, "key_too_new"),
        ):
            assert await waiting.answer(key) == code
        assert not passed(stage, "/dev/attested")
        assert await waiting.answer(keys.cosigned) is None
        assert passed(stage, "/dev/attested")


async def test_the_client_says_which_kind_of_key_a_floor_wants(stage: Stage, keys: Keys) -> None:
    await set_floors(stage)
    actor = await stage.actor()
    async with held(stage, actor, "PUT", "/dev/told") as waiting, stage.sponsor(keys.file) as sam:
        with pytest.raises(RefusedError, match="a passkey whose attestation an operator verified"):
            await sam.approve_action(waiting.pending)


async def test_a_floor_that_is_raised_while_a_request_waits_counts(stage: Stage, keys: Keys) -> None:
    """The question was asked under a lower floor: what was asked then is not approved any more."""
    await set_floors(stage, (VERBS[0], VerbFloor(verb="merge", ask="sponsor"), VERBS[2]))
    actor = await stage.actor()
    async with held(stage, actor, "PUT", "/dev/raised") as waiting:
        await set_floors(stage)
        # The refusal of the answer and that of the request come in either order.
        assert await waiting.answer(keys.passkey) in ("approval_stale", None)
        assert (await waiting.sending).status_code == 403
        assert not passed(stage, "/dev/raised")


async def test_a_cosigned_key_counts_at_once_but_beside_neither_operator(stage: Stage, keys: Keys) -> None:
    """sam has a key on the word of olga and otto. What is done on behalf of otto, it cannot approve."""
    await set_floors(stage, (VERBS[0], VerbFloor(verb="merge", ask="sponsor"), VERBS[2]))
    lent = await give_key(stage.world, stage.world.operator, stage.sam, keys.otto)
    for path, user, codes in (
        ("/dev/for-maria", stage.maria, (None,)),
        ("/dev/for-otto", keys.otto, ("key_beside_voucher", None)),
    ):
        actor = await stage.actor(user)
        async with held(stage, actor, "PUT", path) as waiting:
            for key, code in zip((lent, keys.file), codes, strict=False):
                assert not passed(stage, path)
                assert await waiting.answer(key) == code
            assert passed(stage, path)


async def test_a_key_whose_voucher_is_compromised_lets_nothing_pass(stage: Stage, keys: Keys) -> None:
    await set_floors(stage, (VERBS[0], VerbFloor(verb="merge", ask="sponsor"), VERBS[2]))
    world = stage.world
    oscar = await world.user("oscar", ("operator",))
    lent = await give_key(world, oscar, stage.sam, keys.otto)
    actor = await stage.actor()
    async with held(stage, actor, "PUT", "/dev/compromised") as waiting:
        await world.accepted(
            world.claims(
                UserEndKey,
                oscar,
                user_id="oscar",
                kid=oscar.key.kid,
                reason="stolen",
                compromised=True,
                since_ms=int(time.time() * 1000) - 86_400_000,
            ),
            oscar,
        )
        assert await waiting.answer(lent) == "key_voucher_compromised"
        assert await waiting.answer(keys.file) is None
