"""`ringfence policy`: test the rules, show OPA's input, explain a decision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ringfence.cli.commands.policy_explain import explain
from ringfence.cli.commands.policy_replay import replay
from ringfence.cli.shared.options import JsonOption, wants_json
from ringfence.cli.shared.output import print_json, print_table, say
from ringfence.cli.shared.output_files import is_stdout, output_file, write_output
from ringfence.cli.shared.tables import prose
from ringfence.kernel.base.errors import RingfenceError

app = typer.Typer(
    help="The rules: run their tests, pack them for OPA, replay what was decided, explain a decision.",
    no_args_is_help=True,
)
app.command()(replay)
app.command()(explain)

BundleOption = Annotated[
    Path | None,
    typer.Option(
        "--bundle",
        metavar="DIR",
        help="The folder of the bundle; the one that comes with Ringfence if not given.",
    ),
]


@app.command(name="test")
def run_bundle_tests(
    bundle: BundleOption = None,
    minimum: Annotated[
        float,
        typer.Option("--coverage", metavar="PERCENT", min=0, max=100, help="Fail below this share of lines."),
    ] = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Run the tests of a bundle (every rule `test_...` in its files `*_test.rego`), and show what they cover.

    Exits 1 if a test fails, or if there is none. A running policy uses no bundle that fails its tests.
    """
    from ringfence.rego.bundle import load_bundle
    from ringfence.rego.engine import ISSUANCE
    from ringfence.rego.regorus_programs import compiled, run_tests

    loaded = load_bundle(bundle)
    compiled(loaded.modules, ISSUANCE)
    tested, covered = run_tests(loaded.modules, loaded.tests, coverage=True)
    passed = sum(one.passed for one in tested)
    lines = sum(len(one.covered) + len(one.missed) for one in covered)
    percent = 100 * sum(len(one.covered) for one in covered) / lines if lines else 100.0
    if wants_json(as_json):
        print_json(
            {
                "revision": loaded.revision,
                "passed": passed,
                "failed": len(tested) - passed,
                "tests": [{"name": t.name, "passed": t.passed, "problem": t.problem} for t in tested],
                "coverage": round(percent, 1),
                "files": [
                    {"file": c.file, "coverage": round(c.percent, 1), "missed": c.missed} for c in covered
                ],
            }
        )
    else:
        for one in tested:
            if not one.passed:
                say(f"FAILED  {one.name}{': ' + one.problem if one.problem else ''}", "error")
        print_table(
            ["file", "covered", prose("lines that no test evaluates")],
            ((c.file, f"{c.percent:.0f} %", _ranges(c.missed)) for c in covered),
            empty="",
        )
        say(f"{passed} passed, {len(tested) - passed} failed; {percent:.0f} % of the lines covered")
        say(f"revision {loaded.revision}")
    if not tested:
        raise RingfenceError("the bundle has no tests: add files named *_test.rego with rules named test_...")
    if passed < len(tested):
        raise RingfenceError(f"{len(tested) - passed} of {len(tested)} tests failed")
    if percent < minimum:
        raise RingfenceError(f"the tests cover {percent:.1f} % of the lines, less than {minimum:g} %")


@app.command()
def build(
    output: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", callback=output_file, help="Where to, like policy.tar.gz; - is stdout."
        ),
    ],
    bundle: BundleOption = None,
    as_json: JsonOption = False,
) -> None:
    """Pack a bundle, without its tests, for an OPA server: `opa run --server --bundle FILE`.

    Its manifest names the revision, by which policy knows that OPA decides by the same rules. No file is written if
    the bundle does not compile, or fails its tests.
    """
    from ringfence.rego.bundle import archive, load_bundle
    from ringfence.rego.engine import ISSUANCE
    from ringfence.rego.regorus_programs import check_tests, compiled

    loaded = load_bundle(bundle)
    compiled(loaded.modules, ISSUANCE)
    check_tests(loaded.modules, loaded.tests)
    try:
        write_output(output, archive(loaded), public=True)
    except OSError as error:
        raise RingfenceError(f"{output} cannot be written: {error.strerror}") from None
    if is_stdout(output):
        return
    if wants_json(as_json):
        print_json({"file": str(output), "revision": loaded.revision})
    else:
        say(f"{output}: revision {loaded.revision}")


def _ranges(lines: Sequence[int]) -> str:
    """`3, 7-9` for 3, 7, 8, 9."""
    ranges: list[list[int]] = []
    for line in lines:
        if ranges and line == ranges[-1][1] + 1:
            ranges[-1][1] = line
        else:
            ranges.append([line, line])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
