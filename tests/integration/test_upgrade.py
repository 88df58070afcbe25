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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ringfence.kernel.crypto.jws import parse
from ringfence.messages.audit import AuditCheckpoint
from ringfence.messages.topics import AUDIT, AUDIT_CHECKPOINT, AUDIT_INTAKE, DEAD_LETTER, LEASE
from ringfence.model.audit_log.chain import Source, event_of
from ringfence.model.audit_log.merkle import leaf_hash
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.site.page_commands import run_page
from tests.support.installation import STOPPED, WITHIN_S, Installation, lease, organise

ROOT = Path(__file__).parents[2]
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


@contextmanager
def installed(version: Version, kafka: Kafka, redis: RedisServer, folder: Path) -> Iterator[Installation]:
    made = Installation(
        version, folder, kafka=kafka.bootstrap, embedded_broker=kafka.embedded, redis_url=redis.url
    )
    try:
        made.make()
        yield made
    finally:
        made.end()


def compare(here: Installation) -> None:
    """What the page for operators has before and after an upgrade; each command must find nothing wrong."""
    run_page(ROOT / "docs/operators/upgrade-and-roll-back.md", here.folder, here.environment("olga"))


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
        # No checkpoint comes before audit ends in good order: killed, it leaves events that no checkpoint covers.
        await asyncio.to_thread(here.start, settings={"RINGFENCE_AUDIT_CHECKPOINT_S": "3600"})
        task = await asyncio.to_thread(organise, here)
        kept = await asyncio.to_thread(lease, here, task, "30m")
        late = await asyncio.to_thread(lease, here, task, "20m")
        revoked = await asyncio.to_thread(lease, here, task, "30m")
        here.say("revoke", "--lease", revoked, "--reason", "odd", "--yes", who="olga")
        await until(lambda: here.ends(revoked), "the end of what was revoked")
        await asyncio.to_thread(compare, here)
        short = await asyncio.to_thread(lease, here, task, f"{SHORT_S}s")
        await until(lambda: audited(here, short), "the events of the last lease")
        killed = ("audit",) if audit_ends == "killed" else ()
        await asyncio.to_thread(here.stop, kill=killed)

        if killed:
            assert await unsigned(here), "events that no checkpoint covers"
        assert not await here.ends(short), f"it ended before the upgrade: {SHORT_S} s are too short"
        stood = len(await here.records(AUDIT_INTAKE))

        here.version, upgraded_ms = now, time.time() * 1000
        here.say("topics", "apply")  # as "Upgrade" in docs/release.md has it: a version may bring topics
        here.say("topics", "check")
        await asyncio.to_thread(here.start, settings={"RINGFENCE_AUDIT_CHECKPOINT_S": "1"})
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
        await asyncio.to_thread(compare, here)

        await asyncio.to_thread(here.stop, *STOPPED[:-1])  # audit goes on
        await until(lambda: verified(here), "an event of every record")
        assert not await here.records(DEAD_LETTER)
        uids = [event.uid for record in await here.records(AUDIT) if (event := event_of(record.value))]
        assert len(uids) == len(set(uids)) > 20
        assert len(await here.records(AUDIT_INTAKE)) > stood


async def audited(here: Installation, lease: str) -> bool:
    """Whether the trail has every record of a lease that lives."""
    events = {event.uid for record in await here.records(AUDIT) if (event := event_of(record.value))}
    records = [record for record in await here.records(LEASE) if record.key == lease]
    uids = {Source(record.topic_name, record.partition, record.offset).uid for record in records}
    return bool(uids) and uids <= events


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
