"""Ringfence's own rights, out of a real OpenBao."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringfence.backends import AccessError, BackendSettings, RedisBackend, TargetAccess
from ringfence.backends.secret_sources import KEPT_S, VaultSource
from ringfence.dev.processes import LOOPBACK
from tests.backends.kinds import RedisKind, allow, lease, state
from tests.support.servers.openbao import Vault

PLACE = "secret/data/ringfence/thing#url"


def put(vault: Vault, **fields: str) -> None:
    vault.call("POST", PLACE.partition("#")[0], {"data": fields})


@pytest.fixture
def token_file(vault: Vault, tmp_path: Path) -> Path:
    file = tmp_path / "vault-token"
    file.write_text(vault.token("secret/data/ringfence/*") + "\n")
    file.chmod(0o600)
    return file


async def test_a_backend_works_with_rights_out_of_vault(
    vault: Vault, token_file: Path, redis_kind: RedisKind
) -> None:
    put(vault, url=redis_kind.secret_file.read_text())
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
    put(vault, url="one")
    assert await source.read(PLACE, "it") == "one"
    put(vault, url="two")
    assert await source.read(PLACE, "it") == "one"
    now[0] += KEPT_S
    assert await source.read(PLACE, "it") == "two"
    await source.close()


async def test_missing_vault_secret_is_reported_without_the_token(vault: Vault, token_file: Path) -> None:
    put(vault, url="hush", other="x")
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
