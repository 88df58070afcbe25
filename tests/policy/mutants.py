"""Small mistakes in the text of a bundle, one at a time: what somebody might get wrong in a rule of it, or slip in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ringfence.rego.bundle import Module

_NO_START = ("#", "package ", "import ", "}", "]", ")", "\t", " ")
_STRING = re.compile(r'"([^"\\ ]*)"')
_NUMBER = re.compile(r"(?<![\w.\"-])(\d+)(?![\w.\"-])")
_SWAPS = (
    (" == ", " != "),
    (" <= ", " < "),
    (" < ", " <= "),
    (" > ", " >= "),
    (" >= ", " > "),
    (" - ", " + "),
    (" & ", " | "),
    ("if not ", "if "),
    ("\tnot ", "\t"),
    ('"%v"', '"x"'),
    (": code,", ": message,"),
)
_SET = re.compile(r":= \{\w+ \|.*\}", re.DOTALL)
_PART = re.compile(r"\bdata\.ringfence\.\w+\.(?:deny|lacking|required)\b")


@dataclass(frozen=True)
class Mutant:
    """A module with one mistake in it."""

    file: str
    rule: str
    """The first line of the rule, and its number."""
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}, {self.rule}: {self.what}"


def rules_of(module: Module) -> Iterator[tuple[str, int, int]]:
    """Each rule of a module: its first line with the line's number, where it begins and where it ends in the text."""
    _, text = module
    starts, at = [], 0
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if line.strip() and not line.startswith(_NO_START):
            starts.append((f"line {number}, {line.strip()[:60]}", at))
        at += len(line)
    for (name, start), end in zip(starts, [*(start for _, start in starts[1:]), len(text)], strict=True):
        yield name, start, end


def mutants_of(module: Module) -> Iterator[Mutant]:
    """Every mutant of a module. Some do not compile: those are none."""
    file, text = module
    for name, start, end in rules_of(module):
        rule = "".join(line for line in text[start:end].splitlines(keepends=True) if not line.startswith("#"))
        for what, changed in _changes(rule):
            yield Mutant(file, name, what, text[:start] + changed + text[end:])


def _changes(rule: str) -> Iterator[tuple[str, str]]:
    if not rule.startswith("default "):
        yield "gone", ""
    if _SET.search(rule):
        yield "empty", _SET.sub(":= set()", rule)
    yield from _never(rule)
    for old, new in _SWAPS:
        for match in re.finditer(re.escape(old), rule):
            yield f"{old.strip()} becomes {new.strip()}", rule[: match.start()] + new + rule[match.end() :]
    for match in _STRING.finditer(rule):
        if not match[0].startswith('"%') and not rule[match.end() :].startswith(":"):
            yield f"{match[0]} becomes another", f'{rule[: match.start()]}"mutant"{rule[match.end() :]}'
    for match in _NUMBER.finditer(rule):
        for value in (int(match[1]) + 1, int(match[1]) - 1):
            yield f"{match[1]} becomes {value}", rule[: match.start()] + str(value) + rule[match.end() :]
    for match in _PART.finditer(rule):
        yield f"without {match[0]}", rule[: match.start()] + "set()" + rule[match.end() :]
    for old, new in (("true", "false"), ("false", "true")):
        for match in re.finditer(rf"\b{old}\b", rule):
            yield f"{old} becomes {new}", rule[: match.start()] + new + rule[match.end() :]
    lines = rule.splitlines(keepends=True)
    for number, line in enumerate(lines[1:], 1):
        if line.startswith("\t"):
            yield f"without {line.strip()}", "".join([*lines[:number], *lines[number + 1 :]])


def _never(rule: str) -> Iterator[tuple[str, str]]:
    if " if {" in rule:
        yield "never", rule.replace(" if {", " if {\n\t1 == 2", 1)
    elif " if " in rule:
        yield "never", re.sub(r" if .*", " if 1 == 2", rule, count=1)
        yield "always", re.sub(r" if .*", " if 1 == 1", rule, count=1)
