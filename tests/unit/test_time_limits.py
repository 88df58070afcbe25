"""Tests that hang on purpose, in runs of pytest of their own: each ends, fails, and is named."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.time_limits import AFTER_ALL, RUNNING

ROOT = Path(__file__).parents[2]
WITHIN_S = 90

SETTINGS = """
[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = session
asyncio_default_test_loop_scope = session
timeout = 0.4
timeout_func_only = true
setup_timeout = 0.4
teardown_timeout = 0.4
"""
CONFTEST = """
from tests.support import time_limits

time_limits.GRACE_S = 1.0
time_limits._AGAIN_S = 0.2


def pytest_addoption(parser):
    time_limits.add_settings(parser)


def pytest_configure(config):
    config.pluginmanager.register(time_limits.TimeLimits(config))
"""
HANGING = """
import asyncio
import threading
import time

import pytest


async def test_awaits_for_ever():
    await asyncio.Event().wait()


async def test_swallows_exceptions():
    while True:
        try:
            await asyncio.sleep(3600)
        except Exception:
            pass


async def test_swallows_its_cancellation():
    while True:
        try:
            await asyncio.sleep(3600)
        except BaseException:
            pass


async def test_swallows_all_and_never_rests():
    while True:
        try:
            await asyncio.sleep(0)
        except BaseException:
            pass


async def test_ends_well_once_it_is_cancelled():
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        pass


async def test_waits_while_the_loop_is_busy_with_callbacks():
    loop, going = asyncio.get_running_loop(), [True]

    def again():
        if going:
            loop.call_soon(again)

    again()
    try:
        await asyncio.Event().wait()
    finally:
        going.clear()


async def test_never_awaits():
    while True:
        pass


async def test_blocks_the_loop_in_a_callback():
    asyncio.get_running_loop().call_soon(time.sleep, 3600)
    await asyncio.Event().wait()


async def test_blocks_the_loop_with_a_lock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def test_sleeps():
    time.sleep(3600)


def test_runs_a_loop_of_its_own():
    asyncio.run(asyncio.sleep(3600))


@pytest.fixture
async def hanging_setup():
    await asyncio.Event().wait()


def test_with_a_set_up_that_hangs(hanging_setup):
    pass


@pytest.fixture
async def hanging_teardown():
    yield
    await asyncio.Event().wait()


async def test_with_a_tear_down_that_hangs(hanging_teardown):
    pass


@pytest.fixture
def sleeping_teardown():
    yield
    time.sleep(3600)


def test_with_a_tear_down_that_sleeps(sleeping_teardown):
    pass


@pytest.mark.timeout(0.8)
async def test_with_a_limit_of_its_own():
    await asyncio.Event().wait()


async def test_within_its_limit():
    await asyncio.sleep(0)
"""
STUBBORN = """
import itertools
import time


def test_before():
    pass


def test_swallows_everything():
    while True:
        try:
            time.sleep(3600)
        except BaseException:
            pass


def test_between():
    pass


def test_never_leaves_c_code():
    sum(itertools.repeat(0))


def test_after():
    pass
"""
LEFT = """
import asyncio
import threading

import pytest


@pytest.fixture(scope="session")
async def last():
    yield
    print("the last one is torn down")


@pytest.fixture(scope="session")
async def shared(last):
    yield
    await asyncio.Event().wait()


@pytest.fixture
async def inner():
    yield
    print("the inner one is torn down")


@pytest.fixture
async def hanging(inner):
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.Event().wait())
        yield


@pytest.fixture(scope="session")
async def never_there():
    await asyncio.Event().wait()


async def test_needs_what_never_comes(never_there):
    pass


async def test_needs_it_too(never_there):
    pass


async def test_leaves_a_thread():
    await asyncio.to_thread(threading.Event().wait)


async def test_leaves_two(shared, hanging):
    pass
"""
FAILING = """
import asyncio

import pytest


@pytest.fixture(scope="session")
async def shared():
    yield
    await asyncio.Event().wait()


async def test_fails(shared):
    assert False


async def test_after(shared):
    pass
"""


def run(folder: Path, code: str, *options: str, **more: str) -> str:
    """The output of a run of this code, which fails."""
    (folder / "pytest.ini").write_text(SETTINGS)
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(code)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment.pop(RUNNING, None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", *options],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT)} | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=WITHIN_S,
    )
    assert done.returncode == 1, done.stdout
    return done.stdout


def outcomes(said: str) -> dict[str, set[str]]:
    """From the summary: what became of each test."""
    found: dict[str, set[str]] = {}
    for outcome, name in re.findall(r"^(PASSED|FAILED|ERROR) test_it\.py::(\w+)", said, re.MULTILINE):
        found.setdefault(name, set()).add(outcome)
    return found


@pytest.mark.parametrize("options", [(), ("-n", "2", "--dist", "loadfile")], ids=["alone", "xdist"])
def test_hanging_test_fails_by_name_and_the_rest_runs(tmp_path: Path, options: tuple[str, ...]) -> None:
    hung = tmp_path / "running"
    said = run(tmp_path, HANGING, *options, **{RUNNING: str(hung)})
    names = re.findall(r"^(?:async )?def (test_\w+)", HANGING, re.MULTILINE)
    expected = {name: {"FAILED"} for name in names} | {
        "test_within_its_limit": {"PASSED"},
        "test_with_a_set_up_that_hangs": {"ERROR"},
        "test_with_a_tear_down_that_hangs": {"PASSED", "ERROR"},
        "test_with_a_tear_down_that_sleeps": {"PASSED", "ERROR"},
    }
    assert outcomes(said) == expected, said
    for name in names:
        if name != "test_within_its_limit":
            assert re.search(rf"Timeout: \w+ of test_it\.py::{name} took longer than 0\.[48] s", said), name
    assert "--- thread MainThread" in said
    assert "in hanging_setup" in said, "the stacks of tasks"
    named = {line for file in hung.glob("hung-*") for line in file.read_text().splitlines()}
    assert named == {f"test_it.py::{name}" for name in names if name != "test_within_its_limit"}
    assert not list(hung.glob("running-*"))


def test_unkillable_test_ends_its_worker_and_the_rest_runs(tmp_path: Path) -> None:
    said = run(tmp_path, STUBBORN, "-n", "2", "--max-worker-restart", "3")
    assert outcomes(said) == {
        "test_before": {"PASSED"},
        "test_swallows_everything": {"FAILED"},
        "test_between": {"PASSED"},
        "test_never_leaves_c_code": {"FAILED"},
        "test_after": {"PASSED"},
    }, said
    for name in ("test_swallows_everything", "test_never_leaves_c_code"):
        assert re.search(rf"crashed while running '?test_it\.py::{name}", said), said
        assert f"in {name}\n" in said, "its stack"


def test_without_workers_what_nothing_ends_ends_the_run_by_name(tmp_path: Path) -> None:
    running = tmp_path / "running"
    said = run(tmp_path, STUBBORN, "-k", "swallows", **{RUNNING: str(running)})
    assert "this process ends. Timeout: call of test_it.py::test_swallows_everything took longer" in said
    assert [file.read_text() for file in running.glob("running-*")] == [
        "test_it.py::test_swallows_everything\n"
    ]


def test_hang_after_a_hang_ends_too(tmp_path: Path) -> None:
    """In one tear-down, in a set-up that several tests share, and in a thread that Python waits for at its end."""
    said = run(tmp_path, LEFT, "-s")
    assert outcomes(said) == {
        "test_needs_what_never_comes": {"ERROR"},
        "test_needs_it_too": {"ERROR"},
        "test_leaves_a_thread": {"FAILED"},
        "test_leaves_two": {"PASSED", "ERROR"},
    }, said
    assert said.count("took longer than 0.4 s and was ended\n--- thread") == 3, (
        "of what was never there, once"
    )
    assert "the inner one is torn down" in said
    assert "the last one is torn down" in said
    assert "A thread is left that this process waits for" in said


def test_hang_after_the_last_test_ends_with_a_summary(tmp_path: Path) -> None:
    """An interruption ends the run before what the tests share is torn down."""
    hung = tmp_path / "running"
    said = run(tmp_path, FAILING, "--maxfail", "1", **{RUNNING: str(hung)})
    assert outcomes(said) == {"test_fails": {"FAILED", "ERROR"}}, said
    assert "Timeout: teardown of test_it.py::test_fails took longer than 0.4 s" in said
    again = run(tmp_path, FAILING.replace("assert False", "raise KeyboardInterrupt"))
    assert f"Timeout: teardown of {AFTER_ALL} took longer than 0.4 s" in again
    assert "no tests ran in" in again, "the summary"
