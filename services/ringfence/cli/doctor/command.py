"""`ringfence doctor`: checks everything that Ringfence depends on.

Checks of `ringfence doctor`: OPA, Kafka's replication, Redis, key files, the trust bundle, and sandboxes.
"""

from __future__ import annotations

import asyncio
import contextlib
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from ringfence.cli.shared.options import JsonOption, run, wants_json
from ringfence.cli.shared.output import print_json, print_table
from ringfence.cli.shared.progress import progress
from ringfence.cli.shared.settings_check import unread
from ringfence.cli.shared.tables import state
from ringfence.client.admin.trust_setup import SEAL, missing_on_demand_services
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.clock import SkewCheck, SystemClock, utc_text
from ringfence.kernel.base.config_file import unread_here
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError, SettingsError, UnavailableError
from ringfence.kernel.base.http_client import service_client
from ringfence.kernel.base.settings import ServiceSettings, load
from ringfence.kernel.crypto.jwe import EncryptionKey
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.service_keys import NEXT
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.topics import HEARTBEAT, TRUST
from ringfence.messages.trust import ServiceIdentity

if TYPE_CHECKING:
    from ringfence.kernel.kafka.topics_admin import Replication

Verdict = Literal["good", "bad", "unknown"]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of one check: what was checked, what came out, and what to do if that is not good."""

    what: str
    verdict: Verdict
    says: str


def clock_finding(whose: str, skew: SkewCheck) -> CheckResult:
    """Return the result for the difference between another clock and ours."""
    if reason := skew.unready():
        return CheckResult(f"clock, {whose}", "bad", reason)
    return CheckResult(f"clock, {whose}", "good", f"at most {abs(skew.ahead_ms() or 0)} ms apart")


_WITHIN_MS = 3_000


_NEEDED_FOR_RUNS = frozenset({"bubblewrap", "libseccomp", "control groups"})
"""Facts of a machine without which `ringfence run` with the defaults is refused."""


async def opa_findings() -> AsyncIterator[CheckResult]:
    """Check whether OPA answers with the bundle that is here.

    Yields nothing with the embedded engine, or without service settings.
    """
    try:
        from ringfence.policy.settings import PolicySettings
        from ringfence.rego.bundle import load_bundle
        from ringfence.rego.engine import PolicyFailedError
        from ringfence.rego.opa import OpaEngine
        from ringfence.rego.settings import OpaSettings
    except ModuleNotFoundError:
        return
    url = load(OpaSettings).url
    if url is None:
        return
    try:
        bundle = load_bundle(load(PolicySettings).bundle)
        opa = OpaEngine(url, bundle, timeout_ms=_WITHIN_MS, connections=1)
        try:
            await opa.evaluate(b"{}")
        except PolicyFailedError:
            pass  # an answer to an empty input also shows that the bundle is the right one
        finally:
            await opa.close()
    except RingfenceError as error:
        yield CheckResult("OPA", "bad", str(error))
        return
    yield CheckResult("OPA", "good", f"{url} answers by bundle {bundle.revision[:12]}, which is the one here")


def replication_findings(replication: Replication) -> Iterator[CheckResult]:
    """Check what the loss of a broker would lose."""
    check = "Kafka, replicas"
    if replication.brokers < 2:
        says = (
            "one broker, so each record is stored once: what its disk loses is lost, and while it is away everything "
            "denies; for more than trying out use three brokers and RINGFENCE_REPLICATION=3"
        )
        yield CheckResult(check, "unknown", says)
    elif warnings := replication.warnings():
        for warning in warnings:
            yield CheckResult(check, "bad", warning)
    elif replication.topics:
        fewest = min(topic.replicas for topic in replication.topics.values())
        yield CheckResult(
            check, "good", f"{replication.brokers} brokers, {fewest} replicas of each record at least"
        )


# Checks of Redis for `ringfence doctor`: eviction, persistence, notifications and clock.

_ASKED = (("INFO", "memory", "persistence", "replication"), ("TIME",))
"""TIME comes last: it is compared with our clock when the answer arrives."""


async def redis_findings(settings: ServiceSettings) -> AsyncIterator[CheckResult]:
    """Check whether Redis answers, its configuration, and its clock, on each node that holds keys."""
    try:
        from ringfence.model.lease_store.connection import RedisConnection
    except ModuleNotFoundError:
        says = "not looked at: that needs the extra `server` (ringfence[server]): pip install '.[server]'"
        yield CheckResult("Redis", "unknown", says)
        return
    link, ours = RedisConnection(settings, lambda run_id: True), SystemClock()
    try:
        servers = {name: (ours.now_ms(), answers) async for name, answers in link.ask_each(_ASKED)}
    except RingfenceError as error:
        yield CheckResult("Redis", "bad", str(error))
        await link.close()
        return
    for address, (now_ms, (info, (seconds, micros))) in servers.items():
        name = "Redis" if len(servers) == 1 else f"Redis at {address}"
        skew = SkewCheck(name)
        skew.observe(int(seconds) * 1000 + int(micros) // 1000, now_ms)
        yield clock_finding(name, skew)
        for finding in (eviction(info), persistence(info)):
            yield replace(finding, what=finding.what.replace("Redis", name))
        if link.by_sentinel:
            yield replicas(info, settings.grace_s)
    try:
        yield notifications(await link.missed_expirations(settings.redis_prefix, settings.redis_shards))
    except RingfenceError as error:
        yield CheckResult("Redis, notifications", "unknown", f"not tried: {error}")
    finally:
        await link.close()


def eviction(info: Mapping[str, Any]) -> CheckResult:
    """Check by an answer to INFO whether Redis keeps all data."""
    evicts = info["maxmemory_policy"]
    if evicts != "noeviction":
        says = f"maxmemory-policy is {evicts}: leases could be evicted; set it to noeviction"
        return CheckResult("Redis", "bad", says)
    return CheckResult("Redis", "good", "answers, never evicts")


def replicas(info: Mapping[str, Any], grace_s: float) -> CheckResult:
    """Check by an answer to INFO whether a primary that is cut off from its replicas stops taking writes.

    The server tells the number of replicas that count for `min-replicas-to-write` if that is set, and the lag of each.
    It does not tell its limit for the lag: a replica that counts beyond the grace shows that the limit is too high.
    """
    check = "Redis, replicas"
    config = f"set min-replicas-to-write to 1, and min-replicas-max-lag to less than {grace_s:g} (RINGFENCE_GRACE_S)"
    if (counting := info.get("min_slaves_good_slaves")) is None:
        return CheckResult(check, "bad", f"a primary that was replaced would go on taking writes; {config}")
    lags = [
        one["lag"]
        for name, one in info.items()
        if name.startswith("slave") and isinstance(one, dict) and one.get("state") == "online"
    ]
    fresh = sum(lag < grace_s for lag in lags)
    if counting > fresh:
        says = f"a replica counts that has been silent for {max(lags)} s; {config}"
        return CheckResult(check, "bad", says)
    if counting < 1:
        return CheckResult(check, "bad", "no replica follows the primary, so it takes no writes; start one")
    if counting == 1:
        says = (
            "one replica: after a failover nothing is written until a second server follows; run two replicas"
        )
        return CheckResult(check, "unknown", says)
    return CheckResult(check, "good", f"{counting} replicas follow, and without one no write is taken")


def notifications(silent: Sequence[str]) -> CheckResult:
    """Check by a trial whether the TTL of a lease alone ends it. `silent`: the servers that did not notify."""
    check = "Redis, notifications"
    if silent:
        says = (
            f"{', '.join(silent)} does not notify of expired keys: leases end on time by their deadline sets alone; "
            "set notify-keyspace-events to Ex"
        )
        return CheckResult(check, "unknown", says)
    return CheckResult(check, "good", "a key that expired was notified: the TTL of a lease ends it")


def persistence(info: Mapping[str, Any]) -> CheckResult:
    """Check by an answer to INFO what remains after a restart of Redis."""
    check = "Redis, restart"
    if info["aof_enabled"]:
        return CheckResult(check, "good", "appendonly is on: it comes back with what it had")
    says = (
        "appendonly is off, so at most a snapshot stays over a restart: no lease is lost, as all is rebuilt from "
        "Kafka, and everything denies meanwhile; to be back at once, set appendonly to yes"
    )
    return CheckResult(check, "unknown", says)


# Checks of keys and trust for `ringfence doctor`: files, the bundle on Kafka, its keys, and which bundle services have.

SOON_S = 14 * 86_400
"""A key that ends within this time is reported."""


def key_files(settings: ServiceSettings) -> list[CheckResult]:
    """Check the services' key files on this machine."""
    files = [settings.key_file] if settings.key_file else sorted(settings.key_dir.glob("*.json"))
    if not files:
        says = f"no key files in {settings.key_dir}: no service can be started from here"
        return [CheckResult("keys", "unknown", says)]
    return [_key_file(Path(file)) for file in files]


def _key_file(file: Path) -> CheckResult:
    try:
        if file.stem.removesuffix(NEXT).endswith(SEAL):
            id, kind = EncryptionKey.load(file).id, "X25519"
        else:
            key = SigningKey.load(file)
            id, kind = key.id, key.alg
        mode = stat.S_IMODE(file.stat().st_mode)
    except (RingfenceError, OSError) as error:
        return CheckResult(f"key {file.stem}", "bad", str(error))
    return CheckResult(f"key {file.stem}", "good", f"{id}, {kind}, mode {mode:04o}")


def sandbox_findings(runner_key_file: Path | None) -> Iterator[CheckResult]:
    """Yield what this machine offers for sandboxes of runs: one finding for each fact where it has a runner, else one
    for all. It starts `bwrap true` once.
    """
    # It looks at the kernel's filter of system calls, which other commands do without.
    from ringfence.runner.sandbox.machine import facts

    found = facts()
    if runner_key_file is None:
        problems = [f"{fact.name}: {fact.problem}" for fact in found if fact.problem]
        says = "; ".join(problems) or "bubblewrap makes sandboxes here, and control groups limit them"
        yield CheckResult("sandbox", "unknown" if problems else "good", f"{says} (no runner is set up here)")
        return
    for fact in found:
        remedy = f"; {fact.remedy}" if fact.remedy else ""
        says = f"{fact.value}: {fact.problem}{remedy}" if fact.problem else fact.value
        needed = fact.name in _NEEDED_FOR_RUNS
        verdict: Verdict = "good" if not fact.problem else "bad" if needed else "unknown"
        yield CheckResult(f"sandbox, {fact.name}", verdict, says)


def pool_findings() -> Iterator[CheckResult]:
    """Check the pool file of a runner for fleets, where `RINGFENCE_RUNNER_POOL_FILE` names one."""
    from ringfence.runner.lifecycle.private_paths import check_private_paths, private_paths
    from ringfence.runner.pool import pool_mounts, read_pool
    from ringfence.runner.settings import RunnerSettings

    try:
        file = load(RunnerSettings).pool_file
    except SettingsError as error:
        if "RINGFENCE_RUNNER_POOL_FILE" not in str(error):
            yield CheckResult("runner pool", "bad", str(error))
        return  # otherwise no runner for fleets is set up here
    try:
        pool, client = read_pool(file), load(ClientSettings)
        check_private_paths(pool_mounts(pool), private_paths(client))
    except RingfenceError as error:
        remedy = f"; {error.remedy}" if error.remedy else ""
        yield CheckResult("runner pool", "bad", f"{error.message}{remedy}")
        return
    labels = ", ".join(f"{name}={value}" for name, value in pool.labels.items()) or "no labels"
    says = (
        f"{pool.name}: {pool.backend}, {pool.concurrency} runs at once, {len(pool.mounts)} mounts, {labels}"
    )
    yield CheckResult("runner pool", "good", says)


def bundle_findings(trust: TrustStore, refused: Sequence[str], now_s: float) -> Iterator[CheckResult]:
    """Check the bundle in force on Kafka, and the services' keys that end soon."""
    if trust.version is None:
        reason = refused[-1] if refused else "there is none; run: ringfence init --publish"
        yield CheckResult("trust bundle", "bad", f"no bundle on Kafka counts: {reason}")
        return
    if expired := trust.expired(now_s):
        yield CheckResult("trust bundle", "bad", expired)
        return
    bundle = trust.require()
    days = (bundle.exp - now_s) / 86_400
    says = f"version {bundle.version}, {len(bundle.services)} services, for {days:.0f} days"
    if bundle.exp - now_s < SOON_S:
        remedy = "sign a new one before it ends: ringfence init --renew --publish"
        yield CheckResult("trust bundle", "bad", f"{says}; {remedy}")
    else:
        yield CheckResult("trust bundle", "good", says)
    if in_force := trust.origins(now_s):
        places = "; ".join(f"{one.origin} ({one.use})" for one in in_force)
        yield CheckResult("passkeys", "good", f"for {bundle.rp_id}, used at {places}")
    for role in missing_on_demand_services(bundle):
        says = (
            f"no keys in the trust bundle; where it is wanted: ringfence init --add-service {role} --publish"
        )
        yield CheckResult(f"keys of {role}", "unknown", says)
    for service in bundle.services:
        if (ending := _ending(service, now_s)) is not None and ending < bundle.exp:
            yield _keys_end(service, ending, now_s)


def _ending(service: ServiceIdentity, now_s: float) -> int | None:
    """Return when the last signing or encryption key of a service ends, if that is soon or past."""
    last = max((key.not_after for key in service.keys), default=0)
    if service.encryption_keys:
        last = min(last, max(key.not_after for key in service.encryption_keys))
    return last if last - now_s < SOON_S else None


def _keys_end(service: ServiceIdentity, ending_s: int, now_s: float) -> CheckResult:
    name = service.id.rpartition("/")[2]
    day = utc_text(ending_s, "%Y-%m-%d")
    options = f"its last key ended on {day}" if ending_s <= now_s else f"its last key ends on {day}"
    return CheckResult(
        f"keys of {name}", "bad", f"{options}; run: ringfence init --rotate-service {name} --publish"
    )


def versions(on_kafka: int | None, in_force: Mapping[str, int | None]) -> CheckResult | None:
    """Check whether the services that answered have the bundle that is on Kafka; None where nothing can be compared."""
    if not in_force or on_kafka is None:
        return None
    if differing := {role: options for role, options in in_force.items() if options != on_kafka}:
        roles_text = ", ".join(
            f"{role} has {options or 'none'}" for role, options in sorted(differing.items())
        )
        says = f"on Kafka is version {on_kafka}, and {roles_text}: restart it where that stays so"
        return CheckResult("trust bundle in force", "bad", says)
    return CheckResult(
        "trust bundle in force", "good", f"version {on_kafka}, at all {len(in_force)} that answered"
    )


_SIGNS = {"good": "ok", "bad": "WRONG", "unknown": "?"}


def doctor(as_json: JsonOption = False) -> None:
    """Examine keys, trust, Kafka, Redis, clocks and services, and say what to do. Exit 1 if one is wrong."""
    from ringfence.client.settings import ClientSettings
    from ringfence.kernel.base.settings import ServiceSettings, load

    async def work() -> list[CheckResult]:
        with progress("examining settings and keys", as_json=as_json) as line:
            return [one async for one in examine(load(ServiceSettings), load(ClientSettings), line.say)]

    findings = run(work())
    if wants_json(as_json):
        print_json({"findings": [{"what": f.what, "verdict": f.verdict, "says": f.says} for f in findings]})
    else:
        print_table(
            [state(""), "what", "says"], [(_SIGNS[f.verdict], f.what, f.says) for f in findings], empty=""
        )
    if any(finding.verdict == "bad" for finding in findings):
        raise typer.Exit(1)


# The checks of `ringfence doctor`: each examines one precondition, and says what to do if it fails.
# They change nothing.

_READ_WITHIN_S = 10.0
_LISTEN_S = 2.5
"""The registry sends a heartbeat once a second."""


async def examine(
    settings: ServiceSettings,
    client: ClientSettings,
    now_examining: Callable[[str], None] = lambda what: None,
) -> AsyncIterator[CheckResult]:
    """Yield the results of all checks, in the order in which they depend on each other.

    `now_examining` is called with what is examined next, where that may take a while.
    """
    for finding in _spelling():
        yield finding
    yield _pinned_root(settings)
    for finding in key_files(settings):
        yield finding
    now_examining("examining Kafka and its topics")
    answers, findings = await _topics(settings)
    for finding in findings:
        yield finding
    trust = TrustStore(settings.trust_domain, settings.trust_root)
    if answers:
        now_examining("examining the trust bundle and the broker's clock")
        with contextlib.suppress(RingfenceError):
            async for finding in _on_kafka(settings, trust):
                yield finding
    now_examining("examining Redis")
    async for finding in redis_findings(settings):
        yield finding
    in_force: dict[str, int | None] = {}
    for role, url in (
        ("registry", client.registry_url),
        ("policy", client.policy_url),
        ("issuer", client.issuer_url),
        ("revoker", client.revoker_url),
        ("audit", client.audit_url),
        ("gateway", client.gateway_url),
    ):
        now_examining(f"waiting for the {role} at {url}")
        yield await _check_service(client, role, url, in_force, may_be_away=role == "gateway")
    if finding_of_all := versions(trust.version, in_force):
        yield finding_of_all
    now_examining("examining OPA")
    async for finding in opa_findings():
        yield finding
    for finding in await asyncio.to_thread(list, sandbox_findings(client.runner_key_file)):
        yield finding
    for finding in pool_findings():
        yield finding


def _spelling() -> list[CheckResult]:
    """Check for names of settings that nobody reads. The settings file was read before, so that it is readable."""
    try:
        return [CheckResult("settings", "unknown", says) for says in unread()]
    except ModuleNotFoundError:
        return []  # the settings of services are known only where services could run


def _pinned_root(settings: ServiceSettings) -> CheckResult:
    if settings.trust_root:
        return CheckResult("trust root", "good", f"pinned: {settings.trust_root}")
    return CheckResult(
        "trust root",
        "bad",
        "RINGFENCE_TRUST_ROOT is not set, so nobody is believed; set it to what ringfence init printed"
        + unread_here(),
    )


async def _topics(settings: ServiceSettings) -> tuple[bool, list[CheckResult]]:
    """Check Kafka, its topics and their replication. Returns whether Kafka answers, and the results."""
    from ringfence.kernel.kafka.topics_admin import TopicsAdmin

    try:
        async with TopicsAdmin(settings) as admin:
            differences = await admin.check()
            replication = await admin.replication()
    except UnavailableError as error:
        return False, [CheckResult("Kafka", "bad", str(error))]
    if not differences:
        says = f"{settings.kafka} answers, and all topics are as the contract says"
        return True, [CheckResult("Kafka", "good", says), *replication_findings(replication)]
    first = differences[0]
    says = f"{len(differences)} differences: {first.what} of {first.topic} is {first.found}, not {first.expected}"
    return True, [
        CheckResult("Kafka", "bad", f"{says}; run: ringfence topics check"),
        *replication_findings(replication),
    ]


async def _on_kafka(settings: ServiceSettings, trust: TrustStore) -> AsyncIterator[CheckResult]:
    """Check the trust bundle in force, and the difference between the broker's clock and ours."""
    from ringfence.kernel.kafka.table_reader import Follower

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
            if record.key == "registry":  # heartbeats of revokers and gateways are on that topic, too
                skew.observe(record.appended_at_ms, clock.now_ms())

    async with Follower(settings, [TRUST], on_trust) as follower, asyncio.timeout(_READ_WITHIN_S):
        await follower.complete.wait()
    for finding in bundle_findings(trust, refused, time.time()):
        yield finding
    async with Follower(settings, [HEARTBEAT], on_heartbeat, since_ms=None):
        await asyncio.sleep(_LISTEN_S)
    if skew.ahead_ms() is None:
        says = f"no heartbeat within {_LISTEN_S:g} s: the registry does not run, and every table goes stale"
        yield CheckResult("clock, broker", "bad", f"{says}; run: ringfence serve registry")
    else:
        yield clock_finding("broker", skew)


async def _check_service(
    settings: ClientSettings,
    role: str,
    url: str,
    in_force: dict[str, int | None],
    *,
    may_be_away: bool = False,
) -> CheckResult:
    """Check one service.

    `may_be_away`: the service is optional. The version of its trust bundle is stored in `in_force`.
    """
    import httpx

    try:
        async with service_client(settings, timeout_s=3) as http:
            answer = await http.get(f"{url}/readyz")
            body = answer.json()
            reasons, denies = body.get("reasons", []), body.get("denies", [])
            in_force[role] = body.get("trust_bundle")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, AttributeError) as error:
        says = (
            f"{url} does not answer ({type(error).__name__}); start it, or set RINGFENCE_{role.upper()}_URL"
        )
        return CheckResult(role, "unknown" if may_be_away else "bad", says)
    if answer.status_code == 200 and denies:
        return CheckResult(
            role, "bad", f"{url} answers, and denies everything: {'; '.join(map(str, denies))}"
        )
    if answer.status_code == 200 and (warnings := body.get("warnings", [])):
        return CheckResult(role, "bad", f"{url} is ready, but warns: {'; '.join(map(str, warnings))}")
    if answer.status_code == 200:
        return CheckResult(role, "good", f"{url} is ready")
    return CheckResult(
        role, "bad", f"{url} is not ready: {'; '.join(map(str, reasons)) or answer.status_code}"
    )
