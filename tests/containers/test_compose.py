"""docker-compose.yml as its first lines say, on Podman: an agent's way through it, restarts, and all of it anew."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from ringfence.client.admin.administrator import Administrator
from ringfence.client.agent.agent import Agent
from ringfence.client.settings import ClientSettings
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Permission
from ringfence.messages.registry import BackendSettings, RequestRule, VerbFloor
from ringfence.model.identity.spiffe_ids import spiffe_id
from tests.support.compose import ROOT
from tests.support.containers import WITHIN_S, Compose

PAGE = (ROOT / "docs/containers.md").read_text()
NOTES = [Permission(target="files", verbs=("read",), resources=("notes/*",))]
AS_OLGA = ("--identity", ".ringfence/users/operator.json")
CORE = ("registry", "policy", "issuer", "revoker", "audit", "gateway")


def settings_of(compose: Compose) -> ClientSettings:
    return ClientSettings(kafka="localhost:9093", trust_root=compose.environment["RINGFENCE_TRUST_ROOT"])


def documented(beginning: str) -> list[str]:
    """The command of the page that begins so."""
    (command,) = re.findall(rf"^\$ ({re.escape(beginning)}.*)$", PAGE, re.MULTILINE)
    return shlex.split(command)


async def organisation(compose: Compose) -> str:
    """The target `files`, and the agent `reader` with a task for it, as docs/gateway.md makes them. The task's id."""
    settings, folder = settings_of(compose), compose.folder
    reader = SigningKey.generate(spiffe_id(settings.trust_domain, "agent", "reader"))
    reader.save(folder / "reader.json")
    maria = SigningKey.generate(spiffe_id(settings.trust_domain, "user", "maria"))
    olga = SigningKey.load(folder / ".ringfence/users/operator.json")
    async with Administrator.connect(olga, settings) as administrator:
        await administrator.set_target(
            "files", description="a file server", verbs=[VerbFloor(verb="read")],
            backend=BackendSettings.model_validate({"kind": "jwt", "url": "http://127.0.0.1:9001"}),
            requests=[RequestRule(method="GET", path="/notes/{name}", verb="read", resource="notes/{name}")],
        )  # fmt: skip
        await administrator.set_user(
            "maria", name="Maria", keys=[maria], roles=["sponsor"], entitlements=NOTES
        )
    async with Administrator.connect(maria, settings) as administrator:
        await administrator.register_agent("reader", description="reads notes", keys=[reader], ceiling=NOTES)
        return await administrator.assign_task("reader", purpose="read notes", scope=NOTES, ends_in_s=1800)


async def lease(compose: Compose, task: str) -> str:
    """Request a credential for the notes, through the brokers of the containers. The id of its lease."""
    async with Agent.connect(compose.folder / "reader.json", settings_of(compose)) as agent:
        credential = await agent.request(
            task=task,
            target="files",
            verbs=["read"],
            resources=["notes/*"],
            reason="look",
            timeout_s=WITHIN_S,
        )
        return credential.lease_id


async def awaited(answer: Callable[[], Awaitable[str]], part: str) -> str:
    """Ask until the answer contains `part`."""
    async with asyncio.timeout(WITHIN_S):
        while part not in (found := await answer()):
            await asyncio.sleep(0.2)  # the gateway reads a new lease a moment after the agent
    return found


def served(compose: Compose) -> None:
    """A target for a trial, by the command of the page: it shares the loopback interface of the gateway's container."""
    notes = compose.folder / "notes"
    notes.mkdir(exist_ok=True)
    (notes / "today").write_text("buy milk\n")
    (_, *arguments) = [
        part.replace("$PWD", str(compose.folder)).replace("ringfence-gateway-1", compose.container("gateway"))
        for part in documented("docker run --rm --network container:")
    ]
    compose.podman("run", "--detach", "--name", "notes", *arguments[1:])


@pytest.mark.timeout(600)
async def test_compose_serves_an_agent_and_loses_nothing(compose: Compose) -> None:
    """Started as its first lines say; used from outside; restarted in part, then whole."""
    served(compose)
    try:
        task = await organisation(compose)
        first = await lease(compose, task)

        # In a container without network that has this socket alone, by the command of the page.
        sockets = compose.folder / f".ringfence/gateway/tasks/{task}.sock"
        curl = [part.replace("TASK", task) for part in documented("curl --unix-socket")]
        curl = [part.replace(".ringfence", f"{compose.folder}/.ringfence") for part in curl]

        async def ask() -> str:
            asked = await asyncio.create_subprocess_exec(*curl, stdout=-1, stderr=-1)
            return (await asked.communicate())[0].decode()

        assert await awaited(ask, "buy milk") == "buy milk\n"
        assert sockets.stat().st_uid == int(compose.environment["RINGFENCE_UID"])

        checked = json.loads(await asyncio.to_thread(compose.run_cli, "doctor", "--json"))
        findings = {one["what"]: one["verdict"] for one in checked["findings"]}
        assert {findings[name] for name in ("Kafka", "Redis", "trust bundle in force", "gateway")} == {"good"}
        assert "wrong" not in findings.values(), findings
        assert (
            await asyncio.to_thread(compose.run_cli, "rebuild", "--check") == "Redis holds what Kafka knows\n"
        )

        # A service that is away answers when it is back: the request waits for it on Kafka.
        await asyncio.to_thread(compose.compose, "stop", "issuer")
        waiting = asyncio.create_task(lease(compose, task))
        await asyncio.to_thread(compose.compose, "start", "issuer")
        second = await waiting

        # Containers are made anew, on the same volumes.
        compose.podman("rm", "--force", "notes")
        await asyncio.to_thread(compose.down)
        await asyncio.to_thread(compose.up, "kafka", "valkey")
        await asyncio.to_thread(compose.up, *CORE)
        held = json.loads(await asyncio.to_thread(compose.ringfence, *AS_OLGA, "--json", "lease", "list"))
        assert {first, second} <= {one["id"] for one in held["leases"]}
        third = await lease(compose, task)
        assert third not in (first, second)
        served(compose)
        assert await awaited(ask, "buy milk") == "buy milk\n"
    finally:
        compose.podman("rm", "--force", "--ignore", "notes")


def test_services_that_not_everybody_runs_start_by_their_profile(compose: Compose) -> None:
    folder: Path = compose.folder / ".ringfence"
    (folder / "receivers.toml").write_text(
        '[[receiver]]\nname = "billing"\naudience = "https://billing.example"\ntargets = ["*"]\n'
    )
    for name in ("signal-tokens", "scim-tokens"):
        compose.ringfence("provisioner", "new-token", str(folder / name), "--name", "billing")
    SigningKey.generate("spiffe://ringfence.local/user/acme").save(folder / "provisioner.json")
    compose.give_to_user()
    compose.up("signals", profile="signals")
    compose.up("scim", profile="scim")
