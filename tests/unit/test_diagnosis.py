"""What `ringfence doctor` makes of what it finds: warned in time, and told what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringfence.cli.doctor.command import (
    SOON_S,
    bundle_findings,
    eviction,
    notifications,
    persistence,
    pool_findings,
    sandbox_findings,
    versions,
)
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.trust import ServiceIdentity, TrustBundle
from tests.support.in_memory_registry import TD
from tests.unit.test_runner_pool import pool_file

NOW_S = 1_790_000_000
YEAR_S = 365 * 86_400
REDIS = {"maxmemory_policy": "noeviction", "aof_enabled": 1}


def test_services_without_keys_are_named_with_what_to_do() -> None:
    found = {one.what: one for one in bundle_findings(trust(NOW_S + YEAR_S, NOW_S + YEAR_S), (), NOW_S)}
    for role in ("scim", "signals"):  # not everybody runs them: it is no fault
        assert found[f"keys of {role}"].verdict == "unknown"
        assert f"ringfence init --add-service {role} --publish" in found[f"keys of {role}"].says


def trust(ends_s: int, key_ends_s: int) -> TrustStore:
    """A bundle that ends then, with an issuer whose last key ends then, and one that ended before."""
    root = SigningKey.generate(f"spiffe://{TD}/root")
    old, key = (SigningKey.generate(f"spiffe://{TD}/service/issuer") for _ in range(2))
    issuer = ServiceIdentity(
        id=key.id, roles=("issuer",), keys=(old.record(NOW_S - 1), key.record(key_ends_s))
    )
    bundle = TrustBundle(
        iss=root.id, aud=TD, iat=NOW_S - YEAR_S, exp=ends_s, jti="7", version=7, services=(issuer,)
    )
    store = TrustStore(TD, root.kid)
    store.load(sign(bundle, root, header_jwk=True), NOW_S)
    return store


@pytest.mark.parametrize(
    ("ends_s", "key_ends_s", "wrong"),
    [
        (NOW_S + YEAR_S, NOW_S + YEAR_S, {}),
        (NOW_S + SOON_S - 1, NOW_S + SOON_S - 1, {"trust bundle": "--renew --publish"}),
        (NOW_S, NOW_S, {"trust bundle": "expired at"}),
        (NOW_S + YEAR_S, NOW_S + SOON_S - 1, {"keys of issuer": "ends on"}),
        (NOW_S + YEAR_S, NOW_S - 10, {"keys of issuer": "ended on"}),
    ],
)
def test_bundle_and_keys_about_to_end_are_reported(
    ends_s: int, key_ends_s: int, wrong: dict[str, str]
) -> None:
    found = {one.what: one for one in bundle_findings(trust(ends_s, key_ends_s), (), NOW_S)}
    bad = {what: one.says for what, one in found.items() if one.verdict == "bad"}
    assert bad.keys() == wrong.keys()
    for what, words in wrong.items():
        assert words in bad[what]
    if "keys of issuer" in bad:
        assert "--rotate-service issuer" in bad["keys of issuer"]


def test_without_a_bundle_it_says_why() -> None:
    (found,) = bundle_findings(TrustStore(TD, "pinned"), ["signed by root other"], NOW_S)
    assert (found.verdict, "signed by root other" in found.says) == ("bad", True)


def test_services_with_another_bundle_are_named() -> None:
    same = versions(3, {"issuer": 3, "policy": 3})
    assert same is not None
    assert same.verdict == "good"
    differing = versions(3, {"issuer": 3, "policy": 2, "audit": None})
    assert differing is not None
    assert differing.verdict == "bad"
    assert "policy has 2" in differing.says
    assert "audit has none" in differing.says
    assert "issuer" not in differing.says
    assert versions(3, {}) is None


def test_a_redis_that_evicts_is_wrong_and_one_that_forgets_is_slow() -> None:
    assert eviction(REDIS).verdict == "good"
    assert eviction(REDIS | {"maxmemory_policy": "allkeys-lru"}).verdict == "bad"
    silent = notifications(["127.0.0.1:6379"])
    assert (silent.verdict, "127.0.0.1:6379" in silent.says) == ("unknown", True)
    assert notifications([]).verdict == "good"
    assert persistence(REDIS).verdict == "good"
    snapshots = persistence(REDIS | {"aof_enabled": 0})
    assert (snapshots.verdict, "at most a snapshot" in snapshots.says) == ("unknown", True)


@pytest.mark.parametrize(("key_file", "verdict"), [(None, "unknown"), (Path("runner.json"), "bad")])
def test_a_machine_without_sandboxes_is_wrong_only_where_it_has_a_runner(
    key_file: Path | None, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    found = [one for one in sandbox_findings(key_file) if "bubblewrap" in one.what + one.says]
    assert {one.verdict for one in found} == {verdict}
    assert all("apt install bubblewrap" in one.says for one in found)


def _pool_found(folder: Path, monkeypatch: pytest.MonkeyPatch, **fields: object) -> list[tuple[str, str]]:
    monkeypatch.setenv("RINGFENCE_RUNNER_POOL_FILE", str(pool_file(folder, **fields)))
    return [(one.verdict, one.says) for one in pool_findings()]


def test_the_pool_file_of_a_runner_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RINGFENCE_RUNNER_POOL_FILE", raising=False)
    assert list(pool_findings()) == [], "no runner for fleets is set up here"
    ((verdict, says),) = _pool_found(tmp_path, monkeypatch, labels={"zone": "eu-1"})
    assert (verdict, "reviews" in says, "zone=eu-1" in says) == ("good", True, True)
    ((verdict, says),) = _pool_found(tmp_path, monkeypatch, colour="red")
    assert (verdict, "colour" in says) == ("bad", True)
    gone = {"sources": {"path": str(tmp_path / "gone")}}
    ((verdict, says),) = _pool_found(tmp_path, monkeypatch, mounts=gone)
    assert (verdict, "make it" in says) == ("bad", True)
    monkeypatch.setenv("RINGFENCE_RUNNER_KEY_FILE", str(tmp_path / "sources/key.json"))
    ((verdict, says),) = _pool_found(tmp_path, monkeypatch)
    assert (verdict, "RINGFENCE_RUNNER_KEY_FILE" in says) == ("bad", True)
    monkeypatch.setenv("RINGFENCE_RUNNER_POOL_FILE", str(tmp_path / "nothing.json"))
    ((verdict, says),) = [(one.verdict, one.says) for one in pool_findings()]
    assert (verdict, "cannot read" in says) == ("bad", True)
