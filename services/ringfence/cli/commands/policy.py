"""`ringfence policy`: test the rules, show OPA's input, explain a decision.

`ringfence policy explain`: why policy decided a request as it did.

`ringfence policy replay`: what another bundle would have decided.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer
from rich.text import Text

from ringfence.cli.shared.arguments import check_id_prefix, show_scope
from ringfence.cli.shared.id_lookup import whole_id
from ringfence.cli.shared.options import IdentityOption, JsonOption, duration_s, identity, run, wants_json
from ringfence.cli.shared.output import (
    console,
    is_stdout,
    moment,
    note,
    output_file,
    print_fields,
    print_json,
    print_table,
    say,
    visible,
    write_output,
)
from ringfence.cli.shared.progress import progress
from ringfence.cli.shared.tables import ids, prose
from ringfence.client.errors import ApiError
from ringfence.client.reports.read_api import ReadApi
from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.base import Permission, Scope
from ringfence.model.scope.scope import missing

if TYPE_CHECKING:
    from ringfence.policy.decisions.replay import Change, Report, RequestOutcome, Skipped

_CHANGES: dict[Change, str] = {
    "denied_to_allowed": "denied, would be allowed",
    "denied_to_approval": "denied, would be allowed with an approval",
    "approval_removed": "an approval falls away",
    "ttl_longer": "allowed for longer",
    "allowed_to_denied": "allowed, would be denied",
    "approval_added": "an approval more is needed",
    "ttl_shorter": "allowed for less long",
}
_SKIPPED: dict[Skipped, str] = {
    "later_decision": "a request that was judged before: what people answered",
    "answered_by_people": "judged before that time; people answered",
    "withdrawn": "judged before that time; the agent withdrew it",
    "without_input": "decided before the rules were asked",
    "engine_failed": "the rules gave no answer then",
    "break_glass_not_needed": "asked for break glass without need",
    "input_incomplete": "recorded without what this bundle looks at",
    "input_unreadable": "recorded in a form that is not understood",
    "signature_not_policys": "not signed by policy, by the present trust bundle",
}


def replay(
    bundle: Annotated[Path, typer.Option("--bundle", metavar="DIR", help="The folder of the other bundle.")],
    since: Annotated[
        str, typer.Option("--since", metavar="DURATION", help="How far back; decisions are kept for 30 days.")
    ] = "7d",
    fail_on_widen: Annotated[
        bool,
        typer.Option(
            "--fail-on-widen",
            help="Exit 1 where what was denied would be allowed, or an approval falls away.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Ask another bundle about the requests that were decided, and print what it would decide otherwise.

    Reads Kafka, and changes nothing. Only decisions that policy signed count, each by the input that it holds.
    """
    report = run(_replayed(bundle, duration_s(since), as_json))
    if wants_json(as_json):
        print_json(report.as_json())
    else:
        _print_report(report, since)
    if fail_on_widen and report.widens:
        note("error: the bundle allows more than was allowed", "error")
        raise typer.Exit(1)


async def _replayed(folder: Path, since_s: int, as_json: bool) -> Report:
    from ringfence.client.settings import load_settings
    from ringfence.kernel.base.clock import SystemClock
    from ringfence.kernel.base.settings import load
    from ringfence.policy.decisions.replay import Replay, recorded_decisions, trust_of
    from ringfence.policy.settings import PolicySettings
    from ringfence.rego.bundle import load_bundle
    from ringfence.rego.embedded import EmbeddedEngine

    settings, clock = load_settings(), SystemClock()
    loaded = load_bundle(folder)
    engine = EmbeddedEngine(loaded, timeout_ms=load(PolicySettings).evaluation_timeout_ms)
    await engine.start()
    try:
        trust = await trust_of(settings, clock)
        since_ms = max(clock.now_ms() - since_s * 1000, 1)
        async with recorded_decisions(settings, since_ms) as recorded:
            with progress("replaying decisions", as_json=as_json) as line:
                return await Replay(loaded, engine, trust).run(recorded, line.count)
    finally:
        await engine.close()


def _print_report(report: Report, since: str) -> None:
    print_table(
        ["what would change", "requests"],
        ((name, str(report.changes[kind])) for kind, name in _CHANGES.items() if report.changes[kind]),
        empty=f"nothing would change in the last {since}",
    )
    for kind, name in _CHANGES.items():
        examples = report.examples.get(kind, ())
        if not examples:
            continue
        say(f"{name}:", "heading")
        print_table(
            [ids("request"), "agent", "for", "was", "would be", "wants"],
            (
                (
                    one.request_id,
                    one.agent_id,
                    one.on_behalf_of,
                    _outcome_text(one.before),
                    _outcome_text(one.after),
                    show_scope(tuple(Permission.model_validate(p, strict=False) for p in one.scope)),
                )
                for one in examples
            ),
            empty="",
        )
    for why, name in _SKIPPED.items():
        if report.skipped[why]:
            say(f"not compared: {report.skipped[why]} ({name})")
    for field, count in report.missing_fields.items():
        say(f"  {count} inputs have no `{field}`, which the bundle looks at")
    say(f"{report.read} decisions read, {report.compared} requests compared, {report.unchanged} unchanged")
    say(f"revision {report.revision}")


def _outcome_text(outcome: RequestOutcome) -> str:
    from ringfence.client.arguments import describe_approvers

    reasons = "; ".join(f"{reason.code}: {reason.message}" for reason in outcome.reasons)
    if outcome.outcome == "denied":
        return f"denied ({reasons})"
    approvals = f", with the approval of {describe_approvers(outcome.required)}" if outcome.required else ""
    return f"{outcome.ttl_s} s{approvals}"


def explain(
    request: Annotated[
        str,
        typer.Argument(
            metavar="REQUEST", callback=check_id_prefix, help="The request's id, or how it begins."
        ),
    ],
    bundle: Annotated[
        Path | None,
        typer.Option(
            "--bundle",
            metavar="DIR",
            help="The folder of the bundle that decided it; RINGFENCE_POLICY_BUNDLE, or the one that comes with "
            "Ringfence, if not given.",
        ),
    ] = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Explain a decision: every reason, what each limit allows of the request, every rule that applied, and the input.

    If the folder holds the revision that decided, the command evaluates the rules again. Policy remembers a request for
    a quarter of an hour past its end. For older ones, audit knows their place on Kafka, which keeps them for 30 days.
    """

    async def work() -> Any:
        whole = await whole_id("request", request, identity(me))
        async with ReadApi(identity(me)) as api:
            try:
                return await api.get("policy", "decisions", whole, "explanation")
            except ApiError as error:
                place = await _decision_position(api, whole) if error.status == 404 else None
                if place is None:
                    raise
            return await api.get("policy", "decisions", whole, "explanation", **place)

    explanation = run(work())
    rules = _fired_rules(explanation, bundle)
    if wants_json(as_json):
        print_json({**explanation, "rules": None if rules is None else dict(rules)})
        return
    _print_explanation(explanation)
    if rules is not None:
        print_table(
            ["rule that fired", prose("says")],
            ((name, line) for name, value in rules for line in _value_lines(value)),
            empty="",
        )
    elif explanation.get("input"):
        note(
            "the rules that decided are not here: name their folder with --bundle to see which of them fired"
        )


async def _decision_position(api: ReadApi, request: str) -> dict[str, int] | None:
    """Return the position of the latest decision on a request, from audit; None where audit knows none or does not
    answer.
    """
    from ringfence.messages.topics import CREDENTIAL_DECISION

    try:
        events = (await api.events(request=request, limit=100))["events"]
    except ApiError:
        return None
    decision_events = [one for one in events if one["metadata"].get("log_name") == CREDENTIAL_DECISION.what]
    source = decision_events[-1]["unmapped"]["source"] if decision_events else None
    return source and {name: int(source[name]) for name in ("partition", "offset")}


def _fired_rules(found: Mapping[str, Any], folder: Path | None) -> list[tuple[str, Any]] | None:
    """Return the rules that fired; None where they were not evaluated or are not here."""
    revision = (found.get("revisions") or {}).get("policy")
    if not found.get("input") or revision is None:
        return None
    try:
        from ringfence.kernel.base.settings import load
        from ringfence.policy.settings import PolicySettings
        from ringfence.rego.bundle import load_bundle
        from ringfence.rego.engine import ACTION
        from ringfence.rego.regorus_programs import fired
    except ModuleNotFoundError:  # the extra `server` has the engine
        return None
    here = load_bundle(folder or load(PolicySettings).bundle)
    if here.revision != revision:
        return None
    return fired(here.modules, orjson.dumps(found["input"]).decode(), leave_out=ACTION)


def _value_lines(value: Any) -> list[str]:
    if value is True:
        return ["holds"]
    entries = value if isinstance(value, list) else [value]
    return [
        f"{one['code']}: {one['message']}" if isinstance(one, dict) and {"code", "message"} <= one.keys()
        else one if isinstance(one, str) else orjson.dumps(one).decode()
        for one in entries
    ]  # fmt: skip


def _print_explanation(found: Mapping[str, Any]) -> None:
    from ringfence.client.arguments import describe_approvers

    policy_input = found.get("input") or {}
    request_input = policy_input.get("request", {})
    revisions = found.get("revisions") or {}
    fields = {
        "outcome": found["outcome"],
        "agent": found["agent_id"],
        "on behalf of": policy_input.get("task", {}).get("on_behalf_of", ""),
        "reason given": visible(request_input.get("reason", "")),
        "life": f"{found['ttl_s']} s of {request_input.get('ttl_s')} s" if found.get("ttl_s") else "",
        "approvals": describe_approvers(found["required"]) if found.get("required") else "",
        "approved ahead": ", ".join(
            f"by {one['by']}, grant {one['grant_id']}" for one in found.get("grants", ())
        ),
        "judged as of": moment(policy_input["now_s"]) if "now_s" in policy_input else "",
        "policy": revisions.get("policy", ""),
        "records": ", ".join(f"{k} {v}" for k, v in revisions.items() if k != "policy"),
        "input": f"sha256 {found['input_digest']}" if found.get("input_digest") else "",
        "decision": found["decision_id"],
    }
    print_fields(
        {name: str(value) for name, value in fields.items() if value}, title=f"request {found['request_id']}"
    )
    for reason in found.get("reasons") or ():
        line = Text(f"  {visible(reason['code'])}", style="heading")
        side = f" [{visible(reason['side'])}]" if reason.get("side") else ""
        line.append(f"{side}  {visible(reason['message'])}", style="")
        console().print(line, soft_wrap=True)
    if not policy_input:
        note("it was decided before the rules were asked: nothing was held against any side")
        return
    print_table(
        ["asked for", "side", prose("the side allows")],
        (
            (show_scope((permission,)), side, allows)
            for permission in _parse_scope(request_input.get("scope"))
            for side, allows in _limits(permission, policy_input)
        ),
        empty="",
    )


def _limits(permission: Permission, policy_input: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each side of the intersection, and whether it contains the permission."""
    agent, task, user = (policy_input.get(name, {}) for name in ("agent", "task", "user"))
    entitlements = user.get("entitlements", {})
    as_of = entitlements.get("as_of")
    sides = (
        ("task", _parse_scope(task.get("scope")), ""),
        (f"ceiling of {agent.get('agent_id')}", _parse_scope(agent.get("ceiling")), ""),
        (
            f"entitlements of {user.get('user_id')}",
            _parse_scope(entitlements.get("scope")),
            f", as of {moment(as_of)}" if as_of else "",
        ),
    )
    for name, scope, note_ in sides:
        excess = missing((permission,), scope)
        yield (
            name,
            f"{'not ' + ', '.join(show_scope(excess).split(chr(10))) if excess else 'all of it'}{note_}",
        )


def _parse_scope(items: Sequence[Any] | None) -> Scope:
    return tuple(Permission.model_validate(item, strict=False) for item in items or ())


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
