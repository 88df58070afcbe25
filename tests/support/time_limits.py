"""A time limit for each test that also holds for asyncio: for its set-up, its call and its tear-down.

pytest-timeout raises its exception wherever the main thread is. In a callback of an event loop, asyncio catches that
exception, and the test hangs on. Here a thread watches instead, and ends what took too long in steps:

1. The task that the event loop runs for pytest is cancelled, again and again.
2. A task that suppresses that is abandoned, and its loop stopped.
3. Where the loop does not react, or none runs, a signal raises `Failed` in the main thread.
4. Where that fails as well, the process ends: xdist then reports that its worker crashed while it ran this test.
   faulthandler does this where C code never gives the GIL back.

The test fails, is named, and the stacks of all threads and tasks are printed. What hangs behind it in the same
tear-down is ended as well. So is what hangs when all tests are over: the tear-down of a fixture of the session, which
an interruption puts off until then, or a thread that the process waits for before it ends.

pytest-timeout still reads the settings: its option, its marker and `timeout` in pyproject.toml, which is the limit of a
call.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import pytest_timeout  # type: ignore[import-untyped]

RUNNING = "TESTS_RUNNING_DIR"
"""The environment variable that names a folder: there stands which test each process runs, and which ones hung."""
GRACE_S = 5.0
"""How long each step may take."""
SIGNALS = 5
"""How often `Failed` is raised in the main thread, within one step."""

AFTER_ALL = "the end of the run"
"""What is over its limit where no test is."""

_AGAIN_S = 1.0
"""How long a task that was cancelled has to clean up, before it is cancelled again."""
_abandoned: list[asyncio.Task[Any]] = []
"""Kept: to delete such a task would run its code once more."""


def add_settings(parser: pytest.Parser) -> None:
    """Limits besides those of pytest-timeout, for the settings file."""
    parser.addini("setup_timeout", "The limit of a test's set-up, in seconds", default="600")
    parser.addini("teardown_timeout", "The limit of a test's tear-down, in seconds", default="300")


@dataclass(eq=False)
class Phase:
    """The set-up, the call or the tear-down of one test; or the tear-down of what is left when all are over."""

    item: pytest.Item | None
    when: str
    limit_s: float
    ended: threading.Event = field(default_factory=threading.Event)
    report: str | None = None
    """What is said of it, once its time is over."""
    torn_down: int = 0
    """How many fixtures have ended in it."""

    @property
    def name(self) -> str:
        """Of the test."""
        return AFTER_ALL if self.item is None else self.item.nodeid

    def __post_init__(self) -> None:
        self.deadline_s = time.monotonic() + self.limit_s


class TimeLimits:
    """The plugin. One thread watches all phases of this process, one after the other."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._stderr = os.dup(2)
        """As it is while nothing is captured."""
        self._main = threading.main_thread().ident or 0
        self._phase: Phase | None = None
        self._changed = threading.Condition()
        worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
        folder = os.environ.get(RUNNING)
        self._running = Path(folder, f"running-{worker}-{os.getpid()}") if folder else None
        self._hung = Path(folder, f"hung-{worker}-{os.getpid()}") if folder else None
        self._session: pytest.Session | None = None
        self._finish = pytest.FixtureDef.finish
        pytest.FixtureDef.finish = self._finishing()  # type: ignore[method-assign] # no hook comes before it raises
        signal.signal(signal.SIGALRM, self._raise)
        threading.Thread(target=self._watch, name="time limits", daemon=True).start()

    # --- what pytest and pytest-timeout call ---

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Note which test runs, for whoever has to end this process."""
        if self._running is None:
            return (yield)
        self._running.parent.mkdir(parents=True, exist_ok=True)
        self._running.write_text(item.nodeid + "\n")
        try:
            return (yield)
        finally:
            self._running.unlink(missing_ok=True)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        with self._limited(item, "setup"):
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        # Its time begins and ends by the two hooks below.
        try:
            return (yield)
        finally:
            phase = item.stash.get(_CALL, None)
            if phase is not None:
                del item.stash[_CALL]
                self._end(phase)
                _fail_if_over(phase)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        with self._limited(item, "teardown"):
            return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_timeout_set_timer(self, item: pytest.Item, settings: Any) -> bool:
        """Instead of the timer of pytest-timeout, for the call."""
        item.stash[_CALL] = self._begin(item, "call", settings.timeout)
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_timeout_cancel_timer(self, item: pytest.Item) -> bool:
        phase = item.stash.get(_CALL, None)
        if phase is not None:
            self._end(phase)
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, object, object]:
        """A fixture whose set-up was cancelled has failed: tests that share it do not wait for it once more."""
        try:
            return (yield)
        except asyncio.CancelledError:
            phase = self._phase
            if phase is None or phase.report is None:
                raise
            failure = pytest.fail.Exception(phase.report, pytrace=False)
            fixturedef.cached_result = (None, fixturedef.cache_key(request), (failure, None))  # type: ignore[arg-type]
            raise failure from None

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, object, object]:
        """What is torn down here belongs to no test. Where it hangs, the summary still comes."""
        self._session = session
        # A process that only hands tests to workers of xdist has nothing to tear down but those, within a limit.
        hands_out = self._config.pluginmanager.hasplugin("dsession")
        phase = self._begin(None, "teardown", 0 if hands_out else self._limit_s("teardown"))
        try:
            return (yield)
        except (Exception, asyncio.CancelledError, pytest.fail.Exception):
            if phase.report is None:
                raise
            return None
        finally:
            self._end(phase)
            if phase.report is not None:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_unconfigure(self, config: pytest.Config) -> None:
        """The process ends now, unless a thread keeps it: Python waits for those that are no daemons, and for pools."""
        pytest.FixtureDef.finish = self._finish  # type: ignore[method-assign]
        faulthandler.cancel_dump_traceback_later()
        if self._session is not None and not hasattr(config, "workerinput"):  # xdist ends its workers
            threading.Thread(target=self._leave, name="time limits: end", daemon=True).start()

    # --- one phase ---

    @contextlib.contextmanager
    def _limited(self, item: pytest.Item, when: str) -> Iterator[None]:
        phase = self._begin(item, when, self._limit_s(when))
        try:
            yield
        finally:
            self._end(phase)
            _fail_if_over(phase)

    def _limit_s(self, when: str) -> float:
        if self._config.getoption("timeout", None) == 0:
            return 0
        return float(self._config.getini(f"{when}_timeout"))

    def _begin(self, item: pytest.Item | None, when: str, limit_s: float) -> Phase:
        phase = Phase(item, when, limit_s)
        if limit_s > 0 and not self._config.getoption("usepdb", False):
            with self._changed:
                self._phase = phase
                self._changed.notify()
            self._end_process_after(limit_s)
        return phase

    def _end(self, phase: Phase) -> None:
        with self._changed:
            if self._phase is phase:
                self._phase = None
                faulthandler.cancel_dump_traceback_later()
                self._changed.notify()
        phase.ended.set()

    def _end_process_after(self, limit_s: float) -> None:
        """Later than all other steps."""
        faulthandler.dump_traceback_later(limit_s + 5 * GRACE_S, exit=True, file=self._stderr)

    def _finishing(self) -> Any:
        """`FixtureDef.finish` with failures for cancellations: behind one of these pytest would tear down nothing."""
        finish = self._finish

        def finishing(fixture: pytest.FixtureDef[Any], request: Any) -> None:
            try:
                finish(fixture, request)
            except BaseException as error:
                phase = self._phase
                if phase is None or phase.report is None or not _is_cancelled(error):
                    raise
                raise pytest.fail.Exception(phase.report, pytrace=False) from None
            finally:
                if self._phase is not None:
                    self._phase.torn_down += 1

        return finishing

    def _raise(self, _: int, __: FrameType | None) -> None:
        """The handler of the signal: in the main thread, wherever that is."""
        phase = self._phase
        if phase is not None and phase.report is not None:
            raise pytest.fail.Exception(phase.report, pytrace=False)

    # --- the thread that watches ---

    def _watch(self) -> None:
        while True:
            with self._changed:
                phase = self._phase
                left_s = None if phase is None else phase.deadline_s - time.monotonic()
                if phase is None or left_s is None or left_s > 0:
                    self._changed.wait(left_s)
                    continue
            if pytest_timeout.is_debugging():
                faulthandler.cancel_dump_traceback_later()
                self._end(phase)
                continue
            self._interrupt(phase)

    def _interrupt(self, phase: Phase) -> None:
        """End a phase whose time is over, or this process."""
        loop = _Main(self._main).loop
        phase.report = (
            f"Timeout: {phase.when} of {phase.name} took longer than {phase.limit_s:g} s and was ended"
        )
        stacks = "\n".join(_stacks(loop))
        with contextlib.suppress(OSError):
            if self._hung is not None:
                self._hung.parent.mkdir(parents=True, exist_ok=True)
                with self._hung.open("a") as hung:
                    hung.write(phase.name + "\n")
        self._say(f"\n{phase.report}\n{stacks}\n")
        if phase.item is not None:
            phase.item.add_report_section(phase.when, "stacks", stacks)
        while True:
            torn_down = phase.torn_down
            self._end_process_after(0)
            if self._is_ended(phase):
                return
            if phase.torn_down == torn_down:
                break
            # What hung has ended, and something behind it hangs as well.
        self._say(f"\nNothing ended it: this process ends. {phase.report}\n")
        os._exit(1)

    def _is_ended(self, phase: Phase) -> bool:
        """Whether a phase is over after all steps. False as well where something else hangs in it by now."""
        main, torn_down = _Main(self._main), phase.torn_down
        if main.cancel(phase) and phase.ended.wait(GRACE_S):
            return True
        if phase.torn_down != torn_down:
            return False
        if main.reacts and main.abandon(phase) and phase.ended.wait(GRACE_S):
            return True
        for _ in range(SIGNALS):
            if phase.torn_down != torn_down:
                return False
            signal.pthread_kill(self._main, signal.SIGALRM)
            if phase.ended.wait(GRACE_S / SIGNALS):
                return True
        return main.reacts and main.abandon(phase) and phase.ended.wait(GRACE_S)

    def _leave(self) -> None:
        """End this process where it does not end by itself. Nothing is left to tear down."""
        time.sleep(4 * GRACE_S)
        status = self._session.exitstatus if self._session is not None else 1
        self._say(
            f"\nA thread is left that this process waits for: it ends.\n{chr(10).join(_stacks(None))}\n"
        )
        os._exit(int(status))

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            os.write(self._stderr, text.encode(errors="backslashreplace"))


_CALL = pytest.StashKey[Phase]()


def _fail_if_over(phase: Phase) -> None:
    """Raises Failed in place of whatever the phase ended with."""
    if phase.report is not None and not isinstance(sys.exc_info()[1], KeyboardInterrupt):
        raise pytest.fail.Exception(phase.report, pytrace=False) from None


def _is_cancelled(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(map(_is_cancelled, error.exceptions))
    return isinstance(error, asyncio.CancelledError)


class _Main:
    """What the main thread runs: an event loop and the task for which it runs, if any."""

    def __init__(self, thread: int) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._answered = threading.Event()
        for frame in _frames(sys._current_frames().get(thread)):
            if frame.f_code is _RUN_UNTIL_COMPLETE:
                self.loop, task = frame.f_locals["self"], frame.f_locals.get("future")
                self._task = task if isinstance(task, asyncio.Task) else None
                return

    @property
    def reacts(self) -> bool:
        """Whether the loop has run a callback since."""
        return self._answered.is_set()

    def cancel(self, phase: Phase) -> bool:
        """Cancel the task until it ends. False where there is none."""
        loop, task = self.loop, self._task
        if loop is None or task is None:
            return False

        def again() -> None:
            self._answered.set()
            if not phase.ended.is_set() and not task.done() and task not in _abandoned:
                task.cancel(phase.report)
                loop.call_later(_AGAIN_S, again)

        return _called(loop, again)

    def abandon(self, phase: Phase) -> bool:
        """Stop the loop without the task, which never runs again."""
        loop, task = self.loop, self._task
        if loop is None or task is None:
            return False

        def leave() -> None:
            if phase.ended.is_set() or task.done():  # another one may run in the loop by now
                return
            _abandoned.append(task)
            _forget(loop, task)
            loop.stop()

        return _called(loop, leave)


_RUN_UNTIL_COMPLETE: CodeType = asyncio.BaseEventLoop.run_until_complete.__code__


def _called(loop: asyncio.AbstractEventLoop, callback: Any) -> bool:
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:  # closed meanwhile
        return False
    return True


def _forget(loop: Any, task: asyncio.Task[Any]) -> None:
    """Nothing wakes this task any more, and nobody waits for its end (`asyncio.Runner.close` would)."""
    waits_for: Any = getattr(task, "_fut_waiter", None)
    for callback, _ in list(getattr(waits_for, "_callbacks", None) or ()):
        if getattr(callback, "__self__", None) is task:
            waits_for.remove_done_callback(callback)
    for handle in list(loop._ready):
        if getattr(handle._callback, "__self__", None) is task:
            handle.cancel()
    asyncio.tasks._unregister_task(task)


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _stacks(loop: asyncio.AbstractEventLoop | None) -> Iterable[str]:
    """The stacks of all threads, and of all tasks of a loop, down to what each awaits."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            yield f"--- thread {names.get(ident, ident)}"
            yield "".join(traceback.format_stack(frame)).rstrip()
    for task in asyncio.all_tasks(loop) if loop is not None else ():
        yield f"--- task {task.get_name()}"
        yield from _awaited(task.get_coro())


def _awaited(awaitable: Any) -> Iterator[str]:
    while awaitable is not None:
        frame = next(
            (f for name in ("cr_frame", "gi_frame", "ag_frame") if (f := getattr(awaitable, name, None))),
            None,
        )
        if frame is None:
            yield f"  {awaitable!r}"
            return
        yield f'  File "{frame.f_code.co_filename}", line {frame.f_lineno}, in {frame.f_code.co_name}'
        awaitable = next(
            (a for name in ("cr_await", "gi_yieldfrom", "ag_await") if (a := getattr(awaitable, name, None))),
            None,
        )
