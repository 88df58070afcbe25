"""What is installed, and by which hashes: the locks, the Makefile and the scripts of the gate."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tomllib
from importlib.metadata import requires
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ringfence.dev.processes import StackError
from tests.brokers import apache

ROOT = Path(__file__).parents[2]
LOCKS = sorted([*ROOT.glob("requirements*.lock"), *ROOT.glob(".ci/*.txt")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


class Pin(NamedTuple):
    requirement: Requirement
    hashes: frozenset[str]


def pins(lock: Path) -> dict[str, Pin]:
    """The entries of a lock by the names of their packages."""
    text = re.sub(r"^\s*#.*\n", "", lock.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, Pin] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        requirement, *hashes = line.split(" --hash=")
        pin = Pin(Requirement(requirement.strip()), frozenset(map(str.strip, hashes)))
        found[canonicalize_name(pin.requirement.name)] = pin
    return found


def needed_here(roots: list[str]) -> set[str]:
    """All packages that these requirements lead to on this machine, by what is installed; not the project."""
    own = canonicalize_name(PROJECT["project"]["name"])
    waiting, seen, names = [(Requirement(root), "") for root in roots], set[tuple[str, str]](), set[str]()
    while waiting:
        requirement, of_extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": of_extra}):
            continue
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            if name == own:
                more = PROJECT["project"]["dependencies" if not extra else "optional-dependencies"]
                waiting += [(Requirement(one), "") for one in (more[extra] if extra else more)]
            else:
                names.add(name)
                waiting += [(Requirement(one), extra) for one in requires(name) or ()]
    return names


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_pin_has_one_version_and_its_hashes(lock: Path) -> None:
    found = pins(lock)
    assert found
    for name, pin in found.items():
        assert [one.operator for one in pin.requirement.specifier] == ["=="], name
        assert pin.hashes, name
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", one) for one in pin.hashes), name


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_no_lock_names_a_registry(lock: Path) -> None:
    assert not re.search(r"https?://|--(extra-)?index-url|--find-links", lock.read_text())


def test_the_demo_has_the_very_versions_and_hashes_of_the_whole_lock() -> None:
    whole, demo = pins(ROOT / "requirements.lock"), pins(ROOT / "requirements-demo.lock")
    for name, pin in demo.items():
        assert (pin.requirement.specifier, pin.hashes) == (
            whole[name].requirement.specifier,
            whole[name].hashes,
        ), name


def test_the_demo_installs_what_it_needs_and_nothing_else() -> None:
    here = {
        name
        for name, pin in pins(ROOT / "requirements-demo.lock").items()
        if pin.requirement.marker is None or pin.requirement.marker.evaluate()
    }
    assert here == needed_here(["ringfence[dev]", *PROJECT["build-system"]["requires"]])
    assert not here & {"mypy", "pytest", "mcp", "ruff"}


def test_no_script_installs_what_no_hash_covers() -> None:
    scripts = [
        ROOT / "Makefile",
        ROOT / "deploy/Dockerfile",
        *(p for p in (ROOT / ".ci").iterdir() if p.is_file()),
    ]
    installs = list[str]()
    for script in scripts:
        text = re.sub(r"^#.*", "", script.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
        installs += re.findall(r"\bpip(?:\"|')? (?:install|download|wheel) [^&\n]*", text)
    assert len(installs) >= 8
    covered = ("--require-hashes", "--no-index", "--no-deps --no-build-isolation -e .")
    assert [one for one in installs if not any(way in one for way in covered)] == []


def test_a_jar_that_is_another_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jars = tmp_path / "jars"
    jars.mkdir()
    (jars / "kafka.jar").write_bytes(b"kafka")
    sums = tmp_path / "jars.sha256"
    sums.write_text(f"{hashlib.sha256(b'kafka').hexdigest()}  kafka.jar\n")
    monkeypatch.setattr(apache, "SUMS", sums)
    apache.check_jars(jars)
    (jars / "more.jar").write_bytes(b"")
    with pytest.raises(StackError, match=r"more\.jar"):
        apache.check_jars(jars)
    (jars / "more.jar").unlink()
    (jars / "kafka.jar").write_bytes(b"another")
    with pytest.raises(StackError, match=r"kafka\.jar"):
        apache.check_jars(jars)


def test_every_jar_of_kafka_is_listed() -> None:
    names = [line.split("  ")[1] for line in apache.SUMS.read_text().splitlines()]
    version = re.search(r"<kafka\.version>(.+)</", apache.POM.read_text())
    assert version is not None
    assert f"kafka_2.13-{version[1]}.jar" in names


GO_MODULES = {
    "tests/policy/opa": "opa",
    "tests/kubernetes/apiserver": "go-program",
    "tests/kubernetes/helm": "go-program",
}
"""Folders with a module in Go, and the script of .ci that builds it."""


@pytest.mark.parametrize(("folder", "builder"), GO_MODULES.items())
def test_programs_in_go_are_built_by_hashes(folder: str, builder: str) -> None:
    sums = dict(line.rsplit(" ", 1) for line in (ROOT / folder / "go.sum").read_text().splitlines())
    assert all(value.startswith("h1:") for value in sums.values())
    for module, version in re.findall(
        r"^(?:require )?\t?(\S+) (v\S+)", (ROOT / folder / "go.mod").read_text(), re.M
    ):
        assert f"{module} {version}" in sums, module
    script = (ROOT / ".ci" / builder).read_text()
    assert "-mod=readonly" in script
    assert "go install" not in script


def test_go_builds_only_the_modules_of_this_clone() -> None:
    scripts = {script.name: script.read_text() for script in (ROOT / ".ci").iterdir() if script.is_file()}
    assert {name for name, text in scripts.items() if "go build" in text} == set(GO_MODULES.values())


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The Makefile with the files that decide what is installed, older than anything that is made."""
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "requirements-demo.lock"):
        (tmp_path / name).write_text((ROOT / name).read_text())
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / ".venv").mkdir()
    return tmp_path


def would_install(clone: Path, target: str) -> list[str]:
    """The locks that `make TARGET` would install from, in order."""
    done = subprocess.run(["make", "-n", target], cwd=clone, capture_output=True, text=True, check=True)
    return re.findall(r"-r +(requirements\S*\.lock)", done.stdout)


def test_the_demo_installs_its_own_lock_and_tests_add_the_rest(clone: Path) -> None:
    for target in ("demo", "dev"):
        assert would_install(clone, target) == ["requirements-demo.lock"]
    for target in ("test", "lint", "bench", ".venv/.stamp"):
        assert would_install(clone, target) == ["requirements-demo.lock", "requirements.lock"]


def test_installed_requirements_are_not_installed_again(clone: Path) -> None:
    (clone / ".venv/.stamp-demo").touch()
    assert would_install(clone, "demo") == []
    assert would_install(clone, "test") == ["requirements.lock"]
    (clone / ".venv/.stamp").touch()
    for target in ("test", "demo", "lint"):
        assert would_install(clone, target) == []
