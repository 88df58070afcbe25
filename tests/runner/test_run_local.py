"""`ringfence run`: a command in a fresh sandbox, with an identity of its own, and nothing left of it at the end.

At the end the commands of docs/runs.md and docs/fleets.md, run as their readers run them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.runner.fleet import Fleet
from tests.runner.installation import PROGRAM, SCOPE, WITHIN_S, Installation, until

REQUEST = f"ringfence request --task $RINGFENCE_TASK --allow '{SCOPE}' --reason look --delivery gateway"


# --- the command's own: exit code, signals, streams, environment -----------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("exit 3", 3),
        ("kill -KILL $$", 137),
    ],
)
def test_the_exit_code_is_the_commands(here: Installation, command: str, code: int) -> None:
    assert here.run("--", "sh", "-c", command).returncode == code


def test_a_command_that_cannot_be_run_ends_as_in_a_shell(here: Installation) -> None:
    missing = here.run("--", "no-such-program")
    assert (missing.returncode, b"no-such-program" in missing.stderr) == (127, True)
    assert here.run("--", "/etc/hosts").returncode == 126


def test_streams_are_the_commands_to_the_byte(here: Installation) -> None:
    data = os.urandom(300_000)
    done = here.run("--", "sh", "-c", "cat; echo problem >&2", input=data)
    assert (done.returncode, done.stdout) == (0, data)
    assert done.stderr == b"problem\n"


def test_environment_of_the_caller_is_not_inherited(here: Installation) -> None:
    done = here.run("--env", "ASKED=for", "--", "env", "-0")
    inside = dict(one.split("=", 1) for one in done.stdout.decode().split("\0") if one)
    assert inside["ASKED"] == "for"
    assert inside["HOME"] == "/home/agent"
    outside = here.environment()
    leaked = [name for name in inside if name in outside and inside[name] == outside[name] and name != "LANG"]
    assert leaked == []
    assert not any(name.startswith("RINGFENCE_") and "KAFKA" in name for name in inside)
    assert str(here.folder) not in done.stdout.decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signals_reach_the_command(here: Installation, number: signal.Signals) -> None:
    script = "import os,signal,sys,time\n"
    script += f"signal.signal({int(number)}, lambda *_: (os.write(1, b'got it\\n'), sys.exit(7)))\n"
    script += "print('ready', flush=True)\nwhile True: time.sleep(60)"
    process = here.start("run", "--task", here.task, "--", "python3", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=WITHIN_S)
    assert (process.returncode, out) == (7, b"got it\n"), err


# --- identity, gateway, leases ----------------------------------------------------------------------------------------


def test_a_run_asks_for_a_credential_uses_it_and_loses_it(here: Installation) -> None:
    """The whole way: the instance's own key, the lease, the proxy, what is blocked; and the end of it all."""
    before = len(here.notes.requests)
    url = f"http://127.0.0.1:{here.notes.port}/notes"
    script = (
        f"{REQUEST} >/dev/null && curl -sS {url}/today; curl -sS -X DELETE {url}/today; curl -sS {url}/../x"
    )
    code, report, out = here.report("--", "sh", "-c", script)
    assert code == 0, report
    assert out.startswith(b"buy milk\n")
    assert b"beyond_scope" in out
    assert here.notes.requests[before:] == ["GET /notes/today"]
    (lease,) = report["allowed"]
    assert (lease["target_id"], lease["delivery"]) == ("notes", "gateway")
    assert (lease["status"], lease["ended_by"]) == ("revoked", "run_ended")
    assert "beyond_scope" in {reason["code"] for one in report["denied"] for reason in one["reasons"]}
    assert report["destroyed"]["complete"] is True
    assert report["used"]["connections"] >= 3
    events = here.say("audit", "trace", report["run_id"], who="ali")
    assert report["run_id"] in json.dumps(events)
    assert "beyond_scope" in json.dumps(events) or "was kept from" in json.dumps(events)
    shown = until(partial(_shown_with_denials, here, report["run_id"]), "what was denied, in the trail")
    assert "beyond_scope" in {one["code"] for one in shown["denied"]}
    trace = json.dumps(here.say("audit", "trace", lease["lease_id"], who="ali"))
    assert report["run_id"] in trace
    assert lease["lease_id"] not in {one["id"] for one in here.say("lease", "list", who="olga")["leases"]}


def _shown_with_denials(here: Installation, run_id: str) -> Any:
    found = here.say("run", "show", run_id, who="sam")
    return found if found["denied"] else None


def test_blocked_requests_are_reported_by_run(here: Installation) -> None:
    """Two runs of one agent in one task, at the same time: each report has what that run was kept from."""
    blocked = {}
    url = f"http://127.0.0.1:{here.notes.port}"
    script = "echo ready; read line; curl -sS -o /dev/null {url}/{name}; echo asked; read line"
    names, processes = ("one", "two"), []
    for name in names:
        command = ("sh", "-c", script.format(url=url, name=name))
        processes.append(
            here.start("run", "--json", "--task", here.task, "--", *command, stdin=subprocess.PIPE)
        )
    for said in (b"ready\n", b"asked\n"):
        for process in processes:
            assert process.stdout is not None
            assert process.stdin is not None
            assert process.stdout.readline() == said
            process.stdin.write(b"go\n")
            process.stdin.flush()
    for name, process in zip(names, processes, strict=True):
        _, err = process.communicate(timeout=WITHIN_S)
        report = json.loads(err.decode().strip().splitlines()[-1])
        assert "incomplete" not in report, report
        blocked[name] = [one["destination"]["path"] for one in report["denied"]]
        shown = until(partial(_shown_with_denials, here, report["run_id"]), "its blocked actions")
        assert [one["destination"]["path"] for one in shown["denied"]] == [f"/{name}"]
        trace = json.dumps(here.say("audit", "trace", report["run_id"], who="ali"))
        assert trace.count("was kept from") >= 1
        others = [other for other in names if other != name]
        assert not any(f"/{other}" in trace for other in others)
    assert blocked == {"one": ["/one"], "two": ["/two"]}


def test_requests_counted_at_the_end_are_in_the_report(here: Installation) -> None:
    """The gateway records repeats within a second by their count. The run is over before that second is."""
    url = f"http://127.0.0.1:{here.notes.port}/again?number=[1-30]"
    code, report, _ = here.report("--", "curl", "-sS", "-o", "/dev/null", url)
    assert (code, report.get("incomplete")) == (0, None), report
    assert {one["destination"]["path"] for one in report["denied"]} == {"/again"}
    assert sum(one.get("count", 1) for one in report["denied"]) == 30


def test_a_report_says_what_it_may_lack_where_the_gateway_does_not_publish(here: Installation) -> None:
    """The gateway stands still when the run ends. What it has on disk comes into the trail later."""
    url = f"http://127.0.0.1:{here.notes.port}/notes/late"
    script = f"curl -sS -o /dev/null {url}; echo asked; read line"
    process = here.start(
        "run", "--json", "--task", here.task, "--", "sh", "-c", script, stdin=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"asked\n"
    gateway = here.service("gateway")
    gateway.suspend()
    try:
        _, err = process.communicate(b"go\n", timeout=WITHIN_S)
    finally:
        gateway.resume()
    report = json.loads(err.decode().strip().splitlines()[-1])
    assert report["incomplete"].startswith("what was blocked last may be missing: the gateway"), report
    assert report["destroyed"]["complete"] is True
    shown = until(partial(_shown_with_denials, here, report["run_id"]), "its blocked action")
    assert [one["destination"]["path"] for one in shown["denied"]] == ["/notes/late"]
    until(lambda: b"no_lease" in here.run("--", "curl", "-sS", url).stdout, "a gateway that decides again")


def test_a_run_asks_with_curl_and_forty_lines_of_python(here: Installation) -> None:
    """The example without the SDK, as docs/http-access.md has it for the inside of a run."""
    folder = Path(__file__).parents[2] / "examples/no-sdk"
    script = "PYTHONPATH=$(echo /opt/ringfence/packages-* | tr ' ' :) exec python3 request_with_curl.py"
    words = ["$RINGFENCE_TASK", "notes", "read", "note/today"]
    code, report, out = here.report("--mount", str(folder), "--", "sh", "-c", f"{script} {' '.join(words)}")
    assert code == 0, report
    assert re.fullmatch(rb"allowed: lease [0-9a-f-]{36}\n", out)
    (lease,) = report["allowed"]
    assert (lease["delivery"], lease["ended_by"]) == ("gateway", "run_ended")


def test_the_instance_of_a_run_acts_in_no_other_task(here: Installation) -> None:
    other = here.assign()
    script = REQUEST.replace("$RINGFENCE_TASK", other)
    done = here.run("--", "sh", "-c", f"{script} 2>&1")
    assert done.returncode != 0
    assert re.search(rb"instance_other_task|socket_other_task|another task", done.stdout), done.stdout


def test_a_denied_request_is_reported(here: Installation) -> None:
    script = REQUEST.replace("read:", "delete:")
    code, report, _ = here.report("--", "sh", "-c", script)
    assert code != 0
    (denied,) = [one for one in report["denied"] if one["what"] == "credential"]
    assert denied["scope"][0]["verbs"] == ["delete"]
    assert report["allowed"] == []


def test_without_a_lease_nothing_is_reached(here: Installation) -> None:
    before = len(here.notes.requests)
    url = f"http://127.0.0.1:{here.notes.port}/notes/today"
    done = here.run("--", "sh", "-c", f"curl -sS {url}; curl -sS --noproxy '*' -m 5 {url}")
    assert b"no_lease" in done.stdout
    assert done.returncode != 0
    assert here.notes.requests[before:] == []


# --- the end ----------------------------------------------------------------------------------------------------------


def test_the_time_of_a_run_is_limited(here: Installation) -> None:
    code, report, _ = here.report("--ttl", "8s", "--", "sleep", "600")
    assert (code, report["exit"]["reason"]) == (137, "its time was over")
    assert report["destroyed"]["complete"] is True


def test_a_run_ends_with_its_task(here: Installation) -> None:
    task = here.assign()
    process = here.start("run", "--json", "--task", task, "--", "sh", "-c", "echo ready; sleep 600")
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    here.say("task", "end", task, "--reason", "enough", who="maria")
    _, err = process.communicate(timeout=WITHIN_S)
    report = json.loads(err.decode().strip().splitlines()[-1])
    assert (process.returncode, report["exit"]["reason"]) == (137, "its task has ended")


def test_a_task_for_one_run_ends_with_it(here: Installation) -> None:
    before = json.dumps(here.say("task", "list", who="maria"))
    done = here.call(
        "run", "--json", "--assign", SCOPE, "--agent", "reader-bot", "--", "sh", "-c", REQUEST, who="maria"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stderr.decode().strip().splitlines()[-1])
    assert [one["target_id"] for one in report["allowed"]] == ["notes"]
    task = here.say("task", "show", report["task_id"], who="maria")
    assert report["task_id"] not in before
    assert "ended" in json.dumps(task)


@pytest.mark.parametrize("after", ["ready", "lease"])
def test_a_runner_that_is_killed_leaves_nothing(here: Installation, after: str) -> None:
    """The kernel ends the sandbox; the next run sweeps, reports the run as lost, and its leases end."""
    script = "echo ready; sleep 601" if after == "ready" else f"{REQUEST} >/dev/null; echo ready; sleep 601"
    process = here.start("run", "--task", here.task, "--", "sh", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    process.communicate(timeout=WITHIN_S)
    until(lambda: not _running("sleep 601"), "the end of the sandbox's processes")
    leases = here.say("lease", "list", who="olga")["leases"]
    assert here.run("--", "true").returncode == 0
    if after == "lease":
        assert leases, "the lease of the killed run lives until somebody ends it"
        until(lambda: not here.say("lease", "list", who="olga")["leases"], "the end of the leases")
    assert not list((here.folder / ".ringfence/runner").glob("*.json"))


def _running(command: str) -> bool:
    found = subprocess.run(["pgrep", "-f", command], capture_output=True, check=False)
    return found.returncode == 0


# --- mounts -----------------------------------------------------------------------------------------------------------


TRICKS: dict[str, tuple[str, str]] = {
    "A: a renamed folder": ("mv docs/samples .git/hooks", ".git/hooks/pre-commit"),
    "B: a link inside": ("ln -s ../docs/settings.txt .git/config", ".git/config"),
    "C: a file that names a repository": ("echo 'gitdir: ../store' > lib/.git", "lib/.git"),
    "D: a name that programs read": ("mkdir .cargo; echo > .cargo/config.toml", ".cargo/config.toml"),
    "a set-user-id program": ("cp /bin/sh lib.so.1; chmod 6755 lib.so.1 || echo refused >&2", "lib.so.1"),
}


def test_files_left_in_a_writable_mount_are_reported(here: Installation) -> None:
    folder = here.folder / "work"
    for name in (".git/HEAD", "docs/samples/pre-commit", "docs/settings.txt", "lib/readme", "team/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text\n")
    (folder / "team").chmod(0o2775)
    script = "\n".join(
        ["pwd", *(trick for trick, _ in TRICKS.values()), "mkdir team/new; echo text > notes.txt"]
    )
    code, report, out = here.report("--mount", f"{folder}:rw-as-root", "--", "sh", "-c", script)
    assert (code, out.decode().strip()) == (0, str(folder))
    left = report["destroyed"]["left_in_mounts"]
    for _, path in TRICKS.values():
        assert any(one.startswith(f"mount work: {path} (") for one in left), (path, left)
    assert "mount work: notes.txt (new)" in report["destroyed"]["changed_in_mounts"]
    assert (folder / "notes.txt").read_text() == "text\n"
    assert [path for path in folder.rglob("*") if path.stat(follow_symlinks=False).st_mode & 0o6000] == [
        folder / "team", folder / "team/new",
    ]  # fmt: skip
    read_only = here.run("--mount", str(folder), "--", "sh", "-c", "cat notes.txt; echo x > y")
    assert (read_only.returncode != 0, read_only.stdout) == (True, b"text\n")


def test_replacement_of_a_hidden_folder_is_reported(here: Installation) -> None:
    folder = here.folder / "app"
    (folder / "web/node_modules").mkdir(parents=True)
    words = ("--mount", f"{folder}:rw-as-root", "--hide", f"{folder}/web/node_modules")
    script = "mv web old && mkdir -p web/node_modules/.bin && cp /bin/true web/node_modules/.bin/tool"
    code, report, _ = here.report(*words, "--", "sh", "-c", script)
    assert (code, (folder / "web/node_modules/.bin/tool").exists()) == (0, True)
    left = "mount app: web/node_modules/.bin/tool (new: programs read settings there)"
    assert left in report["destroyed"]["left_in_mounts"]


def test_a_folder_of_root_is_writable_only_where_that_was_said(here: Installation) -> None:
    folder = here.folder / "of-root"
    folder.mkdir()
    refused = here.run("--mount", f"{folder}:rw", "--", "true")
    assert refused.returncode not in (0, 137)
    assert b"belongs to root" in refused.stderr
    assert b"rw-as-root" in refused.stderr
    os.chown(folder, 1000, 1000)
    done = here.run("--mount", f"{folder}:rw", "--", "sh", "-c", f"echo x > {folder}/file")
    assert (done.returncode, (folder / "file").stat().st_uid) == (0, 1000), done.stderr


def test_a_socket_in_a_mounted_folder_is_refused_unless_hidden(here: Installation) -> None:
    folder = here.folder / "with-socket"
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "agent.sock"))
        server.listen()
        refused = here.run("--mount", str(folder), "--", "true")
        assert refused.returncode not in (0, 137)
        assert b"agent.sock is a socket" in refused.stderr
        assert b"--hide" in refused.stderr
        words = ("--mount", str(folder), "--hide", str(folder / "agent.sock"))
        done = here.run(*words, "--", "sh", "-c", f"cat {folder}/agent.sock && test ! -S {folder}/agent.sock")
        assert (done.returncode, done.stdout) == (0, b""), done.stderr
    elsewhere = here.run("--hide", str(folder), "--", "true")
    assert elsewhere.returncode == 2
    assert b"--hide" in elsewhere.stderr


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[list[str], bytes]] = {
    "an agent that names no runner": ([], b"set-attestation"),
    "more time than its selector has": (["--ttl", "2h"], b"--ttl"),
    "a task that is not there": (["--task", "00000000-0000-4000-8000-000000000000"], b"no task"),
    "a folder of the system": (["--mount", "/etc"], b"/etc"),
    "the folder of the runner's key and records": (["--mount", ".ringfence"], b"shows"),
    "a writable folder with the settings file": (["--mount", "settings:rw-as-root"], b"RINGFENCE_CONFIG"),
    "a variable without a value": (["--env", "HOME"], b"NAME=VALUE"),
    "a size without sense": (["--memory", "much"], b"no size"),
    "a backend that is not there": (["--backend", "magic"], b"no backend magic"),
    "an image for bubblewrap": (["--backend", "bubblewrap", "--image", "sha256:" + "0" * 64], b"image"),
}


@pytest.mark.parametrize(("words", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_a_run_that_cannot_be_is_refused_with_a_remedy(
    here: Installation, words: list[str], says: bytes
) -> None:
    task, environment = here.task, here.environment()
    if "settings:rw-as-root" in words:
        (here.folder / "settings").mkdir()
        file = here.folder / "settings/ringfence.toml"
        file.write_text((here.folder / ".ringfence/ringfence.toml").read_text())
        environment["RINGFENCE_CONFIG"] = str(file)
    if not words:
        agent = "bot-without-runner"
        here.call("key", "new", "bot.json", "--id", f"agent/{agent}")
        here.say("agent", "register", agent, "--description", "x", "--key-file", "bot.json", "--allow", SCOPE)
        task = here.assign(agent, lasts="3h")
    elif "--ttl" in words:
        task = here.assign(lasts="3h")
    given = words if "--task" in words else ["--task", task, *words]
    done = here.call("run", *given, "--", "true", environment=environment)
    assert done.returncode not in (0, 137), done
    assert says in done.stderr, done.stderr
    assert b"Traceback" not in done.stderr


# --- the pages -------------------------------------------------------------------------------------------------------

DOCS = Path(__file__).parents[2] / "docs"
_BLOCK = re.compile(r"^( *)```(console|toml)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def blocks(page: str, kind: str) -> list[str]:
    """The blocks of a page of one kind, without their indentation."""
    found = []
    for indent, what, text in _BLOCK.findall((DOCS / page).read_text()):
        if what == kind:
            found.append("\n".join(line.removeprefix(indent) for line in text.splitlines()))
    return found


def commands(page: str) -> list[str]:
    """All commands of a page, in order."""
    lines = "\n".join(blocks(page, "console")).splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


class Reader:
    """Somebody at a shell in the folder of the installation, after `source .ringfence/dev.sh`."""

    def __init__(self, here: Installation) -> None:
        self.here = here
        self.variables: dict[str, str] = {}

    def type(self, command: str, who: str | None = None) -> subprocess.CompletedProcess[bytes]:
        identity = f"export RINGFENCE_IDENTITY=.ringfence/users/{who}.json; " if who else ""
        return subprocess.run(
            ["bash", "-c", f"source .ringfence/dev.sh; {identity}{command}"], cwd=self.here.folder,
            env={**self.here.inherited(), "PATH": f"{PROGRAM.parent}:{os.environ['PATH']}", **self.variables},
            capture_output=True, timeout=WITHIN_S, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def succeeds(self, command: str, who: str | None = None) -> str:
        done = self.type(command, who)
        assert done.returncode == 0, f"{command}: {done.stdout.decode()}{done.stderr.decode()}"
        return done.stdout.decode()


@pytest.fixture(scope="module")
def reader(here: Installation) -> Reader:
    return Reader(here)


def test_the_commands_of_the_page_of_runs(reader: Reader) -> None:
    here = reader.here
    first, second, request, look, hide = commands("runs.md")
    task = here.assign("review-bot", scope="platform:read:env/**")
    out = reader.succeeds(first.replace("TASK", task, 1))
    assert "uid=1000" in out
    assert "RINGFENCE_RUN_INSTANCE" in out
    handle = reader.succeeds(second, "maria").strip()
    assert str(UUID(handle)) == handle, "the gateway has the credential"
    inside = f"{request} && {look}".replace("http://notes.example", f"http://127.0.0.1:{here.notes.port}")
    out = reader.succeeds(f"ringfence run --task {here.task} -- sh -c {shlex.quote(inside)}")
    assert out.endswith("buy milk\n")
    (here.folder / "project").mkdir()
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(here.folder / "project/agent.sock"))
        assert reader.succeeds(hide.replace("TASK", task, 1)) == ""


@pytest.fixture(scope="module")
def fleet(reader: Reader) -> Iterator[Fleet]:
    """A runner that is set up by the commands and the file of the page, under another name than that of the stack."""
    here, said = reader.here, [line.replace("runner-1", "runner-7") for line in commands("fleets.md")]
    add, attest, export_key, export_sockets, serve = said[:5]
    reader.succeeds(add)
    reader.succeeds(f"{attest} --yes", "petra")
    fleet = Fleet(here, "reviews")
    (text,) = blocks("fleets.md", "toml")
    for name, folder in (("/srv/sources", fleet.sources), ("/srv/reports", fleet.reports)):
        text = text.replace(name, str(folder))
    os.chown(fleet.reports, 1000, 1000)  # a folder of root is not written to
    fleet.file = fleet.folder / "reviews.toml"
    fleet.file.write_text(text)
    exported = {}
    for line in (export_key, export_sockets):
        for word in shlex.split(line.removeprefix("export ")):
            name, _, value = word.partition("=")
            exported[name] = value
    assert set(exported) == {"RINGFENCE_KEY_FILE", "RINGFENCE_RUNNER_POOL_FILE", "RINGFENCE_GATEWAY_SOCKETS"}
    assert serve == "ringfence serve runner"
    (key,) = here.folder.rglob("runner-7.json")
    fleet.start(RINGFENCE_KEY_FILE=str(key), RINGFENCE_RUNNER_STATE=str(fleet.folder / "state"))
    yield fleet
    fleet.close()


def test_the_commands_of_the_page_of_fleets(reader: Reader, fleet: Fleet) -> None:
    order, by_label, pools, listed, shown, stopped = commands("fleets.md")[5:]
    task = reader.here.assign("review-bot", scope="platform:read:env/**")

    def typed(command: str, run: str = "") -> Any:
        words = command.replace("--task TASK", f"--task {task}").replace("RUN", run)
        return json.loads(reader.succeeds(words.replace("ringfence ", "ringfence --json ", 1), "maria"))

    until(lambda: typed(pools)["pools"], "the pool in the list")
    for command in (order, by_label):
        found = fleet.ended(typed(command)["run_id"])
        assert found["exit"] == {"code": 127, "reason": found["exit"].get("reason")}, (
            "there is no program review"
        )
        assert found["id"] in {one["id"] for one in typed(f"{listed} --all")["runs"]}
        assert typed(shown, found["id"])["status"] == "ended"
    slow = order.replace("-- review 422", "-- python3 -c 'import time; time.sleep(600)'")
    run_id = typed(slow)["run_id"]
    fleet.started(run_id)
    assert typed(f"{stopped} --yes", run_id)["stopped"] is True
    assert "the wrong branch" in fleet.ended(run_id)["exit"]["reason"]
