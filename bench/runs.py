"""Runs: how long until the command's first instruction, until its first credential, and what many at once take."""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.machine import percentile
from bench.stack import running
from ringfence.client.admin.trust_setup import SERVICE_ROLES
from ringfence.client.connection import Connection
from ringfence.client.settings import ClientSettings
from ringfence.dev.organisation import assign_first_task, seed
from ringfence.dev.stack import Stack
from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.run import RunLimits
from ringfence.model.records.runs import run_id_of
from ringfence.runner.lifecycle.execution import RunExecution, RunnerHost
from ringfence.runner.lifecycle.plan import RunPlan
from ringfence.runner.lifecycle.report import RunReport
from ringfence.runner.sandbox.backend import ResourceLimits, SandboxSpec, Streams
from ringfence.runner.sandbox.bubblewrap import BubblewrapBackend
from tests.runner.run_host import run_host

RUNS = 100
"""So many at once, unless `--runs` says otherwise."""
_TIMES = 20
"""So many of each kind, one after the other."""
_RUNNER, _AGENT = "runner-1", "deploy-bot"
_LIMITS = RunLimits(memory_bytes=2 << 30, cpu_millis=1000, pids=256)
_INIT = "runner/init/bootstrap.py"
_EXECUTABLE = Path(sys.executable).with_name("ringfence")
_REQUEST = (
    "ringfence request --task $RINGFENCE_TASK --allow platform:read:env/staging/web --reason bench >/dev/null"
)
_SETTLE_S = 2.0
"""Seconds until a started run is measured: until then init still imports what it serves with."""


def run(kafka: str, runs: int = RUNS) -> None:
    """Print the figures; or what is missing here, where no sandbox can be made."""
    with tempfile.TemporaryDirectory(prefix="ringfence-bench-") as folder:
        if problems := asyncio.run(BubblewrapBackend(Path(folder)).available()):
            print(f"  not measured: {'; '.join(problems)}")
            return
        asyncio.run(_sandboxes(Path(folder)))
    with running(kafka, SERVICE_ROLES, runner=_RUNNER) as (stack, settings, _):
        asyncio.run(_whole_runs(stack, settings, runs))


# --- the sandbox alone, and with init ---


async def _sandboxes(folder: Path) -> None:
    print(f"to the first instruction, of {_TIMES} each: median and p99")
    backend, limits = BubblewrapBackend(folder), ResourceLimits(2 << 30, 1, 256, 60)

    async def bare(number: int) -> float:
        with _Pipe() as out:
            start = time.perf_counter()
            spec = SandboxSpec(f"bench-{number}", ("echo", "here"), limits=limits)
            sandbox = await backend.start(spec, Streams(None, out.theirs, None))
            took_s = await out.first_byte_s() - start
            await sandbox.wait()
            await sandbox.destroy()
            return took_s

    _show("bubblewrap alone", await _each(bare))
    async with run_host() as host:

        async def with_init(_: int) -> float:
            start = time.perf_counter()
            run = await host.start("echo", "here", limits=limits)
            await run.stdout.until(b"here")
            took_s = time.perf_counter() - start
            await run.finish()
            return took_s

        _show("with init, its key and its proxy", await _each(with_init))


async def _each(once: Callable[[int], Awaitable[float]]) -> list[float]:
    await once(_TIMES)  # what is read for the first time is not measured
    return [await once(number) for number in range(_TIMES)]


# --- whole runs ---


async def _whole_runs(stack: Stack, settings: ClientSettings, runs: int) -> None:
    await seed(stack.trust, settings, stack.options.operator, runner=_RUNNER)
    task = await assign_first_task(stack.trust, settings)
    state = stack.options.state / "runner"
    await asyncio.to_thread(_commands, stack, task, state)
    async with Connection(stack.trust.service_key(_RUNNER), settings) as connection:
        host = RunnerHost(connection, BubblewrapBackend(state), stack.sockets, stack.gateway_ca)
        alone = [await _at_once(host, task, 1) for _ in range(_TIMES)]
        _show("run of a connected runner", [one.first_s[0] for one in alone])
        _show("  from the command's end to its report", [one.ended_s for one in alone])
        _memory(alone[-1], 1)
        print(f"{runs} runs at once, of one runner")
        many = await _at_once(host, task, runs)
        if many.first_s:
            _show("to the first instruction", many.first_s)
            print(
                f"  all had started after {max(many.first_s):.1f} s; all were gone {many.ended_s:.1f} s after their end"
            )
            _memory(many, len(many.first_s))
        complete = sum(report.destruction.complete and report.published for report in many.reports)
        print(f"  {complete} of {runs} ended with nothing left")
        for reason, count in many.failures.items():
            print(f"  {count} failed: {reason}")


def _commands(stack: Stack, task: str, state: Path) -> None:
    """`ringfence run` as people start it: a process of its own for each, with its own connection to Kafka."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RINGFENCE_")},
        **stack.environment(),
        "RINGFENCE_CONFIG": os.devnull,
        "RINGFENCE_GATEWAY_SOCKETS": str(stack.sockets),
        "RINGFENCE_GATEWAY_CA_FILE": str(stack.gateway_ca),
        "RINGFENCE_RUNNER_KEY_FILE": str(stack.trust.service_key(_RUNNER)),
        "RINGFENCE_RUNNER_STATE": str(state),
    }
    script = f"date +%s%N; {_REQUEST}; date +%s%N"
    words = [str(_EXECUTABLE), "run", "--task", task, "--", "sh", "-c", script]
    firsts, credentials, wholes, cpu = [], [], [], []
    for number in range(_TIMES + 1):
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            start_ns = time.time_ns()
            child = subprocess.Popen(
                words, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr
            )
            _, status, used = os.wait4(child.pid, 0)
            whole_s = (time.time_ns() - start_ns) / 1e9
            child.returncode = os.waitstatus_to_exitcode(status)
            stdout.seek(0)
            stderr.seek(0)
            if child.returncode != 0:
                raise SystemExit(f"ringfence run: {stderr.read().decode(errors='replace')}")
            first_ns, credential_ns = map(int, stdout.read().split())
        if number:  # the first reads what the others have
            firsts.append((first_ns - start_ns) / 1e9)
            credentials.append((credential_ns - start_ns) / 1e9)
            wholes.append(whole_s)
            cpu.append(used.ru_utime + used.ru_stime)
    _show("ringfence run", firsts)
    _show("ringfence run, to the first credential", credentials)
    waits = [credential - first for credential, first in zip(credentials, firsts, strict=True)]
    _show("  of these, ringfence request inside", waits)
    _show("  from its start to its end, with that request", wholes)
    _show("  CPU of ringfence run itself", cpu)


@dataclass
class _Measured:
    first_s: list[float] = field(default_factory=list)
    """From the start of each run to its command's first instruction."""
    ended_s: float = 0.0
    """From the end of the commands until the last report was there."""
    reports: list[RunReport] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    init_bytes: list[int] = field(default_factory=list)
    """Memory that each init has for itself (USS)."""
    all_bytes: int = 0
    """All processes of the sandboxes, shared pages divided among those who share them (PSS)."""
    runner_bytes: int = 0
    """This process (USS)."""


async def _at_once(host: RunnerHost, task: str, count: int) -> _Measured:
    """Start so many runs at once, measure them while all are there, and let them end."""
    measured, own = _Measured(), psutil.Process()
    with contextlib.ExitStack() as pipes:
        outs = [pipes.enter_context(_Pipe()) for _ in range(count)]
        ins, feeds = zip(*(os.pipe2(os.O_CLOEXEC) for _ in range(count)), strict=True)
        start = time.perf_counter()
        runs = [
            asyncio.create_task(RunExecution(host, _plan(host, task), Streams(gate, out.theirs, None)).execute())
            for gate, out in zip(ins, outs, strict=True)
        ]  # fmt: skip
        firsts = [asyncio.create_task(out.first_byte_s()) for out in outs]
        for one, first in zip(runs, firsts, strict=True):
            await asyncio.wait({one, first}, return_when=asyncio.FIRST_COMPLETED)
            if first.done():
                measured.first_s.append(first.result() - start)
            else:
                first.cancel()
        await asyncio.sleep(_SETTLE_S)
        await asyncio.to_thread(_weigh, own, measured)
        for descriptor in ins:
            os.close(descriptor)
        end = time.perf_counter()
        for descriptor in feeds:
            os.close(descriptor)
        for result in await asyncio.gather(*runs, return_exceptions=True):
            if isinstance(result, RunReport):
                measured.reports.append(result)
            elif isinstance(result, RingfenceError):
                reason = f"{result.code}: {result.message.partition('/')[0]}"
                measured.failures[reason] = measured.failures.get(reason, 0) + 1
            else:
                raise result
        measured.ended_s = time.perf_counter() - end
    return measured


def _plan(host: RunnerHost, task: str) -> RunPlan:
    nonce = os.urandom(16).hex()
    return RunPlan(
        run_id=run_id_of(host.connection.key.id, nonce=nonce),
        agent_id=_AGENT,
        task_id=task,
        argv=("sh", "-c", "echo here; read line"),
        deadline_s=int(time.time()) + 900,
        limits=_LIMITS,
        nonce=nonce,
    )


def _weigh(own: psutil.Process, measured: _Measured) -> None:
    measured.runner_bytes = own.memory_full_info().uss
    for process in own.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if not any(word in ("bwrap", "--args") or word.endswith((_INIT, "read line")) for word in words):
                continue  # a service of the stack
            memory = process.memory_full_info()
            measured.all_bytes += memory.pss
            if any(word.endswith(_INIT) for word in words) and "--args" not in words:
                measured.init_bytes.append(memory.uss)


def _memory(measured: _Measured, count: int) -> None:
    init = statistics.median(measured.init_bytes) / 2**20 if measured.init_bytes else 0.0
    peaks = [report.destruction.usage.memory_peak_bytes or 0 for report in measured.reports]
    peak = statistics.median(peaks) / 2**20 if peaks else 0.0
    print(
        f"  memory of a run: {measured.all_bytes / count / 2**20:.1f} MiB in its sandbox, shared pages shared; init "
        f"alone has {init:.1f} MiB for itself; peak by its control group {peak:.1f} MiB; the runner has "
        f"{measured.runner_bytes / 2**20:.0f} MiB"
    )


# --- helpers ---


class _Pipe:
    """A pipe whose first byte is waited for."""

    def __enter__(self) -> _Pipe:
        self._ours, self.theirs = os.pipe2(os.O_CLOEXEC)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._ours)
        os.close(self.theirs)

    async def first_byte_s(self) -> float:
        """Wait for a byte. Returns when it was there, by `time.perf_counter`."""
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._ours, arrived.set)
        try:
            await arrived.wait()
            return time.perf_counter()
        finally:
            loop.remove_reader(self._ours)


def _show(name: str, seconds: Sequence[float]) -> None:
    took = list(seconds)
    print(f"  {name:48} {statistics.median(took) * 1000:8.0f} ms {percentile(took, 0.99) * 1000:8.0f} ms")
