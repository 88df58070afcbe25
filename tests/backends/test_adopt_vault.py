"""`ringfence adopt --vault`: the key of a `.env` file goes to a real OpenBao, and no service restarts."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.backends import story
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.gateway.model_server import respond
from tests.gateway.target import Target
from tests.support.adopter import Adopter
from tests.support.scan_corpus import Maker
from tests.support.servers.openbao import Vault
from tests.support.stack import RunningStack

MAKE = Maker(47)
OPENAI = f"sk-proj-{MAKE.token(40)}T3BlbkFJ{MAKE.token(40)}"
_MAY = """
path "secret/data/ringfence/*" { capabilities = ["create", "update", "read"] }
path "secret/destroy/ringfence/*" { capabilities = ["update"] }
"""


@pytest.fixture(scope="module")
async def running(
    kafka: Kafka, redis_server: RedisServer, vault: Vault, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningStack]:
    token = tmp_path_factory.mktemp("vault") / "token"
    token.write_text(vault.token("secret/data/ringfence/*"))
    token.chmod(0o600)
    environment = {
        "RINGFENCE_BACKENDS_VAULT_URL": vault.url,
        "RINGFENCE_BACKENDS_VAULT_TOKEN_FILE": str(token),
    }
    async with story.running(kafka, redis_server, "adoptvault", {}, environment) as (realm, _):
        yield realm


@pytest.fixture
async def adopter(running: RunningStack, vault: Vault, tmp_path: Path) -> Adopter:
    made = await Adopter(running.stack, tmp_path, uuid.uuid4().hex[:8], [OPENAI]).make()
    vault.call("PUT", "sys/policies/acl/adopter", {"policy": _MAY})
    created = vault.call("POST", "auth/token/create", {"policies": ["adopter"], "no_default_policy": True})
    token = tmp_path / ".vault-token"
    token.write_text(created["auth"]["client_token"])
    token.chmod(0o600)
    made.environment["RINGFENCE_BACKENDS_VAULT_URL"] = vault.url
    (tmp_path / ".env").write_text(f"OPENAI_API_KEY={OPENAI}\n")
    return made


@pytest.fixture
async def server() -> AsyncIterator[Target]:
    async with Target(respond=respond).serving() as running:
        yield running


def words_of(adopter: Adopter, server: Target, path: str) -> tuple[str, ...]:
    target = f"llm-{adopter.mark}"
    return (
        ".env", "--target", target, "--url", f"http://127.0.0.1:{server.port}", "--agent", adopter.agent,
        "--allow", f"{target}:generate:model/m-1", "--vault", f"secret/data/{path}#key",
    )  # fmt: skip


def stored(vault: Vault, path: str) -> dict[str, Any]:
    """The answer to a read of the newest version, also of a destroyed one."""
    answer = httpx.get(
        f"{vault.url}/v1/secret/data/{path}", headers={"X-Vault-Token": "root-of-the-test"}, trust_env=False
    )
    return dict(answer.json())


@pytest.mark.timeout(300)
async def test_key_in_vault_is_used_and_finished_without_a_restart(
    adopter: Adopter, server: Target, vault: Vault
) -> None:
    path, target = f"ringfence/{adopter.mark}", f"llm-{adopter.mark}"
    printed = " ".join((await adopter.adopt(*words_of(adopter, server, path))).split())
    assert f"to vault:secret/data/{path}#key; Ringfence sends it" in printed
    assert "agent_can_read" not in printed
    assert (adopter.folder / ".env").read_text() == "OPENAI_API_KEY=replaced-by-ringfence\n"
    assert stored(vault, path)["data"]["data"] == {"key": OPENAI}
    assert not adopter.place(target).exists()
    assert adopter.place(f"{target}.vault").read_text() == f"secret/data/{path}#key"
    assert [one.values("authorization") for one in server.requests] == [[f"Bearer {OPENAI}"]]

    assert "still has the credential" in await adopter.adopt("--target", target, "--finish", status=1)
    vault.call("POST", f"secret/data/{path}", {"data": {"key": "sk-proj-the-new-one"}})
    await adopter.adopt("--target", target, "--finish")
    assert not adopter.state()


@pytest.mark.timeout(300)
async def test_undo_destroys_the_version_in_vault(adopter: Adopter, server: Target, vault: Vault) -> None:
    path, target = f"ringfence/{adopter.mark}", f"llm-{adopter.mark}"
    await adopter.adopt(*words_of(adopter, server, path))
    await adopter.adopt("--target", target, "--undo")
    assert stored(vault, path)["data"]["metadata"]["destroyed"]
    assert not adopter.place(f"{target}.vault").exists()
    assert (adopter.folder / ".env").read_text() == f"OPENAI_API_KEY={OPENAI}\n"


async def test_path_with_other_fields_is_refused(adopter: Adopter, server: Target, vault: Vault) -> None:
    path = f"ringfence/{adopter.mark}"
    vault.call("POST", f"secret/data/{path}", {"data": {"other": "x"}})
    printed = await adopter.adopt(*words_of(adopter, server, path), status=1)
    assert "name a path of its own" in " ".join(printed.split())
    assert stored(vault, path)["data"]["data"] == {"other": "x"}
    assert OPENAI in (adopter.folder / ".env").read_text()


async def test_token_without_the_right_to_write_leaves_the_file(adopter: Adopter, server: Target) -> None:
    printed = await adopter.adopt(*words_of(adopter, server, "others/llm"), status=1)
    assert "Vault answered 403" in printed
    assert OPENAI in (adopter.folder / ".env").read_text()
