"""Keys and instances of agents, and the trust bundle, by commands."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from ringfence.cli.main import main
from ringfence.model.identity.attestation import audience
from tests.flows import test_cli
from tests.flows.test_cli import Shell, organisation
from tests.support.oidc_tokens import TokenIssuer
from tests.support.world import WITHIN_S, World

shell = test_cli.shell


async def test_an_instance_needs_no_key_file(
    shell: Shell, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await organisation(shell)
    issuer = TokenIssuer("https://cluster.example")
    bundle = world.make_bundle(2).model_copy(update={"oidc_issuers": (issuer.pinned(),)})
    await world.publish_trust(bundle)
    await world.until(
        lambda: all(runtime.trust.version == 2 for runtime in world.runtimes.values()) or None, "the bundle"
    )
    line = f"{issuer.issuer} sub=system:serviceaccount:ci:deployer"
    register = ("agent", "register", "pod", "--description", "deploys", "--allow", "platform:read:env/**")
    assert "--selector" in await shell("sam", *register, status=2)
    await shell("sam", *register, "--selector", line)
    assert "system:serviceaccount:ci:deployer life=3600s" in await shell("sam", "agent", "show", "pod")
    task = await shell.json(
        "maria",
        "task",
        "assign",
        "pod",
        "--purpose",
        "look",
        "--for",
        "1h",
        "--allow",
        "platform:read:env/**",
    )
    token = shell.folder / "token"
    token.write_text(issuer.token(issuer.claims(audience(world.td), sub="system:serviceaccount:ci:deployer")))
    monkeypatch.setenv("RINGFENCE_ATTEST_KEY_FILE", str(shell.folder / "kept.json"))
    instance = ("--attest", f"file:{token}", "--agent", "pod")
    ask = (
        "request",
        "--task",
        task["task_id"],
        "--allow",
        "platform:read:env/a",
        "--reason",
        "look",
        *instance,
    )
    assert "give a key or attest" in await shell("bot", *ask, status=1)
    shell.named = False
    lease = (await shell.json("", *ask))["lease_id"]
    assert lease in await shell("", "release", lease, *instance)
    shell.named = True
    await shell("sam", "agent", "set-attestation", "pod", "--none", "--yes")
    assert "say all of them" in await shell("sam", "agent", "set-attestation", "pod", status=2)
    shell.named = False
    assert "no selector of agent pod" in await shell("", *ask, status=1)


async def test_an_agents_key_is_replaced_while_it_runs_and_when_it_was_stolen(shell: Shell) -> None:
    task = await organisation(shell)
    wanted = ("request", "--task", task, "--allow", "platform:read:env/staging/web", "--reason", "look")
    first = await shell.json("bot", *wanted)
    again = ("agent", "rotate-key", "bot")
    told = await shell("sam", *again, status=2)
    assert "name the agent's key" in told
    assert "ends at once" in await shell("sam", *again, "--overlap", "1h", "--compromised", status=2)
    new = ("--new-key", str(shell.folder / "second.json"))
    rotated = await shell.json("sam", *again, *new, "--overlap", "2h", "--reason", "once a quarter")
    assert (
        rotated["kid"]
        == json.loads(await shell("sam", "key", "show", str(shell.folder / "second.json"), "--json"))["kid"]
    )
    second = await shell.json("second", *wanted)
    third = await shell.json("bot", *wanted)
    leases = {one["lease_id"] for one in (first, second, third)}
    assert {item["id"] for item in (await shell.json("sam", "lease", "list"))["leases"]} == leases
    assert "(replaced)" in await shell("sam", "agent", "show", "bot")

    stolen = json.loads((shell.folder / "bot.json").read_text())
    old = next(
        key
        for key in (await shell.json("sam", "agent", "show", "bot"))["state"]["keys"]
        if key["jwk"]["x"] == stolen["jwk"]["x"]
    )
    new = ("--new-key", str(shell.folder / "third.json"))
    told = await shell(
        "sam", *again, *new, "--replaces", old["kid"], "--compromised", "--reason", "it was in a log"
    )
    assert "end now, and their leases too" in told
    async with asyncio.timeout(WITHIN_S):
        while {item["id"] for item in (await shell.json("sam", "lease", "list"))["leases"]} != {
            second["lease_id"]
        }:
            pass
    assert "key_unknown" in await shell("bot", *wanted, "--timeout", "8s", status=1)
    assert (await shell.json("third", *wanted))["lease_id"]
    assert "(compromised)" in await shell("sam", "agent", "show", "bot")


async def test_an_agent_waits_for_its_sponsor_and_a_key_that_ends_is_marked(shell: Shell) -> None:
    await organisation(shell)
    new = ("--new-key", str(shell.folder / "late.json"), "--key-days", "2")
    await shell(
        "olga", "agent", "register", "late", "--description", "x", "--sponsor", "sam", "--inactive",
        "--allow", "platform:read:env/**", *new,
    )  # fmt: skip
    wanted = ("task", "assign", "late", "--purpose", "x", "--for", "1h", "--allow", "platform:read:env/**")
    assert "late is registered" in await shell("maria", *wanted, "--anyway", status=1)
    assert "only the sponsor" in await shell("olga", "agent", "activate", "late", status=1)
    assert "late is active" in await shell("sam", "agent", "activate", "late")
    await shell("maria", *wanted)
    assert "a key ends in" in await shell("sam", "agent", "list")
    assert "ends soon" in await shell("sam", "agent", "show", "late")


async def test_a_later_trust_bundle_leaves_the_first_operator_as_they_are(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Disabled, perhaps because their key was stolen, they were an operator again after a routine renewal."""
    for name in ("kafka", "topic_prefix", "trust_domain", "embedded_broker"):
        monkeypatch.setenv(f"RINGFENCE_{name.upper()}", str(getattr(world.settings("registry"), name)))

    async def init(*args: str) -> Any:
        status = await asyncio.to_thread(main, ["--json", "init", "--folder", str(tmp_path), *args])
        said = capsys.readouterr()
        assert status == 0, said.err
        return json.loads(said.out)

    await init("--operator", "ada")
    first = await init("--publish")
    assert (first["operator"], first["trust_bundle"], first["published"]) == ("ada", 1, True)
    await init("--renew")
    later = await init("--publish")
    assert ("operator" in later, later["trust_bundle"], later["published"]) == (False, 2, True)
    assert (await init("--publish", "--operator", "ada"))["operator"] == "ada"


def test_init_publishes_nothing_before_its_topics_exist(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("kafka", "trust_domain", "embedded_broker"):
        monkeypatch.setenv(f"RINGFENCE_{name.upper()}", str(getattr(world.settings("registry"), name)))
    monkeypatch.setenv("RINGFENCE_TOPIC_PREFIX", "nobody-made-this")
    init = ["init", "--folder", str(tmp_path)]
    assert main(init) == 0
    for more in ([], ["--renew"]):
        assert main([*init, "--publish", *more]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: missing on Kafka: nobody-made-this.trust.v1")
        assert "ringfence topics apply" in line
