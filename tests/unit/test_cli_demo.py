"""Who is asked to press approve in the demo may also say no."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ringfence.cli.commands.demo import next_commands, press_approve
from ringfence.kernel.base.errors import RingfenceError

PENDING: Any = SimpleNamespace(scope=[SimpleNamespace(verbs=["deploy"])], agent="deploy-bot")


async def pressed(keys: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    with os.fdopen(read) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        if keys is not None:
            os.write(write, keys)
        os.close(write)
        await press_approve(PENDING)


@pytest.mark.parametrize("keys", [b"\n", b"y\n", b" YES \n"])
async def test_enter_or_yes_approves(
    keys: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    await pressed(keys, monkeypatch)
    asked = capsys.readouterr()
    assert (asked.out, asked.err) == ("", "  Approve deploy for deploy-bot? [Y/n] ")


@pytest.mark.parametrize(
    ("keys", "says"),
    [(b"n\n", "did not approve"), (None, "nobody is there"), (b"what?\n", "nobody is there")],
)
async def test_anything_else_does_not(
    keys: bytes | None, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RingfenceError, match=says):
        await pressed(keys, monkeypatch)
    assert capsys.readouterr().err.count("[Y/n]") == (2 if keys == b"what?\n" else 1)


def test_what_to_try_next_is_there_in_a_clone_and_elsewhere(tmp_path: Path) -> None:
    assert [line.split()[0] for line in next_commands(tmp_path)] == ["ringfence"] * 3
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/ringfence").touch()
    assert [line.split()[0] for line in next_commands(tmp_path)] == ["make", *[".venv/bin/ringfence"] * 2]
