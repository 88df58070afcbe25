"""The foothold of a stolen key ends with it: what it gave to others, by commands, against all services."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from tests.flows.test_cli import Shell, organisation, shell  # noqa: F401 - a fixture
from tests.flows.test_cli_user_keys import package
from tests.support.world import WITHIN_S, Party, World

ASK = ("--allow", "platform:deploy:env/staging/web", "--reason", "roll out")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


async def otto_of_the_root(world: World, shell: Shell) -> None:  # noqa: F811
    otto = world.party("user", "otto")
    await world.accepted(world.user_set(world.root, otto, ("operator",)), world.root)
    otto.key.save(shell.folder / "otto.json")


async def kid_of(shell: Shell, user: str) -> str:  # noqa: F811
    (key,) = (await shell.json("otto", "user", "keys", user))["keys"]
    return str(key["kid"])


async def end(shell: Shell, user: str, kid: str, since: str, by: str = "otto") -> Any:  # noqa: F811
    return await shell.json(
        by, "user", "end-key", user, kid, "--compromised", "--since", since, "--reason", "stolen", "--yes"
    )


@contextlib.asynccontextmanager
async def asking(shell: Shell, task: str, sponsor: str) -> AsyncIterator[str]:  # noqa: F811
    """The id of a request of bot that waits for its sponsor."""
    asked = asyncio.create_task(shell_in_process(shell, "bot", "request", "--task", task, *ASK))
    try:
        async with asyncio.timeout(WITHIN_S):
            while not (waiting := await shell.json(sponsor, "approvals", "list")):
                pass
        yield waiting[0]["request_id"]
    finally:
        asked.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asked


async def shell_in_process(shell: Shell, who: str, *args: str) -> None:  # noqa: F811
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "ringfence.cli.main", "--identity", str(shell.folder / f"{who}.json"), *args,
        "--timeout", "1m", stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


async def test_operators_of_stolen_key_and_keys_that_they_cosigned_end_with_it(
    world: World,
    shell: Shell,  # noqa: F811
) -> None:
    """The thief of olga's key makes two operators, who together give sam a key of the thief."""
    task, folder = await organisation(shell), shell.folder
    await otto_of_the_root(world, shell)
    since = now()
    for name in ("o2", "o3"):
        await shell(
            "olga", "user", "add", name, "--name", name, "--role", "operator",
            "--new-key", str(folder / f"{name}.json"),
        )  # fmt: skip
    file = await package(shell, "o2", "sam", "thief")
    cosigned = str(folder / "endorsement")
    await shell("o3", "user", "endorse-key", "sam", "--package", file, "-o", cosigned, "--yes")
    await shell("o2", "user", "add-key", "sam", "--package", file, "--endorsement", cosigned, "--yes")

    async with asking(shell, task, "thief") as request:
        olga = await kid_of(shell, "olga")
        refused = await shell(
            "otto", "user", "end-key", "olga", olga, "--compromised", "--reason", "stolen", "--yes", status=1
        )
        assert "--since" in refused  # all that olga ever gave would end otherwise
        ended = await end(shell, "olga", olga, since)
        held = {one["id"]: [part.partition(":")[0] for part in one["parts"]] for one in ended["holds"]}
        assert held == {"o2": ["key", "roles"], "o3": ["key", "roles"], "sam": ["key"]}
        told = await shell("thief", "approvals", "approve", request, "--yes", status=1)
        assert "key" in told
        # sam's own key was given before.
        await shell("sam", "approvals", "approve", request, "--yes")
    await shell("o2", "user", "add", "o4", "--name", "o4", "--new-key", str(folder / "o4.json"), status=1)


async def test_first_key_of_directory_user_given_by_stolen_key_is_told_and_ends_with_it(
    world: World,
    shell: Shell,  # noqa: F811
) -> None:
    """sam sponsors bot and has no key yet, as a user from a directory: the first key counts at once."""
    folder = shell.folder
    await otto_of_the_root(world, shell)
    task = await organisation(shell)
    dora = Party("dora", world.party("user", "dora").key)
    await world.accepted(world.user_set(world.operator, dora, ("sponsor",), keys=()), world.operator)
    since = now()
    await shell("olga", "user", "add-key", "dora", "--new-key", str(folder / "dora.json"))
    event = await world.event_where(lambda e: e.kind == "finding" and e.result == dora.id)
    assert [reason.code for reason in event.reasons] == ["key_added"]
    await shell("olga", "agent", "transfer", "bot", "--to", "dora")

    async with asking(shell, task, "dora") as request:
        ended = await end(shell, "olga", await kid_of(shell, "olga"), since)
        held = {one["id"]: [part.partition(":")[0] for part in one["parts"]] for one in ended["holds"]}
        assert held == {"dora": ["key"], "bot": ["sponsor"]}
        # The request is denied, as its agent is held, or the approval is refused: which comes first is open.
        await shell("dora", "approvals", "approve", request, "--yes", status=1)


async def test_key_of_agent_given_by_stolen_key_of_sponsor_ends_with_it(
    world: World,
    shell: Shell,  # noqa: F811
) -> None:
    task, folder = await organisation(shell), shell.folder
    await otto_of_the_root(world, shell)
    sam = await kid_of(shell, "sam")
    since = now()
    await shell(
        "sam", "agent", "rotate-key", "bot", "--new-key", str(folder / "thief.json"), "--overlap", "7d"
    )
    read = ("request", "--task", task, "--allow", "platform:read:env/staging/web", "--reason", "look")
    lease = (await shell.json("thief", *read))["lease_id"]
    ended = await end(shell, "sam", sam, since)
    (held,) = ended["holds"]
    (part,) = held["parts"]
    assert (held["kind"], held["id"], part.partition(":")[0]) == ("agent", "bot", "key")
    async with asyncio.timeout(WITHIN_S):
        while (await shell.json("otto", "lease", "show", lease))["status"] != "revoked":
            pass
    # Its signature is good, so it is answered at once, and does not wait for its timeout.
    denied = await shell("thief", *read, "--timeout", "60s", "--json", status=1)
    assert '"rests_on_compromised"' in denied
    assert (await shell.json("bot", *read))["lease_id"]


async def test_held_ceiling_ends_leases_and_is_lifted_by_third_operator_alone(
    world: World,
    shell: Shell,  # noqa: F811
) -> None:
    task, folder = await organisation(shell), shell.folder
    await otto_of_the_root(world, shell)
    oona = world.party("user", "oona")
    await world.accepted(world.user_set(world.root, oona, ("operator",)), world.root)
    oona.key.save(folder / "oona.json")
    read = ("request", "--task", task, "--allow", "platform:read:env/staging/web", "--reason", "look")
    lease = (await shell.json("bot", *read))["lease_id"]
    since, olga = now(), await kid_of(shell, "olga")
    await shell(
        "olga", "agent", "set-ceiling", "bot", "--allow", "platform:read,deploy:env/**",
        "--allow", "platform:read:thief/**", "--yes",
    )  # fmt: skip
    ended = await end(shell, "olga", olga, since)
    assert [(one["id"], one["parts"]) for one in ended["holds"]] == [("bot", ["ceiling"])]
    async with asyncio.timeout(WITHIN_S):
        while (await shell.json("otto", "lease", "show", lease))["status"] != "revoked":
            pass
    assert "rests on" in await shell("bot", *read, "--timeout", "5s", status=1)
    lift = ("user", "confirm-compromise", "olga", olga, "--lift", "--reason", "found", "--yes")
    await shell("otto", *lift, status=1)
    await shell("oona", *lift)
    assert (await shell.json("bot", *read))["lease_id"]
