"""`ringfence demo` and `ringfence dev` as a new user sees them."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
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


class Terminal:
    """A program in a pseudo-terminal of 80 columns."""

    def __init__(self, argv: list[str], folder: Path) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        unsized = {name: value for name, value in environment().items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            argv, cwd=folder, env={**unsized, "TERM": "xterm"}, stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        self._told = b""

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def read_until(self, word: str | None) -> str:
        """All that it printed so far, once that contains a word; None: once it has ended."""
        while word is None or word.encode() not in self._told:
            try:
                part = os.read(self._ours, 65_536)
            except OSError:  # the program has ended, and closed the terminal
                part = b""
            if not part:
                assert word is None, self._told.decode()
                break
            self._told += part
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._told.decode()).replace("\r", "")

    def lines(self) -> list[str]:
        """The lines as they stand in the end, without what was written over."""
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._told.decode())
        return [line.rpartition("\r")[2] for line in text.split("\r\n")]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.mark.timeout(600)
def test_in_the_demo_a_no_shows_the_denial_and_its_trail(tmp_path: Path) -> None:
    terminal = Terminal([*RINGFENCE, "demo", "--interactive"], tmp_path)
    try:
        terminal.read_until("[y/N] ")
        terminal.type("n\n")
        told = terminal.read_until(None)
        assert terminal.process.wait(WITHIN_S) == 0, told
        after = told.partition("[y/N] ")[2]
        assert [step for step in [*STEPS, "approval.denied"] if f" {step} " in after] == [
            "request.refused",
            "audit.traced",
            "approval.denied",
        ]
        trail = after[after.index("audit.traced") :]
        assert re.search(r"denied by sam|sam denied", trail), trail
        assert "refused" in trail
        assert "maria" in trail
        assert "Next:" in trail
    finally:
        terminal.kill()


@pytest.mark.timeout(600)
def test_in_the_demo_a_yes_tells_the_whole_story(tmp_path: Path) -> None:
    terminal = Terminal([*RINGFENCE, "demo", "--interactive", "--json"], tmp_path)
    try:
        terminal.read_until("[y/N] ")
        terminal.type("y\n")
        told = terminal.read_until(None)
        assert terminal.process.wait(WITHIN_S) == 0, told
        assert re.findall(r'\{"step": "([a-z.]+)"', told) == STEPS
    finally:
        terminal.kill()


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
def test_killed_dev_leaves_no_process_behind(tmp_path: Path) -> None:
    process = start_dev(tmp_path)
    try:
        said = wait_until_up(process)
        assert "deploy-bot" in said, "it says what was made"
        assert "Made now, and kept for the next start" in said
        children = descendants(process.pid)
        assert len(children) >= 8, "broker, Valkey and six services"
        listed = subprocess.run(
            [*RINGFENCE, "--identity", ".ringfence/users/olga.json", "inventory", "--json"],
            cwd=tmp_path, env=environment() | {"RINGFENCE_CONFIG": ".ringfence/ringfence.toml"}, capture_output=True,
            text=True, timeout=WITHIN_S,
        )  # fmt: skip
        assert listed.returncode == 0, listed.stderr
        assert "deploy-bot" in listed.stdout
        process.kill()
        process.wait(WITHIN_S)
        assert gone(children)
    finally:
        process.kill()


def commands_in(said: list[str]) -> list[str]:
    """Every command that is printed: after two spaces, with the lines that a backslash continues."""
    commands, open = list[str](), False
    for line in said:
        if open:
            commands[-1] += "\n" + line
        elif line.startswith(("  cd ", "  ringfence ")):
            commands.append(line)
        else:
            continue
        open = line.endswith("\\")
    return commands


class Shell:
    """A bash of somebody who opened another terminal: in another folder, without a virtual environment."""

    def __init__(self, folder: Path) -> None:
        plain = {"HOME": str(folder), "PATH": os.defpath, "TERM": "dumb", "LANG": "C.UTF-8"}
        self._bash = subprocess.Popen(
            ["/bin/bash", "--noprofile", "--norc"], cwd="/", env=plain, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def __call__(self, command: str) -> str:
        """Run a command exactly as it is. Returns what it printed; the test fails if its status is not 0."""
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        self._bash.stdin.write(f"{command}\necho '## status' $?\n")
        self._bash.stdin.flush()
        printed = ""
        for line in self._bash.stdout:
            if line.startswith("## status"):
                assert line == "## status 0\n", (command, printed)
                return printed
            printed += line
        raise AssertionError(f"the shell ended: {printed}")

    def kill(self) -> None:
        self._bash.kill()


@pytest.mark.timeout(600)
def test_all_that_dev_prints_fits_80_columns_and_each_command_works_as_it_is_printed(tmp_path: Path) -> None:
    terminal, shell = Terminal([*RINGFENCE, "dev", "--free-ports"], tmp_path), Shell(tmp_path)
    try:
        lines = terminal.read_until("Ctrl-C ends everything").splitlines()
        assert [
            line for line in lines if len(line) > 80 and not line.startswith(("  cd ", "  http://localhost:"))
        ] == []
        commands = commands_in(lines)
        assert len(commands) == 7

        source, read, deploy, waiting, *looks = commands
        assert shell(source) == ""
        assert "platform:read:env/staging/web" in shell(read)
        assert deploy.endswith(" &")
        shell(deploy)
        pending = list[dict[str, str]]()
        while not pending:  # a person takes longer to type the next command
            shell("ringfence approvals list --json > pending.json")
            pending = json.loads((tmp_path / "pending.json").read_text())
        (request,) = pending
        assert "roll out" in shell(waiting)
        shell(f"ringfence approvals approve --yes {request['request_id']}")
        shell("wait")
        for look in looks:
            assert "deploy-bot" in shell(look), look
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(WITHIN_S) == 0
    finally:
        shell.kill()
        terminal.kill()


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
        assert f"  cd {tmp_path} && source .ringfence/dev.sh\n" in said
        shell = (tmp_path / ".ringfence/dev.sh").read_text()
        assert f"export RINGFENCE_CONFIG={tmp_path / '.ringfence/ringfence.toml'}\n" in shell
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


def command(folder: Path, *arguments: str) -> str:
    """What a command of the operator prints on the stack of a folder."""
    called = subprocess.run(
        [*RINGFENCE, "--identity", ".ringfence/users/olga.json", *arguments],
        cwd=folder, env=environment() | {"RINGFENCE_CONFIG": ".ringfence/ringfence.toml"}, capture_output=True,
        text=True, timeout=WITHIN_S,
    )  # fmt: skip
    assert called.returncode == 0, called.stderr
    return called.stdout


@pytest.mark.timeout(600)
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_dev_keeps_what_was_added_unless_it_was_killed(tmp_path: Path, end: signal.Signals) -> None:
    started: list[subprocess.Popen[str]] = []
    try:
        started.append(start_dev(tmp_path))
        first = wait_until_up(started[-1])
        command(tmp_path, "user", "add", "zoe", "--name", "Zoe")
        children = descendants(started[-1].pid)
        started[-1].send_signal(end)
        started[-1].wait(WITHIN_S)
        assert gone(children)
        kept = end == signal.SIGTERM
        started.append(start_dev(tmp_path))
        again = wait_until_up(started[-1])
        assert ("Kept from the last run" in again) is kept
        assert ("zoe" in command(tmp_path, "user", "list")) is kept
        assert (re.findall("--task [0-9a-f-]+", first) == re.findall("--task [0-9a-f-]+", again)) is kept
        started[-1].terminate()
        assert started[-1].wait(WITHIN_S) == 0
        if kept:
            started.append(start_dev(tmp_path, "--fresh", "--no-seed"))
            assert "Made now" in wait_until_up(started[-1])
            assert "zoe" not in command(tmp_path, "user", "list")
    finally:
        for one in started:
            one.kill()


@pytest.mark.timeout(600)
def test_dev_ends_and_says_so_where_a_part_of_it_ends(tmp_path: Path) -> None:
    process = start_dev(tmp_path, "--no-seed")
    try:
        wait_until_up(process)
        children = descendants(process.pid)
        (server,) = (child for child in children if "valkey-server" in child.name())
        server.kill()
        said, _ = process.communicate(timeout=WITHIN_S)
        assert process.returncode == 1
        assert "(valkey-server) ended with status -9" in said
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
