"""The command line against all services, as people and agents use it."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ringfence.cli.main import main
from tests.support.world import WITHIN_S, World


@dataclass
class Shell:
    """Runs `ringfence` in this process, as somebody."""

    folder: Path
    capture: pytest.CaptureFixture[str]
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """What is printed is captured for the whole process: one command at a time."""
    named: bool = True
    """Whether it says who calls, by a key file."""
    printed: str = ""
    """What the last command printed on stdout."""
    noted: str = ""
    """And on stderr."""

    async def __call__(self, who: str, *args: str, status: int = 0) -> str:
        """What it printed on stdout, or on stderr where `status` is not 0."""
        async with self.turn:
            self.capture.readouterr()
            called = ["--identity", str(self.folder / f"{who}.json")] if self.named else []
            ended = await asyncio.to_thread(main, [*called, *args])
            told = self.capture.readouterr()
            self.printed, self.noted = told
            assert ended == status, told.err or told.out
            return told.err if status else told.out

    async def json(self, who: str, *args: str) -> Any:
        """What it printed with --json: one document."""
        return json.loads(await self(who, "--json", *args))


@asynccontextmanager
async def without_collections() -> AsyncIterator[None]:
    """The policy engine of an earlier test must be dropped on the thread that made it; commands run on others."""
    gc.collect()
    gc.freeze()  # the next one need not look at all modules again, which takes half a second
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.fixture
async def shell(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Shell]:
    """All services run; olga the operator has her key file."""
    async with without_collections(), world.running("registry", "policy", "issuer", "revoker", "audit"):
        shared = world.settings("registry")
        for name in [name for name in os.environ if name.startswith("RINGFENCE_")]:
            monkeypatch.delenv(name)
        for name in ("kafka", "topic_prefix", "trust_domain", "trust_root", "embedded_broker"):
            monkeypatch.setenv(f"RINGFENCE_{name.upper()}", str(getattr(shared, name)))
        for role, port in world.ports.items():
            monkeypatch.setenv(f"RINGFENCE_{role.upper()}_URL", f"http://127.0.0.1:{port}")
        # Not that of a `ringfence dev` that somebody has running beside the tests.
        monkeypatch.setenv("RINGFENCE_GATEWAY_URL", "http://127.0.0.1:1")
        world.operator.key.save(tmp_path / "olga.json")
        yield Shell(tmp_path, capsys)


async def organisation(shell: Shell) -> str:
    """Made by commands alone; the id of bot's task on maria's behalf."""
    folder = shell.folder
    key = ("--new-key", str(folder / "sam.json"))
    await shell("olga", "user", "add", "sam", "--name", "Sam Field", "--role", "sponsor", *key)
    await shell(
        "olga", "target", "add", "platform", "--description", "deploys", "--verb", "read", "--verb", "deploy=sponsor",
        "--request", "GET /env/{name*} read env/{name*}", "--new-key", str(folder / "platform.json"),
        "--delivery", "agent",
    )  # fmt: skip
    key = ("--new-key", str(folder / "maria.json"))
    allow = ("--allow", "platform:read:env/**", "--allow", "platform:deploy:env/staging/*")
    await shell("olga", "user", "add", "maria", "--name", "Maria Ortiz", *allow, *key)
    await shell("olga", "key", "new", str(folder / "bot.json"), "--id", "agent/bot")
    await shell(
        "sam", "agent", "register", "bot", "--description", "deploys builds", "--key-file", str(folder / "bot.json"),
        "--allow", "platform:read,deploy:env/**",
    )  # fmt: skip
    task = await shell.json(
        "maria", "task", "assign", "bot", "--purpose", "deploy build 421", "--for", "1h",
        "--allow", "platform:deploy:env/staging/*", "--allow", "platform:read:env/**",
    )  # fmt: skip
    return str(task["task_id"])


async def test_the_story_by_commands_alone(shell: Shell) -> None:
    task = await organisation(shell)

    wanted = ("--task", task, "--allow", "platform:deploy:env/staging/web", "--reason", "roll out 421")
    # It goes on in a process of its own while sam looks and answers.
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "ringfence.cli.main", "--identity", str(shell.folder / "bot.json"), "--json", "request",
        *wanted, "--timeout", "1m", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(WITHIN_S):
        while not (waiting := await shell.json("sam", "approvals", "list")):
            pass
    (pending,) = waiting
    assert (pending["agent"], pending["purpose"], pending["on_behalf_of"]) == (
        "bot",
        "deploy build 421",
        "maria",
    )
    shown = await shell("sam", "approvals", "show", pending["request_id"][:8])
    for part in (
        "bot",
        "deploy build 421",
        "maria",
        "platform:deploy:env/staging/web",
        "roll out 421",
        pending["digest"],
    ):
        assert part in shown
    told = await shell("maria", "approvals", "approve", pending["request_id"], "--yes", status=1)
    assert "needs the agent's sponsor, and maria can give nothing of that" in told
    answered = await shell.json("sam", "approvals", "approve", pending["request_id"], "--yes")
    assert (answered["verdict"], answered["digest"]) == ("approved", pending["digest"])
    out, err = await asyncio.wait_for(process.communicate(), WITHIN_S)
    assert process.returncode == 0, err.decode()
    issued = json.loads(out)
    assert b"waiting for the approval of the agent's sponsor" in err
    assert (issued["target"], issued["sponsor"], issued["on_behalf_of"]) == ("platform", "sam", "maria")
    lease = issued["lease_id"]
    assert await shell.json("sam", "approvals", "list") == []
    assert "nothing waits for you" in await shell("sam", "approvals", "list")

    assert [item["id"] for item in (await shell.json("sam", "lease", "list"))["leases"]] == [lease]
    assert "platform:deploy:env/staging/web" in await shell("sam", "lease", "list")
    (agent,) = (await shell.json("sam", "inventory"))["agents"]
    assert (agent["id"], agent["leases"], agent["orphan"]) == ("bot", 1, False)
    assert "platform" in await shell("sam", "inventory")

    refused = await shell(
        "bot", "request", "--task", task, "--allow", "platform:deploy:env/production/web", "--reason", "while at it",
        status=1,
    )  # fmt: skip
    assert "entitlements:maria does not allow deploy on env/production/web" in refused

    assert (await shell.json("bot", "release", lease))["released"]
    assert (await shell.json("sam", "lease", "show", lease))["status"] == "released"
    assert "release by bot" in await shell("sam", "lease", "show", lease)

    async with asyncio.timeout(WITHIN_S):
        while "released by bot" not in (tree := await shell("maria", "audit", "trace", lease)):
            pass
    lines = tree.splitlines()[1:]
    order = [
        "maria, on whose behalf",
        "task for agent bot: deploy build 421",
        "bot asked for",
        "sam approved",
        lease,
    ]
    places = [next(i for i, line in enumerate(lines) if part in line) for part in order]
    assert places == sorted(places)

    events = [
        json.loads(line)
        for line in (await shell("sam", "--json", "audit", "tail", "--no-follow")).splitlines()
    ]
    assert 0 < len(events) <= 10
    assert all("class_uid" in event for event in events)
    assert "bot" in await shell("sam", "audit", "tail", "--no-follow", "--lease", lease)


async def test_revoking_ends_what_it_covers_and_says_how_much(shell: Shell) -> None:
    task = await organisation(shell)
    ask = ("request", "--task", task, "--allow", "platform:read:env/staging/web", "--reason", "look")
    token = await shell("bot", *ask)
    assert token.count(".") == 2  # stdout is the credential and nothing else
    assert token.strip() == token.rstrip("\n")
    lease = (await shell.json("bot", *ask))["lease_id"]
    assert "1 lease ended" in await shell("sam", "revoke", "--lease", lease, "--reason", "not needed")
    assert "1 lease ended" in await shell("sam", "revoke", "--agent", "bot", "--reason", "all of it")
    assert "no lease that you may see" in await shell("sam", "lease", "list")
    told = await shell("maria", "revoke", "--all", "--yes", "--reason", "mine", status=1)
    assert "refused by the revoker" in told


async def test_records_are_listed_shown_and_changed(shell: Shell) -> None:
    task = await organisation(shell)
    assert {item["id"] for item in await shell.json("olga", "user", "list")} == {"olga", "sam", "maria"}
    assert "Maria Ortiz" in await shell("olga", "user", "list")
    shown = await shell("olga", "user", "show", "maria")
    assert "platform:deploy:env/staging/*" in shown
    assert "platform:read,deploy:env/**" in await shell("sam", "agent", "list")
    assert "deploys builds" in await shell("sam", "agent", "show", "bot")
    assert "deploy (sponsor)" in await shell("maria", "target", "list")
    assert "GET /env/{name*} is read on env/{name*}" in await shell("maria", "target", "show", "platform")
    assert "deploy build 421" in await shell("maria", "task", "list")
    assert "on behalf of" in await shell("maria", "task", "show", task)

    before = (await shell.json("olga", "user", "show", "maria"))["state"]
    await shell("olga", "user", "set", "maria", "--name", "Maria Luz")
    after = (await shell.json("olga", "user", "show", "maria"))["state"]
    assert after == {**before, "name": "Maria Luz"}  # what is not named stays, its date too
    await shell(
        "olga", "user", "set", "maria", "--role", "auditor", "--allow", "platform:read:env/**", "--yes"
    )
    after = (await shell.json("olga", "user", "show", "maria"))["state"]
    assert (after["roles"], len(after["entitlements"]["scope"])) == (["auditor"], 1)

    assert "exists" in await shell("olga", "user", "add", "maria", "--name", "Another", status=1)
    assert "there is no user nobody" in await shell("olga", "user", "set", "nobody", "--no-roles", status=1)
    await shell("sam", "agent", "set-ceiling", "bot", "--allow", "platform:read:env/**", "--yes")
    await shell("sam", "agent", "suspend", "bot", "--reason", "lunch")
    assert "suspended" in await shell("sam", "agent", "show", "bot")
    await shell("sam", "agent", "resume", "bot", "--reason", "back")
    told = await shell("sam", "agent", "transfer", "bot", "--to", "maria", status=1)
    assert "no active user with the role sponsor" in told
    await shell("maria", "task", "end", task, "--reason", "done")
    assert (await shell.json("maria", "task", "show", task))["state"]["status"] == "ended"
    await shell("sam", "agent", "decommission", "bot", "--reason", "old", "--yes")
    await shell("olga", "target", "remove", "platform", "--reason", "gone", "--yes")
    await shell("olga", "user", "disable", "maria", "--reason", "left", "--yes")
    assert "user maria is disabled" in await shell("maria", "task", "list", status=1)


async def test_an_agents_ceiling_is_narrowed_to_what_it_used(shell: Shell) -> None:
    task = await organisation(shell)
    folder = shell.folder
    await shell(
        "sam", "agent", "set-ceiling", "bot", "--allow", "platform:read,deploy:env/**",
        "--allow", '{"target": "images", "verbs": ["push:all"], "resources": ["web:v1", "two words"]}',
        "--anyway", "--yes",
    )  # fmt: skip
    unused = await shell("sam", "agent", "show", "bot")
    assert "no day" in unused
    assert "set-ceiling bot --allow-nothing" in unused
    ask = ("request", "--task", task, "--allow", "platform:read:env/staging/web", "--reason", "look")
    lease = (await shell.json("bot", *ask))["lease_id"]
    async with asyncio.timeout(WITHIN_S):
        while not (found := await shell.json("sam", "agent", "show", "bot"))["usage"]["used"]:
            pass
    assert [(one["target"], one["verb"], one["days"]) for one in found["usage"]["used"]] == [
        ("platform", "read", 1)
    ]
    assert {(one["target"], one["verb"]) for one in found["usage"]["never_used"]} == {
        ("platform", "deploy"), ("images", "push:all"),
    }  # fmt: skip
    shown = await shell("sam", "agent", "show", "bot")
    assert f"holds platform:read:env/staging/web by lease {lease}" in shown
    assert "2 of these it did not use" in shown
    (command,) = (line for line in shown.splitlines() if line.startswith("ringfence "))
    assert command == found["set_ceiling"]
    program, option, identity, *words = shlex.split(command)
    assert (program, option, identity) == ("ringfence", "--identity", str(folder / "sam.json"))
    await shell("sam", *words, "--yes")
    async with asyncio.timeout(WITHIN_S):  # until policy knows it as well
        while (narrowed := await shell.json("sam", "agent", "show", "bot"))["set_ceiling"]:
            pass
    assert narrowed["state"]["ceiling"] == [
        {"target": "platform", "verbs": ["read"], "resources": ["env/**"]}
    ]
    assert narrowed["set_ceiling"] is None
    assert (await shell.json("sam", "lease", "show", lease))["status"] == "active"
    assert "there is no agent bot that maria may see" in await shell(
        "maria", "agent", "show", "bot", status=1
    )


async def test_an_agent_is_shown_without_policy(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    await organisation(shell)
    monkeypatch.setenv("RINGFENCE_POLICY_URL", "http://127.0.0.1:1")
    found = await shell.json("sam", "agent", "show", "bot")
    assert (found["id"], found["usage"], found["set_ceiling"]) == ("bot", None, None)
    assert "deploys builds" in await shell("sam", "agent", "show", "bot")


async def test_assign_shows_first_what_all_sides_allow(shell: Shell) -> None:
    await organisation(shell)
    assign = ("task", "assign", "bot", "--purpose", "deploy everywhere", "--for", "1h")
    everywhere = ("--allow", "platform:deploy:env/**")
    shown = await shell.json("maria", *assign, *everywhere, "--dry-run")
    assert shown["task_id"] is None
    assert shown["effective"] == [{"target": "platform", "verbs": ["deploy"], "resources": ["env/staging/*"]}]
    assert [cut["side"] for cut in shown["cuts"]] == ["entitlements:maria"]
    assert len(await shell.json("maria", "task", "list")) == 1

    nothing = ("--allow", "platform:deploy:env/production/web")
    told = await shell("maria", *assign, *nothing, status=1)
    assert "cut: platform:deploy:env/production/web (entitlements:maria does not allow it)" in told
    assert "would allow nothing" in told
    assert (await shell.json("maria", *assign, *nothing, "--anyway"))["task_id"]


async def test_a_task_for_somebody_who_signed_the_terms(shell: Shell) -> None:
    await organisation(shell)
    terms = ("--purpose", "deploy 422", "--allow", "platform:read:env/**", "--for", "1h")
    consent = shell.folder / "consent.jws"
    consent.write_text(await shell("maria", "task", "consent", "bot", *terms))
    assigned = await shell.json("sam", "task", "assign", "bot", "--consent", str(consent))
    assert assigned["on_behalf_of"] == "maria"
    state = (await shell.json("maria", "task", "show", assigned["task_id"]))["state"]
    assert (state["assigned_by"], state["on_behalf_of"], state["purpose"]) == ("sam", "maria", "deploy 422")


async def test_an_agent_hands_on_a_part_of_its_task(shell: Shell) -> None:
    task, below = await organisation(shell), str(shell.folder / "below.json")
    await shell(
        "sam", "agent", "register", "below", "--description", "looks", "--new-key", below, "--allow",
        "platform:read:env/**",
    )  # fmt: skip
    terms = ("--purpose", "look first", "--allow", "platform:read:env/staging/*")
    part = ("task", "delegate", task, "below", *terms)
    made = await shell.json("bot", *part, "--for", "10m")
    assert (made["parent"], made["agent_id"]) == (task, "below")
    assert "below < bot" in await shell("sam", "task", "list")
    assert f"{made['task_id']} to below (active)" in await shell("maria", "task", "show", task)
    shown = await shell("maria", "task", "show", made["task_id"])
    assert f"task {task}" in shown
    assert "bot" in shown
    assert "s earlier than that; set an earlier end" in await shell("bot", *part, "--for", "1d", status=1)
    assert "in the chain already" in await shell(
        "bot", "task", "delegate", task, "bot", *terms, "--for", "10m", status=1
    )
    assert "speaks for" in await shell("maria", *part, "--for", "10m", status=1)
    wish = ("--allow", "platform:read:env/staging/web", "--reason", "look")
    ask = ("request", "--task", made["task_id"], *wish)
    lease = (await shell.json("below", *ask))["lease_id"]
    assert "handed on by" in await shell("sam", "lease", "show", lease)
    async with asyncio.timeout(WITHIN_S):
        while "handed on by bot" not in await shell("sam", "audit", "trace", task):
            pass
    refused = await shell("below", "task", "end", task, "--reason", "x", status=1)
    assert "only those that handed a task on end it" in refused
    await shell("bot", "task", "end", made["task_id"], "--reason", "seen enough")
    assert (await shell.json("sam", "task", "show", made["task_id"]))["state"]["status"] == "ended"
    assert "has ended; have a new one assigned" in await shell("below", *ask, status=1)


async def test_a_refused_command_leaves_no_key_behind(shell: Shell) -> None:
    await organisation(shell)
    file = shell.folder / "eve.json"
    add = ("user", "add", "eve", "--name", "Eve", "--new-key", str(file))
    assert "only an operator" in await shell("maria", *add, status=1)
    assert not file.exists()
    await shell("olga", *add)
    assert file.exists()
    assert "exists already" in await shell("olga", *add, status=1)
    assert file.exists()  # it is the key of somebody who is there


async def test_request_within_a_grant_needs_no_approval(shell: Shell) -> None:
    task = await organisation(shell)
    ahead = ("approvals", "grant", task, "--allow", "platform:deploy:env/**", "--count", "2", "--for", "2h")
    refused = await shell("maria", *ahead, "--yes", status=1)
    assert "maria can approve nothing of agent bot" in refused
    refused = await shell("sam", *ahead, status=2)
    assert "add --yes" in refused
    for part in ("bot (deploys builds)", "deploy build 421", "maria", "2, each for 1 h at most", "sponsor"):
        assert part in shell.printed
    # What sam signs reaches beyond the task: what may come of it is shown beside it.
    assert "platform:deploy:env/**" in shell.printed
    assert "platform:deploy:env/staging/*" in shell.printed
    granted = await shell.json("sam", *ahead, "--yes", "--ttl", "5m", "--comment", "release 421")
    grant = granted["grant_id"]
    wanted = ("request", "--task", task, "--allow", "platform:deploy:env/staging/web", "--reason", "421")
    first = await shell.json("bot", *wanted)
    assert first["sponsor"] == "sam"
    lease = await shell.json("sam", "lease", "show", first["lease_id"])
    assert lease["grants"] == [grant]
    longer = await waiting(shell, *wanted, "--ttl", "6m")
    await listed(shell, 1)
    (shown,) = await shell.json("sam", "approvals", "grants")
    assert (shown["used"], shown["count"], shown["status"], shown["comment"]) == (1, 2, "live", "release 421")
    for who, sees in (("olga", True), ("maria", True), ("sam", True)):
        assert (grant in await shell(who, "approvals", "grants")) is sees
    assert "1 of 2" in shell.printed

    beyond = await shell("olga", "approvals", "withdraw", grant, "--reason", "not mine", status=1)
    assert "neither signed the grant" in beyond
    assert "taken back" in await shell("maria", "approvals", "withdraw", grant, "--reason", "it is off")
    assert (await shell.json("sam", "approvals", "grants"))[0]["status"] == "withdrawn"
    fits = await waiting(shell, *wanted)
    # As what waits already: two requests, of which only the later asks for what the grant says.
    first, last = await listed(shell, 2)
    like = ("approvals", "grant", "--like", last, "--count", "3")
    assert "the request says it" in await shell("sam", *like, "--ttl", "5m", status=2)
    assert "name a task" in await shell("sam", "approvals", "grant", status=2)
    await shell("sam", *like, "--yes")
    assert await listed(shell, 1) == [first]
    assert await asyncio.wait_for(fits.wait(), WITHIN_S) == 0
    # Nobody waits for the other any more, so nobody is asked about it.
    longer.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(longer.wait(), WITHIN_S) == 130
    await listed(shell, 0)
    (live,) = [one for one in await shell.json("sam", "approvals", "grants") if one["status"] == "live"]
    assert (live["used"], live["count"], live["ttl_s"]) == (1, 3, 300)
    async with asyncio.timeout(WITHIN_S):
        while "maria took back grant" not in (tree := await shell("sam", "audit", "trace", task)):
            pass
    assert "sam approved 2 credentials ahead: platform: deploy on env/**" in tree
    async with asyncio.timeout(WITHIN_S):
        for told in ("bot gave the request up", "withdrew the request: nobody waits for it any more"):
            while told not in await shell("sam", "audit", "trace", task):
                pass


async def waiting(shell: Shell, *command: str) -> asyncio.subprocess.Process:
    """A command of bot that goes on, once it has said that it waits for an approval. Ctrl-C ends it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", INTERRUPTIBLE, "--identity", str(shell.folder / "bot.json"), *command,
        "--timeout", "5m", stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    said = await asyncio.wait_for(process.stderr.readline(), WITHIN_S)
    assert b"waiting for the approval" in said
    return process


async def listed(shell: Shell, count: int) -> list[str]:
    """The ids of the requests that wait for sam, once they are so many."""
    async with asyncio.timeout(WITHIN_S):
        while len(waiting := await shell.json("sam", "approvals", "list")) != count:
            pass
    return [one["request_id"] for one in waiting]


@pytest.mark.parametrize("command", [("audit", "tail"), ("approvals", "watch")], ids=" ".join)
async def test_ctrl_c_ends_what_goes_on_and_on_without_a_word(shell: Shell, command: tuple[str, ...]) -> None:
    identity = str(shell.folder / "olga.json")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", INTERRUPTIBLE, "--identity", identity, *command,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    # The first word of each says that it is connected.
    first = process.stderr if command[0] == "approvals" else process.stdout
    await asyncio.wait_for(first.readline(), WITHIN_S)
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), WITHIN_S)
    assert (process.returncode, err) == (130, b"")


async def test_a_watch_shows_what_is_alike_once(shell: Shell) -> None:
    task = await organisation(shell)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", INTERRUPTIBLE, "--identity", str(shell.folder / "sam.json"), "approvals", "watch",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None

    async def until(part: str) -> str:
        """What it prints, up to the line that holds this."""
        assert process.stdout is not None
        lines: list[str] = []
        async with asyncio.timeout(WITHIN_S):
            while not lines or part not in lines[-1]:
                lines.append((await process.stdout.readline()).decode())
        return "".join(lines)

    asked: list[asyncio.subprocess.Process] = []

    async def ask(verb: str, reason: str) -> None:
        wanted = ("--allow", f"platform:{verb}:env/staging/web", "--reason", reason)
        asked.append(await waiting(shell, "request", "--task", task, *wanted))

    await ask("deploy", "build 1")
    shown = await until("approvals approve")
    for part in (
        "bot (deploys builds)",
        "deploy build 421",
        "maria",
        "build 1",
        "UNUSUAL",
        "nothing was approved",
    ):
        assert part in shown
    await ask("deploy", "build\n2")
    again = await until("approvals grant --like")
    assert "one more like" in again
    assert "2 wait: build‹U+000A›2" in again
    assert "wants" not in again  # it is not shown once more
    await ask("read,deploy", "build 3")
    assert "build 3" in await until("approvals approve")
    for one in (process, *asked):
        one.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(one.wait(), WITHIN_S) == 130


UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


INTERRUPTIBLE = """
import signal, sys
from ringfence.cli.main import main
# Whoever started the tests may have it ignored, as shells do for what they run in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main())
"""


async def test_the_doctor_says_what_is_wrong_and_what_to_do(
    shell: Shell, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = world.settings("registry")
    (tmp_path / "keys").mkdir()
    world.key("issuer").save(tmp_path / "keys" / "issuer.json")
    world.seals["issuer"].save(tmp_path / "keys" / "issuer-seal.json")
    monkeypatch.setenv("RINGFENCE_KEY_DIR", str(tmp_path / "keys"))
    monkeypatch.setenv("RINGFENCE_PARTITIONS", str(shared.partitions))
    monkeypatch.setenv("RINGFENCE_REDIS_URL", shared.redis_url)

    async def examined(status: int = 0) -> dict[str, tuple[str, str]]:
        await shell("olga", "--json", "doctor", status=status)
        findings = json.loads(shell.printed)["findings"]
        return {one["what"]: (one["verdict"], one["says"]) for one in findings}

    found = await examined()
    assert found.pop("gateway")[0] == "unknown", "there is none here, and there need not be one"
    assert found.pop("Redis, restart")[0] != "bad", "a Redis of tests need keep nothing"
    verdict, says = found.pop("Kafka, replicas")
    assert (verdict, says.partition(",")[0]) == ("unknown", "one broker"), "a note, and no fault"
    assert {verdict for verdict, _ in found.values()} == {"good"}, found
    assert {
        "trust root",
        "key issuer",
        "key issuer-seal",
        "Kafka",
        "trust bundle",
        "trust bundle in force",
        "clock, broker",
        "clock, Redis",
    } <= found.keys()
    assert {"registry", "policy", "issuer", "revoker", "audit"} <= found.keys()

    (tmp_path / "keys" / "issuer.json").chmod(0o644)
    monkeypatch.setenv("RINGFENCE_REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("RINGFENCE_TRUST_ROOT", "x" * 43)
    monkeypatch.setenv("RINGFENCE_AUDIT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("RINGFENCE_PARTITIONS", str(shared.partitions + 1))
    found = await examined(status=1)
    wrong = {what: says for what, (verdict, says) in found.items() if verdict == "bad"}
    assert wrong.keys() == {"key issuer", "Kafka", "trust bundle", "Redis", "audit"}
    assert "chmod 600" in wrong["key issuer"]
    assert "partitions" in wrong["Kafka"]
    assert "RINGFENCE_TRUST_ROOT" in wrong["trust bundle"]
    assert "RINGFENCE_REDIS_URL" in wrong["Redis"]
    assert "RINGFENCE_AUDIT_URL" in wrong["audit"]

    monkeypatch.setenv("RINGFENCE_KAFKA", "127.0.0.1:1")
    found = await examined(status=1)
    assert found["Kafka"] == ("bad", found["Kafka"][1])
    assert "RINGFENCE_KAFKA" in found["Kafka"][1]
    assert found["registry"][0] == "good"  # what else there is to see is seen all the same
    assert "RINGFENCE_REDIS_URL" in found["Redis"][1]


async def test_a_static_secret_is_never_handed_out_and_its_lease_is_a_handle(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    await organisation(shell)
    folder = shell.folder
    await shell("olga", "target", "add", "hub", "--description", "code", "--template", "github-api")
    state = (await shell.json("olga", "target", "show", "hub"))["state"]
    assert state["backend"]["url"] == "https://api.github.com"
    assert {"verb": "workflows:write", "floor": "operator", "ask": None, "key": None} in state["verbs"]
    wanted = json.dumps({"target": "hub", "verbs": ["contents:read"], "resources": ["repos/octo/hello/**"]})
    key = ("--public-key", str(folder / "maria.json"))
    await shell("olga", "user", "set", "maria", "--allow", wanted, *key, "--yes")
    await shell("sam", "agent", "set-ceiling", "bot", "--allow", wanted, "--yes")
    assigned = ("task", "assign", "bot", "--purpose", "read it", "--for", "1h", "--allow", wanted)
    task = (await shell.json("maria", *assigned))["task_id"]
    asked = ("request", "--task", task, "--reason", "read it", "--allow", wanted)
    refused = await shell("bot", *asked, "--delivery", "agent", status=1)
    assert "credentials of hub go to gateways only" in refused
    issued = await shell.json("bot", *asked)
    assert (issued["delivery"], issued["kind"], issued["value"]) == ("gateway", "http", None)
    printed = await shell("bot", *asked)
    assert UUID.fullmatch(printed.strip())
    code = "import os, sys; sys.exit('RINGFENCE_LEASE' not in os.environ or 'RINGFENCE_CREDENTIAL' in os.environ)"
    await shell("bot", *asked, "--exec", "--", sys.executable, "-c", code)
    monkeypatch.setenv("RINGFENCE_IDENTITY", str(folder / "sam.json"))
    monkeypatch.setenv("RINGFENCE_RUNNER_KEY_FILE", str(folder / "sam.json"))
    own = str(folder / "bot.json")
    code = (
        "import os, sys; sys.exit(any('sam.json' in value for value in os.environ.values())"
        " or os.environ['RINGFENCE_IDENTITY'] != sys.argv[1])"
    )
    await shell("bot", *asked, "--exec", "--", sys.executable, "-c", code, own)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 7), (signal.SIGTERM, 143)], ids=str)
async def test_a_signal_is_for_the_command_and_its_credential_is_released(
    shell: Shell, number: signal.Signals, status: int
) -> None:
    task = await organisation(shell)
    trap = "trap 'exit 7' INT; echo started; while :; do sleep 0.05; done"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", INTERRUPTIBLE, "--identity", str(shell.folder / "bot.json"), "request", "--task", task,
        "--reason", "look", "--allow", "platform:read:env/staging/web", "--exec", "--", "bash", "-c", trap,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), WITHIN_S) == b"started\n"
    process.send_signal(number)
    _, err = await asyncio.wait_for(process.communicate(), WITHIN_S)
    lease = UUID.search(err.decode())
    assert (process.returncode, bool(lease)) == (status, True), err
    shown = {"status": "active"}
    async with asyncio.timeout(WITHIN_S):
        while shown["status"] == "active":  # the revoker has not read the release yet
            shown = await shell.json("sam", "lease", "show", lease[0] if lease else "")
    assert shown["status"] in ("ending", "released")


async def test_a_signal_withdraws_what_waits_for_approval(shell: Shell) -> None:
    task = await organisation(shell)
    wanted = ("--allow", "platform:deploy:env/staging/web", "--reason", "build 1")
    process = await waiting(shell, "request", "--task", task, *wanted)
    await listed(shell, 1)
    process.send_signal(signal.SIGHUP)
    assert await asyncio.wait_for(process.wait(), WITHIN_S) == 128 + signal.SIGHUP
    await listed(shell, 0)


async def test_a_command_with_a_credential_goes_on_without_its_terminal_under_nohup(shell: Shell) -> None:
    task = await organisation(shell)
    process = await asyncio.create_subprocess_exec(
        "nohup", sys.executable, "-c", INTERRUPTIBLE, "--identity", str(shell.folder / "bot.json"),
        "request", "--task", task, "--reason", "look", "--allow", "platform:read:env/staging/web",
        "--exec", "--", "bash", "-c", "trap 'exit 9' TERM; echo started; while :; do sleep 0.05; done",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), WITHIN_S) == b"started\n"
    process.send_signal(signal.SIGHUP)  # it would end the command first
    process.send_signal(signal.SIGTERM)
    _, err = await asyncio.wait_for(process.communicate(), WITHIN_S)
    assert process.returncode == 9, err


async def test_no_op_or_self_lockout_change_asks_for_confirmation(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    await organisation(shell)
    assert "nothing of maria would change" in await shell("olga", "user", "set", "maria", status=1)
    assert "could not take it back" in await shell(
        "olga", "user", "disable", "olga", "--reason", "x", status=2
    )
    assert (await shell.json("olga", "user", "show", "olga"))["state"]["status"] == "active"
    (shell.folder / "empty.json").write_text("[]")
    empty = ("agent", "set-ceiling", "bot", "--allow", f"@{shell.folder / 'empty.json'}")
    assert "there is no permission in" in await shell("sam", *empty, status=2)
    lease = "00000000-0000-0000-0000-000000000000"
    assert "released" not in (await shell("bot", "release", lease, "--no-wait")).split()
    assert (await shell.json("bot", "release", lease, "--no-wait"))["released"] is False
    assert "sam is no auditor" in await shell("sam", "audit", "verify", "--witness", status=1)


async def test_provisioners_are_listed_with_what_they_may_give(shell: Shell) -> None:
    file = shell.folder / "delegation.yaml"
    file.write_text(
        "source: acme\ngroups:\n  Deployers:\n    roles: [sponsor]\n    allow: ['platform:read:env/**']\n"
    )
    assert "no provisioner" in await shell("olga", "provisioner", "list")
    given = ("--name", "Directory of ACME", "--delegation", str(file))
    await shell("olga", "provisioner", "set", "acme", *given, "--new-key", str(shell.folder / "acme.json"))
    printed = " ".join((await shell("olga", "provisioner", "list")).split())
    for said in ("acme", "active", "Deployers: sponsor; platform:read:env/**"):
        assert said in printed
    (one,) = await shell.json("olga", "provisioner", "list")
    assert (one["id"], one["state"]["delegation"]["source"]) == ("acme", "acme")
