"""`list` and `show` for users, agents, targets and tasks, as far as the registry's API lets the caller see them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ringfence.cli.shared.arguments import show_scope
from ringfence.cli.shared.attestation import show_selector
from ringfence.cli.shared.options import call
from ringfence.cli.shared.output import moment, print_fields, print_json, print_table, until
from ringfence.cli.shared.tables import Column, ids, prose, state
from ringfence.client.errors import ApiError
from ringfence.client.reports.read_api import ReadApi
from ringfence.kernel.base.secret_refs import without_secrets
from ringfence.kernel.base.text import Lines, did_you_mean, span
from ringfence.messages.base import KeyRecord
from ringfence.messages.registry import (
    AgentState,
    AnyState,
    RequestRule,
    TargetState,
    TaskState,
    UserState,
    VerbFloor,
)
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.model_limits import limits_text
from ringfence.model.records.agent_keys import endings
from ringfence.model.unknown_fields import names_of, unknown_fields

_SOON = "ends soon: give another"
_STATES: Mapping[SubjectKind, type[AnyState]] = {
    "user": UserState,
    "agent": AgentState,
    "target": TargetState,
    "task": TaskState,
}


def list_records(
    kind: SubjectKind, key: Path | None, as_json: bool, wide: bool = False, **query: str | None
) -> None:
    """Print all records of a kind that the caller may see."""

    records = call(ReadApi(key), lambda api: api.records(kind, **query))
    if as_json:
        print_json(records)
        return
    columns, row = _ROWS[kind]
    print_table(
        columns, (row(_state(kind, item)) for item in records), empty=f"no {kind} that you may see", wide=wide
    )


def show_record(kind: SubjectKind, id: str, key: Path | None, as_json: bool) -> None:
    record = call(ReadApi(key), lambda api: read_record(api, kind, id))
    if as_json:
        print_json(record)
    else:
        print_record(kind, record)


async def read_record(api: ReadApi, kind: SubjectKind, id: str) -> Any:
    """Return one record. Raises ApiError; if there is none, with the closest id that the caller may see."""
    try:
        return await api.record(kind, id)
    except ApiError as error:
        if error.status != 404:
            raise
        near = did_you_mean(id, [one["id"] for one in await api.records(kind)])
        unknown = ApiError(f"{error.message}{near}", code=error.code, status=error.status)
        raise unknown.with_remedy(f"ringfence {kind} list") from None


def print_record(
    kind: SubjectKind, found: Mapping[str, Any], more: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Print one record, `{id, revision, state}`, for people, with additional fields."""
    state = _state(kind, found)
    title = f"{kind} {found['id']}, revision {found['revision']}"
    fields = {**_FIELDS[kind](state), **more}
    print_fields({name: value for name, value in fields.items() if value}, title=title)


def _state(kind: SubjectKind, item: Mapping[str, Any]) -> Any:
    # Not strict: JSON has no tuples. It is shown, and nothing is decided by it.
    return _STATES[kind].model_validate(item["state"], strict=False)


def _user_row(user: UserState) -> Sequence[str]:
    roles = ", ".join(user.roles)
    status = f"{user.status}{_key_ends(user)}"
    return user.user_id, status, roles, user.name, show_scope(user.entitlements.scope)


def _agent_row(agent: AgentState) -> Sequence[str]:
    return agent.agent_id, _status(agent), agent.sponsor, agent.description, show_scope(agent.ceiling)


def _target_row(target: TargetState) -> Sequence[str]:
    return (
        target.target_id,
        target.status,
        target.backend.kind,
        target.delivery,
        _verbs(target),
        target.description,
    )


def _task_row(task: TaskState) -> Sequence[str]:
    return (
        task.task_id,
        _task_status(task),
        " < ".join(task.act or (task.agent_id,)),
        task.on_behalf_of,
        moment(task.not_after),
        show_scope(task.scope),
        task.purpose,
    )


_ROWS: Mapping[SubjectKind, tuple[Sequence[str | Column], Callable[[Any], Sequence[str]]]] = {
    "user": (("user", state("status"), "roles", "name", "entitled to"), _user_row),
    "agent": (("agent", state("status"), "sponsor", prose("for"), "ceiling"), _agent_row),
    "target": (
        ("target", state("status"), "backend", "delivery", prose("verbs"), prose("what it is")),
        _target_row,
    ),
    "task": ((ids("task"), state("status"), "agent", "for", "ends", "scope", prose("purpose")), _task_row),
}


def _user_fields(user: UserState) -> dict[str, str]:
    entitlements = user.entitlements
    return {
        "name": user.name,
        "status": user.status,
        "roles": ", ".join(user.roles) or "none",
        "entitled to": show_scope(entitlements.scope),
        "known from": f"{entitlements.source}, as of {moment(entitlements.as_of)}",
        "keys": _keys(user.keys, user),
    }


def _agent_fields(agent: AgentState) -> dict[str, str]:
    return {
        "for": agent.description,
        "status": _status(agent),
        "sponsor": f"{agent.sponsor} (did not consent)" if agent.without_consent else agent.sponsor,
        "ceiling": show_scope(agent.ceiling),
        "limits of a task": limits_text(agent.limits) if agent.limits else "",
        **({"instances": "; ".join(map(show_selector, agent.attestation))} if agent.attestation else {}),
        "keys": _keys(agent.keys, agent),
    }


def target_fields(target: TargetState) -> dict[str, str]:
    """Return names and values of a target for people. An empty value means that the target has none."""
    requests = [f"{r.method} {r.path} is {_does(r)}" for r in target.requests]
    asks = [f"{v.verb} ({v.ask})" for v in target.verbs if v.ask]
    settings = sorted((target.backend.model_extra or {}).items())
    return {
        "what it is": target.description,
        "status": target.status,
        "backend": target.backend.kind,
        # Built-in backends are given references, never secrets. What another package's backend is given is unknown.
        "settings": Lines(without_secrets(f"{name}={value}") for name, value in settings),
        "audience": target.backend.audience or "",
        "verbs": _verbs(target),
        "each action waits": ", ".join(asks),
        "requests": Lines(requests),
        "delivery": target.delivery,
        "longest life": f"{target.max_ttl_s} s",
        "keys": _keys(target.keys),
    }


def _does(rule: RequestRule) -> str:
    if unknown := unknown_fields(rule):
        return f"denied, as {names_of(unknown)} is not known here"
    return f"{rule.verb} on {rule.resource}{_conditions(rule)}"


def _conditions(rule: RequestRule) -> str:
    """Return the further conditions of a rule, in the notation of `target add --request`."""
    texts = [
        f"{where}:{name}={','.join(values)}"
        for where, conditions in (("query", rule.query), ("body", rule.body))
        for name, values in (conditions or {}).items()
    ]
    if rule.mcp is not None:
        texts.append(f"message:{rule.mcp.method}" + (f"={rule.mcp.name}" if rule.mcp.name else ""))
        texts += [
            f"argument:{name}={','.join(values)}" for name, values in (rule.mcp.arguments or {}).items()
        ]
    if rule.model is not None:
        texts.append(f"model:{rule.model.api}" + ("=server-tools" if rule.model.server_tools else ""))
    if rule.git is not None:
        texts.append(f"git:{rule.git.operation}")
    return "".join(f" {condition}" for condition in texts)


def _task_fields(task: TaskState) -> dict[str, str]:
    return {
        "purpose": task.purpose,
        "status": _task_status(task),
        "agent": task.agent_id,
        "on behalf of": task.on_behalf_of,
        "assigned by": task.assigned_by,
        "part of": f"task {task.parent}" if task.parent else "",
        "handed on by": ", then ".join(reversed((task.act or ())[1:])),
        "scope": show_scope(task.scope),
        "limits": limits_text(task.limits) if task.limits else "",
        "ends": until(task.not_after, time.time()),
    }


_FIELDS: Mapping[SubjectKind, Callable[[Any], dict[str, str]]] = {
    "user": _user_fields,
    "agent": _agent_fields,
    "target": target_fields,
    "task": _task_fields,
}


def _status(agent: AgentState) -> str:
    status = f"{agent.status} (by an operator)" if agent.suspended_by_operator else agent.status
    return f"{status}{_key_ends(agent)}"


def _key_ends(state: AgentState | UserState) -> str:
    """Return a note about a key that ends soon without a successor."""
    now_s = time.time()
    ends = endings(state, now_s)
    return f", a key ends in {span(ends[0].key.not_after - now_s)}" if ends else ""


def _task_status(task: TaskState) -> str:
    return "over" if task.status == "active" and task.not_after <= time.time() else task.status


def _verbs(target: TargetState) -> str:
    return ", ".join(map(_verb, target.verbs))


def _verb(floor: VerbFloor) -> str:
    notes: list[str] = [] if floor.floor == "none" else [floor.floor]
    if floor.key is not None:
        notes.append("by attested passkeys alone" if floor.key == "attested" else "by key files alone")
    if unknown := unknown_fields(floor):
        notes.append(f"to nobody, as {names_of(unknown)} is not known here")
    return f"{floor.verb} ({'; '.join(notes)})" if notes else floor.verb


def _keys(keys: Sequence[KeyRecord], of: AgentState | UserState | None = None) -> str:
    now_s = time.time()
    soon = {ending.key.kid for ending in endings(of, now_s)} if of else ()
    notes = dict.fromkeys(soon, f" ({_SOON})")
    if isinstance(of, AgentState):
        notes |= dict.fromkeys(of.replaced, " (replaced)") | dict.fromkeys(of.compromised, " (compromised)")
    elif isinstance(of, UserState):
        notes |= dict.fromkeys(of.compromised or (), " (compromised)")
    return Lines(
        f"{key.kid}  {'until' if key.not_after > now_s else 'ended'} {moment(key.not_after)}{notes.get(key.kid, '')}"
        for key in keys
    )
