"""The commands of docs/runs.md and docs/fleets.md, run as their readers run them, on a running stack."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runner.fleet import Fleet
from tests.runner.installation import PROGRAM, WITHIN_S, Installation, until

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
    assert "eyJ" in reader.succeeds(second, "maria"), "it shows the credential"
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
