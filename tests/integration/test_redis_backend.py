"""What is Valkey's own: patterns and commands of its ACL. What every backend must do is in tests/backends."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from ringfence.backends import RedisBackend
from ringfence.backends.redis import MAX_PATTERNS, READ, WRITE, rules
from ringfence.backends.target_settings import InexactError
from ringfence.messages.base import Permission
from ringfence.messages.lease import Lease
from ringfence.messages.registry import BackendSettings, TargetRecord, TargetState
from ringfence.model.scope.globs import parse_glob
from tests.support.servers.redis_target import ValkeyTarget, valkey_target, works
from tools.schemas.examples import EXAMPLES


@pytest.fixture(scope="module")
async def valkey(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ValkeyTarget]:
    async with valkey_target("cache", tmp_path_factory.mktemp("target")) as target:
        yield target


@pytest.fixture
async def backend(valkey: ValkeyTarget) -> AsyncIterator[RedisBackend]:
    backend = valkey.backend()
    yield backend
    await backend.close()


def allow(verbs: str | tuple[str, ...], *resources: str) -> Permission:
    return Permission(
        target="cache", verbs=(verbs,) if isinstance(verbs, str) else verbs, resources=resources
    )


def lease(*scope: Permission) -> Lease:
    example = cast(Lease, EXAMPLES[Lease])
    update = {"lease_id": str(uuid.uuid4()), "target_id": "cache", "backend": "redis", "scope": scope}
    return example.model_copy(update=update)


def target(**backend: Any) -> TargetState:
    state = cast(TargetRecord, EXAMPLES[TargetRecord]).state
    settings = BackendSettings.model_validate({"kind": "redis", **backend})
    return state.model_copy(update={"target_id": "cache", "backend": settings})


async def may(valkey: ValkeyTarget, backend: RedisBackend, one: Lease, *command: str) -> bool:
    """What the server itself says to a command of the lease's user."""
    async with valkey.admin() as admin:
        answer = await admin.execute_command("ACL", "DRYRUN", backend.user_of(one.lease_id), *command)
    return bool(answer == b"OK")


async def minted(backend: RedisBackend, *scope: Permission) -> tuple[Lease, str]:
    one = lease(*scope)
    credential = await backend.mint(one, target())
    assert (credential.kind, credential.expires_at) == ("redis", one.deadline)
    return one, credential.value


# --- what a user may --------------------------------------------------------------------------------------------------


NAMES = (
    "a",
    "b",
    "a/b",
    "a/b/c",
    "a/x/c",
    "a/x/y/c",
    "a/c",
    "ab",
    "a/bc",
    "c",
    "x/c",
    "a/b/c/d",
    "é",
    "日本/a",
    "a b",
)


@pytest.mark.parametrize(
    "glob", ["**", "a", "a/**", "**/c", "a/**/c", "a/**/b/**", "é", "日本/**", "a/b", "x-y_z.1:2,@"]
)
async def test_the_servers_patterns_match_the_names_of_the_glob_and_no_others(
    valkey: ValkeyTarget, backend: RedisBackend, glob: str
) -> None:
    one, _ = await minted(backend, allow("get", glob))
    for name in {*NAMES, glob.replace("**", "q")}:
        assert await may(valkey, backend, one, "get", name) == parse_glob(glob).matches(name), name


async def test_permissions_stand_for_themselves(valkey: ValkeyTarget, backend: RedisBackend) -> None:
    one, _ = await minted(backend, allow("read", "a/**"), allow("write", "b/**"), allow("incr", "n"))
    assert await may(valkey, backend, one, "get", "a/1")
    assert await may(valkey, backend, one, "set", "b/1", "x")
    assert await may(valkey, backend, one, "incr", "n")
    for command in ("set a/1 x", "get b/1", "get n", "set n 1", "incr b/1", "getdel b/1", "set b/1 x get"):
        assert not await may(valkey, backend, one, *command.split()), command


@pytest.mark.parametrize("command", sorted(READ | WRITE))
async def test_every_command_of_the_lists_is_known_and_names_its_keys(
    valkey: ValkeyTarget, command: str
) -> None:
    async with valkey.admin() as admin:
        (info,) = (await admin.execute_command("COMMAND", "INFO", command)).values()
    flags = {flag for spec in info["key_specifications"] for flag in spec[b"flags"]}
    assert info["key_specifications"]
    assert not flags & {b"incomplete", b"not_key"}
    assert not set(info["flags"]) & {"movablekeys_unknown", "admin", "noscript_admin", "pubsub"}
    assert ("write" in info["flags"]) == (command in WRITE)


# --- what cannot be said exactly is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "resource",
    [
        "a/*", "*", "a*", "*/c", "a b", "a\tb", "a\nb", "a\r\nACL SETUSER x on", "a'b", 'a"b', "a\\b", "a[b]",
        "a?b", "a^b", "a(b", "a)b", "a) +@all (~x", "a ~* +@all", "a\u00a0b", "a\u2028b", "a\u200bb", "a\x00b",
        "", "/a", "a//b", "../a", "a`b", "a;b", "a#b", "a{b}", "\u202ea",
    ],
)  # fmt: skip
def test_a_resource_that_an_acl_cannot_say(resource: str) -> None:
    wild = Permission.model_construct(target="cache", verbs=("read",), resources=(resource,))
    with pytest.raises(InexactError):
        rules([wild])


@pytest.mark.parametrize(
    "verb", ["deploy", "keys", "eval", "config", "acl", "select", "@all", "all", "flushall", "*"]
)
def test_a_verb_that_is_no_command_on_named_keys(verb: str) -> None:
    wild = Permission.model_construct(target="cache", verbs=("read", verb), resources=("a",))
    with pytest.raises(InexactError, match="verb"):
        rules([wild])


def test_empty_and_inexact_pattern_rules_are_refused() -> None:
    with pytest.raises(InexactError):
        rules([])
    many = [f"{number}/**/a/**/b/**" for number in range(MAX_PATTERNS // 8)]
    rules([allow("read", *many)])
    with pytest.raises(InexactError, match=r"\*\*"):
        rules([allow("read", *many, "one/more")])
    deep = Permission.model_construct(target="cache", verbs=("read",), resources=("**/a/" * 9 + "b",))
    with pytest.raises(InexactError):
        rules([deep])


# --- passwords --------------------------------------------------------------------------------------------------------


async def test_the_password_is_never_sent_by_the_broker_and_each_is_another(
    valkey: ValkeyTarget, backend: RedisBackend
) -> None:
    async with valkey.admin() as admin:
        monitor = admin.monitor()
        async with monitor as watched:
            one, url = await minted(backend, allow("read", "a"))
            _, other = await minted(backend, allow("read", "a"))
            await admin.execute_command("PING", "the-end")
            said: list[str] = []
            while not said or "the-end" not in said[-1]:
                said.append((await watched.next_command())["command"])
        entry = await admin.execute_command("ACL", "GETUSER", backend.user_of(one.lease_id))
    password = url.split(":")[2].partition("@")[0]
    assert len(password) >= 43
    assert password != other.split(":")[2].partition("@")[0]
    assert not any(password in line for line in [*said, repr(entry)])


async def test_minting_again_keeps_the_first_password_good_and_widens_nothing(
    valkey: ValkeyTarget, backend: RedisBackend
) -> None:
    one, first = await minted(backend, allow("read", "a"))
    async with valkey.admin() as admin:  # somebody meddled
        await admin.execute_command("ACL", "SETUSER", backend.user_of(one.lease_id), "~*", "+@all", "nopass")
        await admin.execute_command("ACL", "SETUSER", backend.user_of(one.lease_id), "resetpass")
    second = (await backend.mint(one, target())).value
    third = (await backend.mint(one, target())).value
    assert not await works(first)  # by the meddling, not by us
    assert await works(second)
    assert await works(third)
    assert not await may(valkey, backend, one, "set", "a", "x")
    assert not await may(valkey, backend, one, "get", "b")


async def test_a_user_that_only_looks_like_a_leases_is_left_alone(
    valkey: ValkeyTarget, backend: RedisBackend
) -> None:
    async with valkey.admin() as admin:
        await admin.execute_command("ACL", "SETUSER", "ringfence.test.example.somebody", "on")
    one, _ = await minted(backend, allow("read", "a"))
    found = await backend.existing("cache")
    assert one.lease_id in found
    assert all(len(id) == 36 for id in found)
