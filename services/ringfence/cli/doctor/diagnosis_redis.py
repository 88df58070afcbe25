"""What `ringfence doctor` says of Redis: does it evict, what is left over a restart, and what time is it there?"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import replace

from ringfence.cli.doctor.finding import Finding, clock
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.clock_skew import SkewCheck
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.settings import ServiceSettings

_OPTIONS = ("maxmemory-policy", "notify-keyspace-events", "appendonly", "save")


async def redis_findings(settings: ServiceSettings) -> AsyncIterator[Finding]:
    """Whether it answers, how it is set up, and how far its clock is from ours: each node that holds keys."""
    try:
        from ringfence.model.lease_store.connection import Link
    except ModuleNotFoundError:
        says = "not looked at: that needs the extra `server` (ringfence[server]): pip install '.[server]'"
        yield Finding("Redis", "unknown", says)
        return
    link = Link(settings.redis_url, lambda run_id: True)
    questions, ours = [*(("CONFIG", "GET", name) for name in _OPTIONS), ("TIME",)], SystemClock()
    try:
        servers = {name: (ours.now_ms(), answers) async for name, answers in link.ask_each(questions)}
    except RingfenceError as error:
        yield Finding("Redis", "bad", str(error))
        return
    finally:
        await link.close()
    for address, (now_ms, (*answers, (seconds, micros))) in servers.items():
        name = "Redis" if len(servers) == 1 else f"Redis at {address}"
        skew = SkewCheck(name)
        skew.heard(int(seconds) * 1000 + int(micros) // 1000, now_ms)
        yield clock(name, skew)
        said = {option: _option(answer) for option, answer in zip(_OPTIONS, answers, strict=True)}
        for finding in (eviction(said), persistence(said)):
            yield replace(finding, what=finding.what.replace("Redis", name))


def eviction(said: Mapping[str, str]) -> Finding:
    """By its options: does it keep all that it is given, and tell of what expires?"""
    evicts = said["maxmemory-policy"]
    if evicts != "noeviction":
        says = f"maxmemory-policy is {evicts}: leases could be evicted; set it to noeviction"
        return Finding("Redis", "bad", says)
    if not {"E", "x"} <= set(said["notify-keyspace-events"].replace("A", "x")):
        says = "notify-keyspace-events lacks Ex: leases end on time all the same, woken by the deadline set alone"
        return Finding("Redis", "unknown", f"{says}; set it to Ex")
    return Finding("Redis", "good", "answers, never evicts, tells of expired keys")


def persistence(said: Mapping[str, str]) -> Finding:
    """By its options: what is left after it was restarted?"""
    what = "Redis, restart"
    if said["appendonly"] == "yes":
        return Finding(what, "good", "appendonly is on: it comes back with what it had")
    kept = f"snapshots ({said['save']})" if said["save"] else "nothing"
    says = (
        f"appendonly is off, {kept} stays over a restart: no lease is lost, as all is rebuilt from Kafka, and "
        "everything denies meanwhile; to be back at once, set appendonly to yes"
    )
    return Finding(what, "unknown", says)


def _option(answer: object) -> str:
    """The value in an answer to CONFIG GET, whichever protocol it came by."""
    values = list(answer.values()) if isinstance(answer, dict) else list(answer or [])[1:]  # type: ignore[call-overload]
    return values[0].decode() if values and isinstance(values[0], bytes) else str(values[0] if values else "")
