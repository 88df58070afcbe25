"""Canaries: many runs that are killed at random, after which nothing of them is found anywhere.

`RINGFENCE_TEST_CANARY_RUNS` says how many (20), `RINGFENCE_TEST_CANARY_SEED` which; both are printed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from ringfence.client.connection import Connection
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jws import parse
from ringfence.messages.lease import TERMINAL, Lease
from ringfence.messages.run import Run
from ringfence.messages.topics import LEASE, RUN
from tests.runner.installation import SCOPE, WITHIN_S, Installation, until
from tests.support import secret_canary

RUNS = int(os.environ.get("RINGFENCE_TEST_CANARY_RUNS", "20"))
SEED = int(os.environ.get("RINGFENCE_TEST_CANARY_SEED", "0")) or secrets.randbelow(1 << 31)
AT_ONCE = 3
pytestmark = pytest.mark.timeout(240 + 15 * RUNS)
VICTIMS = ("nobody", "command", "init", "process 1", "bubblewrap", "run", "run, politely")
LONGEST_DELAY_S = 2.5
ASK = f"ringfence --json request --task $RINGFENCE_TASK --allow '{SCOPE}' --reason look"
COMMAND = f"""
for place in $HOME /tmp /dev/shm /run/ringfence/instance; do echo $CANARY_INSIDE$1 > $place/file; done
cat /run/ringfence/instance/key.json; echo
{ASK} --delivery agent
{ASK} --delivery gateway
echo asked; exec sleep $2
"""
_GONE = (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess)


@dataclass
class Finished:
    """A run that has ended, somehow."""

    victim: str
    asked: bool
    made: list[str] = field(default_factory=list)
    """What was issued to it, and the private half of its key."""


def cast(
    here: Installation, mark: str, number: int, victim: str, delay_s: float, after_asking: bool
) -> Finished:
    """Start a run and kill its victim. Returns once `ringfence run` has ended."""
    lasts = f"{600 + number}" if victim != "nobody" else "0"
    process = here.start(
        "run", "--task", here.task, "--env", f"CANARY_INSIDE={mark}", "--ttl", "5m", "--", "sh", "-c", COMMAND, "sh",
        mark, lasts, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    said = b""
    if after_asking:
        while b"asked\n" not in said and (line := process.stdout.readline()):
            said += line
    time.sleep(delay_s)
    kill(process, victim)
    said += process.communicate(timeout=WITHIN_S)[0]
    return Finished(victim, b"asked\n" in said, secrets_in(said.decode()))


def kill(process: subprocess.Popen[bytes], victim: str) -> None:
    """Kill a process of the run; if it does not have that one at the moment, `ringfence run` itself."""
    if victim == "nobody":
        return
    if victim == "run, politely":
        process.terminate()
        return
    chosen = process.pid
    with contextlib.suppress(*_GONE):
        for one in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(*_GONE):
                if role(one) == victim:
                    chosen = one.pid
    with contextlib.suppress(ProcessLookupError):
        os.kill(chosen, signal.SIGKILL)


def role(process: psutil.Process) -> str:
    words = process.cmdline()
    if any(word.endswith("init/bootstrap.py") for word in words) and not words[0].startswith("ringfence-"):
        return "init"
    if words and words[0].startswith("ringfence-"):
        parent = process.parent()
        of_bwrap = parent is not None and parent.cmdline()[:1] == words[:1]
        return "process 1" if of_bwrap else "bubblewrap"
    return "command" if words[:1] in (["sh"], ["sleep"]) else "other"


def secrets_in(text: str) -> list[str]:
    """The private key, and the credential that was delivered to the agent, in what a run printed."""
    found, decoder, at = list[str](), json.JSONDecoder(), 0
    while (at := text.find("{", at)) >= 0:
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError:
            at += 1
            continue
        if "jwk" in value:
            found.append(value["jwk"]["d"])
        found += [
            value[name] for name in ("credential", "value", "token") if isinstance(value.get(name), str)
        ]
    return found


async def records(here: Installation) -> tuple[dict[str, list[str]], dict[str, str]]:
    """What was said of each run, in order; and the last status of each lease. Both as they stand on Kafka."""
    runs, leases = dict[str, list[str]](), dict[str, str]()

    def look(found: Sequence[Any]) -> None:
        for record in found:
            if not record.value:
                continue
            with contextlib.suppress(InvalidMessageError):  # another message of the topic
                if record.topic is RUN:
                    runs.setdefault(record.key, []).append(parse(record.value).unverified_claims(Run).status)
                else:
                    leases[record.key] = parse(record.value).unverified_claims(Lease).status

    async with Connection(here.folder / ".ringfence/keys/audit.json", here.settings()) as connection:
        await connection.follow([RUN, LEASE], look, since_ms=0)
        return dict(runs), dict(leases)


def files_with(canaries: Sequence[str], folders: Sequence[Path], since_s: float) -> list[str]:
    """The files below these folders, written since then, that hold one of the canaries; by grep(1), for speed.

    Files of 2 GiB and more are left out: tests of others make sparse ones that nobody could read to their end.
    """
    written = subprocess.run(
        ["find", *map(str, folders), "-xdev", "-type", "f", "-size", "-2097152k", "-newermt", f"@{since_s}", "-print0"],
        capture_output=True, check=False,
    ).stdout  # fmt: skip
    return searched(canaries, written)


def searched(canaries: Sequence[str], paths: bytes) -> list[str]:
    """Those of the files, with NUL after each, that hold one of the canaries."""
    patterns = os.memfd_create("patterns")  # in a file, the search would find itself
    try:
        os.write(patterns, "\n".join(canaries).encode())
        done = subprocess.run(
            ["xargs", "-0", "-r", "grep", "-lFa", "-f", f"/dev/fd/{patterns}"], input=paths, capture_output=True,
            check=False, pass_fds=[patterns],
        )  # fmt: skip
    finally:
        os.close(patterns)
    return done.stdout.decode(errors="replace").splitlines()


def left(run_ids: Sequence[str], mark: str) -> list[str]:
    """What is left of these runs on this machine: processes, mounts, control groups, folders."""
    names = [mark, *run_ids]
    found = [path.name for path in Path(tempfile.gettempdir()).glob("ringfence-run-*")]
    for one in psutil.process_iter():
        with contextlib.suppress(*_GONE):
            found.append(f"process {one.pid}: {' '.join(one.cmdline())}")
    found += Path("/proc/self/mountinfo").read_text().splitlines()
    groups = subprocess.run(
        ["find", "/sys/fs/cgroup", "-maxdepth", "5", "-type", "d"], capture_output=True, check=False
    )
    found += groups.stdout.decode().split()
    return [line[:200] for line in found if any(name in line for name in names)]


async def test_after_many_runs_and_random_kills_nothing_is_left(here: Installation) -> None:
    print(f"{RUNS} runs, RINGFENCE_TEST_CANARY_SEED={SEED}")
    chance, mark = random.Random(SEED), f"canary-{secrets.token_hex(12)}"
    work = [
        (number, chance.choice(VICTIMS), chance.uniform(0, LONGEST_DELAY_S), chance.random() < 0.6)
        for number in range(RUNS)
    ]
    began_s = time.time() - 1
    with ThreadPoolExecutor(AT_ONCE) as pool:
        loop = asyncio.get_running_loop()
        runs = await asyncio.gather(
            *(loop.run_in_executor(pool, cast, here, mark, number, victim, delay_s * (not asks), asks)
              for number, victim, delay_s, asks in work)
        )  # fmt: skip
    # The next run on this machine sweeps.
    assert here.run("--", "true").returncode == 0
    print(Counter(run.victim for run in runs), f"{sum(run.asked for run in runs)} of them had asked")
    made = [secret for run in runs for secret in run.made]
    assert sum(run.asked for run in runs) >= RUNS // 5
    assert len(made) >= RUNS // 2

    said, leases = await records(here)
    until(lambda: not left(list(said), mark), f"the end of what is left: {left(list(said), mark)}")
    assert len(said) >= RUNS // 3
    for run_id, statuses in said.items():
        over = [status for status in statuses if status in ("ended", "lost")]
        assert (len(over), statuses[-1:]) == (1, over), f"{run_id}: {statuses}"
    assert leases

    async def all_ended() -> bool:
        return all(status in TERMINAL for status in (await records(here))[1].values())

    async with asyncio.timeout(WITHIN_S):
        while not await all_ended():
            await asyncio.sleep(0.2)
    state = here.folder / ".ringfence"
    assert not list((state / "runner").glob("*.json"))
    until(
        lambda: not {path.stem for path in (state / "tasks").iterdir()} & said.keys(),
        "the end of their sockets",
    )

    canaries = [*made, mark]
    assert await secret_canary.on_topics(here.settings(identity=None), canaries) == []
    assert secret_canary.in_files([state], canaries) == []
    folders = [Path(tempfile.gettempdir()), Path("/var/tmp"), Path.home(), Path("/dev/shm"), Path("/var/log")]
    assert files_with(canaries, [one for one in folders if one.is_dir()], began_s) == []
    assert in_journal(canaries) == []
    for device in swap_devices():
        assert searched(canaries, f"{device}\0".encode()) == []


async def test_a_run_ends_without_kafka_and_is_lost_once_it_is_back(here: Installation) -> None:
    """Its sandbox goes at once. The next run on this machine finds that nobody reported its end."""
    process = here.start("run", "--task", here.task, "--", "sh", "-c", "echo ready; exec sleep 600")
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    (broker,) = (
        one for one in psutil.Process(here.pid).children(recursive=True) if "--kafka-port" in one.cmdline()
    )
    broker.suspend()
    try:
        process.terminate()
        _, problems = process.communicate(timeout=WITHIN_S)
    finally:
        broker.resume()
    assert process.returncode == 143, problems
    assert b"not on Kafka" in problems
    assert here.run("--", "true").returncode == 0
    said, _ = await records(here)
    assert all(sum(one in ("ended", "lost") for one in statuses) == 1 for statuses in said.values()), said


def in_journal(canaries: Sequence[str]) -> list[str]:
    """Lines of the system's journal that hold one of them; none where the machine has no journal."""
    if shutil.which("journalctl") is None:
        print("not provable here: there is no journal")
        return []
    done = subprocess.run(["journalctl", "--since", "-2h", "-o", "cat"], capture_output=True, check=False)
    return [
        line
        for line in done.stdout.decode(errors="replace").splitlines()
        if any(one in line for one in canaries)
    ]


def swap_devices() -> list[Path]:
    found = [Path(line.split()[0]) for line in Path("/proc/swaps").read_text().splitlines()[1:]]
    if not found:
        print("not provable here: there is no swap")
    return found


def test_the_search_finds_a_canary(tmp_path: Path) -> None:
    """Or that nothing is found would say nothing."""
    canary = f"canary-{secrets.token_hex(8)}"
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "file").write_bytes(b"\0\xff" + canary.encode() + b"\n")
    assert files_with([canary, "another"], [tmp_path], time.time() - 60) == [str(tmp_path / ".hidden/file")]
    assert secrets_in(f'x {{"jwk": {{"d": "{canary}"}}}}\n{{"credential": "two"}} asked') == [canary, "two"]
