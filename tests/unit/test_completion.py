"""Completion of command lines: what is offered where, and that nothing of a stranger reaches a shell."""

from __future__ import annotations

import os
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

from ringfence.cli.completion import command_line
from ringfence.cli.completion.command import SCRIPTS, Shell
from ringfence.cli.completion.command_line import MAX_CANDIDATES, MAX_DESCRIPTION, Candidate, one_line, safe
from ringfence.cli.completion.complete import SOURCES, answer, complete, words_of
from ringfence.cli.main import COMMANDS, app, main
from ringfence.client.reports.read_api import ReadApi
from ringfence.kernel.crypto.keys import SigningKey

HELPS = {name: entry.help for name, entry in COMMANDS.items()}
ID = "3f2a9c1d-0a4d-5d39-9b5e-0a4d7e6c0f5d"
ROOT = typer.main.get_command(app)


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith("RINGFENCE_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def olga(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A person who is calling, by the settings."""
    file = tmp_path / "olga.json"
    SigningKey.generate("spiffe://ringfence.local/user/olga").save(file)
    monkeypatch.setenv("RINGFENCE_IDENTITY", str(file))
    return file


def offered(line: str) -> list[str]:
    """The words that are offered at the end of a line."""
    *before, current = command_line.split(line)
    return [
        one.value for one in complete(ROOT, HELPS, command_line.without_command(before), current).candidates
    ]


def kind(line: str) -> str:
    *before, current = command_line.split(line)
    return complete(ROOT, HELPS, command_line.without_command(before), current).kind


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ringfence ", ["ringfence", ""]),
        ("ringfence ag", ["ringfence", "ag"]),
        ("ringfence  task   sh", ["ringfence", "task", "sh"]),
        ("ringfence 'a b", ["ringfence", "a b"]),
        ("ringfence 'a b' ", ["ringfence", "a b", ""]),
        ('ringfence "a\\" b"c', ["ringfence", 'a" bc']),
        ("ringfence '' ", ["ringfence", "", ""]),
        ("ringfence a\\ b", ["ringfence", "a b"]),
        ("ringfence \\", ["ringfence", ""]),
        ("true && ringfence ag", ["ringfence", "ag"]),
        ("ringfence $(x) `y`", ["ringfence", "$(x)", "`y`"]),
    ],
)
def test_a_line_is_split_as_bash_does_and_nothing_is_expanded(line: str, words: list[str]) -> None:
    assert command_line.split(line) == words


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ringfence appr", ["approvals"]),
        ("RINGFENCE_KAFKA=x A= ringfence appr", ["approvals"]),
        ("ringfence --json appr", ["approvals"]),
        ("ringfence --identity x.json appr", ["approvals"]),
        ("ringfence --identity=x.json appr", ["approvals"]),
        ("ringfence approvals de", ["deny"]),
        ("ringfence --ver", ["--version"]),
        ("ringfence lease list --st", ["--status"]),
        ("ringfence lease list --status ", ["minting", "active", "ending"]),
        ("ringfence lease list --status=a", ["--status=active"]),
        ("ringfence lease list --wide --w", []),
        ("ringfence lease list --status active --st", []),
        ("ringfence task assign bot --allow a:b:c --allo", ["--allow", "--allow-nothing"][:1]),
        ("ringfence request --delivery ", ["agent", "gateway"]),
        ("ringfence user add maria --role ", ["sponsor", "operator", "auditor"]),
        ("ringfence user add maria --role sponsor --role ", ["operator", "auditor"]),
        ("ringfence serve registry pol", ["policy"]),
        ("ringfence serve registry reg", []),
        ("ringfence completion ", ["bash", "zsh", "fish"]),
        ("ringfence target add x --backend po", ["postgres"]),
        ("ringfence audit trace --kind ", ["lease", "request", "task", "agent", "user", "run"]),
        ("ringfence dev --no-s", ["--no-seed"]),
        ("ringfence nosuch ", []),
        ("ringfence agent register ", []),
        ("ringfence task assign bot --for ", []),
        ("ringfence approvals approve x -- --", []),
    ],
)
def test_commands_options_and_choices(line: str, expected: list[str]) -> None:
    assert offered(line) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ringfence --identity ", "files"),
        ("ringfence task list --identity=a", "files"),
        ("ringfence request --task x -- ", "files"),
        ("ringfence policy build ", "files"),
        ("ringfence policy test --bundle ", "folders"),
        ("ringfence dev --state ", "folders"),
        ("ringfence task assign bot --purpose ", "words"),
    ],
)
def test_files_and_folders_are_left_to_the_shell(line: str, expected: str) -> None:
    assert kind(line) == expected


def test_commands_and_options_have_descriptions() -> None:
    by_name = {one.value: one.description for one in complete(ROOT, HELPS, [], "").candidates}
    assert by_name["approvals"] == COMMANDS["approvals"].help
    options = complete(ROOT, HELPS, ["lease", "list"], "--").candidates
    assert all(one.description for one in options)


def parameters(command: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for param in command.params:
        yield path, param
    if hasattr(command, "list_commands"):
        for name in command.list_commands(None):
            yield from parameters(command.get_command(None, name), *path, name)


def test_every_placeholder_is_completed_or_said_not_to_be() -> None:
    seen = set()
    for path, param in parameters(ROOT):
        metavar = param.metavar
        if (
            metavar is None
            or command_line._choices(param)
            or (param.param_type_name == "option" and param.is_flag)
        ):
            continue
        if words_of(path).keys() & {metavar, param.opts[0]}:
            continue
        seen.add(metavar)
    # A message of `target add --request`, whose placeholder is its whole grammar; gateways that are being added.
    known = {"NAME", *(one for one in seen if one.startswith("'METHOD"))}
    known |= command_line.FILE_METAVARS | command_line.FOLDER_METAVARS | command_line.COMMAND_METAVARS
    assert seen - known - command_line.NOT_COMPLETED - SOURCES.keys() == set()
    assert (command_line.NOT_COMPLETED | SOURCES.keys()) - seen == set()


# Ids of a service, and who asks for them.


def registry(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> list[tuple[str, ...]]:
    """Let the services answer this, by the last part of the path. Returns what was asked, and by whom."""
    asked: list[tuple[str, ...]] = []

    async def get(self: ReadApi, service: str, *path: str, **query: Any) -> Any:
        asked.append((self.key.id, service, *path, *(str(value) for value in query.values() if value)))
        return answers[path[-1]]

    monkeypatch.setattr(ReadApi, "get", get)
    return asked


def agent(id: str, description: str = "a bot") -> dict[str, Any]:
    return {"state": {"agent_id": id, "status": "active", "sponsor": "sam", "description": description}}


def task(id: str, agent_id: str = "bot", status: str = "active", purpose: str = "to test") -> dict[str, Any]:
    return {
        "state": {
            "task_id": id, "agent_id": agent_id, "status": status, "purpose": purpose, "not_after": 4_000_000_000
        }
    }  # fmt: skip


def test_ids_are_looked_up_as_the_person_who_is_named(
    olga: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = registry(monkeypatch, agents={"agents": [agent("deploy-bot"), agent("review-bot")]})
    assert offered("ringfence agent show ") == ["deploy-bot", "review-bot"]
    assert offered("ringfence lease list --agent=dep") == ["--agent=deploy-bot"]
    sam = tmp_path / "sam.json"
    SigningKey.generate("spiffe://ringfence.local/user/sam").save(sam)
    assert offered(f"ringfence --identity {sam} agent show dep") == ["deploy-bot"]
    assert offered(f"ringfence agent show --identity={sam} dep") == ["deploy-bot"]
    people = [who.rpartition("/")[2] for who, *_ in asked]
    assert people == ["olga", "olga", "sam", "sam"]


def test_an_agents_tasks_are_looked_up_as_the_person_in_the_settings(
    olga: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bot = tmp_path / "bot.json"
    SigningKey.generate("spiffe://ringfence.local/agent/bot").save(bot)
    asked = registry(monkeypatch, tasks={"tasks": [task(ID), task(ID[:-1] + "e", status="ended")]})
    assert offered(f"ringfence --identity {bot} request --task 3f2") == [ID]
    assert asked == [("spiffe://ringfence.local/user/olga", "registry", "tasks", "bot")]
    # What has ended can still be looked at.
    assert offered("ringfence task show 3f2") == [ID, ID[:-1] + "e"]
    assert offered("ringfence task end 3f2") == [ID]


HOSTILE = [
    "$(touch pwned)", "`touch pwned`", "a;touch pwned", "a'b", 'a"b', "a b", "a\nb", "a\tb", "a|b", "a&b", "a>b",
    "a*", "a?", "{a,b}", "~root", "!!", "a\\b", "a$b", "#a", "-rf", "--yes", "\x1b[31ma", "a\u202eb", "bot\u0430",
    "", "a" * 200, "=ls", "a=b", "(a)", "[a]", "a%b", "^a", "../a b",
]  # fmt: skip


@pytest.mark.parametrize("shell", get_args(Shell))
def test_an_id_that_a_shell_could_read_is_never_offered(
    shell: str, olga: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry(monkeypatch, agents={"agents": [*map(agent, HOSTILE), agent("good-bot"), agent("good-bot")]})
    line = (
        ("", "ringfence agent show ", "63", "200") if shell == "bash" else ("ringfence", "agent", "show", "")
    )
    said = answer(ROOT, HELPS, [shell, *line])
    first, *candidates = said.splitlines()
    assert first == "words"
    assert len(candidates) == 1
    assert candidates[0].startswith("good-bot")


@pytest.mark.parametrize("shell", get_args(Shell))
@pytest.mark.parametrize("text", [*HOSTILE, "a:b\\:c", "x\r\nwords\nrm", "\x9b31m", "\u2028line", "字" * 100])
def test_a_description_is_one_line_that_acts_on_no_terminal(
    text: str, shell: str, olga: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry(monkeypatch, agents={"agents": [agent("bot-1", text), agent("bot-2", text)]})
    line = (
        ("", "ringfence agent show ", "63", "90") if shell == "bash" else ("ringfence", "agent", "show", "")
    )
    said = answer(ROOT, HELPS, [shell, *line])
    assert said.endswith("\n")
    first, *candidates = said[:-1].split("\n")
    assert first == "words"
    assert [one[:5] for one in candidates] == ["bot-1", "bot-2"]
    for candidate in candidates:
        after = candidate[6:] if shell == "fish" else candidate
        assert not {unicodedata.category(char) for char in after} & {"Cc", "Cf", "Zl", "Zp"}
        assert len(candidate) <= len("bot-1") + 2 + MAX_DESCRIPTION + 20


def test_bash_gets_descriptions_only_where_it_lists(olga: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry(monkeypatch, agents={"agents": [agent("deploy"), agent("deploy-bot"), agent("other")]})

    def reply(current: str, line: str, comp_type: int, columns: int = 100) -> list[str]:
        return answer(ROOT, HELPS, ["bash", current, line, str(comp_type), str(columns)]).splitlines()[1:]

    # What readline puts in is what all lines begin with: part of a value.
    both = reply("dep", "ringfence agent show dep", 9)
    assert [one.split("  ")[0] for one in both] == ["deploy", "deploy-bot"]
    assert both[1].startswith("deploy")
    assert both[0][len("deploy")] != both[1][len("deploy")]
    assert reply("o", "ringfence agent show o", 9) == ["other"]
    for inserts in (37, 42):  # menu-complete, insert-completions
        assert reply("dep", "ringfence agent show dep", inserts) == ["deploy", "deploy-bot"]
    assert reply("dep", "ringfence agent show dep", 63, columns=15) == ["deploy", "deploy-bot"]
    # Bash replaces what comes after the `=`, or the whole word where that ends none.
    assert reply("o", "ringfence lease list --agent=o", 9) == ["other"]
    assert reply("", "ringfence lease list --agent=", 37)[0] == "deploy"
    assert reply("--agent=o", "ringfence lease list --agent=o", 9) == ["--agent=other"]


def test_many_candidates_are_limited_and_long_text_costs_nothing() -> None:
    many = [Candidate(f"bot-{number}", "x") for number in range(MAX_CANDIDATES + 10)]
    assert len(safe(many)) == MAX_CANDIDATES
    assert len(one_line("\u202e" * 1_000_000)) == MAX_DESCRIPTION


# The program.


def ask(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ringfence.cli.main", "__complete", *words],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False, input="",
    )  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ("fish", "ringfence", "agent", "show", ""),  # nobody said who is calling
        ("fish", "ringfence", "--identity", "nowhere.json", "agent", "show", ""),
        ("fish", "ringfence", "approvals", "approve", ""),
        ("bash", "x"),
        ("bash", "", "ringfence ", "many", "80"),
        (),
        ("tcsh", "ringfence", ""),
    ],
)
def test_failing_completion_is_silent(words: tuple[str, ...]) -> None:
    done = ask(*words)
    assert done.returncode == 0
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) <= 1 or words[0] == "tcsh"


def test_a_service_that_does_not_answer_and_a_key_file_that_is_a_pipe_end_silently(
    olga: Path, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    for identity in (olga, pipe):
        done = ask(
            "fish", "ringfence", "--identity", str(identity), "agent", "show", "",
            RINGFENCE_REGISTRY_URL="http://127.0.0.1:9",
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("shell", get_args(Shell))
def test_the_command_prints_the_script_and_how_to_load_it(
    shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert script == SCRIPTS[shell]
    assert "eval" not in script
    assert main(["completion", "--help"]) == 0
    assert f"ringfence completion {shell}" in capsys.readouterr().out


def test_another_shell_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2
    assert "bash" in capsys.readouterr().err
