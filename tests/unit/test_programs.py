"""Lookup of programs, by Ringfence and by its children, without PATH entries that depend on the working directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ringfence.kernel.base.programs import find_program, search_path
from ringfence.runner.sandbox.bubblewrap import BubblewrapBackend
from ringfence.runner.sandbox.machine import bubblewrap_obstacles, bubblewrap_version
from ringfence.scan.external_scanners import DetectSecretsAdapter, places_of

DEPENDENT = ("", ".", "./node_modules/.bin", "node_modules/.bin")


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which somebody left programs that write `ran`."""
    folder = tmp_path / "repository"
    for place in (folder, folder / "node_modules/.bin"):
        place.mkdir(parents=True)
        for name in ("bwrap", "podman", "python3", "detect-secrets"):
            (place / name).write_text(f"#!/bin/sh\necho ran >>{tmp_path}/ran\necho bubblewrap 9.9\n")
            (place / name).chmod(0o755)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("entry", DEPENDENT)
def test_program_in_an_entry_that_depends_on_the_working_directory_is_not_found(
    planted: Path, monkeypatch: pytest.MonkeyPatch, entry: str
) -> None:
    monkeypatch.setenv("PATH", os.pathsep.join((entry, "/nonexistent")))
    assert search_path() == "/nonexistent"
    assert find_program("bwrap") is None
    assert find_program("./bwrap") is None
    assert find_program("node_modules/.bin/bwrap") is None
    assert find_program(str(planted / "bwrap")) == str(planted / "bwrap")


@pytest.mark.parametrize("entry", DEPENDENT)
async def test_planted_bwrap_is_not_run(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str
) -> None:
    monkeypatch.setenv("PATH", os.pathsep.join((entry, "/nonexistent")))
    assert bubblewrap_version() is None
    assert bubblewrap_obstacles() == ["bwrap is not installed: apt install bubblewrap"]
    assert (
        "bwrap is not installed: apt install bubblewrap"
        in await BubblewrapBackend(tmp_path / "state").available()
    )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("entry", DEPENDENT)
def test_scanner_does_not_resolve_its_interpreter_in_the_scanned_folder(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str
) -> None:
    program = tmp_path / "bin/detect-secrets"
    program.parent.mkdir()
    program.write_text("#!/usr/bin/env python3\nprint('{\"results\": {}}')\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join((entry, str(program.parent), "/usr/bin", "/bin")))
    assert places_of(DetectSecretsAdapter(), [str(planted)]) == []
    assert not (tmp_path / "ran").exists()
