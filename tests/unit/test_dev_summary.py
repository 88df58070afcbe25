"""What `ringfence dev` prints: it fits 80 columns, and a path that needs quotes has them."""

from __future__ import annotations

import json
import shlex
import subprocess
import uuid
from pathlib import Path

import pytest
import typer

from ringfence.cli.commands.dev import _secret_places, command_lines, organisation_lines, shell_file
from ringfence.dev.organisation import PEOPLE

TASK = str(uuid.uuid4())


def test_all_of_it_fits_80_columns() -> None:
    lines = [
        *organisation_lines("olga", TASK),
        *command_lines(Path("/home/maria/ringfence"), Path(".ringfence"), TASK),
    ]
    assert [line for line in lines if len(line) > 80] == []


def test_summary_names_everything_that_was_made() -> None:
    told = "\n".join(organisation_lines("olga", TASK))
    for name in ("olga", *(person.id for person in PEOPLE), "platform", "deploy-bot", "review-bot", TASK):
        assert name in told


def test_an_operator_alone_is_all_where_nothing_else_was_made() -> None:
    (line,) = organisation_lines("olga", None)
    assert line.split() == ["olga", "operator:", "sets", "up", "users", "and", "targets"]
    commands = list(command_lines(Path("/x"), Path(".ringfence"), None))
    assert commands[-1] == "  ringfence inventory"
    assert "task" not in "\n".join(commands)


@pytest.mark.parametrize("name", ["plain", "two words", "it's", "$HOME", "a;b"])
def test_sourced_shell_file_works_in_any_path(name: str, tmp_path: Path) -> None:
    state = tmp_path / name
    state.mkdir()
    (state / "dev.sh").write_text(shell_file(state, "users/sam.json"))
    first = next(line for line in command_lines(tmp_path, Path(name), TASK) if line.startswith("  cd "))
    show = "command -v ringfence; echo $RINGFENCE_CONFIG; echo $RINGFENCE_IDENTITY; pwd"
    done = subprocess.run(
        ["/bin/bash", "-c", f"set -e; {first}; {show}"], capture_output=True, text=True, check=True
    )
    program, config, identity, folder = done.stdout.splitlines()
    assert program.endswith("/ringfence")
    assert (config, identity) == (str(state / "ringfence.toml"), str(state / "users/sam.json"))
    assert folder == str(tmp_path)


def test_control_characters_in_a_path_are_not_printed() -> None:
    lines = list(command_lines(Path("/tmp/\x1b[2J"), Path(".ringfence"), TASK))
    assert "\x1b" not in "".join(lines)
    assert shlex.split(lines[1]), "and the line is still one for a shell"


def test_secrets_of_targets_are_named_by_their_places(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RINGFENCE_BACKENDS_ACCESS", '{"shop": "env:SHOP"}')
    assert _secret_places([]) == {}
    places = json.loads(_secret_places(["hub=file:hub.token", "llm=env:LLM"])["RINGFENCE_BACKENDS_ACCESS"])
    assert places == {"shop": "env:SHOP", "hub": f"file:{tmp_path / 'hub.token'}", "llm": "env:LLM"}


@pytest.mark.parametrize(
    "text", ["sk-secret", "hub=sk-secret", "hub=vault:sk-secret", "hub=file:", "=env:sk-secret"]
)
def test_secret_that_is_no_place_is_refused_and_not_quoted(text: str) -> None:
    with pytest.raises(typer.BadParameter) as refusal:
        _secret_places([text])
    assert "sk-secret" not in str(refusal.value)
