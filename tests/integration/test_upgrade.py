"""An installation of the version before is upgraded, as `docs/release.md` has it: nothing is lost, nothing revived.

Each version is a wheel in a virtual environment of its own, and does all by its own `ringfence`: its services are
processes, its people and agents use the command line. Kafka and Redis go on meanwhile, and keep what is there.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import sysconfig
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ringfence.client.admin.trust_setup import TrustFolder
from ringfence.dev.processes import LOOPBACK, Child, free_port, spawn
from ringfence.dev.stack import readiness
from ringfence.kernel.base.settings import BusSettings
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.kafka.range_reader import Stretches
from ringfence.kernel.kafka.record import Received
from ringfence.messages.audit import AuditChained, AuditCheckpoint
from ringfence.messages.base import Topic, typ_header
from ringfence.messages.lease import TERMINAL, Lease
from ringfence.messages.topics import AUDIT, AUDIT_CHECKPOINT, AUDIT_INTAKE, DEAD_LETTER, LEASE
from ringfence.model.audit_log.chain import Source, event_of
from ringfence.model.audit_log.merkle import leaf_hash
from tests.brokers import RedisServer
from tests.conftest import Kafka

ROOT = Path(__file__).parents[2]
STOPPED = ("gateway", "registry", "policy", "issuer", "revoker", "audit")
"""In this order: what takes in work first, then what ends leases, and audit last, which tells of all of them."""
STARTED = STOPPED[::-1]
"""Audit first, and what ends leases before what makes more of them."""
WITHIN_S = 60.0
SHORT_S = 60
"""The life of the lease that ends by itself after the upgrade: longer than the upgrade takes to begin."""

pytestmark = [pytest.mark.upgrade, pytest.mark.timeout(400)]


class Version:
    """One version of Ringfence, installed from its wheel."""

    def __init__(self, name: str, source: Path, folder: Path) -> None:
        self.name = name
        self._bin = folder / name / "venv" / "bin"
        _ran(
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            str(folder / name),
            str(source),
        )
        (wheel,) = (folder / name).glob("ringfence-*.whl")
        python = str(self._bin / "python")
        _ran(sys.executable, "-m", "venv", "--without-pip", str(self._bin.parent))
        _ran(
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            str(wheel),
        )
        # What both versions need is installed beside the tests. It comes after the wheel on the path.
        purelib = _ran(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        Path(purelib, "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        module = _ran(python, "-P", "-c", "import ringfence; print(ringfence.__file__)", cwd=folder)
        assert module.startswith(purelib), f"{name} is not the wheel, but {module}"

    @property
    def program(self) -> str:
        return str(self._bin / "ringfence")


def _ran(*argv: str, cwd: Path = ROOT) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=cwd, env=environment)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stdout}{done.stderr}"
    return done.stdout


def source_of(ref: str, folder: Path) -> Path:
    """The files of a commit. Fails the test where the clone has not got it: it may be shallow."""
    known = subprocess.run(
        ["git", "cat-file", "-e", f"{ref}^{{commit}}"], cwd=ROOT, capture_output=True, check=False
    )
    if known.returncode != 0:
        pytest.fail(
            f"the version before, {ref}, is not in this clone: fetch it (git fetch --unshallow), or name another by "
            "--upgrade-from",
            pytrace=False,
        )
    archive, source = folder / "before.tar", folder / "before-source"
    source.mkdir()
    _ran("git", "archive", "--output", str(archive), ref)
    _ran("tar", "--extract", "--file", str(archive), "--directory", str(source))
    return source


@pytest.fixture(scope="module")
def versions(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Version, Version]:
    """The version before, and the one of this clone."""
    folder = tmp_path_factory.mktemp("upgrade")
    before = source_of(request.config.getoption("--upgrade-from"), folder)
    return Version("before", before, folder), Version("now", ROOT, folder)


class Installation:
    """What stays as versions change: topics, keys in Redis, a trust folder, ports."""

    def __init__(self, version: Version, kafka: Kafka, redis: RedisServer, folder: Path) -> None:
        self.version = version
        self.folder = folder
        self.trust = TrustFolder(folder / "state")
        self._children: dict[str, Child] = {}
        self._ports = {name: free_port() for name in STOPPED}
        self._door = free_port()
        mark = f"up{uuid.uuid4().hex[:8]}"
        self._shared = {
            "RINGFENCE_CONFIG": os.devnull,
            "RINGFENCE_KAFKA": kafka.bootstrap,
            "RINGFENCE_EMBEDDED_BROKER": str(kafka.embedded),
            "RINGFENCE_REDIS_URL": redis.url,
            "RINGFENCE_REDIS_PREFIX": mark,
            "RINGFENCE_TOPIC_PREFIX": mark,
            "RINGFENCE_TRUST_DOMAIN": "acme.example",
            "RINGFENCE_PARTITIONS": "2",
            "RINGFENCE_REPLICATION": "1",
            **{
                f"RINGFENCE_{name.upper()}_URL": f"http://{LOOPBACK}:{port}"
                for name, port in self._ports.items()
            },
        }
        self.settings = BusSettings(
            kafka=kafka.bootstrap,
            embedded_broker=kafka.embedded,
            topic_prefix=mark,
            trust_domain="acme.example",
        )

    # --- the command line ---

    def run(self, *words: str, who: str | None = None) -> subprocess.CompletedProcess[str]:
        """`ringfence` of the version that is installed."""
        identity = ["--identity", str(self.identity(who))] if who else []
        environment = {
            name: value for name, value in os.environ.items() if name != "PYTHONPATH"
        } | self._shared
        return subprocess.run(
            [self.version.program, *identity, "--json", *words],
            capture_output=True, text=True, check=False, cwd=self.folder, env=environment, timeout=120,
        )  # fmt: skip

    def say(self, *words: str, who: str | None = None) -> Any:
        """What it prints. Fails where it does not end well."""
        done = self.run(*words, who=who)
        assert done.returncode == 0, f"{self.version.name}: {' '.join(words)}: {done.stdout}{done.stderr}"
        return json.loads(done.stdout) if done.stdout.strip() else None

    def identity(self, who: str) -> Path:
        """The key file of a person or an agent."""
        return self.trust.user_key("olga") if who == "olga" else self.folder / f"{who}.json"

    # --- the life of an installation ---

    def make(self) -> None:
        """As `docs/operations.md` has the first start."""
        self.say("init", "--folder", str(self.folder / "state"), "--operator", "olga")
        self._shared["RINGFENCE_TRUST_ROOT"] = self.trust.fingerprint()
        self.say("topics", "apply")
        self.say("init", "--folder", str(self.folder / "state"), "--operator", "olga", "--publish")

    def start(self, **more: str) -> None:
        """Every service of the version, and return when all are ready."""
        for name in STARTED:
            environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
            environment |= self._shared | more
            environment |= {
                "RINGFENCE_HTTP": f"{LOOPBACK}:{self._ports[name]}",
                "RINGFENCE_INSTANCE": name,
                "RINGFENCE_KEY_DIR": str(self.folder / "state" / "keys"),
                "RINGFENCE_GATEWAY_LISTEN": f"{LOOPBACK}:{self._door}",
                "RINGFENCE_GATEWAY_SOCKETS": str(self.folder / "state" / "tasks"),
                "RINGFENCE_GATEWAY_CA_FILE": str(self.folder / "state" / "gateway-ca.pem"),
            }
            log = self.folder / f"{self.version.name}-{name}.log"
            self._children[name] = spawn(
                name, [self.version.program, "serve", name], env=environment, log_path=log
            )
        for name in STARTED:
            self._children[name].wait_until(partial(self._ready, name), WITHIN_S, "was ready")

    def _ready(self, name: str) -> bool:
        return readiness(self._ports[name]) is None

    def stop(self, *, kill: tuple[str, ...] = ()) -> None:
        """One service after the other; each ends well, but for those that are killed."""
        for name in STOPPED:
            child = self._children.pop(name)
            if name in kill:
                child.kill()
                continue
            child.terminate()
            assert child.wait(WITHIN_S) == 0, f"{name} did not end well: {child.log_tail(20)}"

    def stop_all_but(self, kept: str) -> None:
        """What is left writes to its topics alone."""
        for name in STOPPED:
            if name != kept:
                child = self._children.pop(name)
                child.terminate()
                assert child.wait(WITHIN_S) == 0, f"{name} did not end well: {child.log_tail(20)}"

    def end(self) -> None:
        for child in self._children.values():
            child.kill()

    # --- what is there ---

    async def records(self, topic: Topic[Any]) -> list[Received]:
        """All that stands on a topic."""
        async with Stretches(self.settings) as kafka:
            return [record async for record in kafka.whole(topic)]

    async def ends(self, lease: str) -> list[tuple[Received, Lease]]:
        """The records by which a lease ended."""
        found = [
            (record, parse(record.value).unverified_claims(Lease))
            for record in await self.records(LEASE)
            if record.key == lease and record.value
        ]
        return [(record, claims) for record, claims in found if claims.status in TERMINAL]

    def leases(self) -> set[str]:
        """Those that live, as the operator sees them."""
        return {one["id"] for one in self.say("lease", "list", who="olga")["leases"]}


@contextmanager
def installed(version: Version, kafka: Kafka, redis: RedisServer, folder: Path) -> Iterator[Installation]:
    made = Installation(version, kafka, redis, folder)
    try:
        made.make()
        yield made
    finally:
        made.end()


def organise(here: Installation) -> str:
    """sam sponsors bot, which may read the shop's environments, and has a task. Returns the task."""
    allow = "shop:read:env/**"
    here.say(
        "target",
        "add",
        "shop",
        "--description",
        "a shop",
        "--verb",
        "read",
        "--backend",
        "jwt",
        "--new-key",
        str(here.identity("shop")),
        who="olga",
    )
    here.say(
        "user", "add", "sam", "--name", "Sam", "--role", "sponsor", "--allow", allow,
        "--new-key", str(here.identity("sam")), who="olga",
    )  # fmt: skip
    here.say(
        "agent", "register", "bot", "--description", "a bot", "--allow", allow,
        "--new-key", str(here.identity("bot")), who="sam",
    )  # fmt: skip
    assigned = here.say(
        "task", "assign", "bot", "--purpose", "a test", "--allow", allow, "--for", "1h", who="sam"
    )
    task: str = assigned["task_id"]
    return task


def lease(here: Installation, task: str, ttl: str) -> str:
    """A new one."""
    answer = here.say(
        "request",
        "--task",
        task,
        "--reason",
        "to look",
        "--allow",
        "shop:read:env/staging",
        "--ttl",
        ttl,
        who="bot",
    )
    id: str = answer["lease_id"]
    return id


async def until(holds: Callable[[], Any], what: str) -> Any:
    """What `holds` returns, awaited, once it is true."""
    async with asyncio.timeout(3 * WITHIN_S):
        while not (found := await holds()):
            await asyncio.sleep(0.5)
        return found


@pytest.mark.parametrize("audit_ends", ["in good order", "killed"])
async def test_an_upgrade_loses_nothing_and_revives_nothing(
    versions: tuple[Version, Version],
    kafka: Kafka,
    redis_server: RedisServer,
    tmp_path: Path,
    audit_ends: str,
) -> None:
    before, now = versions
    with installed(before, kafka, redis_server, tmp_path) as here:
        # No checkpoint comes before audit ends in good order: killed, it leaves events of which only `audit.chained`
        # tells.
        await asyncio.to_thread(here.start, RINGFENCE_AUDIT_CHECKPOINT_S="3600")
        task = await asyncio.to_thread(organise, here)
        kept = await asyncio.to_thread(lease, here, task, "30m")
        late = await asyncio.to_thread(lease, here, task, "20m")
        revoked = await asyncio.to_thread(lease, here, task, "30m")
        here.say("revoke", "--lease", revoked, "--reason", "odd", "--yes", who="olga")
        await until(lambda: here.ends(revoked), "the end of what was revoked")
        short = await asyncio.to_thread(lease, here, task, f"{SHORT_S}s")
        await until(lambda: audited(here, short), "the events of the last lease")
        killed = ("audit",) if audit_ends == "killed" else ()
        await asyncio.to_thread(here.stop, kill=killed)

        direct = await chained_directly(here)
        assert direct, "the version before chains its own events directly"
        if killed:
            assert direct & await unsigned(here), "events of which only `audit.chained` tells"
        assert not await here.ends(short), f"it ended before the upgrade: {SHORT_S} s are too short"
        stood = len(await here.records(AUDIT_INTAKE))

        here.version, upgraded_ms = now, time.time() * 1000
        here.say("topics", "apply")  # as "Upgrade" in docs/release.md has it: a version may bring topics
        here.say("topics", "check")
        await asyncio.to_thread(here.start, RINGFENCE_AUDIT_CHECKPOINT_S="1")
        assert here.leases() >= {kept, late}
        assert revoked not in here.leases()
        ((record, end),) = await until(lambda: here.ends(short), "the end of the short lease")
        assert (end.status, record.appended_at_ms > upgraded_ms) == ("expired", True)
        new = await asyncio.to_thread(lease, here, task, "10m")
        here.say("revoke", "--lease", late, "--reason", "odd", "--yes", who="olga")
        await until(lambda: here.ends(late), "the end of what is revoked now")
        assert here.leases() == {kept, new}
        assert len(await here.ends(revoked)) == 1
        assert not await here.ends(kept)
        here.say("rebuild", "--check")

        await asyncio.to_thread(here.stop_all_but, "audit")
        await until(lambda: verified(here), "an event of every record")
        assert not await here.records(DEAD_LETTER)
        uids = [event.uid for record in await here.records(AUDIT) if (event := event_of(record.value))]
        assert len(uids) == len(set(uids)) > 20
        assert len(await here.records(AUDIT_INTAKE)) > stood
        assert await chained_directly(here) == direct, "the version of now chains nothing so"


async def audited(here: Installation, lease: str) -> bool:
    """Whether the trail has every record of a lease that lives."""
    events = {event.uid for record in await here.records(AUDIT) if (event := event_of(record.value))}
    records = [record for record in await here.records(LEASE) if record.key == lease]
    uids = {Source(record.topic_name, record.partition, record.offset).uid for record in records}
    return bool(uids) and uids <= events


async def chained_directly(here: Installation) -> set[str]:
    """The hashes of which `audit.chained` tells."""
    messages = [parse(record.value) for record in await here.records(AUDIT_INTAKE)]
    return {
        hashed
        for jws in messages
        if jws.header.typ == typ_header(AuditChained)
        for hashed in jws.unverified_claims(AuditChained).hashes
    }


async def unsigned(here: Installation) -> set[str]:
    """The hashes of the events that no checkpoint covers."""
    heads = [
        parse(record.value).unverified_claims(AuditCheckpoint)
        for record in await here.records(AUDIT_CHECKPOINT)
    ]
    sizes = {head.tree: head.size for head in sorted(heads, key=lambda head: head.size)}
    events = [(record, event_of(record.value)) for record in await here.records(AUDIT)]
    return {
        leaf_hash(record.value).hex()
        for record, event in events
        if event and event.link and event.link.seq > sizes.get(event.link.tree, 0)
    }


async def verified(here: Installation) -> bool:
    """Whether `ringfence audit verify` finds nothing. Fails where it finds what no event to come makes good."""
    done = await asyncio.to_thread(here.run, "audit", "verify", "--settle", "0", who="olga")
    faults = {fault["kind"] for fault in json.loads(done.stdout)["faults"]}
    assert faults <= {"missing"}, done.stdout
    return done.returncode == 0
