"""`make mutants`: puts mistakes into the modules that decide, one at a time, and counts those that a unit test finds.

Fails below 90 % killed in a module, and where what survives is not what `survivors.toml` lists and explains.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.mutants import survivors
from tests.mutants.modules import MODULES
from tests.mutants.mutation import MutantId, mutants_of
from tests.mutants.process import PACKAGE, ROOT, BrokenTestsError, Verdict, judge

REQUIRED_PERCENT = 90


@dataclass(frozen=True, slots=True)
class Result:
    """What became of the mutants of one module."""

    module: str
    verdicts: dict[MutantId, Verdict]
    seconds: float

    @property
    def survived(self) -> list[MutantId]:
        return [id for id, verdict in self.verdicts.items() if verdict == "survived"]

    @property
    def percent(self) -> float:
        return _percent(len(self.verdicts) - len(self.survived), len(self.verdicts))


def _percent(killed: int, of: int) -> float:
    return 100 * killed / of if of else 100.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument("modules", nargs="*", help="only these, as in: model/scope/rule.py")
    parser.add_argument("--jobs", type=int, default=2, help="how many mutants run at a time (default: 2)")
    parser.add_argument("--refresh", action="store_true", help="write what survives to survivors.toml")
    parser.add_argument("--all-survivors", action="store_true", help="print the listed ones too")
    options = parser.parse_args(arguments)
    if unknown := set(options.modules) - MODULES.keys():
        parser.error(f"no such module: {', '.join(sorted(unknown))}; there are {', '.join(MODULES)}")
    chosen = [module for module in MODULES if module in options.modules or not options.modules]
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="ringfence-mutants-") as folder:
        os.environ |= {"TMPDIR": folder, "HYPOTHESIS_STORAGE_DIRECTORY": f"{folder}/hypothesis"}
        tempfile.tempdir = None
        listed = survivors.read()
        results = [_run(module, options.jobs, Path(folder), listed) for module in chosen]
    return _report(results, refresh=options.refresh, show_listed=options.all_survivors)


def _run(module: str, at_once: int, folder: Path, listed: Collection[MutantId]) -> Result:
    begun = time.monotonic()
    mutants = mutants_of(module, (PACKAGE / module).read_text())
    log = folder / "log"
    log.write_bytes(b"")
    tests = [f"tests/unit/{name}" for name in MODULES[module]]
    verdicts: dict[MutantId, Verdict] = {}
    try:
        for mutant, verdict in judge(module, mutants, tests, at_once, log):
            verdicts[mutant.id] = verdict
            if verdict == "survived" and mutant.id not in listed:
                print(_named("survived, and is not listed", mutant.id), file=sys.stderr, flush=True)
            if sys.stderr.isatty():
                print(f"\r{module} {len(verdicts)}/{len(mutants)} ", end="", file=sys.stderr, flush=True)
    except BrokenTestsError:
        print(log.read_text(errors="replace")[-4000:], file=sys.stderr)
        raise SystemExit(f"{module}: its tests fail without any mutant, see above") from None
    result = Result(module, {mutant.id: verdicts[mutant.id] for mutant in mutants}, time.monotonic() - begun)
    _print_line(result.module, [result], result.seconds)
    return result


def _print_line(name: str, results: Sequence[Result], seconds: float) -> None:
    verdicts = [verdict for result in results for verdict in result.verdicts.values()]
    survived, late = verdicts.count("survived"), verdicts.count("timeout")
    killed = len(verdicts) - survived
    print(
        f"{name:22} {len(verdicts):5} mutants {killed:5} killed ({late} by a limit) {survived:4} survived "
        f"{_percent(killed, len(verdicts)):6.1f} % {seconds:5.0f} s",
        flush=True,
    )


def _report(results: Sequence[Result], *, refresh: bool, show_listed: bool) -> int:
    if len(results) > 1:
        _print_line("total", results, sum(result.seconds for result in results))
    listed = survivors.read()
    modules = {result.module for result in results}
    survived = [id for result in results for id in result.survived]
    if refresh:
        others = {id: reason for id, reason in listed.items() if id.module not in modules}
        listed = others | {id: listed.get(id, "") for id in survived}
        survivors.write(listed, MODULES)
    verdicts = {id: verdict for result in results for id, verdict in result.verdicts.items()}
    problems = [
        f"{result.module}: {result.percent:.1f} % killed, {REQUIRED_PERCENT} % are required"
        for result in results
        if result.percent < REQUIRED_PERCENT
    ]
    for id in survived:
        if id not in listed:
            problems.append(f"{id.module} {id.where or 'module'}: a survivor that is not listed, see above")
        elif not listed[id].strip():
            problems.append(_named("survived, and is listed without a reason", id))
        elif show_listed:
            print(_named(f"listed: {listed[id]}", id))
    for id in listed:
        if id.module in modules | (set(listed_modules(listed)) - MODULES.keys()) and id not in survived:
            what = "was killed" if id in verdicts else "is no mutant any more"
            problems.append(_named(f"is listed, and {what}: --refresh removes it", id))
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def listed_modules(listed: dict[MutantId, str]) -> set[str]:
    return {id.module for id in listed}


def _named(what: str, id: MutantId) -> str:
    nth = f" (number {id.nth} of these)" if id.nth > 1 else ""
    return f"{id.module} {id.where or 'module'}{nth}: {what}\n  - {id.old}\n  + {id.new}"


if __name__ == "__main__":
    sys.exit(main())
