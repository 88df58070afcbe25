"""The public contract is as `golden/public_names.txt` lists it: no name is gone or changed, and none is unlisted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.public_names import SNAPSHOT, Names, changed, new, read, updated, written

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found() -> Names:
    """What the code has. Collected in a process of its own, since every module of the package is imported for it."""
    made = subprocess.run(
        [sys.executable, "-m", "tools.public_names", "--json"], cwd=ROOT, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    names: Names = json.loads(made.stdout)
    return names


def test_every_public_name_is_there_unchanged(found: Names) -> None:
    problems = changed(read(SNAPSHOT), found)
    assert not problems, "\n".join(problems)


def test_no_public_name_is_unlisted(found: Names) -> None:
    problems = new(read(SNAPSHOT), found)
    assert not problems, "\n".join(problems)


def test_the_list_is_sorted_and_lists_each_name_once() -> None:
    assert SNAPSHOT.read_text() == written(read(SNAPSHOT))


LISTED = {"metric a": "counter", "metric b": "gauge", "error code c": ""}


def test_removed_or_changed_public_name_is_reported() -> None:
    assert changed(LISTED, LISTED) == []
    assert changed(LISTED, LISTED | {"metric b": "counter"}) == [
        "changed: metric b\n  was gauge\n  is  counter"
    ]
    assert changed(LISTED, {"metric a": "counter", "metric b": "gauge"}) == ["gone: error code c"]


def test_new_public_name_is_reported_with_its_command() -> None:
    (problem,) = new(LISTED, LISTED | {"metric d": "gauge"})
    assert "metric d" in problem
    assert "python -m tools.public_names --write" in problem


def test_writing_adds_and_neither_changes_nor_removes() -> None:
    code = {"metric a": "gauge", "metric b": "gauge", "metric d": ""}
    assert updated(LISTED, code, write=True) == LISTED | {"metric d": ""}


def test_a_name_is_removed_by_name_alone_and_replaced_where_it_changed() -> None:
    code = {"metric a": "gauge", "metric b": "gauge"}
    assert updated(LISTED, code, write=False, remove=["error code c"]) == {
        "metric a": "counter",
        "metric b": "gauge",
    }
    assert updated(LISTED, code, write=True, remove=["metric a"]) == LISTED | {"metric a": "gauge"}


@pytest.mark.parametrize("name", ["metric b", "metric z"])
def test_unchanged_or_unlisted_name_cannot_be_removed(name: str) -> None:
    with pytest.raises(LookupError, match=name):
        updated(LISTED, LISTED, write=True, remove=[name])


def test_the_list_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text(written(LISTED))
    assert read(file) == LISTED
    assert file.read_text().splitlines()[-3:] == ["error code c", "metric a: counter", "metric b: gauge"]
