"""`ringfence policy explain`: why policy decided a request as it did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.text import Text

from ringfence.cli.shared.arguments import check_id_prefix, show_scope
from ringfence.cli.shared.id_lookup import whole_id
from ringfence.cli.shared.options import IdentityOption, JsonOption, identity, run, wants_json
from ringfence.cli.shared.output import (
    console,
    moment,
    note,
    print_fields,
    print_json,
    print_table,
    visible,
)
from ringfence.cli.shared.tables import prose
from ringfence.client.errors import ApiError
from ringfence.client.reports.read_api import ReadApi
from ringfence.messages.permission import Permission, Scope
from ringfence.model.scope.scope import missing


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
    """Return the value of a rule, one entry per line."""
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
