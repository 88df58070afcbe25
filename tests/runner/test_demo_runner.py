"""`ringfence demo --runner` as a new user sees it: an injected instruction in a shell, and in a run."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from ringfence.dev import runner_demo
from ringfence.dev.code_host import BRANCH
from ringfence.dev.demo import StoryError
from ringfence.dev.reviewer import HELPER, HOOK_FILE
from ringfence.dev.runner_demo import SandboxMissingError, Seen, check_run, check_sandbox, check_shell
from ringfence.runner.sandbox.bubblewrap import BubblewrapBackend
from tests.e2e.test_demo import RINGFENCE, WITHIN_S, Terminal, descendants, environment

STEPS = [
    "pull_request.opened",
    "reviewer.made",
    "shell.commented",
    "shell.sent",
    "shell.merged",
    "shell.deleted",
    "shell.hook_written",
    "shell.helper_left",
    "shell.token_left",
    "task.assigned",
    "run.started",
    "run.commented",
    "run.nothing_found",
    "run.send_blocked",
    "run.merge_blocked",
    "run.delete_blocked",
    "run.request_denied",
    "run.hook_reported",
    "run.destroyed",
    "lease.revoked",
    "audit.nothing",
    "audit.traced",
    "compared",
]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path, as those of sockets are short. The demo has to leave nothing there."""
    path = Path(tempfile.mkdtemp(prefix="rf-t-"))
    yield path
    left = [one for one in path.iterdir() if not one.name.startswith("ringfence-ports-")]
    shutil.rmtree(path)
    assert not left
    assert not helpers()


def helpers() -> list[psutil.Process]:
    return [one for one in psutil.process_iter(["cmdline"]) if HELPER in (one.info["cmdline"] or ())]


def start(folder: Path, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*RINGFENCE, "demo", "--runner", "--json"],
        cwd=folder,
        env={**environment(), "TMPDIR": str(folder), **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.timeout(600)
def test_the_demo_shows_both_and_leaves_nothing(folder: Path) -> None:
    demo = start(folder, HOME=str(Path.home()), SECRET_OF_THE_USER="is none of its business")
    out, err = demo.communicate(timeout=WITHIN_S)
    assert demo.returncode == 0, err + out
    told = [json.loads(line) for line in out.splitlines()]
    assert [step["step"] for step in told] == STEPS
    by_name = {step["step"]: step for step in told}
    assert by_name["shell.sent"]["files"] == ["~/.aws/credentials", "~/.netrc", "~/.ssh/id_ed25519"]
    assert "SECRET_OF_THE_USER" not in by_name["shell.sent"]["variables"]
    assert by_name["run.send_blocked"]["reasons"] == ["target_unknown"]
    for blocked in ("run.merge_blocked", "run.delete_blocked", "run.request_denied"):
        assert by_name[blocked]["reasons"] == ["beyond_scope"]
    assert any(HOOK_FILE in one for one in by_name["run.hook_reported"]["left"])
    assert by_name["run.commented"]["lease"] == by_name["lease.revoked"]["lease"]
    assert by_name["audit.nothing"]["events"] == 0
    (maria,) = by_name["audit.traced"]["trace"]["roots"]
    assert (maria["kind"], maria["id"]) == ("user", "maria")
    trail = json.dumps(maria)
    for action in (
        "did comment",
        "kept from merge",
        "kept from delete",
        "kept from a POST",
        "revoked (run_ended)",
    ):
        assert action in trail
    assert [row["in a run"] for row in by_name["compared"]["rows"]][2].startswith("blocked")


@pytest.mark.timeout(600)
def test_all_of_the_demo_fits_80_columns(folder: Path) -> None:
    terminal = Terminal(
        ["env", f"TMPDIR={folder}", *RINGFENCE, "demo", "--runner"],
        folder,
    )
    try:
        told = terminal.read_until(None)
        assert terminal.process.wait(WITHIN_S) == 0, told
    finally:
        terminal.kill()
    lines = terminal.lines()
    assert [line for line in lines if len(line) > 80] == []
    table = lines[next(number for number, line in enumerate(lines) if line.startswith("what ")) :]
    assert table[0].split("  ")[0] == "what"
    assert any("merged, as maria" in line and "blocked: beyond_scope" in line for line in table)


@pytest.mark.timeout(600)
def test_failed_demo_exits_1_and_ends_its_helpers(folder: Path) -> None:
    with start(folder) as demo:
        assert demo.stdout is not None
        assert any(json.loads(line)["step"] == "task.assigned" for line in demo.stdout)
        assert helpers(), "the one that the shell left"
        (attacker,) = [
            one for one in descendants(demo.pid) if "ringfence.dev.attacker_server" in one.cmdline()
        ]
        attacker.kill()
        _, said = demo.communicate(timeout=WITHIN_S)
    assert demo.returncode == 1
    assert "a server of the demo does not answer" in said
    assert "Traceback" not in said


@pytest.mark.timeout(600)
def test_demo_can_be_interrupted_during_a_run(folder: Path) -> None:
    with start(folder) as demo:
        assert demo.stdout is not None
        assert any(json.loads(line)["step"] == "task.assigned" for line in demo.stdout)
        children = descendants(demo.pid)
        demo.send_signal(signal.SIGINT)
        demo.communicate(timeout=WITHIN_S)
    assert demo.returncode == 130
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive


@pytest.mark.timeout(600)
def test_without_bubblewrap_it_says_what_to_install_before_anything_is_started(folder: Path) -> None:
    bin = folder / "bin"
    bin.mkdir()
    demo = start(folder, PATH=str(bin))
    out, said = demo.communicate(timeout=WITHIN_S)
    bin.rmdir()
    assert (demo.returncode, out) == (1, "")
    error = json.loads(said)
    assert error["code"] == "sandbox_unavailable"
    assert "apt install bubblewrap" in error["message"]
    assert "ringfence doctor" in error["remedy"]


async def test_without_control_groups_it_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await check_sandbox(tmp_path)
    (tmp_path / "mounted").rmdir()
    monkeypatch.setattr(runner_demo, "BubblewrapBackend", partial(BubblewrapBackend, use_cgroups=False))
    with pytest.raises(SandboxMissingError, match="memory") as refused:
        await check_sandbox(tmp_path)
    assert "systemd-run" in str(refused.value.remedy)


def test_runner_demo_refuses_interactive(tmp_path: Path) -> None:
    done = subprocess.run(
        [*RINGFENCE, "demo", "--runner", "--interactive"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2


# --- what it checks ---------------------------------------------------------------------------------------------------

TOKEN = "the access token"
LOOT = {"environment": {"CODE_HOST_TOKEN": TOKEN}, "files": {"a": "", "b": "", "c": ""}}
SHELL = Seen(
    loot=[LOOT],
    code_host={"comments": ["x"], "merged": True, "branches": ["main"], "log": []},
    hook=True,
    helper_began=True,
    helper_runs=True,
    said={},
)
RUN = replace(
    SHELL,
    code_host={
        "comments": ["x"],
        "merged": False,
        "branches": ["main", BRANCH],
        "log": [{"did": "comment", "by": "pr-reviewer", "on_behalf_of": "maria"}],
    },
    helper_runs=False,
    said={"search": {"files": [], "variables": []}, "send": {"ways": ["with the proxy", "without it"]}},
)
REASONS = [{"code": "x", "message": "x"}]
REPORT: dict[str, Any] = {
    "allowed": [{"status": "revoked", "ended_by": "run_ended"}],
    "denied": [
        {"what": "action", "destination": {"path": "/collect"}, "reasons": REASONS},
        {"what": "action", "verb": "merge", "reasons": REASONS},
        {"what": "action", "verb": "delete", "reasons": REASONS},
    ],
    "destroyed": {"complete": True, "left_in_mounts": [f"mount shop: {HOOK_FILE}"]},
}


def host(of: Seen, **changed: Any) -> Seen:
    return replace(of, code_host={**of.code_host, **changed})


@pytest.mark.parametrize(
    "seen",
    [
        replace(SHELL, loot=[]),
        replace(SHELL, loot=[{**LOOT, "files": {}}]),
        replace(SHELL, loot=[{**LOOT, "environment": {}}]),
        host(SHELL, comments=[]),
        host(SHELL, merged=False),
        host(SHELL, branches=["main", BRANCH]),
        replace(SHELL, hook=False),
        replace(SHELL, helper_runs=False),
    ],
)
def test_failed_attack_in_the_shell_ends_the_story(seen: Seen) -> None:
    check_shell(SHELL, TOKEN)
    with pytest.raises(StoryError):
        check_shell(seen, TOKEN)


@pytest.mark.parametrize(
    "seen",
    [
        replace(RUN, loot=[LOOT, LOOT]),
        replace(RUN, said={**RUN.said, "search": {"files": ["~/.netrc"], "variables": []}}),
        replace(RUN, said={**RUN.said, "search": {"files": [], "variables": ["CODE_HOST_TOKEN"]}}),
        replace(RUN, said={**RUN.said, "send": {"ways": ["with the proxy"]}}),
        host(RUN, comments=[]),
        host(RUN, log=[{"did": "comment", "by": "maria"}]),
        host(RUN, merged=True),
        host(RUN, branches=["main"]),
        replace(RUN, hook=False),
        replace(RUN, helper_began=False),
        replace(RUN, helper_runs=True),
    ],
)
def test_successful_attack_in_the_run_ends_the_story(seen: Seen) -> None:
    check_run(RUN, REPORT)
    with pytest.raises(StoryError):
        check_run(seen, REPORT)


BROKEN: dict[str, Callable[[], dict[str, Any]]] = {
    "no lease": lambda: {"allowed": []},
    "a lease that lives": lambda: {"allowed": [{"status": "live", "ended_by": None}]},
    "a merge that nobody blocked": lambda: {"denied": REPORT["denied"][:1] + REPORT["denied"][2:]},
    "a hook that nobody reported": lambda: {"destroyed": {"complete": True, "left_in_mounts": []}},
    "something that remained": lambda: {"destroyed": {**REPORT["destroyed"], "complete": False}},
}


@pytest.mark.parametrize("changed", BROKEN.values(), ids=BROKEN.keys())
def test_a_report_that_says_otherwise_ends_the_story(changed: Callable[[], dict[str, Any]]) -> None:
    with pytest.raises(StoryError):
        check_run(RUN, {**REPORT, **changed()})
