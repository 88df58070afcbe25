"""The findings of a scan's report that `ringfence adopt` can take, and the choice of one."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import typer

from ringfence.cli.adopt.adoption import AdoptStoppedError
from ringfence.cli.shared.output import say
from ringfence.kernel.base.strict_json import json_object
from ringfence.kernel.base.text import Lines
from ringfence.scan.findings import Pattern
from ringfence.scan.remedies import is_adoptable


def choose_finding(report: Path, field: str | None, *, ask: bool) -> tuple[Path, str]:
    """Return file and field of one finding of `ringfence scan --json`; asks where several are left.

    A report only points: the file is scanned again, and nothing else of the report is used. Raises AdoptStoppedError.
    """
    try:
        found = json_object(report.read_bytes())["findings"]
        ways = {
            (str(one["path"]), str(one["field"])): f"{one['title']}, {one['field']} in {one['path']}"
            for one in found
            if is_adoptable(one["reader"], Pattern(one["pattern"]), one["opens"].get("service"), one["kind"])
            and field in (None, one["field"])
        }
    except OSError as error:
        raise AdoptStoppedError(f"{report} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise AdoptStoppedError(f"{report} is no report; write one by: ringfence scan --json") from None
    if not ways:
        raise AdoptStoppedError(
            f"no finding of {report} has a way here; see the steps of: ringfence scan --details"
        )
    chosen = list(ways)
    if len(chosen) > 1:
        if not ask or not sys.stdin.isatty():
            commands = [
                f"ringfence adopt {shlex.quote(path)} --field {shlex.quote(name)}" for path, name in chosen
            ]
            raise AdoptStoppedError(
                Lines(["there are several findings; adopt one after the other:", *commands])
            )
        for number, text in enumerate(ways.values(), start=1):
            say(f"{number}. {text}")
        number = typer.prompt("Which one?", type=int)
        if not 1 <= number <= len(chosen):
            raise AdoptStoppedError(f"there is no number {number} in the list")
        chosen = [chosen[number - 1]]
    path, name = chosen[0]
    return Path(path).expanduser(), name
