"""The options that sinks hand to librdkafka, by the real one, which is in kcat: it refuses what it does not know."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

SIEM = Path(__file__).parents[2] / "deploy/siem"
NOWHERE = "127.0.0.1:1"
OF_FLUENT_BIT = re.compile(r"^[ #]*rdkafka\.([a-z.]+): *(\S+)$", re.MULTILINE)
OF_VECTOR = re.compile(r"^ +(isolation\.level): *(\S+)$", re.MULTILINE)
IN_PROSE = re.compile(r"rdkafka\.([a-z.]+): (\w+), and$", re.MULTILINE)


def options() -> Iterator[tuple[str, str, str]]:
    """File, name and value of each, also of those that are comments."""
    for name, patterns in (("fluent-bit.yaml", (OF_FLUENT_BIT, IN_PROSE)), ("vector.yaml", (OF_VECTOR,))):
        text = (SIEM / name).read_text()
        for pattern in patterns:
            yield from ((name, option, value) for option, value in pattern.findall(text))


def said(option: str, value: str) -> str:
    kcat = shutil.which("kcat")
    assert kcat, "kcat is not installed; on Debian: apt-get install kcat"
    command = [kcat, "-b", NOWHERE, "-L", "-m", "1", "-X", f"{option}={value}"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stderr


@pytest.mark.tools
@pytest.mark.parametrize(("file", "option", "value"), list(options()))
def test_librdkafka_knows_the_option_and_its_value(file: str, option: str, value: str) -> None:
    answer = said(option, value)
    assert "No such configuration property" not in answer, answer
    assert "Invalid value" not in answer, answer


@pytest.mark.tools
def test_librdkafka_rejects_unknown_options() -> None:
    assert "No such configuration property" in said("isolation.levels", "read_committed")
    assert "Invalid value" in said("isolation.level", "committed")


def test_the_options_are_found() -> None:
    found = {(file, option) for file, option, _ in options()}
    assert {("fluent-bit.yaml", "isolation.level"), ("vector.yaml", "isolation.level")} <= found
    assert len(found) >= 9
