"""What services say of themselves to Prometheus while they work: how far behind, whose clock, which keys."""

from __future__ import annotations

from prometheus_client import REGISTRY

from ringfence.audit.settings import AuditSettings
from ringfence.registry.settings import RegistrySettings
from tests.support.benches.policy_bench import DEPLOY, PolicyBench
from tests.support.world import World


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


async def test_each_group_says_how_far_it_is_behind(world: World) -> None:
    group = f"{world.prefix}.audit"
    async with world.running("registry", "audit", own={"audit": AuditSettings(linger_ms=10)}):
        await world.user("sam", roles=("sponsor",))
        behind_s = await world.until(
            lambda: value("ringfence_handling_lag_seconds", group=group) or None, group
        )
        assert 0 < behind_s < 60
        # What was late once is no alarm for ever: with nothing left to handle, nothing is behind.
        await world.until(
            lambda: value("ringfence_handling_lag_seconds", group=group) == 0 or None, "that nothing is left"
        )


async def test_keys_that_end_are_counted_until_they_are_replaced(world: World) -> None:
    def counted(count: int) -> bool | None:
        return value("ringfence_keys_ending") == count or None

    async with world.running("registry", own={"registry": RegistrySettings(key_check_s=0.05)}):
        sam = await world.user("sam", roles=("sponsor",))
        for name, days in (("bot", 2), ("other", 400), ("third", 10)):
            key = world.party("agent", name).key_record(days)
            await world.agent(name, sam, keys=(key,))
        await world.until(lambda: counted(2), "that two keys end")
        uma = world.party("user", "uma")
        await world.accepted(world.user_set(world.operator, uma, keys=(uma.key_record(3),)), world.operator)
        await world.until(lambda: counted(3), "that three keys end")
        fresh = world.party("user", "uma").key_record()
        await world.accepted(world.user_set(world.operator, uma, keys=(fresh,)), world.operator)
        await world.until(lambda: counted(2), "that one was replaced")


async def test_the_clock_is_held_against_that_of_the_broker(world: World) -> None:
    async with world.running("registry", "policy"):
        ahead_s = await world.until(lambda: value("ringfence_clock_ahead_seconds", whose="broker"), "a clock")
    assert abs(ahead_s) < 60


async def test_waiting_approval_is_counted_with_its_age(world: World) -> None:
    def waits(count: int) -> bool | None:
        return value("ringfence_approvals_waiting") == count or None

    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        assert value("ringfence_approvals_waiting") == value("ringfence_approvals_oldest_seconds") == 0
        asked = await office.ask(DEPLOY)
        question = await office.question(asked, office.sam)
        await world.until(lambda: waits(1), "that a request waits")
        first_s = value("ringfence_approvals_oldest_seconds")
        assert first_s is not None
        assert 0 < first_s < 60
        later = await office.ask(DEPLOY)
        await office.question(later, office.sam)
        await world.until(lambda: waits(2), "that two wait")
        assert (value("ringfence_approvals_oldest_seconds") or 0) > first_s  # still that of the first one
        await office.approve(question, office.sam)
        await office.decision(asked, "allowed")
        await world.until(lambda: waits(1), "that one was answered")
