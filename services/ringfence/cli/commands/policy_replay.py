"""`ringfence policy replay`: what another bundle would have decided."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ringfence.cli.shared.arguments import show_scope
from ringfence.cli.shared.options import JsonOption, duration_s, run, wants_json
from ringfence.cli.shared.output import note, print_json, print_table, say
from ringfence.cli.shared.progress import progress
from ringfence.cli.shared.tables import ids
from ringfence.messages.permission import Permission

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
