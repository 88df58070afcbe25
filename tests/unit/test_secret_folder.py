"""The folder with one secret file for each target: a new file counts at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringfence.backends.secret_sources import AccessError, BackendSettings, TargetAccess


def write(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)


async def test_secret_of_a_new_target_needs_no_restart(tmp_path: Path) -> None:
    access = TargetAccess.of(BackendSettings(secrets=tmp_path))
    with pytest.raises(AccessError, match=f"or write the file {tmp_path / 'llm'}"):
        access.check("llm")
    write(tmp_path / "llm", "one\n")
    access.check("llm")
    assert await access.read("llm") == "one"
    write(tmp_path / "llm", "two")
    assert access.at_hand("llm") == "two"
    (tmp_path / "llm").unlink()
    with pytest.raises(AccessError):
        access.at_hand("llm")


def test_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "llm", "hush")
    (tmp_path / "llm").chmod(0o644)
    with pytest.raises(AccessError, match="can be read by others") as raised:
        TargetAccess.of(BackendSettings(secrets=tmp_path)).at_hand("llm")
    assert "hush" not in str(raised.value)


def test_named_place_counts_before_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "llm", "folder")
    write(tmp_path / "other", "named")
    access = TargetAccess.of(BackendSettings(access={"llm": f"file:{tmp_path / 'other'}"}, secrets=tmp_path))
    assert access.at_hand("llm") == "named"
