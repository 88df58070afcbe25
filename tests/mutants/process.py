"""Runs the tests of one module against its mutants, each in a forked process that dies with its verdict.

The files on disk stay as they are: a mutant exists in the memory of its process alone. Where the mistake is in the body
of a function, the process is forked after the tests were collected, the function's code is exchanged, and only the
tests that reach the function run, up to the first that fails: those first that have killed most for their time. Any
other (constants, class bodies, defaults) needs the module to be imported anew, and so does one that survives in a
function that ran while tests were collected.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import mmap
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, Literal, cast

import hypothesis
import pytest
from hypothesis import Phase

from tests.mutants.mutation import Mutant

Verdict = Literal["killed", "timeout", "survived", "import"]
"""`timeout`: ended by a limit, which counts as killed. `import`: for the module imported anew to tell."""

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "services" / "ringfence"
_OPTIONS = ("-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0")
_MEMORY_BYTES = 4 * 1024**3
_POLL_S = 0.004
_TEST_OVERHEAD_S = 0.005
"""What running any test costs beside its own time, roughly."""
_IMPORT_STATUS = 3
_SETTINGS = "_hypothesis_internal_use_settings"
"""Where Hypothesis keeps a test's settings: it has no other way to change them from outside."""


class BrokenTestsError(Exception):
    """The chosen tests fail without any mistake."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Processor time is what a hanging loop uses up on any machine; the other limit ends what waits for ever."""

    cpu_s: float
    wall_s: float

    @classmethod
    def of(cls, usual_s: float) -> Limits:
        return cls(2 + 4 * usual_s, 20 + 20 * usual_s)


# Forking -----------------------------------------------------------------------------------------------------


def _in_child(work: Callable[[], bool], limits: Limits) -> int:
    """Fork a process, in a group of its own, that exits with 1 where `work` says so; returns its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        return pid
    status = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        seconds = int(limits.cpu_s) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        status = int(work())
    finally:
        os._exit(status)


def run_all(
    jobs: Iterable[tuple[int, Callable[[], bool], Limits]], at_once: int
) -> Generator[tuple[int, Verdict], None, None]:
    """Run jobs (number, work, limits), some at a time, and yield each number with its verdict. All end where it is
    closed.
    """
    waiting = iter(jobs)
    running: dict[int, tuple[int, float]] = {}
    more = True
    try:
        while more or running:
            while more and len(running) < at_once:
                job = next(waiting, None)
                if job is None:
                    more = False
                    break
                number, work, limits = job
                running[_in_child(work, limits)] = (number, time.monotonic() + limits.wall_s)
            ended = False
            for pid, (number, until) in list(running.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                if not done and time.monotonic() < until:
                    continue
                _end_group(pid)
                if not done:
                    os.waitpid(pid, 0)
                del running[pid]
                ended = True
                yield number, _verdict(status) if done else "timeout"
            if not ended:
                time.sleep(_POLL_S)
    finally:
        for pid in running:
            _end_group(pid)
            os.waitpid(pid, 0)


def _end_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _verdict(status: int) -> Verdict:
    if os.WIFSIGNALED(status):
        return "timeout" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL) else "killed"
    verdicts: dict[int, Verdict] = {0: "survived", _IMPORT_STATUS: "import"}
    return verdicts.get(os.WEXITSTATUS(status), "killed")


# In the process of the tests ---------------------------------------------------------------------------------


class _Quick:
    """A plugin of pytest for the process of a mutant. Its first failure ends it: describing one takes longer than most
    tests. Hypothesis looks for no smaller example, either.
    """

    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> None:
        if call.excinfo and not call.excinfo.errisinstance((pytest.skip.Exception, pytest.xfail.Exception)):
            self.failed()

    def failed(self) -> None:
        os._exit(1)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        phases = (Phase.explicit, Phase.reuse, Phase.generate)
        for item in items:
            test = getattr(item, "function", None)
            if (usual := getattr(test, _SETTINGS, None)) is not None:
                setattr(test, _SETTINGS, hypothesis.settings(usual, phases=phases))


class _Mutating(_Quick):
    """A plugin of pytest that runs the collected tests again and again, once for each mutant."""

    def __init__(
        self, path: Path, mutants: Sequence[Mutant], at_once: int, tell: Callable[[Any], None]
    ) -> None:
        self._path = str(path)
        self._mutants = mutants
        self._at_once = at_once
        self._tell = tell
        self._running: tuple[memoryview[int], int] | None = None
        """In the process of a mutant: where kills are counted, and the test that runs."""
        self._while_collecting: set[str] = set()
        """Functions that ran while tests were collected: what came of them then is that of no mutant."""
        self._watch(self._while_collecting)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self._watch(None)
        if session.testsfailed:
            raise session.Failed("the tests cannot be collected")
        # Programs in `tools` import the package: loaded before a mutant, they would bring the module without it.
        names = [
            name for name in sys.modules if name.partition(".")[0] not in ("ringfence", "tests", "tools")
        ]
        self._tell({"modules": names})
        gc.unfreeze()  # tests/conftest.py hides from `get_objects` what was there after the collection
        self._caches = [
            found
            for found in gc.get_objects()
            if isinstance(found, functools._lru_cache_wrapper) and found.__module__.startswith("ringfence")
        ]
        self._functions = [
            found
            for found in gc.get_objects()
            if isinstance(found, FunctionType) and found.__code__.co_filename == self._path
        ]
        gc.collect()
        gc.freeze()
        reached = self._measure(session)
        if reached is None:
            return True
        self._judge(session, *reached)
        return True

    def _forget(self) -> None:
        for cache in self._caches:
            cache.cache_clear()

    def _measure(self, session: pytest.Session) -> tuple[list[float], dict[str, list[int]]] | None:
        """How long each test takes, and which tests reach which function. In its own process: it fills caches."""
        reading, writing = os.pipe()

        def run() -> bool:
            durations, reached = [], dict[str, list[int]]()
            for number, item in enumerate(session.items):
                self._forget()
                touched: set[str] = set()
                self._watch(touched)
                begun = time.process_time()
                _run_item(item, None)
                durations.append(time.process_time() - begun)
                self._watch(None)
                for name in touched:
                    reached.setdefault(name, []).append(number)
            with os.fdopen(writing, "w") as out:
                json.dump([durations, reached], out)
            return bool(session.testsfailed)

        pid = _in_child(run, Limits(600, 600))
        status = None
        try:
            os.close(writing)
            with os.fdopen(reading) as answer:
                text = answer.read()
            _, status = os.waitpid(pid, 0)
        finally:
            if status is None:  # interrupted
                _end_group(pid)
                os.waitpid(pid, 0)
        if _verdict(status) != "survived":
            self._tell({"broken": "the tests fail without a mutant"})
            return None
        return cast("tuple[list[float], dict[str, list[int]]]", json.loads(text))

    def _watch(self, touched: set[str] | None) -> None:
        path = self._path

        def called(frame: FrameType, event: str, _: object) -> None:
            if event == "call" and frame.f_code.co_filename == path and touched is not None:
                touched.add(frame.f_code.co_qualname.partition(".<locals>")[0])

        sys.setprofile(called if touched is not None else None)
        threading.setprofile(called if touched is not None else None)

    def _judge(self, session: pytest.Session, durations: list[float], reached: dict[str, list[int]]) -> None:
        self._tell({"usual_s": sum(durations)})
        # How many mutants each test has killed, in memory that the forked processes share. Two that count at the same
        # moment may lose one, which changes an order and no verdict.
        kills = memoryview(mmap.mmap(-1, 4 * len(durations))).cast("I")

        def kills_per_s(test: int) -> float:
            return (kills[test] + 0.05) / (durations[test] + _TEST_OVERHEAD_S)

        def jobs() -> Iterator[tuple[int, Callable[[], bool], Limits]]:
            for number, mutant in enumerate(self._mutants):
                tests = reached.get(mutant.id.where, [])
                if not mutant.in_function or not tests:
                    self._tell({"number": number, "verdict": "import"})
                    continue
                tests = sorted(tests, key=kills_per_s, reverse=True)
                usual_s = sum(durations[test] for test in tests)
                work = functools.partial(self._fails, session, mutant, tests, durations, kills)
                yield number, work, Limits.of(usual_s)

        for number, verdict in run_all(jobs(), self._at_once):
            if verdict == "survived" and self._mutants[number].id.where in self._while_collecting:
                verdict = "import"
            self._tell({"number": number, "verdict": verdict})

    def _fails(
        self,
        session: pytest.Session,
        mutant: Mutant,
        tests: Sequence[int],
        durations: Sequence[float],
        kills: memoryview[int],
    ) -> bool:
        try:
            self._exchange(mutant)
        except ValueError:  # it closes over other names than before
            os._exit(_IMPORT_STATUS)
        self._forget()
        for test, following in zip(tests, [*tests[1:], None], strict=True):
            self._running = (kills, test)
            limit_further_cpu(Limits.of(durations[test]).cpu_s)
            _run_item(session.items[test], None if following is None else session.items[following])
        return bool(session.testsfailed)

    def failed(self) -> None:
        if self._running:
            kills, test = self._running
            kills[test] += 1
            os._exit(1)

    def _exchange(self, mutant: Mutant) -> None:
        changed = _codes_of(compile(mutant.text, self._path, "exec", dont_inherit=True), mutant.id.where)
        held = [one for one in self._functions if one.__code__.co_qualname == mutant.id.where]
        # A property's getter and setter share a name; their order is the same in both.
        order = sorted({one.__code__.co_firstlineno for one in held})
        for function in held:
            function.__code__ = changed[order.index(function.__code__.co_firstlineno)]


def limit_further_cpu(seconds: float) -> None:
    """Let this process use so much more, within the limit that it has: a loop without end is ended soon."""
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    wanted = int(time.process_time() + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (min(wanted, most), most))


def _run_item(item: pytest.Item, following: pytest.Item | None) -> None:
    item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)


def _codes_of(code: CodeType, name: str) -> list[CodeType]:
    found = [] if code.co_qualname != name else [code]
    for const in code.co_consts:
        if isinstance(const, CodeType) and "<locals>" not in const.co_qualname:
            found += _codes_of(const, name)
    return sorted(found, key=lambda one: one.co_firstlineno)


class _MutantLoader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: Path, text: str) -> None:
        super().__init__(name, str(path))
        self._text = text

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._text, self.path, "exec", dont_inherit=True)


class _MutantFinder(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, path: Path, text: str) -> None:
        self._name, self._path, self._text = name, path, text

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        return importlib.util.spec_from_loader(fullname, _MutantLoader(fullname, self._path, self._text))


# From outside ------------------------------------------------------------------------------------------------


def judge(
    module: str, mutants: Sequence[Mutant], tests: Sequence[str], at_once: int, log: Path
) -> Iterator[tuple[Mutant, Verdict]]:
    """The verdict on each mutant of a module, in no order. Raises BrokenTestsError."""
    path = PACKAGE / module
    name = "ringfence." + module.removesuffix(".py").replace("/", ".")
    reading, writing = os.pipe()

    def collected() -> bool:
        os.close(reading)
        _silence(log)
        # Interrupting the whole ends the processes of the mutants, too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        with os.fdopen(writing, "w", buffering=1) as out:

            def tell(what: Any) -> None:
                out.write(json.dumps(what) + "\n")

            tell({"status": int(pytest.main([*_OPTIONS, *tests], [_Mutating(path, mutants, at_once, tell)]))})
        return False

    pid = _in_child(collected, Limits(100_000, 100_000))
    os.close(writing)
    to_import: list[int] = []
    usual_s, status = 0.0, None
    try:
        with os.fdopen(reading) as answers:
            for line in answers:
                told = json.loads(line)
                if "verdict" not in told:
                    usual_s, status = told.get("usual_s", usual_s), told.get("status", status)
                    if "broken" in told:
                        status = 1
                        break
                    _preload(told.get("modules", ()))
                elif told["verdict"] == "import":
                    to_import.append(told["number"])
                else:
                    yield mutants[told["number"]], told["verdict"]
    finally:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
    if status != 0:
        raise BrokenTestsError(module)

    def fails(text: str) -> bool:
        _silence(log)
        sys.meta_path.insert(0, _MutantFinder(name, path, text))
        return pytest.main([*_OPTIONS, *tests], [_Quick()]) != 0

    limits = Limits.of(usual_s + 2)
    if to_import:  # without a mistake nothing may fail in this way either
        ((_, verdict),) = run_all([(0, functools.partial(fails, path.read_text()), limits)], 1)
        if verdict != "survived":
            raise BrokenTestsError(module)
    jobs = ((number, functools.partial(fails, mutants[number].text), limits) for number in to_import)
    for number, verdict in run_all(jobs, at_once):
        yield mutants[number], verdict


def _silence(log: Path) -> None:
    with log.open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)


def _preload(modules: Iterable[str]) -> None:
    """Import what the tests import of others, so that a process forked from here starts with it."""
    for name in modules:
        if name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
