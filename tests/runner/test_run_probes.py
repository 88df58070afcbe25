"""The bypass suite of whole runs: each probe reaches what is planted outside, and nothing from inside `ringfence run`.

A probe that does not reach it outside either proves nothing here: it is skipped with the reason, and pytest lists it.
All probes of one kind of run are made in one run, which has a lease at both of its targets.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import termios
import tomllib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.certificates import Certificates
from tests.runner import planted
from tests.runner.installation import PROGRAM, SCOPE, WITHIN_S, Installation, installation, until
from tests.runner.probe_programs import BLOCKED, DRIVER, REACHED, Results, program, results

FRONT, SHARED = "front:read:page/*", "shared:read:page/*"
HIDDEN = "hidden.example"
ASK = "ringfence request --task $RINGFENCE_TASK --allow '{}' --reason look --delivery gateway >/dev/null"
CAPABLE = Path(__file__).with_name("capable_run.py")
KINDS = ("ordinary", "capable")
"""`capable`: the command is root of its namespace, with every capability there."""


@dataclass
class Planted:
    """The installation, and what stands beside it."""

    here: Installation
    canary: str
    folder: Path
    ports: dict[str, int] = field(default_factory=dict)
    services: dict[str, int] = field(default_factory=dict)
    other_run: str = ""
    task: str = ""
    victim: int = 0
    secret: int = -1
    """A descriptor of a file that holds the canary."""

    @property
    def given(self) -> dict[str, Any]:
        return {
            "canary": self.canary[::-1],
            "secret_file": str(self.folder / "secret"),
            "victim": self.victim,
        }

    @property
    def sockets(self) -> Path:
        return self.here.folder / ".ringfence/tasks"

    def outside(self, text: str, *arguments: str, **more: Any) -> tuple[int, str]:
        """A program as a shell of the runner's user starts it, behind a proxy that leads everywhere."""
        environment = self.here.environment()
        environment |= {
            "HTTP_PROXY": f"http://{planted.LOOPBACK}:{self.ports['proxy']}",
            "CANARY": self.canary,
        }
        environment |= more.pop("environment", {})
        done = subprocess.run(
            [sys.executable, "-c", text, *arguments], env=environment,
            stdout=more.pop("stdout", subprocess.PIPE),
            stderr=subprocess.STDOUT, check=False, cwd="/", pass_fds=[self.secret], **{"timeout": WITHIN_S, **more},
        )  # fmt: skip
        return done.returncode, (done.stdout or b"").decode(errors="replace").strip()

    def run(self, kind: str, *words: str, **more: Any) -> subprocess.Popen[bytes]:
        """Start `ringfence run` with an environment and descriptors that hold the canary."""
        start = [sys.executable, str(CAPABLE)] if kind == "capable" else [str(PROGRAM)]
        given: dict[str, Any] = {
            "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "pass_fds": [self.secret],
            **more,
        }  # fmt: skip
        return subprocess.Popen(
            [*start, "run", "--task", self.task, *words], cwd=self.here.folder,
            env={**self.here.environment(), "CANARY": self.canary}, **given,
        )  # fmt: skip


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2].partition("/")[0])


@contextlib.contextmanager
def victim(canary: str) -> Iterator[int]:
    """A program that holds the canary in environment, arguments and memory, and is called like init. Yields its pid.

    It ends with its input, whatever ends this process.
    """
    process = subprocess.Popen(
        ["sh", "-c", "echo started; read line", canary, "init/bootstrap.py"],
        env={"PATH": os.environ["PATH"], "CANARY": canary}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
    finally:
        process.communicate()


@contextlib.contextmanager
def another_run(plant: Planted) -> Iterator[str]:
    """A run of the same agent in another task, whose socket is open. Yields its id."""
    process = plant.here.start(
        "run", "--task", plant.here.assign("front-bot", scope=FRONT), "--", "sh", "-c",
        "echo ready; cat", stdin=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        (path,) = plant.sockets.glob("*.sock")
        yield path.stem
    finally:
        process.communicate(timeout=WITHIN_S)


@pytest.fixture(scope="module")
async def plant(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Planted]:
    canary = f"canary-{secrets.token_hex(16)}"
    folder = tmp_path_factory.mktemp("planted")
    certificates = Certificates(folder)
    tls = certificates.server("localhost", HIDDEN)
    with contextlib.ExitStack() as stack:
        servers = {
            "service": planted.Server(planted.always(canary)),
            "service6": planted.Server(planted.always(canary), "::1"),
            "tls": planted.Server(planted.over_tls(tls, planted.always(canary))),
            "shared": planted.Server(planted.by_host(HIDDEN, canary, "shared page")),
            "front": planted.Server(planted.over_tls(tls, planted.by_host(HIDDEN, canary, "front page"))),
            "proxy": planted.Server(planted.proxy),
        }
        for server in servers.values():
            stack.callback(server.close)
        async with installation(RINGFENCE_GATEWAY_TARGETS_CA_FILE=str(certificates.file)) as here:
            plant = Planted(here, canary, folder, {name: server.port for name, server in servers.items()})
            settings = tomllib.loads((here.folder / ".ringfence/ringfence.toml").read_text())
            for name in ("registry_url", "gateway_url", "policy_url", "kafka", "redis_url"):
                plant.services[name.removesuffix("_url")] = port_of(settings[name])
            for target, url in (("front", "https://localhost"), ("shared", "http://127.0.0.1")):
                here.say(
                    "target", "add", target, "--description", target, "--backend", "jwt", "--setting",
                    f"url={url}:{plant.ports[target]}", "--verb", "read", "--request",
                    "GET /{name} read page/{name}", who="olga",
                )  # fmt: skip
            here.say("user", "set", "maria", "--add", FRONT, "--add", SHARED, "--yes", who="olga")
            here.say(
                "agent", "register", "front-bot", "--description", "reads pages", "--allow", SCOPE, "--allow", FRONT,
                "--allow", SHARED, "--selector", "runner=runner-1 life=1h",
            )  # fmt: skip
            made = here.say(
                "task", "assign", "front-bot", "--purpose", "read pages", "--allow", SCOPE, "--allow", FRONT,
                "--allow", SHARED, "--for", "40m", who="maria",
            )  # fmt: skip
            plant.task = made["task_id"]
            (folder / "secret").write_text(canary)
            plant.secret = os.open(folder / "secret", os.O_RDONLY)
            stack.callback(os.close, plant.secret)
            plant.victim = stack.enter_context(victim(canary))
            plant.other_run = stack.enter_context(another_run(plant))
            yield plant
            stack.close()


# --- the probes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A probe. Its texts have places for ports and paths: see `values`."""

    name: str
    program: str
    given: dict[str, Any] = field(default_factory=dict)
    inside: dict[str, Any] = field(default_factory=dict)
    """What is other inside."""


def get(path: str, *hosts: str) -> str:
    lines = "".join(f"Host: {host}\r\n" for host in hosts)
    return f"GET {path} HTTP/1.1\r\n{lines}Connection: close\r\n\r\n"


FORMS = (
    "127.0.0.1:{service}", "localhost:{service}", "LOCALHOST:{service}", "localhost.:{service}", "127.0.0.1.:{service}",
    "127.1:{service}", "2130706433:{service}", "0x7f000001:{service}", "0x7f.0.0.1:{service}", "0177.0.0.1:{service}",
    "017700000001:{service}", "0.0.0.0:{service}", "[::ffff:127.0.0.1]:{service}", "[::ffff:7f00:1]:{service}",
    "[::1]:{service6}", "[0:0:0:0:0:0:0:1]:{service6}", "{hostname}:{service}", "agent@127.0.0.1:{service}",
    "127.0.0.1:{notes}@127.0.0.1:{service}", "127.0.0.1:{notes}@localhost:{service}", "127.0.0.1:0{service}",
)  # fmt: skip
"""Ways to write the address of a service that is no target, on a machine that has a target at another port."""
HEALTHY = '{{"status":"ok"}}'
SERVICES = {
    # ApiVersions, which a broker answers with its correlation id (Kafka protocol guide).
    "kafka": ("\0\0\0\x0a\0\x12\0\0RFKA\xff\xff", "RFKA"),
    "redis": ("PING\r\n", "+PONG"),
    "registry": (get("/healthz", "registry"), HEALTHY),
    "policy": (get("/healthz", "policy"), HEALTHY),
    "gateway": (get("/healthz", "gateway"), HEALTHY),
}
AT, TLS, FRONT_AT, SHARED_AT = (
    "127.0.0.1:{service}",
    "127.0.0.1:{tls}",
    "localhost:{front}",
    "127.0.0.1:{shared}",
)
NOTES_AT = "127.0.0.1:{notes}"
TRUST = get("/v1/trust", "ringfence")
PROCESSES = ("environment", "proc_environ", "proc_cmdline", "proc_mem", "proc_root", "descriptors", "kill")
INIT = ("init_memory", "init_ptrace", "init_descriptors")


def proxied(name: str, send: str, **given: Any) -> Case:
    inside = {"socket": given.pop("inside_socket")} if "inside_socket" in given else {}
    return Case(name, "proxied", {"send": send, **given}, inside)


CASES = [
    *(proxied(f"connect {form}", get("/", form), connect=form) for form in FORMS),
    *(proxied(f"absolute {form}", get(f"http://{form}/", form.rpartition("@")[2])) for form in FORMS),
    *(proxied(f"service {name}", send, answer=answer, connect=f"127.0.0.1:{{{name}}}")
      for name, (send, answer) in SERVICES.items()),
    proxied("connect relayed inside", get("/", AT), connect=AT, relayed=True),
    proxied("connect by the socket", get("/", AT), connect=AT, inside_socket="/run/ringfence/gateway.sock"),
    proxied("connect with the host of a target", get("/", NOTES_AT), connect=AT, connect_host=NOTES_AT),
    proxied("absolute form of a target, host of another", get(f"http://{SHARED_AT}/x", HIDDEN)),
    proxied("absolute form of another, host of a target", get(f"http://{AT}/x", NOTES_AT)),
    proxied("TLS name of a target, other address", get("/x", FRONT_AT), connect=TLS, tls_name="localhost"),
    proxied("TLS name of a target, other port", get("/x", FRONT_AT), connect="localhost:{tls}", tls_name="localhost"),
    proxied("TLS name of another, address of a target", get("/x", HIDDEN), connect=FRONT_AT, tls_name=HIDDEN),
    proxied("TLS name of a target, host of another", get("/x", HIDDEN), connect=FRONT_AT, tls_name="localhost"),
    proxied("TLS name of a target, two hosts", get("/x", FRONT_AT, HIDDEN), connect=FRONT_AT, tls_name="localhost"),
    Case("port of the proxy", "take_port"),
    *(Case(name, name) for name in (*PROCESSES, *INIT)),
    Case("socket of another run", "unix_socket", {"path": "{sockets}/{other_run}.sock", "send": TRUST}),
    Case("relay of another run", "unix_socket", {"path": "{other_folder}/gateway.sock", "send": TRUST}),
    Case("control socket", "unix_socket", {"path": "{other_folder}/gateway.sock"},
         {"path": "/run/ringfence/control.sock"}),
]  # fmt: skip
CONTROLS = [
    proxied("target over HTTP", get(f"http://{NOTES_AT}/notes/today", NOTES_AT), answer="buy milk"),
    proxied("target over HTTP, by a relay inside", get(f"http://{NOTES_AT}/notes/today", NOTES_AT), answer="buy milk",
            relayed=True),
    proxied("target that serves several hosts", get(f"http://{SHARED_AT}/x", SHARED_AT), answer="shared page"),
    proxied("target over TLS", get("/x", FRONT_AT), connect=FRONT_AT, tls_name="localhost", answer="front page"),
]  # fmt: skip
"""What the run may reach. Without it the probes would be kept from all by something else than what they are about."""


def filled(plant: Planted, given: dict[str, Any]) -> dict[str, Any]:
    """With the ports and paths of this run of the tests."""
    values = {
        **plant.ports, **plant.services, "notes": plant.here.notes.port, "hostname": socket.gethostname(),
        "sockets": plant.sockets, "other_run": plant.other_run,
        "other_folder": Path(tempfile.gettempdir()) / f"ringfence-run-{plant.other_run}",
    }  # fmt: skip
    found = {
        name: value.format(**values) if isinstance(value, str) else value for name, value in given.items()
    }
    return {
        name: value.encode("latin-1").hex() if name in ("send", "answer") else value
        for name, value in found.items()
    }


@dataclass
class Inside:
    """What became of each probe in one run."""

    kind: str
    results: Results


@pytest.fixture(scope="module", params=KINDS)
def inside(request: pytest.FixtureRequest, plant: Planted) -> Inside:
    work = []
    for case in (*CONTROLS, *CASES):
        given = filled(plant, {**case.given, **case.inside})
        work.append((case.name, program(case.program), {**plant.given, **given, "inside": True}))
    asked = " && ".join(ASK.format(scope) for scope in (SCOPE, FRONT, SHARED))
    process = plant.run(request.param, "--", "sh", "-c", f'{asked} && exec python3 -c "$0"', DRIVER)
    said, problems = process.communicate(json.dumps(work).encode(), timeout=300)
    assert process.returncode == 0, problems.decode()
    return Inside(request.param, results(said.decode()))


@pytest.mark.parametrize("case", CONTROLS, ids=lambda case: case.name)
def test_the_run_reaches_its_targets(inside: Inside, case: Case) -> None:
    assert inside.results[case.name][0] == REACHED, inside.results[case.name]


@pytest.fixture(scope="module")
def outside(plant: Planted) -> Results:
    """What each probe does outside."""
    found: Results = {}
    with planted.reusable_listener() as port:
        for taking in (False, True):
            work = [
                (case.name, program(case.program), {**plant.given, **filled(plant, case.given)})
                for case in CASES
                if (case.program == "take_port") == taking
            ]
            environment = {"HTTP_PROXY": f"http://{planted.LOOPBACK}:{port}"} if taking else {}
            status, said = plant.outside(
                DRIVER, input=json.dumps(work).encode(), environment=environment, timeout=300
            )
            assert status == 0, said
            found |= results(said)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reached_outside_and_not_in_a_run(outside: Results, inside: Inside, case: Case) -> None:
    status, said = outside[case.name]
    assert status in (REACHED, BLOCKED), f"the probe is broken: {said}"
    if status == BLOCKED:
        pytest.skip(f"not provable here: {case.name}: {said}")
    if inside.kind == "capable" and case.program in ("init_memory", "init_descriptors"):
        pytest.skip("it has every capability of the namespace that init is in")
    code, why = inside.results[case.name]
    assert code == BLOCKED, why
    assert "stale_view" not in why


# --- switching the sandbox off ----------------------------------------------------------------------------------------

SURVIVOR = """
import os, sys, time
init, mark = int(sys.argv[1]), sys.argv[2]
if os.fork() == 0:
    os.setsid()
    try:
        while True:
            os.kill(init, 0)
            time.sleep(0.02)
    except OSError:
        # The kernel needs a moment for all that is in a namespace whose process 1 has ended.
        time.sleep(1)
        open(mark, "w").close()
    os._exit(0)
os.kill(init, 9)
time.sleep(600)
"""
SPIN = """
import os, platform, sys, time
jump = {"x86_64": b"\\xeb\\xfe", "aarch64": b"\\x00\\x00\\x00\\x14"}[platform.machine()]
try:
    # Where process 1 waits for its children, it is to go round in a circle after them.
    at = int(open("/proc/1/syscall").read().split()[-1], 16)
    with open("/proc/1/mem", "r+b", buffering=0) as memory:
        memory.seek(at)
        memory.write(jump)
except OSError as error:
    print("blocked:", error, flush=True)
    sys.exit(3)
os.kill(os.getppid(), 9)
while True:
    time.sleep(0.05)
    open(sys.argv[1], "w").close()
"""


@pytest.fixture
def shared(plant: Planted) -> Iterator[Path]:
    """A folder to mount."""
    with tempfile.TemporaryDirectory(prefix="shared-", dir=plant.here.folder) as folder:
        yield Path(folder)


def report_of(process: subprocess.Popen[bytes]) -> tuple[dict[str, Any], bytes]:
    """The report at the end of a run with `--json`, and its standard output."""
    said, problems = process.communicate(timeout=WITHIN_S)
    lines = problems.decode().strip().splitlines()
    assert lines, process.returncode
    return json.loads(lines[-1]), said


def test_killed_init_ends_the_run(plant: Planted, shared: Path) -> None:
    marks = [shared / "outside", shared / "inside"]
    with subprocess.Popen(["sleep", "600"]) as init:
        survivor = subprocess.Popen([sys.executable, "-c", SURVIVOR, str(init.pid), str(marks[0])])
        init.wait()
        until(marks[0].exists, "what outside goes on after that")
        survivor.kill()
        survivor.wait()
    process = plant.run(
        "ordinary",
        "--json",
        "--mount",
        f"{shared}:rw-as-root",
        "--",
        "python3",
        "-c",
        SURVIVOR,
        "2",
        str(marks[1]),
    )
    report, _ = report_of(process)
    assert (report["exit"]["code"], report["destroyed"]["complete"]) == (137, True), report
    assert not found(str(marks[1]))
    assert not marks[1].exists()


def test_a_command_that_keeps_process_1_from_ending_is_ended(plant: Planted, shared: Path) -> None:
    """Process 1 is bubblewrap's, has the command's uid, and lets it write to its memory."""
    mark = shared / "went on"
    started = plant.run(
        "ordinary", "--json", "--mount", f"{shared}:rw-as-root", "--", "python3", "-c", SPIN, str(mark)
    )
    report, said = report_of(started)
    if not mark.exists():
        pytest.skip(f"not provable here: process 1 cannot be kept from ending: {said.decode()}")
    assert report["exit"]["reason"] == "its init has ended, and its sandbox went on"
    assert report["destroyed"]["complete"], report


def test_a_run_whose_init_is_stopped_ends_in_its_time(plant: Planted) -> None:
    report, _ = report_of(
        plant.run("ordinary", "--json", "--ttl", "12s", "--", "sh", "-c", "kill -STOP $PPID; sleep 600")
    )
    assert report["exit"] == {"code": 137, "reason": "its time was over"}
    assert report["destroyed"]["complete"], report


def test_no_variable_of_the_run_is_inits(plant: Planted) -> None:
    """The dynamic linker complains once of each program that it cannot load the library into."""
    variables = {"LD_PRELOAD": "/no/such.so", "PYTHONPATH": "/x", "PYTHONINSPECT": "1", "PYTHONHOME": "/x"}
    alone = subprocess.run(["/bin/true"], env=variables, capture_output=True, check=True)
    if alone.stderr.count(b"such.so") != 1:
        pytest.skip("not provable here: the dynamic linker says nothing of what it cannot load")
    words = [word for name, value in variables.items() for word in ("--env", f"{name}={value}")]
    process = plant.run("ordinary", *words, "--", "/bin/true")
    _, problems = process.communicate(timeout=WITHIN_S)
    assert (process.returncode, problems.count(b"such.so")) == (0, 1), problems


def test_processes_of_a_command_end_with_the_run(plant: Planted, shared: Path) -> None:
    mark = secrets.token_hex(8)
    script = f"setsid sh -c 'sleep 600 & echo ready; wait; : {mark}' & sleep 0.5; exit 0"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.DEVNULL, start_new_session=True) as outside:
        outside.wait()
    left = found(mark)
    assert left, "outside it does"
    for pid in left:
        os.killpg(pid, 9)
    process = plant.run("ordinary", "--", "sh", "-c", script)
    said, _ = process.communicate(timeout=WITHIN_S)
    assert (process.returncode, said) == (0, b"ready\n")
    assert not found(mark)


def found(mark: str) -> list[int]:
    """The processes that have this among their arguments."""
    done = subprocess.run(["pgrep", "-f", mark], capture_output=True, check=False)
    return [int(pid) for pid in done.stdout.split()]


# --- streams ----------------------------------------------------------------------------------------------------------


def test_a_terminal_as_standard_input_takes_no_typed_input(plant: Planted) -> None:
    _, terminal = os.openpty()

    def controlling() -> None:
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    status, said = plant.outside(
        program("typed_input"),
        json.dumps(plant.given),
        stdin=terminal,
        start_new_session=True,
        preexec_fn=controlling,
    )
    if status == BLOCKED:
        pytest.skip(f"not provable here: {said}")
    assert status == REACHED, said
    process = plant.run(
        "ordinary", "--", "python3", "-c", program("typed_input"), json.dumps(plant.given), stdin=terminal
    )
    said_inside, problems = process.communicate(timeout=WITHIN_S)
    assert process.returncode == BLOCKED, (said_inside, problems)
    assert b"there is no terminal" not in said_inside


@pytest.mark.skipif(
    os.geteuid() != 0, reason="a user's run has the user's uid, and opens the user's files again"
)
def test_a_file_as_standard_output_is_not_read(plant: Planted, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(f"{plant.canary}\n")
    path.chmod(0o600)
    with path.open("ab") as file:
        given = json.dumps({**plant.given, "descriptor": 1})
        status, _ = plant.outside(program("reopen"), given, stdin=subprocess.DEVNULL, stdout=file)
        assert status == REACHED
        process = plant.run("ordinary", "--", "python3", "-c", program("reopen"), given, stdout=file)
        _, problems = process.communicate(timeout=WITHIN_S)
    assert process.returncode == BLOCKED, problems


# --- sockets and mounts -----------------------------------------------------------------------------------------------


def test_while_a_run_goes_on_its_control_socket_is_gone(plant: Planted) -> None:
    folder = Path(tempfile.gettempdir()) / f"ringfence-run-{plant.other_run}"
    assert sorted(path.name for path in folder.iterdir()) == ["gateway.sock", "runner.json"]
    assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("mount", ["{state}/tasks:rw", "{folder}/link/tasks", "/"])
def test_a_mount_that_shows_what_is_the_runners_is_refused(plant: Planted, mount: str) -> None:
    folder = plant.here.folder
    (folder / "work").mkdir(exist_ok=True)
    if not (folder / "link").is_symlink():
        (folder / "link").symlink_to(folder / ".ringfence")
    (folder / ".ringfence/runner").mkdir(exist_ok=True)
    asked = mount.format(state=folder / ".ringfence", folder=folder)
    process = plant.run("ordinary", "--mount", asked, "--", "true")
    _, problems = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 1, problems
    assert b"Traceback" not in problems
    assert b"mount" in problems
