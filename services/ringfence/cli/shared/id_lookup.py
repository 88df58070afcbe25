"""Finds whole ids by how they begin, for commands that people run.

An id that a terminal shows is shortened, and people copy it from there. Ids are chosen by whoever creates a record, so
an agent can try ids until one begins like another. A prefix that several ids have is therefore refused, with all of
them, and never resolved to the likeliest. Commands that an agent runs, and answers that nobody looks at first, take
whole ids only (`check_whole_id`, `require_whole_id`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from ringfence.cli.shared.arguments import check_uuid
from ringfence.client.arguments import MIN_PREFIX_LENGTH
from ringfence.client.errors import ApiError, InvalidCallError
from ringfence.client.reports.read_api import ReadApi
from ringfence.kernel.base.text import Lines, did_you_mean, visible

if TYPE_CHECKING:
    from ringfence.client.passkeys.questions import PasskeyUser

IdKind = Literal["task", "lease", "request", "grant", "run"]
_WHOLE: Final = 36
_EVENTS: Final = 1000
"""How many of the latest audit events are searched. Older leases and requests need their whole ids."""
_MOST: Final = 10
_LIST_WITH: Final[Mapping[str, str]] = {
    "task": "ringfence task list",
    "lease": "ringfence lease list",
    "request": "ringfence approvals list --everyone",
    "grant": "ringfence approvals grants",
    "run": "ringfence run list --all",
}


def is_prefix(text: str) -> bool:
    """Return whether a text can be how an id begins, and is no whole id."""
    return MIN_PREFIX_LENGTH <= len(text) < _WHOLE and not set(text) - set("0123456789abcdef-")


def is_whole(text: str) -> bool:
    """Return whether a text is as long as an id, so that it cannot be the beginning of another one."""
    return len(text) >= _WHOLE


def check_whole_id(text: str | None) -> str | None:
    """Validate an id for a command that an agent runs. A typer callback. Raises typer.BadParameter."""
    if text is not None:
        require_whole_id(text)
    return check_uuid(text)


TaskOption = Annotated[
    str,
    typer.Option(
        "--task", metavar="TASK", callback=check_whole_id, help="The whole id of the task that this is for."
    ),
]


def require_whole_id(
    text: str, hint: str = "an agent names tasks and leases by their whole ids", *, of: str | None = None
) -> None:
    """Refuse the beginning of an id, saying why. `of`: the argument or option. Raises typer.BadParameter."""
    if is_prefix(text):
        raise typer.BadParameter(
            f"{text!r} is only how an id begins; {hint} (lists show them with --wide)", param_hint=of
        )


async def whole_id(kind: IdKind, text: str, who: Path | PasskeyUser | None) -> str:
    """Return the only id of a kind that begins with `text`. A whole id is returned as it is, without any query.

    `who`: whose key file the services' APIs are asked with. For a person with a passkey, who has no token for those,
    Kafka is read: then only for tasks and leases.

    Raises InvalidCallError if none or several begin so, and ApiError if no service could say.
    """
    if is_whole(text):
        return text
    from ringfence.client.passkeys.questions import PasskeyUser

    if isinstance(who, PasskeyUser):
        return only_one(kind, text, await _ids_on_kafka(kind, text, who))
    async with ReadApi(who) as api:
        return only_one(kind, text, await known_ids(api, kind))


async def _ids_on_kafka(kind: IdKind, prefix: str, who: PasskeyUser) -> dict[str, str]:
    from ringfence.client import kafka_lookups
    from ringfence.client.connection import Connection

    find = {"task": kafka_lookups.tasks_by_prefix, "lease": kafka_lookups.leases_by_prefix}[kind]
    async with Connection(who) as connection:
        return await find(connection, prefix)


def only_one(kind: str, text: str, known: Mapping[str, str]) -> str:
    """Return the only id in `known` that begins with `text`.

    Args:
        kind: what the ids are of, for the message.
        text: a whole id, or how one begins.
        known: what is known of each id: a few words that tell it from the others.

    Raises:
        InvalidCallError: none begins so, or several do; the message lists these.
    """
    found = sorted(id for id in known if id.startswith(text)) if len(text) >= MIN_PREFIX_LENGTH else []
    if text in known or len(found) == 1:
        return text if text in known else found[0]
    where = _LIST_WITH.get(kind)
    see = f"see: {where}" if where else "give the whole id"
    if found:
        lines = [f"  {id}  {visible(known[id])}".rstrip() for id in found[:_MOST]]
        more = [f"  and {len(found) - _MOST} more"] if len(found) > _MOST else []
        raise InvalidCallError(
            Lines([f"several {kind}s begin with {text!r}; name one of them:", *lines, *more])
        )
    if is_whole(text):
        raise InvalidCallError(
            f"there is no {kind} {text} that you may see{'; ' + see if where else ', or it is over'}"
        )
    near = did_you_mean(text, {id[: len(text)] for id in known}, cutoff=0.75)
    raise InvalidCallError(f"no {kind} that you may see begins with {text!r}{near}; {see}")


async def known_ids(api: ReadApi, kind: IdKind | None = None) -> dict[str, str]:
    """Return the ids of a kind (None: of tasks, leases and requests) that the caller may see, each with a few words.

    Tasks are those that the registry lists, leases those that have not ended. Both, and requests, are added from the
    latest audit events. Raises ApiError if no service answers.
    """
    found: dict[str, str] = {}
    failed: list[ApiError] = []
    for source in (_from_audit, _from_registry, _from_revoker):
        try:
            found |= await source(api, kind)
        except ApiError as error:
            failed.append(error)
    if not found and failed:
        raise failed[0]
    return found


async def _from_audit(api: ReadApi, kind: IdKind | None) -> dict[str, str]:
    if kind == "run":
        return {}
    events: list[Mapping[str, Any]] = (await api.events(limit=_EVENTS))["events"]
    kinds: tuple[IdKind, ...] = (kind,) if kind else ("task", "lease", "request")
    return {
        str(fields[one]): f"{one} of {fields.get('agent') or 'an agent'}"
        for event in events
        for fields in (event.get("unmapped") or {},)
        for one in kinds
        if fields.get(one)
    }


async def _from_registry(api: ReadApi, kind: IdKind | None) -> dict[str, str]:
    if kind not in (None, "task"):
        return {}
    return {
        str(one["id"]): f"task of {one['state']['agent_id']}: {one['state']['purpose']}"
        for one in await api.records("task")
    }


async def _from_revoker(api: ReadApi, kind: IdKind | None) -> dict[str, str]:
    if kind == "run":
        return {
            str(one["id"]): f"run of {one['agent_id']}, {one['status']}"
            for one in (await api.runs(all=True))["runs"]
        }
    if kind not in (None, "lease"):
        return {}
    return {
        str(one["id"]): f"lease of {one['agent_id']}, {one['status']}"
        for one in (await api.leases())["leases"]
    }
