"""Proposals by commands alone: what waits is said with who may second it, shown, seconded and withdrawn."""

from __future__ import annotations

import json

import pytest

from ringfence.client.admin.trust_setup import TrustFolder
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.messages.registry import AgentSetCeiling, UserDisable, UserInvite
from tests.flows.test_cli import Shell, shell
from tests.flows.test_proposals import Office
from tests.support.world import World, scope

__all__ = ["shell"]
WIDER = ("agent", "set-ceiling", "bot", "--allow", "platform:deploy:env/production/web", "--yes", "--anyway")


@pytest.fixture
async def office(shell: Shell, world: World) -> Office:
    office = Office(world)
    await office.staff()
    for party in (office.otto, office.oona, office.sam):
        party.key.save(shell.folder / f"{party.name}.json")
    return office


async def test_change_waits_is_shown_and_seconded(shell: Shell, office: Office) -> None:
    waits = await shell("sam", *WIDER, status=1)
    assert "agent.set-ceiling waits for a second person until" in waits
    assert "who may: olga, oona, otto; by: ringfence proposal second" in waits
    (listed,) = await shell.json("otto", "proposal", "list")
    assert (listed["author"], listed["subject"], listed["status"]) == ("sam", "agent bot", "open")
    table = await shell("otto", "proposal", "list")
    assert listed["id"][:12] in table
    shown = await shell.json("otto", "proposal", "show", listed["id"][:8])
    assert shown["now"]["ceiling"] == []
    assert shown["wanted"]["ceiling"][0]["resources"] == ["env/production/web"]
    assert "env/production/web" in await shell("otto", "proposal", "show", listed["id"][:8])
    assert (await shell.json("olga", "agent", "show", "bot"))["state"]["ceiling"] == []
    await shell("otto", "proposal", "second", listed["id"][:12], "--yes")
    assert (await shell.json("olga", "agent", "show", "bot"))["state"]["ceiling"] != []
    assert "no change waits" in await shell("otto", "proposal", "list")
    (after,) = await shell.json("otto", "proposal", "list", "--all")
    assert (after["status"], after["by"]) == ("seconded", "otto")


async def test_author_withdraws_and_cannot_second(shell: Shell, office: Office) -> None:
    await shell("olga", *WIDER, status=1)
    (listed,) = await shell.json("olga", "proposal", "list")
    refused = await shell("olga", "proposal", "second", listed["id"], "--yes", status=1)
    assert "somebody else has to second it" in refused
    assert "no proposal that you may see" in await shell("otto", "proposal", "show", "ffffff", status=1)
    await shell("olga", "proposal", "withdraw", listed["id"][:12])
    assert await shell.json("olga", "proposal", "list") == []
    again = await shell("otto", "proposal", "second", listed["id"], "--yes", status=1)
    assert "withdrawn by olga before" in again


async def test_sponsor_sees_proposals_about_agents_only(shell: Shell, office: Office) -> None:
    await shell("olga", *WIDER, status=1)
    key = str(shell.folder / "uma.json")
    await shell("olga", "user", "add", "uma", "--name", "Uma", "--new-key", key, status=1)
    assert [one["subject"] for one in await shell.json("sam", "proposal", "list")] == ["agent bot"]
    assert len(await shell.json("otto", "proposal", "list")) == 2


async def test_author_and_second_see_the_whole_ceiling(shell: Shell, office: Office, world: World) -> None:
    """What the agent holds already is shown too, with whether it used it."""
    given = scope("platform", ["read", "deploy"], ["env/staging"])
    await world.accepted(world.claims(AgentSetCeiling, world.root, agent_id="bot", ceiling=given), world.root)
    added = ("agent", "set-ceiling", "bot", "--add", "platform:deploy:env/*", "--yes", "--anyway")
    await shell("sam", *added, status=1)
    author = shell.noted
    (listed,) = await shell.json("otto", "proposal", "list")
    shown = await shell("otto", "proposal", "show", listed["id"])
    await shell("otto", "proposal", "second", listed["id"], "--yes")
    for text in (author, shown, shell.noted):
        assert "whole ceiling then" in text
        assert "not used in 30 days" in text
        assert "(new)" in text


async def test_author_and_second_see_the_forbidden_combinations(
    shell: Shell, office: Office, world: World
) -> None:
    both = ("agent", "set-ceiling", "bot", "--allow", "platform:push,merge:web", "--yes", "--anyway")
    await shell("sam", *both, status=1)
    author = shell.noted
    (listed,) = await shell.json("otto", "proposal", "list")
    shown = await shell("otto", "proposal", "show", listed["id"])
    found = await shell.json("otto", "proposal", "show", listed["id"])
    await shell("otto", "proposal", "second", listed["id"], "--yes")
    for text in (author, shown, shell.noted, found["findings"]["forbidden combinations"]):
        assert "what writes a change must not be what approves it" in " ".join(text.split())


async def test_list_of_users_is_shown_whole_and_seconded_at_once(shell: Shell, office: Office) -> None:
    for name in ("uma", "uri"):
        key = str(shell.folder / f"{name}.json")
        await shell("olga", "user", "add", name, "--name", name.title(), "--new-key", key, status=1)
    await shell("olga", *WIDER, status=1)
    listed = {one["subject"]: one["id"] for one in await shell.json("otto", "proposal", "list")}
    mixed = await shell("otto", "proposal", "second", *listed.values(), "--yes", status=1)
    assert "only users and keys are seconded in a list" in mixed
    assert len(await shell.json("otto", "proposal", "list")) == 3
    ids = [listed["user uma"], listed["user uri"]]
    assert "given twice" in await shell("otto", "proposal", "second", ids[0], ids[0], "--yes", status=1)
    too_many = await shell("otto", "proposal", "second", *ids * 51, "--yes", status=1)
    assert "102 proposals; one signature seconds at most 100" in too_many
    said = await shell("otto", "proposal", "second", *ids, "--yes")
    for name in ("Uma", "Uri"):
        assert f'"{name}"' in shell.noted, "each change is shown"
    assert "user uma, user uri are changed, by olga and you" in said
    assert (await shell.json("uri", "user", "show", "uri"))["state"]["name"] == "Uri"


async def test_doctor_says_that_no_second_operator_is_independent(
    shell: Shell, office: Office, world: World
) -> None:
    async def registry(status: int = 0) -> dict[str, str]:
        await shell("olga", "--json", "doctor", status=status)
        return next(one for one in json.loads(shell.printed)["findings"] if one["what"] == "registry")

    assert "independent operators" not in (await registry(1))["says"]
    for user in ("otto", "oona"):
        await world.accepted(world.claims(UserDisable, world.root, user_id=user, reason="left"), world.root)
    found = await registry(1)
    assert found["verdict"] == "bad"
    assert "independent operators with a live key: 1 of 2; make another with the root" in found["says"]


async def test_root_invites_a_second_operator(shell: Shell, world: World) -> None:
    """The invitation that `init --second-operator` verifies."""
    world.root.key.save(shell.folder / "root.json")
    invitation = (await shell.json("root", "user", "invite", "petra"))["invitation"]
    claims = parse(invitation).unverified_claims(UserInvite)
    assert (claims.iss, claims.user_id) == (world.root.id, "petra")


async def test_key_file_made_for_a_proposal_is_kept_and_counts_once_seconded(
    shell: Shell,
    office: Office,
) -> None:
    file = shell.folder / "uma.json"
    await shell("olga", "user", "add", "uma", "--name", "Uma", "--new-key", str(file), status=1)
    assert file.exists()
    (listed,) = await shell.json("otto", "proposal", "list")
    await shell("otto", "proposal", "second", listed["id"], "--yes")
    assert (await shell.json("uma", "user", "show", "uma"))["state"]["name"] == "Uma"


async def test_second_operator_and_the_mode_required_are_published_together(
    shell: Shell,
    world: World,
) -> None:
    folder, package = shell.folder / "trust", shell.folder / "package"
    trust = TrustFolder(folder)
    folder.mkdir(mode=0o700)
    for file in (trust.root_key, shell.folder / "root.json"):
        world.root.key.save(file)
    trust.bundle.write_text(sign(world.bundle, world.root.key, header_jwk=True))
    invitation = shell.folder / "invitation"
    invitation.write_text((await shell.json("root", "user", "invite", "petra"))["invitation"])
    key = str(shell.folder / "petra.json")
    await shell("olga", "key", "new", key, "--id", "user/petra")
    package.write_text(await shell("petra", "key", "prove", key, "--invitation", str(invitation)))
    made = ("init", "--folder", str(folder), "--second-operator", str(package), "--publish")
    said = await shell.json("root", *made)
    assert (said["operator"], said["second_person"]["mode"], said["trust_bundle"]) == ("petra", "required", 2)
    registry = world.runtimes["registry"]
    await world.until(lambda: registry.trust.version == 2 or None, "the bundle of two operators")
    begins_s = said["second_person"]["not_before"]
    assert [registry.trust.second_person(at_s) for at_s in (begins_s - 1, begins_s)] == [
        "reported",
        "required",
    ]
    await world.event_where(lambda event: event.kind == "accepted" and event.result == "petra")
    assert (await shell.json("petra", "user", "show", "petra"))["state"]["roles"] == ["operator"]
