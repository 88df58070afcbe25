"""What a service makes of the process that it runs in."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from ringfence.kernel.base.log_limiter import FIRST

SERVICE = """
import resource
from types import SimpleNamespace

from ringfence.kernel.service.process import run

hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))


class Service:
    role = "policy"

    async def run(self, stop):
        print("core", *resource.getrlimit(resource.RLIMIT_CORE))


print("before", *resource.getrlimit(resource.RLIMIT_CORE))
run([Service()], SimpleNamespace(log_format="json", log_level="info"))
"""


ASKED_TWICE = """
import os, signal
from types import SimpleNamespace

from ringfence.kernel.service.process import run


class Service:
    role = "policy"

    async def run(self, stop):
        os.kill(os.getpid(), signal.SIGTERM)
        await stop.wait()


status = run([Service()], SimpleNamespace(log_format="json", log_level="info"))
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    os.kill(os.getpid(), number)
raise SystemExit(status)
"""


HELD = """
import asyncio, os, signal, sys, threading
from types import SimpleNamespace

from ringfence.kernel.service.process import run


class Service:
    role = "policy"

    async def run(self, stop):
        asyncio.get_running_loop().run_in_executor(None, threading.Event().wait)
        if sys.argv[1] == "fails":
            raise RuntimeError("it broke\\x1b[2J\\u202e\\nRuntimeError: not this one")


class Ended:
    def __init__(self):
        threading.Thread(target=self.tell, daemon=True).start()

    def tell(self):
        while signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            pass
        print("ended", flush=True)


Ended()
raise SystemExit(run([Service()], SimpleNamespace(log_format="json", log_level="info")))
"""


FLOODED = """
import logging
from types import SimpleNamespace

from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.service.process import run


class Service:
    role = "policy"

    async def run(self, stop):
        for number in range(100):
            logging.getLogger("ringfence").warning("bad record %d", number, extra=rate_limited("heartbeat"))


run([Service()], SimpleNamespace(log_format="json", log_level="info"))
"""


def test_a_flood_of_one_kind_is_a_few_lines_of_its_log_and_what_is_left_out_is_told_at_the_end() -> None:
    done = subprocess.run([sys.executable, "-c", FLOODED], check=True, capture_output=True, timeout=60)
    told = [json.loads(line)["event"] for line in done.stderr.splitlines()]
    assert told[:FIRST] == [f"bad record {number}" for number in range(FIRST)]
    (last,) = told[FIRST:]
    assert last.startswith(f"left out {100 - FIRST} like these")
    assert last.endswith("bad record 99")


def test_second_stop_signal_during_exit_ends_cleanly() -> None:
    done = subprocess.run([sys.executable, "-c", ASKED_TWICE], check=False, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(("how", "status", "says"), [("well", 0, ""), ("fails", 1, "RuntimeError: it broke")])
def test_a_thread_that_hangs_does_not_hold_what_has_ended(how: str, status: int, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELD, how], check=False, capture_output=True, timeout=60, text=True
    )
    assert done.returncode == status
    assert says in done.stderr
    assert not {"\x1b", "\u202e"} & set(done.stderr), "nothing acts upon a terminal"
    assert "\nRuntimeError: not this one" not in done.stderr, "nor begins a line that is not its own"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_second_stop_signal_does_not_wait_for_threads(signum: signal.Signals) -> None:
    script = HELD.replace(
        "kernel.process import run", "kernel import process; process.HELD_S = 3600; run = process.run"
    )
    with subprocess.Popen([sys.executable, "-c", script, "well"], stdout=subprocess.PIPE, text=True) as held:
        assert held.stdout is not None
        assert held.stdout.readline() == "ended\n"
        held.send_signal(signum)
        assert held.wait(60) == 0


def test_a_crash_leaves_no_copy_of_the_key() -> None:
    done = subprocess.run([sys.executable, "-c", SERVICE], check=True, capture_output=True, timeout=60)
    _, core = done.stdout.decode().splitlines()
    assert core.split()[:2] == ["core", "0"]
