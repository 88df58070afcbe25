"""`ringfence demo` and `ringfence dev` as a new user sees them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

RINGFENCE = [sys.executable, "-m", "ringfence.cli.main"]
WITHIN_S = 300

STEPS = [
    "bypass.asked",
    "bypass.succeeded",
    "bypass.closed",
    "task.assigned",
    "credential.requested",
    "approval.requested",
    "approval.given",
    "credential.issued",
    "credential.verified",
    "request.refused",
    "credential.released",
    "lease.expired",
    "audit.traced",
]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RINGFENCE_")}


@pytest.mark.timeout(600)
def test_the_demo_tells_the_whole_story(tmp_path: Path) -> None:
    done = subprocess.run(
        [*RINGFENCE, "demo", "--json"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [step["step"] for step in told] == STEPS
    by_name = {step["step"]: step for step in told}
    assert by_name["bypass.succeeded"]["build"] == "build-421"
    assert any(side.startswith("entitlements:maria") for side in by_name["request.refused"]["sides"])
    assert by_name["lease.expired"]["late_ms"] >= 0
    assert by_name["credential.issued"]["lease"] == by_name["credential.released"]["lease"]
    assert by_name["credential.issued"]["lease"] != by_name["lease.expired"]["lease"]
    story = json.dumps(by_name["audit.traced"]["trace"])
    assert "maria" in story
    assert "sam" in story
    assert not list(tmp_path.iterdir()), "the demo leaves nothing behind"


@pytest.mark.timeout(600)
def test_a_step_that_fails_is_said_in_a_line_and_ends_with_1(tmp_path: Path) -> None:
    with subprocess.Popen(
        [*RINGFENCE, "demo", "--json"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as demo:
        assert demo.stdout is not None
        assert any(json.loads(line)["step"] == "bypass.closed" for line in demo.stdout)
        for process in descendants(demo.pid):
            if "ringfence.dev.demo_target" in process.cmdline():
                process.kill()
        _, said = demo.communicate(timeout=WITHIN_S)
    assert demo.returncode == 1
    assert "the platform at http://127.0.0.1:" in said
    assert "Traceback" not in said


def start_dev(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*RINGFENCE, "dev", "--free-ports", *options],
        cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_until_up(process: subprocess.Popen[str]) -> str:
    """The output up to where it says that it is up and ends with Ctrl-C."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "Ctrl-C ends everything" in line:
            return "".join(said)
    raise AssertionError("dev ended early:\n" + "".join(said))


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=WITHIN_S)
    return not alive


@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_dev_leaves_no_process_behind(tmp_path: Path, how: signal.Signals) -> None:
    process = start_dev(tmp_path)
    try:
        said = wait_until_up(process)
        assert "inventory" in said, "it says what to try"
        children = descendants(process.pid)
        assert len(children) >= 8, "broker, Valkey and six services"
        listed = subprocess.run(
            [*RINGFENCE, "--identity", ".ringfence/users/olga.json", "inventory", "--json"],
            cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=WITHIN_S,
        )  # fmt: skip
        assert listed.returncode == 0, listed.stderr
        assert "deploy-bot" in listed.stdout
        process.send_signal(how)
        process.wait(WITHIN_S)
        assert gone(children)
    finally:
        process.kill()


@pytest.mark.timeout(600)
def test_dev_uses_nothing_that_others_left_where_it_starts(tmp_path: Path) -> None:
    """Neither settings, for itself or its services, nor modules of Python."""
    (tmp_path / "ringfence.toml").write_text(
        'kafka_security_protocol = "SASL_PLAINTEXT"\nkafka_sasl_username = "x"\n'
        f'kafka_sasl_password = "file:{tmp_path}/k"\n'
    )
    for module in ("orjson", "typer", "uvloop"):
        (tmp_path / f"{module}.py").write_text('raise SystemExit("a planted module was run")\n')
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "ringfence.cli.main", "dev", "--free-ports", "--no-seed"],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        said = wait_until_up(process)
        assert said.count("ignored the settings file") == 1
        assert "export RINGFENCE_CONFIG=.ringfence" not in said
        assert f"export RINGFENCE_CONFIG={tmp_path / '.ringfence/ringfence.toml'}" in said
        process.terminate()
        assert process.wait(WITHIN_S) == 0
    finally:
        process.kill()


@pytest.mark.timeout(600)
def test_one_stack_a_folder_and_the_next_start_has_the_same_keys(tmp_path: Path) -> None:
    first = start_dev(tmp_path)
    try:
        wait_until_up(first)
        settings = (tmp_path / ".ringfence/ringfence.toml").read_text()
        second = start_dev(tmp_path)
        said, _ = second.communicate(timeout=WITHIN_S)
        assert second.returncode == 1
        assert said.count("\n") == 1
        assert "Another stack runs in" in said
        assert (tmp_path / ".ringfence/ringfence.toml").read_text() == settings
        assert first.poll() is None
    finally:
        first.kill()
    first.wait(WITHIN_S)

    again = start_dev(tmp_path, "--no-seed")
    try:
        wait_until_up(again)
        root = next(line for line in settings.splitlines() if line.startswith("trust_root"))
        assert root in (tmp_path / ".ringfence/ringfence.toml").read_text()
        again.terminate()
        assert again.wait(WITHIN_S) == 0, "ending it is its usual end"
    finally:
        again.kill()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", ["noida-db", "valkey-server"])
def test_dev_ends_and_says_so_where_a_part_of_it_ends(tmp_path: Path, part: str) -> None:
    process = start_dev(tmp_path, "--no-seed")
    try:
        wait_until_up(process)
        children = descendants(process.pid)
        (server,) = (child for child in children if part in child.name())
        server.kill()
        said, _ = process.communicate(timeout=WITHIN_S)
        assert process.returncode == 1
        assert f"({part}) ended with status -9" in said
        assert gone(children)
    finally:
        process.kill()


@pytest.mark.timeout(600)
def test_dev_says_which_service_did_not_end_in_good_order(tmp_path: Path) -> None:
    process = start_dev(tmp_path, "--no-seed")
    try:
        wait_until_up(process)
        children = descendants(process.pid)
        (policy,) = (child for child in children if child.cmdline()[-1] == "policy")
        policy.suspend()  # it hears of nothing any more
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=WITHIN_S)
        assert process.returncode == 1
        assert "policy did not end in good order: status -9" in " ".join(said.split())
        assert "registry did not end" not in said
        assert gone(children)
    finally:
        process.kill()


@pytest.mark.timeout(600)
def test_dev_can_be_interrupted_while_it_starts(tmp_path: Path) -> None:
    process = start_dev(tmp_path, "--state", "elsewhere")
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "starting Valkey" in line:
                break
        children = descendants(process.pid)
        assert children, "the broker at least"
        process.send_signal(signal.SIGINT)
        assert process.wait(WITHIN_S) == 130
        assert "Ringfence is up" not in process.stdout.read()
        assert gone(children)
    finally:
        process.kill()


@pytest.mark.timeout(600)
def test_a_busy_port_has_a_one_line_remedy(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 8701))
            taken.listen()
        except OSError:
            pass  # somebody else has it: as good for this test
        done = subprocess.run(
            [*RINGFENCE, "dev"],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=WITHIN_S,
        )
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "8701" in line
    assert "--free-ports" in line
