"""Who is asked for approval in the demo says no unless they type yes."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ringfence.cli.commands.demo import ask_approval, next_commands

PENDING: Any = SimpleNamespace(scope=[SimpleNamespace(verbs=["deploy"])], agent="deploy-bot")


async def pressed(keys: bytes | None, monkeypatch: pytest.MonkeyPatch) -> bool:
    read, write = os.pipe()
    with os.fdopen(read) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        if keys is not None:
            os.write(write, keys)
        os.close(write)
        return await ask_approval(PENDING)


@pytest.mark.parametrize("keys", [b"y\n", b" YES \n"])
async def test_only_a_yes_approves(
    keys: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await pressed(keys, monkeypatch)
    asked = capsys.readouterr()
    assert (asked.out, asked.err) == ("", "  Approve deploy for deploy-bot? [y/N] ")


@pytest.mark.parametrize("keys", [b"\n", b"n\n", b"No\n", None, b"what?\n"])
async def test_enter_and_the_end_of_input_are_a_no(
    keys: bytes | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not await pressed(keys, monkeypatch)
    assert capsys.readouterr().err.count("[y/N]") == (2 if keys == b"what?\n" else 1)


def test_next_commands_fit_a_clone_and_an_installation(tmp_path: Path) -> None:
    assert [line.split()[0] for line in next_commands(tmp_path)] == ["ringfence"] * 3
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/ringfence").touch()
    assert [line.split()[0] for line in next_commands(tmp_path)] == ["make", *[".venv/bin/ringfence"] * 2]
