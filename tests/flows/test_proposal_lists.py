"""One second signature over a list of users and keys: all of it takes effect, or none."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from ringfence.kernel.base.errors import UnavailableError
from ringfence.messages.codes import Code
from ringfence.messages.registry import MAX_SECONDED, SecondedCommand, UserSet
from ringfence.messages.topics import USER
from ringfence.registry.commands import Registry
from tests.flows.test_proposals import Office, opened
from tests.support.world import Party, World


async def proposed(office: Office, *names: str, **keys: Party) -> list[UserSet]:
    """New users that olga proposed, each with a key of their own or the given one."""
    commands = []
    for name in names:
        party = office.world.party("user", name)
        command = office.world.user_set(office.olga, party, ())
        if name in keys:
            command = command.model_copy(update={"keys": (keys[name].key_record(),)})
        await office.propose(command, office.olga)
        commands.append(command)
    return commands


def named(office: Office, commands: list[Any]) -> list[SecondedCommand]:
    return [office.named(one, office.olga) for one in commands]


async def users(world: World) -> set[str]:
    return {str(record.key) for record in await world.records(USER)}


async def test_list_of_users_takes_effect_with_one_signature(world: World) -> None:
    async with opened(world) as office:
        commands = await proposed(office, *(f"user{number}" for number in range(MAX_SECONDED)))
        event = await world.command(office.words(named(office, commands), office.otto), office.otto)
        assert event.kind == "accepted", event.reasons
        assert {f"user{number}" for number in range(MAX_SECONDED)} <= await users(world)
        assert (await world.get("registry", "/v1/proposals", office.otto)).json()["proposals"] == []
        for one in commands:
            await office.closing("accepted", one.jti)


async def test_author_proposes_no_more_users_than_one_list_has(world: World) -> None:
    async with opened(world) as office:
        await proposed(office, *(f"user{number}" for number in range(MAX_SECONDED)))
        one_more = world.user_set(office.olga, world.party("user", "late"), ())
        assert await office.code(one_more, office.olga) == Code.TOO_MANY_PROPOSED
        await office.propose(office.ceiling(office.olga), office.olga)


async def test_list_with_a_foreign_member_changes_nothing(world: World) -> None:
    async with opened(world) as office:
        commands = named(office, await proposed(office, "uma", "uri"))
        ceiling = office.ceiling(office.olga)
        await office.propose(ceiling, office.olga)
        (about_otto,) = [world.user_set(office.olga, office.otto, ("operator", "auditor"))]
        await office.propose(about_otto, office.olga)
        foreign = {
            Code.SECOND_LISTED: office.named(ceiling, office.olga, await office.revision()),
            Code.SECOND_NOT_ENTITLED: office.named(about_otto, office.olga, 1),
            Code.PROPOSAL_UNKNOWN: commands[0].model_copy(update={"proposal": "0" * 64}),
            Code.SUBJECT_CHANGED: commands[1].model_copy(update={"revision": 1}),
        }
        for code, one in foreign.items():
            kept = [other for other in commands if other.command != one.command]
            assert await office.code(office.words([*kept, one], office.otto), office.otto) == code
        assert not {"uma", "uri"} & await users(world)
        await world.accepted(office.words(commands, office.otto), office.otto)
        assert {"uma", "uri"} <= await users(world)


async def test_list_that_gives_one_key_to_two_users_changes_nothing(world: World) -> None:
    async with opened(world) as office:
        shared = world.party("user", "shared")
        commands = named(office, await proposed(office, "uma", "uri", uma=shared, uri=shared))
        assert await office.code(office.words(commands, office.otto), office.otto) == Code.SECOND_LISTED
        assert not {"uma", "uri"} & await users(world)


async def test_list_above_the_limit_is_malformed(world: World) -> None:
    one = SecondedCommand(author=world.operator.id, command="x", proposal="0" * 64, revision=0)
    office = Office(world)
    with pytest.raises(ValidationError, match=f"at most {MAX_SECONDED} items"):
        office.words([one] * (MAX_SECONDED + 1), world.operator)


async def test_list_interrupted_in_the_middle_is_completed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the registry ended between the records of two users: the second signature is delivered again."""
    publish, failures = Registry._publish, ["uri"]

    async def publish_later(self: Registry, subject: Any, *given: Any) -> None:
        if subject[1] in failures:
            raise UnavailableError(f"it ended before {failures.pop()}")
        await publish(self, subject, *given)

    async with opened(world) as office:
        commands = await proposed(office, "uma", "uri", "ute")
        monkeypatch.setattr(Registry, "_publish", publish_later)
        word = office.words(named(office, commands), office.otto)
        await world.accepted(word, office.otto)
        assert failures == []
        found = [str(record.key) for record in await world.records(USER)]
        assert sorted(name for name in found if name in ("uma", "uri", "ute")) == ["uma", "uri", "ute"]
        listed = (await world.get("registry", "/v1/proposals", office.otto, all="1")).json()["proposals"]
        assert {(one["status"], one["by"]) for one in listed} == {("seconded", "otto")}
