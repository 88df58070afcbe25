"""Ids that cannot be any are wrong use: nobody is asked, and the exit status says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ringfence.cli.main import COMMANDS, load, main

IDS = {"AGENT", "USER", "PROVISIONER", "TARGET", "TASK", "[TASK]", "LEASE", "GRANT", "REQUEST"}


def commands(command: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    under = getattr(command, "commands", None)
    if under is None:
        yield path, command
    for name, one in (under or {}).items():
        yield from commands(one, *path, name)


def test_no_command_takes_just_anything_for_an_id(capsys: pytest.CaptureFixture[str]) -> None:
    seen = set()
    for name, entry in COMMANDS.items():
        for path, command in commands(load(name, entry), name):
            for param in command.params:
                if param.metavar not in IDS or param.multiple:
                    continue
                seen.add(param.metavar)
                # What is there is looked at before what is missing besides.
                said = ["no id"] if param.param_type_name == "argument" else [param.opts[0], "no id"]
                assert (main([*path, *said]), path, param.name) == (2, path, param.name)
                assert "'no id'" in capsys.readouterr().err, (path, param.name)
    assert seen == IDS


@pytest.mark.parametrize(
    ("args", "status"),
    [
        (["lease", "show", "5F0C0E6E-0000-4000-8000-000000000000"], 2),
        (["approvals", "show", "5f0"], 2),
        (["approvals", "show", "5f0c"], 1),
        (["lease", "show", "5f0c0e6e-0000-4000-8000-000000000000"], 1),
    ],
)
def test_what_could_be_an_id_is_asked_for(
    args: list[str], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RINGFENCE_IDENTITY", "RINGFENCE_TRUST_ROOT", "RINGFENCE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    assert main(args) == status
