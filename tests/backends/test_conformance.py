"""What every backend must do, each against its real server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from ringfence.backends import (
    AccessError,
    Backend,
    BackendContext,
    CircuitBreaker,
    TargetAccess,
    TargetError,
    TargetRefusedError,
    built_in,
)
from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.lease import Lease
from tests.backends.conftest import BY_THE_GATEWAY, BY_THE_TARGET
from tests.backends.kinds import TARGET, Kind, Stateful, allow, lease, state
from tests.support.servers.redis_target import Gate


@pytest.fixture
async def backend(kind: Kind) -> AsyncIterator[Backend]:
    backend = kind.backend()
    yield backend
    await backend.close()


@pytest.fixture
async def own(stateful: Stateful) -> AsyncIterator[Backend]:
    backend = stateful.backend()
    yield backend
    await backend.close()


def usual(kind: Kind) -> Lease:
    """Reads `a`, reads and writes `b`."""
    return lease(
        kind.name,
        allow("read", kind.resource("a")),
        allow(("read", "write"), kind.resource("b")),
    )


def is_token(backend: Backend) -> bool:
    """Whether a target that does not ask introspection, as in the suite, takes a credential until its deadline."""
    return backend.stateless and backend.enforced_by == "target"


async def minted(backend: Backend, one: Lease) -> str:
    target = state(backend.kind)
    assert backend.problem(one, target) is None
    credential = await backend.mint(one, target)
    assert (credential.kind, credential.expires_at) == (backend.kind, one.deadline)
    return credential.value


async def until(true: Callable[[], Awaitable[bool]], what: str) -> None:
    try:
        async with asyncio.timeout(60):
            while not await true():
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"not within 60 s: {what}") from None


# --- the scope --------------------------------------------------------------------------------------------------------


async def test_action_within_the_scope_is_possible(kind: Kind, backend: Backend) -> None:
    one = usual(kind)
    value = await minted(backend, one)
    for act in (kind.read_a, kind.read_b, kind.write_b):
        assert await kind.may(value, act), act
    await backend.undo(one.lease_id, target_id=TARGET)


async def test_action_beyond_the_scope_is_refused_by_the_target(kind: Kind, backend: Backend) -> None:
    one = usual(kind)
    value = await minted(backend, one)
    for act in (kind.write_a, *kind.beyond):
        assert not await kind.may(value, act), act
    await backend.undo(one.lease_id, target_id=TARGET)


async def test_to_write_is_not_to_read(kind: Kind, backend: Backend) -> None:
    writing = lease(kind.name, allow("write", kind.resource("b")))
    value = await minted(backend, writing)
    assert await kind.may(value, kind.write_b[:1] if kind.name == "postgres" else kind.write_b)
    for act in (kind.read_b, kind.read_a, kind.write_a):
        assert not await kind.may(value, act), act
    await backend.undo(writing.lease_id, target_id=TARGET)


async def test_permissions_stand_for_themselves(kind: Kind, backend: Backend) -> None:
    crossed = lease(kind.name, allow("read", kind.resource("a")), allow("write", kind.resource("b")))
    value = await minted(backend, crossed)
    assert await kind.may(value, kind.read_a)
    for act in (kind.write_a, kind.read_b):
        assert not await kind.may(value, act), act
    await backend.undo(crossed.lease_id, target_id=TARGET)


async def test_a_name_is_only_itself_whatever_is_in_it(kind: Kind, backend: Backend) -> None:
    before = await kind.names()
    for odd in kind.odd:
        one = lease(kind.name, allow("read", odd.resource))
        value = await minted(backend, one)
        assert await kind.may(value, odd.read), odd
        for act in (kind.read_a, kind.write_b, *(other.read for other in kind.odd if other != odd)):
            assert not await kind.may(value, act), (odd, act)
        await backend.undo(one.lease_id, target_id=TARGET)
    assert await kind.names() == before


async def test_inexact_permission_is_refused_before_anything_is_made(
    stateful: Stateful, own: Backend
) -> None:
    before = await stateful.names()
    for resource in stateful.unsayable:
        permission = allow("read", "a").model_copy(update={"resources": (resource,)})
        one = lease(stateful.name, permission)
        assert own.problem(one, state(stateful.name)), resource
        with pytest.raises(TargetRefusedError):
            await own.mint(one, state(stateful.name))
    for wrong in (lease(stateful.name), lease(stateful.name, allow("deploy", stateful.resource("a")))):
        assert own.problem(wrong, state(stateful.name))
        with pytest.raises(TargetRefusedError):
            await own.mint(wrong, state(stateful.name))
    assert await stateful.names() == before


async def test_unknown_target_setting_is_refused(stateful: Stateful, own: Backend) -> None:
    for settings in ({"read_only": True}, {"address": "elsewhere"}, {"address": "a b:1"}):
        assert "operator" in (own.problem(usual(stateful), state(stateful.name, **settings)) or "")
        with pytest.raises(RingfenceError):
            await own.mint(usual(stateful), state(stateful.name, **settings))


# --- ends -------------------------------------------------------------------------------------------------------------


async def test_self_ending_credential_ends_without_ringfence(kind: Kind) -> None:
    backend = kind.backend()
    one = usual(kind)
    one = one.model_copy(update={"deadline": int(time.time()) + 8})
    value = await minted(backend, one)
    await backend.close()
    async with kind.session(value) as lives:
        async with kind.alone():
            could = await kind.may(value, kind.read_a)
            assert could or time.time() >= one.deadline - 1

            async def refused() -> bool:
                return not await kind.may(value, kind.read_a)

            if backend.own_expiry == "none":
                await asyncio.sleep(max(0.0, one.deadline + 1 - time.time()))
                assert not await refused()
            else:
                await until(refused, "it is refused")
                assert time.time() >= one.deadline
            if backend.enforced_by == "gateway":
                await until(ended(lives), "what is open ends with it")
        fresh = kind.backend()
        if not backend.stateless:
            assert await lives()  # what is open lasts until it is undone
        await fresh.undo(one.lease_id, target_id=TARGET)
        assert is_token(backend) or not await lives()
        await fresh.close()


def ended(lives: Callable[[], Awaitable[bool]]) -> Callable[[], Awaitable[bool]]:
    async def look() -> bool:
        return not await lives()

    return look


async def test_undoing_ends_live_sessions_at_once(stateful: Stateful, own: Backend) -> None:
    one = usual(stateful)
    value = await minted(own, one)
    async with stateful.session(value) as lives, stateful.session(value) as also_lives:
        assert await lives()
        await own.undo(one.lease_id, target_id=TARGET)
        assert not await lives()
        assert not await also_lives()
    assert not await stateful.may(value, stateful.read_a)
    assert one.lease_id not in await own.existing(TARGET)


async def test_undoing_can_be_repeated_also_at_the_same_time(stateful: Stateful, own: Backend) -> None:
    one = usual(stateful)
    value = await minted(own, one)
    before = {
        name for name in await stateful.names() if one.lease_id.replace("-", "") not in name.replace("-", "")
    }
    await asyncio.gather(*(own.undo(one.lease_id, target_id=TARGET) for _ in range(4)))
    assert not await stateful.may(value, stateful.read_a)
    await own.undo(one.lease_id, target_id=TARGET)
    assert await stateful.names() == before


async def test_undoing_what_nobody_knows_succeeds_and_touches_nothing(kind: Kind, backend: Backend) -> None:
    bystander = usual(kind)
    value = await minted(backend, bystander)
    before = await kind.names()
    await backend.undo(lease(kind.name).lease_id, target_id=TARGET)
    assert await kind.names() == before
    assert await kind.may(value, kind.read_a)
    await backend.undo(bystander.lease_id, target_id=TARGET)


async def test_made_again_the_first_stays_good_and_both_end_together(
    stateful: Stateful, own: Backend
) -> None:
    one = usual(stateful)
    first = await minted(own, one)
    second = await minted(own, one)
    for value in (first, second):
        assert await stateful.may(value, stateful.read_a)
        assert not await stateful.may(value, stateful.write_a)
    assert stateful.secret_of(first) != stateful.secret_of(second)
    await own.undo(one.lease_id, target_id=TARGET)
    for value in (first, second):
        assert not await stateful.may(value, stateful.read_a)


async def test_many_at_once(kind: Kind, backend: Backend) -> None:
    before = await kind.names()
    reading = [lease(kind.name, allow("read", kind.resource("a"))) for _ in range(10)]
    writing = [lease(kind.name, allow(("read", "write"), kind.resource("b"))) for _ in range(10)]
    leases = [one for pair in zip(reading, writing, strict=True) for one in pair]
    values = await asyncio.gather(*(minted(backend, one) for one in [*leases, reading[0]]))
    for one, value in zip([*leases, reading[0]], values, strict=True):
        reads = one in reading
        assert await kind.may(value, kind.read_a) == reads
        assert await kind.may(value, kind.write_b) != reads
    if not backend.stateless:
        assert {one.lease_id for one in leases} <= await backend.existing(TARGET)
    await asyncio.gather(*(backend.undo(one.lease_id, target_id=TARGET) for one in leases))
    assert await kind.names() == before


async def test_made_and_undone_at_once(kind: Kind, backend: Backend) -> None:
    before = await kind.names()
    for _ in range(10):
        leases = [usual(kind) for _ in range(4)]
        values = [await minted(backend, one) for one in leases]
        more = [usual(kind) for _ in range(4)]
        await asyncio.gather(
            *(backend.undo(one.lease_id, target_id=TARGET) for one in leases),
            *(minted(backend, one) for one in more),
        )
        for value in values if not is_token(backend) else ():
            assert not await kind.may(value, kind.read_a)
        await asyncio.gather(*(backend.undo(one.lease_id, target_id=TARGET) for one in more))
    assert await kind.names() == before


async def test_existing_lists_only_the_own_trust_domain(stateful: Stateful, own: Backend) -> None:
    neighbour = stateful.backend("test.example.org")
    mine, theirs = usual(stateful), usual(stateful)
    await minted(own, mine)
    value = await minted(neighbour, theirs)
    found = await own.existing(TARGET)
    assert mine.lease_id in found
    assert theirs.lease_id not in found
    assert await neighbour.existing(TARGET) == {theirs.lease_id}
    await own.undo(theirs.lease_id, target_id=TARGET)
    assert await stateful.may(value, stateful.read_a)
    await neighbour.undo(theirs.lease_id, target_id=TARGET)
    await own.undo(mine.lease_id, target_id=TARGET)
    await neighbour.close()


# --- when something dies ----------------------------------------------------------------------------------------------


@pytest.fixture
async def gate(stateful: Stateful) -> AsyncIterator[Gate]:
    """On Ringfence's own way to the target."""
    async with Gate(stateful.address) as gate:
        stateful.write_secret(gate.address)
        yield gate
    stateful.write_secret()


async def test_cut_off_at_any_step_of_making_nothing_is_left_once_it_is_undone(
    stateful: Stateful, gate: Gate
) -> None:
    before, steps = await stateful.names(), 0
    while True:
        one, backend = usual(stateful), stateful.backend()
        gate.turn("open")
        gate.fuse = steps
        try:
            await minted(backend, one)
            cut = False
        except TargetError:
            cut = True
        gate.fuse = None
        gate.turn("open")
        await backend.undo(one.lease_id, target_id=TARGET)
        assert await stateful.names() == before, f"after {steps} pieces"
        await backend.close()
        if not cut:
            break
        steps += 1
    assert steps > 3


async def test_cut_off_at_any_step_of_undoing_the_next_try_ends_it(stateful: Stateful, gate: Gate) -> None:
    before, steps = await stateful.names(), 0
    while True:
        one, backend = usual(stateful), stateful.backend()
        gate.turn("open")
        value = await minted(backend, one)
        await backend.close()  # the connections that there are, too
        gate.fuse = steps
        try:
            await backend.undo(one.lease_id, target_id=TARGET)
            cut = False
        except TargetError:
            cut = True
        gate.fuse = None
        gate.turn("open")
        await backend.undo(one.lease_id, target_id=TARGET)
        assert await stateful.names() == before, f"after {steps} pieces"
        assert not await stateful.may(value, stateful.read_a)
        await backend.close()
        if not cut:
            break
        steps += 1
    assert steps > 3


async def test_a_target_that_hangs_costs_no_more_than_the_deadline_and_is_used_again(
    stateful: Stateful, gate: Gate
) -> None:
    backend = stateful.backend()
    caller = CircuitBreaker(concurrency=4, deadline_s=0.5, longest_shut_s=0.1)
    one = usual(stateful)
    await minted(backend, one)  # a connection is there, which hangs then
    gate.turn("hanging")
    async with asyncio.timeout(60):
        with pytest.raises(TargetError):
            await caller.call(TARGET, lambda: backend.undo(one.lease_id, target_id=TARGET))
    gate.turn("open")
    await backend.undo(one.lease_id, target_id=TARGET)
    assert one.lease_id not in await backend.existing(TARGET)
    await backend.close()


async def test_a_server_that_was_restarted_is_found_again(stateful: Stateful) -> None:
    backend = stateful.backend()
    before = set() if stateful.forgets else await stateful.names()
    one = usual(stateful)
    value = await minted(backend, one)
    await stateful.restart()
    assert await stateful.may(value, stateful.read_a) != stateful.forgets
    other = usual(stateful)
    assert await stateful.may(await minted(backend, other), stateful.read_a)
    for lease_id in (one.lease_id, other.lease_id):
        await backend.undo(lease_id, target_id=TARGET)
    assert await stateful.names() == before
    await backend.close()


# --- Ringfence's own rights -------------------------------------------------------------------------------------------


async def test_wrong_admin_secret_is_reported_without_the_secret(stateful: Stateful) -> None:
    for what, url in stateful.wrong_secrets().items():
        stateful.secret_file.write_text(url)
        stateful.secret_file.chmod(0o600)
        backend = stateful.backend()
        for call in (
            lambda b=backend: b.mint(usual(stateful), state(stateful.name)),
            lambda b=backend: b.undo(usual(stateful).lease_id, target_id=TARGET),
            lambda b=backend: b.existing(TARGET),
        ):
            said = await _error_of(call)
            if said is None:
                assert what == "another database"  # Redis says it only where it matters
                continue
            assert "wrong-secret" not in str(said), what
            assert said.__suppress_context__ or said.__context__ is None, what
            assert isinstance(said, TargetError) or what not in ("password", "address"), what
        await backend.close()
    stateful.write_secret()


async def _error_of(call: Callable[[], Awaitable[object]]) -> RingfenceError | None:
    try:
        await call()
    except RingfenceError as error:
        return error
    return None


async def test_rights_that_are_not_there_are_said_too(stateful: Stateful) -> None:
    stateful.secret_file.chmod(0o644)
    backend = stateful.backend()
    with pytest.raises(AccessError, match="chmod 600"):
        await backend.existing(TARGET)
    stateful.secret_file.unlink()
    with pytest.raises(AccessError, match="cannot read"):
        await backend.existing(TARGET)
    stateful.write_secret()
    assert await backend.existing(TARGET) == frozenset()
    await backend.close()
    nowhere = stateful.backend(access=TargetAccess({}))
    assert "operator" in (nowhere.problem(usual(stateful), state(stateful.name)) or "")
    with pytest.raises(AccessError):
        await nowhere.mint(usual(stateful), state(stateful.name))


async def test_rights_that_were_replaced_count_at_once_and_agents_are_told_their_own_address(
    stateful: Stateful, gate: Gate
) -> None:
    backend = stateful.backend()
    one = usual(stateful)
    await minted(backend, one)
    came = gate.came
    assert came
    stateful.write_secret()
    await backend.undo(one.lease_id, target_id=TARGET)
    assert gate.came == came
    host = f"localhost:{stateful.address.rpartition(':')[2]}"
    credential = await backend.mint(one, state(stateful.name, address=host))
    assert f"@{host}/" in credential.value
    assert await stateful.may(credential.value, stateful.read_a)
    await backend.undo(one.lease_id, target_id=TARGET)
    await backend.close()


# --- secrets ----------------------------------------------------------------------------------------------------------


async def test_the_server_is_never_told_a_secret_and_each_is_another(
    stateful: Stateful, own: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    leases = [usual(stateful) for _ in range(3)]
    values = [await minted(own, one) for one in leases]
    secrets = [stateful.secret_of(value) for value in values]
    for value in values:
        assert await stateful.may(value, stateful.read_a)
    for one in leases:
        await own.undo(one.lease_id, target_id=TARGET)
    assert len(set(secrets)) == 3
    assert all(len(secret) >= 43 for secret in secrets)  # 256 bits
    for secret in secrets:
        assert secret.encode() not in stateful.said()
        assert secret not in caplog.text


# --- what is declared -------------------------------------------------------------------------------------------------


def test_gateway_enforced_kinds_are_declared_and_marked() -> None:
    """Else its cases would be left out without a word."""
    backends = built_in(BackendContext("test.example", "https://issuer.test.example"))
    assert {kind for kind, one in backends.items() if one.enforced_by == "gateway"} == set(BY_THE_GATEWAY)
    assert backends.keys() == {*BY_THE_TARGET, *BY_THE_GATEWAY}, "every kind goes through the suite"
