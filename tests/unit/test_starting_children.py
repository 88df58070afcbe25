"""How long the parts of a local stack may take to start, and what is said of one that does not."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from ringfence.dev.processes import (
    LOOPBACK,
    MOST_PATIENCE,
    Patience,
    StackError,
    free_port,
    run_delays,
    spawn,
)
from ringfence.dev.stack import readiness

SLEEPS = [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(600)"]


class Machine:
    """A clock, and how long threads waited for a processor, as the test wants them."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.waited_s = {7: 50.0}

    def patience(self, limit_s: float) -> Patience:
        return Patience(limit_s, lambda: (1,), clock=lambda: self.now_s, delays=self._delays)

    def over(self, patience: Patience) -> bool:
        return patience.over

    def _delays(self, pids: Iterable[int]) -> Mapping[int, float]:
        assert tuple(pids) == (1,)
        return self.waited_s

    def passes(self, s: float, *, waiting: float = 0.0, thread: int = 7) -> None:
        self.now_s += s
        self.waited_s = {**self.waited_s, thread: self.waited_s.get(thread, 0.0) + waiting}


def test_on_an_idle_machine_the_limit_is_the_clocks() -> None:
    machine = Machine()
    patience = machine.patience(60)
    machine.passes(60)
    assert not machine.over(patience)
    machine.passes(1)
    assert machine.over(patience)
    assert patience.spent == "60 s"


def test_time_waiting_for_a_processor_extends_the_limit() -> None:
    machine = Machine()
    patience = machine.patience(60)
    machine.passes(300, waiting=290)
    assert not machine.over(patience)
    machine.passes(51)  # nobody waits any more, and still it does not start
    assert machine.over(patience)
    assert patience.spent == "60 s, besides 290 s of waiting for a processor"


def test_waiting_that_came_before_and_of_two_at_once_counts_once() -> None:
    machine = Machine()
    machine.passes(500, waiting=500)
    patience = machine.patience(60)
    machine.passes(30, waiting=30)
    machine.passes(0, waiting=30, thread=8)
    machine.passes(31)
    assert not machine.over(patience)
    machine.waited_s = {}  # their threads ended: what they waited stays waited
    machine.passes(30)
    assert machine.over(patience)
    assert patience.delayed_s == 30


def test_waiting_for_a_processor_is_bounded() -> None:
    machine = Machine()
    patience = machine.patience(60)
    machine.passes(60 * MOST_PATIENCE, waiting=60 * MOST_PATIENCE)
    assert not machine.over(patience)
    machine.passes(1, waiting=1)
    assert machine.over(patience)


@pytest.mark.skipif(sys.platform != "linux", reason="known on Linux alone")
def test_the_waiting_of_every_thread_is_known() -> None:
    found = run_delays([os.getpid(), 2**22 + 1])  # the second is no process
    assert os.getpid() in found
    assert all(delay_s >= 0 for delay_s in found.values())


def test_failed_start_names_reason_and_log(tmp_path: Path) -> None:
    machine = Machine()

    def ready() -> bool:
        machine.passes(61 if "ready" in child.log_tail() else 0)
        return False

    child = spawn("policy", SLEEPS, log_path=tmp_path / "policy.log")
    try:
        with pytest.raises(StackError) as failed:
            child.wait_until(ready, 60, "was ready", why=lambda: "no bundle", patience=machine.patience(60))
    finally:
        child.kill()
    assert str(failed.value) == (
        "policy runs, but took more than 60 s until it was ready. It says: no bundle. "
        f"Its log is {tmp_path}/policy.log and ends with:\nready"
    )


def test_readiness_at_the_last_check_counts(tmp_path: Path) -> None:
    machine = Machine()
    looks = iter([False, True])

    def ready() -> bool:
        machine.passes(61)  # an answer takes long on a busy machine
        return next(looks)

    child = spawn("policy", SLEEPS, log_path=tmp_path / "policy.log")
    try:
        child.wait_until(ready, 60, "was ready", patience=machine.patience(60))
    finally:
        child.kill()


def test_a_service_says_why_it_is_not_ready() -> None:
    answers = [(503, b'{"reasons": ["no trust bundle", "no table"]}'), (503, b"<html>"), (200, b"{}")]

    class Service(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    port = free_port()
    assert readiness(port) == f"/readyz on port {port} does not answer"
    with ThreadingHTTPServer((LOOPBACK, port), Service) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        assert readiness(port) == "no trust bundle; no table"
        assert readiness(port) == f"/readyz on port {port} answers 503"
        assert readiness(port) is None
        server.shutdown()
