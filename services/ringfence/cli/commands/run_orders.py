"""`ringfence run order|list|show|stop`: runs of fleets, and what became of all runs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ringfence.cli.shared import connect
from ringfence.cli.shared.arguments import check_id_prefix, check_name
from ringfence.cli.shared.id_lookup import is_whole, whole_id
from ringfence.cli.shared.options import (
    IdentityOption,
    JsonOption,
    ReasonOption,
    WideOption,
    YesOption,
    call,
    confirm,
    credential_life_s,
    duration_s,
    identity,
    run,
    size_bytes,
    wants_json,
)
from ringfence.cli.shared.output import note, print_fields, print_json, print_table, say, until, visible
from ringfence.cli.shared.run_options import CpusOption, MemoryOption, PidsOption, RunTtlOption
from ringfence.cli.shared.tables import ending, ids, prose, state
from ringfence.client.errors import ApiError, InvalidCallError
from ringfence.client.reports.read_api import ReadApi
from ringfence.kernel.crypto.claims import MAX_LIFE_S

if TYPE_CHECKING:
    from ringfence.client.admin.administrator import OrderedRun
    from ringfence.messages.run import Mount


_RELAYED: Final = "relay.ended"
_TOLD: Final = ("request.refused", "credential.refused", "action.denied", "action.by_another", _RELAYED)
"""Events that `show` tells of a run."""
_MOST_TOLD: Final = 100


def order(
    task: Annotated[
        str,
        typer.Option("--task", metavar="TASK", callback=check_id_prefix, help="The task that this is for."),
    ],
    command: Annotated[
        list[str], typer.Argument(metavar="[-- COMMAND...]", help="What to run.", show_default=False)
    ],
    pool: Annotated[
        str | None,
        typer.Option(
            "--pool",
            metavar="POOL",
            callback=check_name,
            help="The pool of runners that it is for; the one with most room that has the labels, if not given.",
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="NAME=VALUE", help="A label that the pool has to have. Repeatable."),
    ] = None,
    mount: Annotated[
        list[str] | None,
        typer.Option(
            "--mount",
            metavar="NAME[:rw]",
            help="A folder of the pool, by its name there; read-only without :rw. Repeatable.",
        ),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(
            "--image", metavar="DIGEST", help="The container image: sha256:... The pool's own if not given."
        ),
    ] = None,
    ttl: RunTtlOption = "30m",
    memory: MemoryOption = "2G",
    cpus: CpusOption = 1.0,
    pids: PidsOption = 256,
    valid: Annotated[
        str, typer.Option("--valid", metavar="DURATION", help="How long the order may wait for its turn.")
    ] = "1h",
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Order a run from a pool of runners, as the task's assigner, who it is on behalf of, or the agent's sponsor.

    The order is signed with your key file. Its outcome: ringfence run show RUN.
    """
    from ringfence.messages.run import RunLimits

    ttl_s, valid_s = credential_life_s(ttl), duration_s(valid)
    if valid_s > MAX_LIFE_S:
        raise typer.BadParameter(
            f"{valid!r} is longer than an order may wait: {MAX_LIFE_S // 3600}h", param_hint="--valid"
        )
    if pool is None and not label:
        raise typer.BadParameter("give --pool, or --label to find one", param_hint="--pool")
    mounts, labels = tuple(map(_mount, mount or ())), _labels(label or ())
    limits = RunLimits(memory_bytes=size_bytes(memory), cpu_millis=round(cpus * 1000), pids=pids)

    async def work() -> tuple[OrderedRun, str]:
        task_id = await whole_id("task", task, identity(me))
        chosen = pool or await _pool_with(labels, identity(me))
        async with connect.administrator(identity(me)) as person:
            return await person.order_run(
                task_id, pool=chosen, command=command, limits=limits, ttl_s=ttl_s, mounts=mounts, image=image,
                valid_s=valid_s, labels=labels,
            ), chosen  # fmt: skip

    ordered, chosen = run(work())
    if wants_json(as_json):
        print_json({
            "run_id": ordered.run_id, "order_id": ordered.order_id, "agent_id": ordered.agent_id, "pool": chosen,
        })  # fmt: skip
        return
    say(ordered.run_id)
    note(f"ordered from pool {chosen}; see: ringfence run show {ordered.run_id}")


async def _pool_with(labels: Mapping[str, str], me: Any) -> str:
    """The pool that has these labels, and most room for runs. Raises InvalidCallError."""
    async with ReadApi(me) as api:
        found = await api.pools(labels)
    if not found:
        wanted = ", ".join(f"{name}={value}" for name, value in labels.items())
        raise InvalidCallError(f"no pool with {wanted} has a runner that works now").with_remedy(
            "ringfence run pools"
        )
    return str(max(found, key=lambda one: one["free"])["name"])


def _labels(given: Sequence[str]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name in labels:
            raise typer.BadParameter(f"{text[:64]!r}: write NAME=VALUE, each name once", param_hint="--label")
        labels[str(check_name(name))] = value
    return labels


def pools(
    label: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="NAME=VALUE", help="Only pools that have it. Repeatable."),
    ] = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the pools whose runners work now, with their labels and how many more runs each may start."""
    labels = _labels(label or ())

    found = call(ReadApi(identity(me)), lambda api: api.pools(labels))
    if wants_json(as_json):
        print_json({"pools": found})
        return
    print_table(
        ["pool", prose("labels"), "free", prose("runners")],
        (
            (
                one["name"],
                ", ".join(f"{name}={value}" for name, value in one["labels"].items()),
                str(one["free"]),
                ", ".join(one["runners"]),
            )
            for one in found
        ),
        empty="no pool has a runner that works now",
    )


def list_runs(
    agent: Annotated[
        str | None, typer.Option("--agent", metavar="AGENT", callback=check_name, help="Only this agent's.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", metavar="TASK", callback=check_id_prefix, help="Only this task's.")
    ] = None,
    runner: Annotated[
        str | None,
        typer.Option("--runner", metavar="RUNNER", callback=check_name, help="Only this runner's."),
    ] = None,
    all: Annotated[bool, typer.Option("--all", help="Also those that ended in the last days.")] = False,
    wide: WideOption = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """List runs that go on, the latest first: of your tasks and agents; or all."""

    async def work() -> Any:
        task_id = await whole_id("task", task, identity(me)) if task else None
        async with ReadApi(identity(me)) as api:
            return await api.runs(agent=agent, task=task_id, runner=runner, all=all)

    found = run(work())
    if wants_json(as_json):
        print_json(found)
        return
    now_s = time.time()
    print_table(
        [
            ids("run"),
            "agent",
            "runner",
            state("status"),
            ending("ends"),
            prose("outcome"),
            ids("task", only_wide=True),
        ],
        (
            (
                one["id"],
                one["agent_id"],
                one["runner"],
                one["status"],
                "" if one["over"] else until(one["deadline"], now_s),
                _outcome(one),
                one["task_id"],
            )
            for one in found["runs"]
        ),
        empty="no run that you may see"
        if all
        else "no run goes on that you may see; see: ringfence run list --all",
        wide=wide,
    )
    if found.get("more"):
        note("there are more; narrow it with --agent, --task or --runner", "warning")


def show(
    id: Annotated[
        str,
        typer.Argument(
            metavar="RUN", callback=check_id_prefix, help="A run's id, or how it begins; or an order's."
        ),
    ],
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what became of a run or an order: its state, what it may use, how it ended, what was denied to it, or why it
    was refused.
    """

    async def work() -> tuple[Any, Any, str | None]:
        run_id = await whole_id("run", id, identity(me))
        async with ReadApi(identity(me)) as api:
            found = await api.run(run_id)
            try:
                filters = {"run": found["id"], "code": ",".join(_TOLD)}
                return found, (await api.events(filters, limit=_MOST_TOLD))["events"], None
            except ApiError as error:
                return found, [], str(error)

    found, events, unknown = run(work())
    denied = [_denial(one) for one in events if one["metadata"]["event_code"] != _RELAYED]
    relays = [_relay(one) for one in events if one["metadata"]["event_code"] == _RELAYED]
    if wants_json(as_json):
        told = {"denied": denied, "relays": relays} if unknown is None else {"incomplete": unknown}
        print_json({**found, **told})
        return
    print_fields(dict(_fields(found, denied, relays)), title=f"run {found['id']}")
    if unknown is not None:
        note(f"what was denied to it is not known here: {unknown}", "warning")


def stop(
    id: Annotated[
        str,
        typer.Argument(metavar="RUN", callback=check_id_prefix, help="The run's id, or how it begins."),
    ],
    reason: ReasonOption,
    yes: YesOption = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """End a run, or an order that waits, as whoever may order it. The sandbox is destroyed, and its leases end."""

    async def look() -> tuple[str, Any]:
        run_id = await whole_id("run", id, identity(me))
        async with ReadApi(identity(me)) as api:
            try:
                found = await api.run(run_id)
            except ApiError as error:
                if error.status != 404 or not is_whole(id):
                    raise
                return run_id, None  # no runner has said anything of it yet: it waits
            return found["id"], found

    run_id, found = run(look())
    if found is not None and found["over"]:
        say(f"run {run_id} is over: {_outcome(found)}") if not wants_json(as_json) else print_json(
            {"run_id": run_id, "stopped": False}
        )
        return
    of = f" of agent {visible(found['agent_id'])}" if found is not None else ""
    confirm(f"End run {run_id}{of}?", yes)
    known = {name: found.get(name) for name in ("agent_id", "task_id", "ordered_by")} if found else {}

    connect.administer(identity(me), lambda person: person.stop_run(run_id, reason=reason, **known))
    if wants_json(as_json):
        print_json({"run_id": run_id, "stopped": True})
        return
    note(f"run {run_id} is to end; see: ringfence run show {run_id}")


def _mount(text: str) -> Mount:
    from ringfence.messages.run import Mount

    name, colon, mode = text.partition(":")
    if colon and mode not in ("rw", "ro"):
        raise typer.BadParameter(
            f"{text!r} is no NAME or NAME:rw; an order names a mount of the pool, and no path",
            param_hint="--mount",
        )
    return Mount(name=str(check_name(name)), read_write=mode == "rw")


def _outcome(found: Mapping[str, Any]) -> str:
    refused, exit = found.get("refused"), found.get("exit") or {}
    if refused:
        return f"refused: {refused['message']}"
    parts = [f"exit {exit['code']}"] if exit.get("code") is not None else []
    parts += [f"signal {exit['signal']}"] if exit.get("signal") is not None else []
    parts += [str(exit["reason"])] if exit.get("reason") else []
    return ", ".join(parts)


def _denial(event: Mapping[str, Any]) -> dict[str, Any]:
    """A denied request or a blocked action, of an event of the trail."""
    fields = event["unmapped"]
    told = {name: fields.get(name) for name in ("target", "verb", "resource", "method", "destination")}
    return {
        "at_ms": event["time"],
        "what": "action" if event["metadata"]["event_code"].startswith("action.") else "credential",
        "code": event.get("status_code"),
        "message": event["message"],
        **{name: value for name, value in told.items() if value is not None},
        **({"count": event["count"]} if "count" in event else {}),
    }


def _relay(event: Mapping[str, Any]) -> dict[str, Any]:
    fields = event["unmapped"]
    named = ("target", "destination", "sent_bytes", "received_bytes", "duration_ms")
    reason = {"code": event["status_code"]} if event.get("status_code") else {}
    return {"at_ms": event["time"], **{name: fields.get(name) for name in named}, **reason}


def _fields(
    found: Mapping[str, Any], denied: Sequence[Mapping[str, Any]], relays: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, str]]:
    limits = found["limits"]
    refused = found.get("refused")
    fields = {
        "status": found["status"],
        "refused": f"{refused['code']}: {refused['message']}" if refused else "",
        "outcome": "" if refused else _outcome(found),
        "agent": found["agent_id"],
        "task": found["task_id"],
        "runner": found["runner"],
        "ordered by": (found.get("ordered_by") or "").rpartition("/")[2],
        "order": found.get("order_id", ""),
        "ends": "" if found["over"] else until(found["deadline"], time.time()),
        "limits": f"{limits['memory_bytes'] >> 20} MiB, {limits['cpu_millis'] / 1000:g} processors, "
        f"{limits['pids']} processes",
        "mounts": ", ".join(
            f"{one['name']}{' (writable)' if one.get('read_write') else ''}"
            for one in found.get("mounts", ())
        ),
        "backend": found["backend"],
        "image": found.get("image_digest", ""),
        "rules": found.get("policy_digest", ""),
        "remained": "; ".join(found.get("remained", ())),
        "denied": "; ".join(one["message"] for one in denied),
        "relays": "; ".join(
            f"{one['target']}: {one['sent_bytes']} bytes there, {one['received_bytes']} back"
            for one in relays
        ),
    }
    yield from ((name, value) for name, value in fields.items() if value)
