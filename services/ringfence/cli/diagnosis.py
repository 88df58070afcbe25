"""The examinations of `ringfence doctor`: each looks at one thing that must be right, and says what to do where it is
not. They change nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import tomllib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx

from ringfence.cli.spelling import mistyped
from ringfence.client.ceremony import SEAL
from ringfence.client.settings import ClientSettings
from ringfence.kernel.clock import SystemClock
from ringfence.kernel.envelope import EncryptionKey
from ringfence.kernel.errors import InvalidMessageError, RingfenceError, UnavailableError
from ringfence.kernel.kafka import Follower, Received
from ringfence.kernel.keys import SigningKey
from ringfence.kernel.settings import ServiceSettings, config_file
from ringfence.kernel.skew import SkewCheck
from ringfence.kernel.topics_admin import TopicsAdmin
from ringfence.kernel.trust import TrustStore
from ringfence.messages.topics import HEARTBEAT, TRUST

Verdict = Literal["good", "bad", "unknown"]
_READ_WITHIN_S = 10.0
_LISTEN_S = 2.5
"""The registry's heartbeat comes once a second."""
_SOON_S = 14 * 86_400


@dataclass(frozen=True, slots=True)
class Finding:
    """One examination: what was looked at, what came of it, and what to do where that is not good."""

    what: str
    verdict: Verdict
    says: str


async def examine(settings: ServiceSettings, client: ClientSettings) -> AsyncIterator[Finding]:
    """All examinations, in the order in which one thing needs another."""
    for finding in _spelling():
        yield finding
    yield _pinned_root(settings)
    for finding in _keys(settings):
        yield finding
    topics = await _topics(settings)
    yield topics
    if topics.verdict == "unknown":
        return
    with contextlib.suppress(RingfenceError):
        async for finding in _on_kafka(settings):
            yield finding
    async for finding in _redis(settings):
        yield finding
    for role, url in (
        ("registry", client.registry_url),
        ("policy", client.policy_url),
        ("issuer", client.issuer_url),
        ("revoker", client.revoker_url),
        ("audit", client.audit_url),
    ):
        yield await _service(role, url)
    yield await _service("gateway", client.gateway_url, may_be_away=True)


def _spelling() -> list[Finding]:
    """Names of settings that nobody reads. The settings file was read before, so that it can be."""
    file = config_file()
    config: dict[str, Any] = tomllib.loads(file.read_text()) if file.is_file() else {}
    try:
        return [Finding("settings", "unknown", says) for says in mistyped(os.environ, config)]
    except ModuleNotFoundError:
        return []  # the settings of services are known only where services could run


def _pinned_root(settings: ServiceSettings) -> Finding:
    if settings.trust_root:
        return Finding("trust root", "good", f"pinned: {settings.trust_root}")
    return Finding(
        "trust root",
        "bad",
        "RINGFENCE_TRUST_ROOT is not set, so nobody is believed; set it to what ringfence init printed",
    )


def _keys(settings: ServiceSettings) -> list[Finding]:
    """The key files of services that are on this machine."""
    files = [settings.key_file] if settings.key_file else sorted(settings.key_dir.glob("*.json"))
    if not files:
        says = f"no key files in {settings.key_dir}: no service can be started from here"
        return [Finding("keys", "unknown", says)]
    return [_key(Path(file)) for file in files]


def _key(file: Path) -> Finding:
    try:
        if file.stem.endswith(SEAL):
            id, kind = EncryptionKey.load(file).id, "X25519"
        else:
            key = SigningKey.load(file)
            id, kind = key.id, key.alg
    except RingfenceError as error:
        return Finding(f"key {file.stem}", "bad", str(error))
    return Finding(f"key {file.stem}", "good", f"{id}, {kind}, mode 0600")


async def _topics(settings: ServiceSettings) -> Finding:
    try:
        async with TopicsAdmin(settings) as admin:
            differences = await admin.check()
    except UnavailableError as error:
        return Finding("Kafka", "unknown", str(error))
    if not differences:
        return Finding("Kafka", "good", f"{settings.kafka} answers, and all topics are as the contract says")
    first = differences[0]
    says = f"{len(differences)} differences: {first.what} of {first.topic} is {first.found}, not {first.expected}"
    return Finding("Kafka", "bad", f"{says}; run: ringfence topics check")


async def _on_kafka(settings: ServiceSettings) -> AsyncIterator[Finding]:
    """The trust bundle in force, and how far the broker's clock is from ours."""
    trust = TrustStore(settings.trust_domain, settings.trust_root)
    refused: list[str] = []
    skew = SkewCheck("the broker")
    clock = SystemClock()

    def on_trust(records: Sequence[Received]) -> None:
        for record in records:
            try:
                trust.load(record.value, time.time())
            except InvalidMessageError as error:
                refused.append(str(error))

    def on_heartbeat(records: Sequence[Received]) -> None:
        for record in records:
            if record.key == "registry":  # revokers and gateways are heard there, too
                skew.heard(record.appended_at_ms, clock.now_ms())

    async with Follower(settings, [TRUST], on_trust) as follower, asyncio.timeout(_READ_WITHIN_S):
        await follower.complete.wait()
    yield _bundle(trust, refused)
    async with Follower(settings, [HEARTBEAT], on_heartbeat, since_ms=None):
        await asyncio.sleep(_LISTEN_S)
    if skew.ahead_ms() is None:
        says = f"no heartbeat within {_LISTEN_S:g} s: the registry does not run, and every table goes stale"
        yield Finding("clock, broker", "bad", f"{says}; run: ringfence serve registry")
    else:
        yield _clock("broker", skew)


def _bundle(trust: TrustStore, refused: Sequence[str]) -> Finding:
    if trust.version is None:
        why = refused[-1] if refused else "there is none; run: ringfence init --publish"
        return Finding("trust bundle", "bad", f"no bundle on Kafka counts: {why}")
    bundle = trust.require()
    left_s = bundle.exp - time.time()
    says = f"version {bundle.version}, {len(bundle.services)} services, for {left_s / 86_400:.0f} days"
    if left_s < _SOON_S:
        return Finding("trust bundle", "bad", f"{says}; sign a new one before it ends")
    return Finding("trust bundle", "good", says)


async def _redis(settings: ServiceSettings) -> AsyncIterator[Finding]:
    try:
        from ringfence.model.lease_store.link import Link
    except ModuleNotFoundError:
        says = "not looked at: that needs the extra `server` (ringfence[server]): pip install '.[server]'"
        yield Finding("Redis", "unknown", says)
        return
    link = Link(settings.redis_url, lambda run_id: True)
    skew = SkewCheck("Redis")
    try:
        (seconds, micros), policy, events = await link.pipeline(
            [
                ("TIME",),
                ("CONFIG", "GET", "maxmemory-policy"),
                ("CONFIG", "GET", "notify-keyspace-events"),
            ]
        )
        skew.heard(int(seconds) * 1000 + int(micros) // 1000, SystemClock().now_ms())
    except RingfenceError as error:
        yield Finding("Redis", "bad", str(error))
        return
    finally:
        await link.close()
    yield _clock("Redis", skew)
    evicts = _option(policy)
    if evicts != "noeviction":
        says = f"maxmemory-policy is {evicts}: leases could be evicted; set it to noeviction"
        yield Finding("Redis", "bad", says)
    elif not {"E", "x"} <= set(_option(events).replace("A", "x")):
        says = "notify-keyspace-events lacks Ex: leases end on time all the same, woken by the deadline set alone"
        yield Finding("Redis", "unknown", f"{says}; set it to Ex")
    else:
        yield Finding("Redis", "good", "answers, never evicts, tells of expired keys")


def _option(answer: object) -> str:
    """The value in an answer to CONFIG GET, whichever protocol it came by."""
    values = list(answer.values()) if isinstance(answer, dict) else list(answer or [])[1:]  # type: ignore[call-overload]
    return values[0].decode() if values and isinstance(values[0], bytes) else str(values[0] if values else "")


def _clock(whose: str, skew: SkewCheck) -> Finding:
    if reason := skew.unready():
        return Finding(f"clock, {whose}", "bad", reason)
    return Finding(f"clock, {whose}", "good", f"at most {abs(skew.ahead_ms() or 0)} ms apart")


async def _service(role: str, url: str, *, may_be_away: bool = False) -> Finding:
    """`may_be_away`: of what not every installation has."""
    try:
        async with httpx.AsyncClient(timeout=3) as http:
            answer = await http.get(f"{url}/readyz")
            said = answer.json()
            reasons, denies = said.get("reasons", []), said.get("denies", [])
    except (httpx.HTTPError, ValueError, AttributeError) as error:
        says = (
            f"{url} does not answer ({type(error).__name__}); start it, or set RINGFENCE_{role.upper()}_URL"
        )
        return Finding(role, "unknown" if may_be_away else "bad", says)
    if answer.status_code == 200 and denies:
        return Finding(role, "bad", f"{url} answers, and denies everything: {'; '.join(map(str, denies))}")
    if answer.status_code == 200 and (warnings := said.get("warnings", [])):
        return Finding(role, "bad", f"{url} is ready, but warns: {'; '.join(map(str, warnings))}")
    if answer.status_code == 200:
        return Finding(role, "good", f"{url} is ready")
    return Finding(role, "bad", f"{url} is not ready: {'; '.join(map(str, reasons)) or answer.status_code}")
