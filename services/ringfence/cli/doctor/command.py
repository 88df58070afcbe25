"""`ringfence doctor`: checks everything that Ringfence depends on."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence

import typer

from ringfence.cli.doctor.checks import (
    CheckResult,
    bundle_findings,
    key_files,
    opa_findings,
    pool_findings,
    redis_findings,
    replication_findings,
    sandbox_findings,
    versions,
)
from ringfence.cli.doctor.checks import clock as clock_finding
from ringfence.cli.shared.options import JsonOption, run, wants_json
from ringfence.cli.shared.output import print_json, print_table
from ringfence.cli.shared.progress import progress
from ringfence.cli.shared.settings_check import unread
from ringfence.cli.shared.tables import state
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.clock import SkewCheck, SystemClock
from ringfence.kernel.base.config_file import unread_here
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError, UnavailableError
from ringfence.kernel.base.http_client import web_client
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.topics import HEARTBEAT, TRUST

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
        yield await _check_service(role, url, in_force, may_be_away=role == "gateway")
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
    role: str, url: str, in_force: dict[str, int | None], *, may_be_away: bool = False
) -> CheckResult:
    """Check one service.

    `may_be_away`: the service is optional. The version of its trust bundle is stored in `in_force`.
    """
    import httpx

    try:
        async with web_client(timeout_s=3) as http:
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
