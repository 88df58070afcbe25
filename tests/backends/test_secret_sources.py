"""Ringfence's own rights, out of a real OpenBao."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from ringfence.backends import AccessError, BackendSettings, RedisBackend, TargetAccess
from ringfence.backends.secret_sources import KEPT_S, VaultSource
from ringfence.dev.processes import LOOPBACK, StackError, free_port, spawn
from tests.backends.kinds import RedisKind, allow, lease, state

FETCH = Path(__file__).parents[2] / ".ci" / "bao"
ROOT_TOKEN = "root-of-the-test"
PLACE = "secret/data/ringfence/thing#url"


@dataclass
class Vault:
    """An OpenBao in development mode, with KV version 2 at `secret/`."""

    url: str

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """As root."""
        answer = httpx.request(
            method, f"{self.url}/v1/{path}", json=body, headers={"X-Vault-Token": ROOT_TOKEN}, trust_env=False
        )
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def put(self, **fields: str) -> None:
        self.call("POST", PLACE.partition("#")[0], {"data": fields})

    def token(self, path: str) -> str:
        """A token that may read one path."""
        self.call(
            "PUT", "sys/policies/acl/reader", {"policy": f'path "{path}" {{ capabilities = ["read"] }}'}
        )
        made = self.call("POST", "auth/token/create", {"policies": ["reader"], "no_default_policy": True})
        return str(made["auth"]["client_token"])


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vault]:
    fetched = subprocess.run([FETCH], capture_output=True, text=True, check=False)
    if fetched.returncode:
        pytest.exit(f"OpenBao is not to be had: {fetched.stderr}", returncode=1)
    folder, port = tmp_path_factory.mktemp("bao"), free_port()
    argv = [
        fetched.stdout.strip(), "server", "-dev", "-dev-no-store-token", f"-dev-root-token-id={ROOT_TOKEN}",
        f"-dev-listen-address={LOOPBACK}:{port}",
    ]  # fmt: skip
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    child = spawn("bao", argv, log_path=folder / "bao.log", env=environment)

    def answers() -> bool:
        try:
            return httpx.get(f"http://{LOOPBACK}:{port}/v1/sys/health", trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        child.wait_until(answers, 30, "answers as initialised and unsealed")
        yield Vault(f"http://{LOOPBACK}:{port}")
    except StackError as error:
        pytest.exit(error.message, returncode=1)
    finally:
        child.kill()


@pytest.fixture
def token_file(vault: Vault, tmp_path: Path) -> Path:
    file = tmp_path / "vault-token"
    file.write_text(vault.token("secret/data/ringfence/*") + "\n")
    file.chmod(0o600)
    return file


async def test_a_backend_works_with_rights_out_of_vault(
    vault: Vault, token_file: Path, redis_kind: RedisKind
) -> None:
    vault.put(url=redis_kind.secret_file.read_text())
    settings = BackendSettings(
        access={"thing": f"vault:{PLACE}"}, vault_url=vault.url, vault_token_file=token_file
    )
    access = TargetAccess.of(settings)
    backend = RedisBackend("test.example", access)
    one = lease("redis", allow("read", "a"))
    assert backend.problem(one, state("redis")) is None
    credential = await backend.mint(one, state("redis"))
    assert await redis_kind.may(credential.value, redis_kind.read_a)
    await backend.undo(one.lease_id, target_id="thing")
    await backend.close()
    await access.close()


async def test_a_replaced_secret_is_seen_before_long(vault: Vault, token_file: Path) -> None:
    now = [100.0]
    source = VaultSource(vault.url, token_file, seconds=lambda: now[0])
    vault.put(url="one")
    assert await source.read(PLACE, "it") == "one"
    vault.put(url="two")
    assert await source.read(PLACE, "it") == "one"
    now[0] += KEPT_S
    assert await source.read(PLACE, "it") == "two"
    await source.close()


async def test_what_vault_does_not_give_is_said_without_the_token(vault: Vault, token_file: Path) -> None:
    vault.put(url="hush", other="x")
    vault.call("POST", "secret/data/ringfence/gone", {"data": {"url": "x"}})
    vault.call("DELETE", "secret/data/ringfence/gone")
    for where, says in {
        "secret/data/ringfence/nothing#url": "has nothing at",
        "secret/data/ringfence/gone#url": "has nothing at",
        "secret/data/ringfence/thing#nothing": "has no text as the field",
        "secret/data/ringfence/thing": "has no text as the field",
        "secret/data/others#url": "may not read",
        "nowhere/data/x#url": "may not read",
    }.items():
        await _refused(VaultSource(vault.url, token_file), where, says)
    token_file.write_text("wrong-token")
    await _refused(VaultSource(vault.url, token_file), PLACE, "may not read")
    token_file.chmod(0o640)
    await _refused(VaultSource(vault.url, token_file), PLACE, "chmod 600")
    token_file.chmod(0o600)
    await _refused(VaultSource(f"http://{LOOPBACK}:1", token_file), PLACE, "does not answer")


async def _refused(source: VaultSource, where: str, says: str) -> None:
    with pytest.raises(AccessError, match=says) as caught:
        await source.read(where, "it")
    assert "hush" not in str(caught.value)
    assert "wrong-token" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    await source.close()


def test_a_place_in_vault_needs_a_vault() -> None:
    with pytest.raises(AccessError, match="RINGFENCE_BACKENDS_VAULT_URL"):
        TargetAccess.of(BackendSettings(access={"thing": f"vault:{PLACE}"}))
