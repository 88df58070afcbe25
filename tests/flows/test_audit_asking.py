"""`audit who`, `audit export` and the filters of `audit tail` against running services, as each person sees them."""

from __future__ import annotations

import asyncio
import csv
import hashlib
import json
import signal
import sys
import time
from typing import Any

import pytest

from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.credential import Reason
from ringfence.messages.operations import ActionDecided
from ringfence.messages.topics import ACTION, AUDIT
from tests.flows import test_cli
from tests.support.world import WITHIN_S, Party, World

organisation, shell = test_cli.organisation, test_cli.shell
ASK = ("--allow", "platform:read:env/staging/web", "--reason", "look")
WHO = ("audit", "who", "--target", "platform")


async def acted(world: World, task: str, lease: str) -> None:
    """A gateway let one action of bot pass, and blocked another."""
    good = ActionDecided(
        action_id="a1", gateway="spiffe://test.example/service/gateway", agent_id="bot", lease_id=lease,
        task_id=task, target_id="platform", verb="read", resource="env/staging/web", allowed=True, access="read",
        method="GET", request_digest="ab" * 32, latency_us=1, at_ms=int(time.time() * 1000),
    )  # fmt: skip
    beyond = (Reason(code="beyond_scope", message="the task does not allow it"),)
    bad = good.model_copy(update={"action_id": "a2", "allowed": False, "verb": "deploy", "reasons": beyond})
    for action in (good, bad):
        await world.send(ACTION, "bot", action.model_dump_json(exclude_none=True))


async def told(shell: Any, *args: str, until: Any) -> Any:
    """What olga is told, once it is so: the index follows the topics."""
    async with asyncio.timeout(WITHIN_S):
        while not until(found := await shell.json("olga", *args)):
            pass
    return found


async def lines(shell: Any, who: str, *args: str) -> list[Any]:
    """What is printed as JSON, a document a line."""
    return [json.loads(line) for line in (await shell(who, "--json", "audit", *args)).splitlines()]


async def strangers(shell: Any, world: World) -> None:
    """petra sponsors nobody, uma is nobody's sponsor; once audit and policy have heard of them."""
    for name, roles in (("petra", ("--role", "sponsor")), ("uma", ())):
        key = ("--new-key", str(shell.folder / f"{name}.json"))
        await shell("olga", "user", "add", name, "--name", name.title(), *roles, *key)
        await world.known(Party(name, SigningKey.load(shell.folder / f"{name}.json")), "audit", "policy")


async def test_audit_who_names_people_who_could_and_who_did(shell: Any, world: World) -> None:
    await world.known(world.operator, "audit", "policy")
    assert "there is no target platform" in await shell("olga", *WHO, status=1)

    task = await organisation(shell)
    issued = await shell.json("bot", "request", "--task", task, *ASK)
    await acted(world, task, issued["lease_id"])
    found = await told(shell, *WHO, until=lambda one: one["did"] and one["did"][0]["denied"])
    (could,) = found["could"]
    (way,) = could["tasks"]
    assert (could["id"], could["sponsor"], could["now"]) == ("bot", "sam", True)
    assert could["ceiling_by"]["by"].endswith("/sam")
    assert (way["id"], way["on_behalf_of"], way["assigned_by"], way["approvals"]) == (
        task, "maria", "maria", ["sponsor"],
    )  # fmt: skip
    (did,) = found["did"]
    assert {name: did[name] for name in ("agent", "sponsor", "on_behalf_of", "lease")} == {
        "agent": "bot", "sponsor": "sam", "on_behalf_of": "maria", "lease": issued["lease_id"],
    }  # fmt: skip
    assert {name: did[name] for name in ("allowed", "denied", "observed", "leases", "handed_out")} == {
        "allowed": 1, "denied": 1, "observed": 0, "leases": 1, "handed_out": 1,
    }  # fmt: skip
    assert [gap for gap in found["gaps"] if "no gateway told" in gap] == []
    assert "handed to the agents themselves" in " ".join(found["gaps"])

    # On env/production no task and no entitlement allows deploy, though the ceiling does.
    (could,) = (await shell.json("olga", *WHO, "--verb", "deploy", "--resource", "env/production/web"))[
        "could"
    ]
    assert (could["now"], could["tasks"]) == (False, [])
    only = await shell.json("olga", *WHO, "--verb", "deploy")
    assert [(line["denied"], line["allowed"], line["leases"]) for line in only["did"]] == [(1, 0, 0)]

    printed = await shell("olga", *WHO)
    for part in (
        "could, now: 1",
        "maria (entitled by operator)",
        "sam",
        "deploy build 421",
        "env/staging/*",
        issued["lease_id"],
    ):
        assert part in printed, printed

    # sam answers for bot, it was for maria; the others have nothing to do with it.
    await strangers(shell, world)
    seen = {who: await shell.json(who, *WHO) for who in ("sam", "maria", "petra", "uma")}
    assert {who: (len(one["could"]), len(one["did"])) for who, one in seen.items()} == {
        "sam": (1, 1), "maria": (0, 1), "petra": (0, 0), "uma": (0, 0),
    }  # fmt: skip
    await shell("maria", "task", "end", task, "--reason", "done")
    ended = await told(shell, *WHO, until=lambda one: not one["could"][0]["now"])
    assert ended["could"][0]["tasks"] == []
    assert (await shell.json("olga", *WHO, "--since", "2d", "--until", "1d"))["did"] == []

    assert "platform has no verb fly" in await shell("olga", *WHO, "--verb", "fly", status=1)
    for wrong in (("--since", "yesterday"), ("--since", "1h", "--until", "2h")):
        assert (
            "write for example" in (said := await shell("olga", *WHO, *wrong, status=2)) or "before" in said
        )
    assert "--target" in await shell("olga", "audit", "who", status=2)


async def test_audit_who_reports_a_gap_without_policy(
    shell: Any, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.known(world.operator, "audit")
    monkeypatch.setenv("RINGFENCE_POLICY_URL", "http://127.0.0.1:1")
    found = await shell.json("olga", *WHO)
    assert found["could"] is None
    assert any(gap.startswith("who could: the policy") for gap in found["gaps"])
    monkeypatch.setenv("RINGFENCE_AUDIT_URL", "http://127.0.0.1:1")
    assert "RINGFENCE_AUDIT_URL" in await shell("olga", *WHO, status=1)


async def test_an_export_is_the_topic_in_every_format(shell: Any, world: World) -> None:
    await world.known(world.operator, "audit", "policy")
    task = await organisation(shell)
    issued = await shell.json("bot", "request", "--task", task, *ASK)
    await acted(world, task, issued["lease_id"])
    await told(shell, *WHO, until=lambda one: one["did"] and one["did"][0]["denied"])
    until = ("--until", time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() + 5)))
    mine = ("audit", "export", "--agent", "bot", *until)

    files = {format: shell.folder / f"trail.{format}" for format in ("ocsf", "csv")}
    for format, file in files.items():
        done = await shell.json("olga", *mine, "--format", format, "-o", str(file))
        assert (done["file"], done["events"] > 5) == (str(file), True)
    raw = files["ocsf"].read_bytes().splitlines()
    events = [json.loads(line) for line in raw]
    places = [(event["time"], event["metadata"]["uid"]) for event in events]
    assert places == sorted(places)
    on_topic: set[bytes] = set()

    def is_last(record: Any) -> bool:
        on_topic.add(record.value)
        return set(raw) <= on_topic

    await world.consume_until(AUDIT, is_last)

    uids = [event["metadata"]["uid"] for event in events]
    with files["csv"].open(newline="") as text:
        assert [row["uid"] for row in csv.DictReader(text)] == uids
    assert (await shell("olga", *mine)).encode().splitlines() == raw, (
        "stdout is the same, and so is a second time"
    )

    # All of it: each event has the leaf hash of the one before in its tree, as the lines stand in the file.
    chains: dict[str, dict[int, tuple[str, str]]] = {}
    for line in (await shell("olga", "audit", "export", *until)).encode().splitlines():
        chain = json.loads(line)["unmapped"]["chain"]
        leaf = hashlib.sha256(b"\0" + line).hexdigest()
        chains.setdefault(chain["tree"], {})[chain["seq"]] = (chain["prev"], leaf)
    for links in chains.values():
        assert sorted(links) == list(range(1, len(links) + 1))
        assert all(links[seq + 1][0] == links[seq][1] for seq in range(1, len(links)))

    # Narrowed down, and as others see it.
    actions = await shell("olga", *mine, "--class", "6003", "--target", "platform", "--status", "failure")
    assert [json.loads(line)["metadata"]["event_code"] for line in actions.splitlines()] == ["action.denied"]
    await strangers(shell, world)
    of_lease = ("audit", "export", "--code", "credential.issued")
    counts = {
        who: len((await shell(who, *of_lease)).splitlines()) for who in ("sam", "maria", "petra", "uma")
    }
    assert counts == {"sam": 1, "maria": 1, "petra": 0, "uma": 0}
    assert (await shell("uma", *of_lease, "--format", "csv")).count("\n") == 1, "a header alone"

    assert "there already" in await shell("olga", *mine, "-o", str(files["csv"]), status=1)
    assert "begin anew" in await shell("olga", *mine, "--resume", "-o", str(shell.folder / "x"), status=1)
    for wrong, remedy in (
        (("--format", "xml"), "ocsf"),
        (("--format", "parquet"), "is not one of ocsf, csv"),
        (("--resume",), "-o FILE"),
        (("--class", "API"), "--class"),
        (("--code", "a*b"), "action.*"),
        (("--since", "soon"), "write for example"),
    ):
        assert remedy in await shell("olga", "audit", "export", *wrong, status=2), wrong


async def test_a_tail_is_narrowed_down_and_begins_when_it_is_told_to(shell: Any, world: World) -> None:
    await world.known(world.operator, "audit", "policy")
    task = await organisation(shell)
    issued = await shell.json("bot", "request", "--task", task, *ASK)
    await acted(world, task, issued["lease_id"])
    await told(shell, *WHO, until=lambda one: one["did"] and one["did"][0]["denied"])

    async def codes(*args: str, who: str = "olga") -> list[str]:
        found = await lines(shell, who, "tail", "--no-follow", *args)
        return [event["metadata"]["event_code"] for event in found]

    # Audit reads actions of several partitions: either event may be the first of its chain.
    assert sorted(await codes("--code", "action.*")) == ["action.allowed", "action.denied"]
    assert await codes("--code", "action.*", "--status", "failure") == ["action.denied"]
    assert await codes("--target", "platform", "--severity", "low", "--code", "action.*") == ["action.denied"]
    assert await codes("--user", "maria", "--code", "credential.issued") == ["credential.issued"]
    assert await codes("--on-behalf-of", "sam") == []
    assert await codes("--sponsor", "petra") == []
    every = await codes("--since", "1h")
    assert len(every) > 10, "more than --lines"
    assert await codes("--since", "1h", "--code", "task.*", "--code", "action.denied") == [
        code for code in every if code.startswith("task.") or code == "action.denied"
    ]
    await strangers(shell, world)
    assert await codes("--since", "1h", "--code", "credential.*", who="petra") == []
    assert "action.*" in await shell("olga", "audit", "tail", "--code", "*x", status=2)
    assert "no duration" in await shell("olga", "audit", "tail", "--since", "x", status=2)


async def test_a_tail_goes_on_with_what_fits(shell: Any, world: World) -> None:
    await world.known(world.operator, "audit", "policy")
    task = await organisation(shell)
    issued = await shell.json("bot", "request", "--task", task, *ASK)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", test_cli.INTERRUPTIBLE, "--identity", str(shell.folder / "sam.json"), "--json",
        "audit", "tail", "--since", "1h", "--code", "credential.issued", "--code", "action.denied",
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async with asyncio.timeout(WITHIN_S):
            first = json.loads(await process.stdout.readline())
            await acted(world, task, issued["lease_id"])
            second = json.loads(await process.stdout.readline())
    finally:
        process.send_signal(signal.SIGINT)
        rest, _ = await asyncio.wait_for(process.communicate(), WITHIN_S)
    codes = [event["metadata"]["event_code"] for event in (first, second)]
    assert codes == ["credential.issued", "action.denied"]
    assert rest == b""
