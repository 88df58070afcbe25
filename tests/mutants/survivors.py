"""The list of mutants that no unit test kills: which they are, and why each is equivalent or harmless."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.mutants.mutation import MutantId

FILE = Path(__file__).with_name("survivors.toml")
_HEAD = """\
# Mutants that survive the unit tests of their module, with the reason why each is equivalent (it behaves the same) or
# harmless. `make mutants` holds this list against what it finds; `make mutants ARGS="--refresh"` rewrites it, keeps the
# reasons of those that still survive, and leaves a new one's empty: kill it with a test, or give the reason.
"""


def read(file: Path = FILE) -> dict[MutantId, str]:
    """Each listed mutant, with its reason."""
    if not file.exists():
        return {}
    entries = tomllib.loads(file.read_text()).get("survivor", [])
    return {
        MutantId(one["module"], one["where"], one["old"], one["new"], one.get("nth", 1)): one["reason"]
        for one in entries
    }


def write(survivors: Mapping[MutantId, str], modules: Iterable[str], file: Path = FILE) -> None:
    """Write the list, in the order of `modules`."""
    place = {module: number for number, module in enumerate(modules)}
    parts = [_HEAD]
    for id, reason in sorted(
        survivors.items(), key=lambda one: (place.get(one[0].module, len(place)), one[0].where)
    ):
        fields = {"module": id.module, "where": id.where, "old": id.old, "new": id.new}
        lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
        if id.nth > 1:
            lines.append(f"nth = {id.nth}")
        parts.append(
            "\n".join(["[[survivor]]", *lines, f"reason = {json.dumps(reason, ensure_ascii=False)}", ""])
        )
    file.write_text("\n".join(parts))
