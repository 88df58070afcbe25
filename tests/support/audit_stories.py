"""The exact audit story of an attack: what it leaves on the trail, step by step, and nothing else.

    async with leaves(world, '''
        3003 Request Privileges: Requested/Observed credential.requested by bot
        3003 Assign Privileges: Failure/Denied request.refused [beyond_scope entitlements:maria] by policy for bot
    ''', bot=desk.bot.name):
        ...                                  # the attack

A line is an event: class, activity, status and disposition, Ringfence's name of the step, each reason with the side
that lacked something, who did it, and for which agent, where that is another. Lines that begin with `~` come of things
that happen at the same time: those that follow on each other come in any order. Where the story is another the test
fails with the difference, and the lines as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from ringfence.messages.topics import AUDIT, AUDITED

if TYPE_CHECKING:
    from ringfence.kernel.kafka.record import Received
    from ringfence.messages.credential import Coordinates
    from tests.support.stack import RunningStack, Seen
    from tests.support.world import World

WITHIN_S = 60.0
_ORDER = {topic.what: place for place, topic in enumerate(AUDITED)}


@asynccontextmanager
async def expect_trail(world: World, story: str, **names: str) -> AsyncIterator[None]:
    """What happens in the block leaves this on the trail. `names`: how somebody is called there: their real name."""
    before = {event["metadata"]["uid"] for event in await world.trail.events()}
    yield

    async def told() -> list[str]:
        every = await world.trail.events()
        return [line(event, names) for event in every if event["metadata"]["uid"] not in before]

    await comes_to(story, told, world.trail.news)


async def request_leaves(world: World, story: str, request: str, **names: str) -> None:
    """Fails unless this is all that is told about a request, by its id. `names` as for `expect_trail`."""
    await is_told(world, story, {"request": request}, **names)


async def is_told(world: World, story: str, words: dict[str, str], **names: str) -> None:
    """Fails unless this is all that is told with these words of Ringfence's own. `names` as for `expect_trail`."""

    async def told() -> list[str]:
        every = await world.trail.events()
        return [line(event, names) for event in every if _has(event, words)]

    await comes_to(story, told, world.trail.news)


@asynccontextmanager
async def realm_leaves(realm: RunningStack, seen: Seen, story: str) -> AsyncIterator[list[Coordinates]]:
    """The same in a whole stack, by what its audit writes: of all that names somebody of the realm, and of the records
    of which the block puts the places on the list that it is given, as what nobody is believed for names nobody.
    """
    since_ms = int(time.time() * 1000)
    places: list[Coordinates] = []
    yield places

    async def told() -> list[str]:
        await seen.up_to_now()
        events = {e["metadata"]["uid"]: e for e in _events(seen.of(AUDIT))}
        mine = [e for e in events.values() if e["time"] >= since_ms and _concerns(e, realm, places)]
        mine.sort(
            key=lambda e: (e["time"], _ORDER[e["metadata"]["log_name"]], e["unmapped"]["source"]["offset"])
        )
        return [line(event, {"": f"-{realm.mark}"}) for event in mine]

    await comes_to(story, told, seen.news)


def _events(records: Iterable[Received]) -> Iterator[dict[str, Any]]:
    """Those that are there, whatever tests put beside them."""
    for record in records:
        with contextlib.suppress(ValueError, RecursionError):
            event = json.loads(record.value)
            if isinstance(event, dict) and "metadata" in event:
                yield event


def _concerns(event: dict[str, Any], realm: RunningStack, places: Sequence[Coordinates]) -> bool:
    words = event["unmapped"]
    at = [
        (one["topic"], one["partition"], one["offset"])
        for one in (words["source"], words.get("about"))
        if one
    ]
    return realm.mark in json.dumps(event) or any((p.topic, p.partition, p.offset) in at for p in places)


def _has(event: dict[str, Any], words: dict[str, str]) -> bool:
    return all(event["unmapped"].get(name) == value for name, value in words.items())


async def comes_to(
    story: str, told: Callable[[], Awaitable[list[str]]], news: Callable[[], Awaitable[object]]
) -> None:
    """Fails unless what is told comes to be this story, and stays so when all is read that is there.

    Args:
        told: the lines as they are now.
        news: waits until there may be more of them.
    """
    wanted = [" ".join(one.split()) for one in story.strip().splitlines() if one.strip()]
    lines: list[str] = []
    try:
        async with asyncio.timeout(WITHIN_S):
            while not _same(wanted, lines := await told()):
                await news()
    except TimeoutError:
        raise AssertionError(_difference(wanted, lines)) from None
    lines = await told()
    assert _same(wanted, lines), _difference(wanted, lines)


def line(event: dict[str, Any], names: dict[str, str]) -> str:
    """One event as a line of a story."""
    status = event["status"] + (f"/{event['action']}" if "action" in event else "")
    who, agent = _who(event), event["unmapped"].get("agent")
    said = [
        f"{event['class_uid']} {event['activity_name']}: {status} {event['metadata']['event_code']}",
        *_reasons(event),
        f"by {who}" if who else "by nobody known",
    ]
    if agent is not None and agent != who:
        said.append(f"for {agent}")
    text = " ".join(said)
    for name, real in names.items():
        text = text.replace(real, name)
    return text


def _who(event: dict[str, Any]) -> str | None:
    actors = [event, *event.get("evidences", ())]
    found = [one["actor"]["user"]["name"] for one in actors if "user" in one.get("actor", {})]
    if found:
        return str(found[0])
    by = event["unmapped"]["verified"]["by"]
    return None if by is None else f"nobody known, signed by {by.rpartition('/')[2]}"


def _reasons(event: dict[str, Any]) -> list[str]:
    reasons = event["unmapped"].get("reasons", ())
    said = dict.fromkeys(" ".join(filter(None, (one["code"], one.get("side")))) for one in reasons)
    return [f"[{', '.join(said)}]"] if said else []


def _same(wanted: Sequence[str], lines: Sequence[str]) -> bool:
    if len(wanted) != len(lines):
        return False
    at = 0
    while at < len(wanted):
        end = at + 1
        while wanted[at].startswith("~") and end < len(wanted) and wanted[end].startswith("~"):
            end += 1
        expected = [one.removeprefix("~").strip() for one in wanted[at:end]]
        if sorted(expected) != sorted(lines[at:end]):
            return False
        at = end
    return True


def _difference(wanted: Sequence[str], lines: Sequence[str]) -> str:
    expected = [one.removeprefix("~").strip() for one in wanted]
    diff = difflib.unified_diff(expected, lines, "the story", "what is told", n=99, lineterm="")
    return "\n".join(["the story is another:", *diff, "", "it is:", *lines])


# --- what many stories have in common; `why` as in a line ---


def asked_for(by: str = "bot") -> str:
    """An agent asked for a credential."""
    return f"3003 Request Privileges: Requested/Observed credential.requested by {by}\n"


def allowed(bot: str = "bot") -> str:
    """Policy, or what has its key, allowed it."""
    return f"3003 Decide: Success/Allowed request.allowed by policy for {bot}\n"


def rests_on_one_person(bot: str = "bot") -> str:
    """User, sponsor and approver all have their rights by one person's word: a finding."""
    return f"2004 Create: New credential.one_person [one_person] by policy for {bot}\n"


def sent(bot: str = "bot") -> str:
    """A sealed reply stands on its topic."""
    return f"3003 Deliver: Success/Observed reply.sent by nobody known for {bot}\n"


def waits(why: str, bot: str = "bot") -> str:
    """Policy wants approval, and a person is asked for it."""
    return f"""
        ~3003 Decide: Pending/Observed approval.required [{why}] by policy for {bot}
        ~3003 Ask for Approval: Requested/Observed approval.requested [{why}] by policy for {bot}
        ~{sent(bot)}"""


def approved(by: str, bot: str = "bot") -> str:
    """A person said yes."""
    return f"3003 Approve: Success/Allowed approval.given by {by} for {bot}\n"


def refused_by_policy(why: str, bot: str = "bot") -> str:
    """Policy's final no, which the agent is sent."""
    return f"""
        3003 Assign Privileges: Failure/Denied request.refused [{why}] by policy for {bot}
        {sent(bot)}"""


def refused_by_issuer(why: str, bot: str = "bot", *, finding: bool = True) -> str:
    """The issuer's no to what policy had allowed; a finding where an honest policy would not have."""
    found = f"~3002 Finding: Failure finding [{why}] by issuer for {bot}\n" if finding else ""
    return f"""
        ~{sent(bot)}
        ~3003 Assign Privileges: Failure/Denied credential.refused [{why}] by issuer for {bot}
        {found}"""


def answer_refused(why: str, bot: str = "bot") -> str:
    """Policy's no to a person's answer."""
    return f"3003 Refuse: Failure/Denied message.refused [{why}] by policy for {bot}\n"


def forged(why: str = "key_unknown") -> str:
    """Nobody is believed to have written a record."""
    return f"3002 Logon: Failure/Denied record.not_believed [{why}] by nobody known\n"


def buried(why: str = "key_unknown") -> str:
    """A service could do nothing with a record."""
    return f"3002 Dead Letter: Failure/Denied record.dead_lettered [{why}] by nobody known\n"
