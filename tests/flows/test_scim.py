"""A directory's requests, in the shapes that Entra ID and Okta document, before the real endpoint: what becomes of
users. And an independent reader of RFC 7643 and 7644.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import httpx2
import pytest
from scim2_client.engines.httpx2 import SyncSCIMClient
from scim2_tester import Status, check_server

from ringfence.client.admin.provisioner import Provisioner
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.settings import BusSettings
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.kernel.service.bearer_tokens import MAX_WRONG, new_token
from ringfence.messages.base import ExpiringClaims
from ringfence.messages.registry import (
    AgentRegister,
    Entitlements,
    GroupDelegation,
    Provisioning,
    UserDisable,
    UserSet,
    UserState,
)
from ringfence.messages.topics import HEARTBEAT, SERVICE_EVENT, USER
from ringfence.model.records.directory import Directory
from ringfence.scim.provisioning import DirectoryView, EntitlementRefresh, ProvisioningWriter
from ringfence.scim.settings import ScimSettings
from tests.conftest import Kafka
from tests.support.audit_stories import expect_trail
from tests.support.benches.scim_directory import (
    GROUP_SCHEMA,
    GROUPS,
    USER_SCHEMA,
    Company,
    opened_company,
)
from tests.support.in_memory_registry import FixedClock
from tests.support.world import Party, World, scope

LONG = "x" * 3000
_numbers = itertools.count()


@pytest.fixture(scope="module")
async def shared(kafka: Kafka) -> AsyncIterator[Company]:
    """One endpoint for all tests that look at users of their own. It has both groups."""
    async with (
        World.open(kafka.bootstrap, paced=kafka.embedded) as world,
        opened_company(world) as company,
    ):
        for group in GROUPS:
            await company.group(group.group)
        yield company


@pytest.fixture
async def own(kafka: Kafka) -> AsyncIterator[Company]:
    """An endpoint of the test's own."""
    async with (
        World.open(kafka.bootstrap, paced=kafka.embedded) as world,
        opened_company(world) as company,
    ):
        yield company


def fresh(name: str = "maria") -> str:
    return f"{name}{next(_numbers)}"


async def group_id(company: Company, name: str) -> str:
    found = await company.call("GET", f'Groups?filter=displayName eq "{name}"&excludedAttributes=members')
    assert found["totalResults"] == 1
    assert "members" not in found["Resources"][0]
    id: str = found["Resources"][0]["id"]
    return id


async def member(company: Company, group: str = "Developers", **more: Any) -> str:
    """The id of a new user of a group."""
    user: str = (await company.user(fresh(), **more))["id"]
    path = f"Groups/{await group_id(company, group)}"
    await company.patch(path, {"op": "add", "path": "members", "value": [{"value": user}]})
    return user


def enrolling(company: Company, state: UserState, key: Party | None = None) -> UserSet:
    """An operator gives a user from the directory a key, and leaves the rest as it is."""
    key = key or company.world.party("user", state.user_id)
    fields = {
        name: getattr(state, name) for name in ("user_id", "name", "roles", "entitlements", "provisioned")
    }
    return company.world.claims(UserSet, company.world.operator, keys=(key.key_record(),), **fields)


LET_ACT_AGAIN = """
    3004 Update: Requested user.set by acme
    3004 Update: Failure command.refused [disabled_by_operator] by registry
"""
WRONG_TOKENS = "3003 Refuse: Failure/Denied message.refused [token_unknown] by scim\n" * MAX_WRONG
NOTHING = ""
"""The endpoint says no to the directory that it serves, and commands nothing."""
STOLEN_KEY = """
    3004 Update: Requested user.set by acme
    3004 Update: Failure command.refused [group_not_delegated] by registry
    3004 Update: Requested user.set by acme
    3004 Update: Failure command.refused [beyond_delegation] by registry
    3004 Update: Requested user.set by acme
    3004 Update: Failure command.refused [beyond_delegation] by registry
    3004 Update: Requested user.set by acme
    3004 Update: Failure command.refused [keys_not_delegated] by registry
    3004 Update: Requested user.set by acme
    3004 Update: Failure command.refused [not_its_user] by registry
    3004 Disable: Requested user.disable by acme
    3004 Disable: Failure command.refused [not_its_user] by registry
    3004 Disable: Requested user.disable by acme
    3004 Disable: Failure command.refused [not_its_user] by registry
"""
NO_SPONSOR_ANY_MORE = """
    3004 Create: Requested agent.register by sam for second
    3004 Create: Failure command.refused [not_sponsor] by registry for second
"""


# --- the specification, as somebody else reads it ---------------------------------------------------------------------


async def test_an_independent_checker_finds_nothing_but_what_is_meant(shared: Company):
    def check() -> list[Any]:
        with httpx2.Client(base_url=shared.url, headers={"Authorization": f"Bearer {shared.token}"}) as http:
            return list(check_server(SyncSCIMClient(http), resource_types=["User"]))

    results = await asyncio.to_thread(check)
    wrong = {(one.title, str(one.reason)) for one in results if one.status is not Status.SUCCESS}
    # Who is not said to be inactive may act; there is no third state.
    assert wrong <= {("check_remove_attribute", "PATCH modify() did not remove attribute 'active'")}
    assert len(results) > 40


# --- Entra ID ---------------------------------------------------------------------------------------------------------


async def test_entra_makes_a_user_and_puts_them_into_a_group(shared: Company):
    name = fresh("anna")
    found = await shared.call("GET", f'Users?filter=userName eq "{name}@acme.example"')
    assert (found["totalResults"], found.get("Resources", [])) == (0, [])
    made = await shared.call(
        "POST",
        "Users",
        {
            "schemas": [USER_SCHEMA, "urn:ietf:params:scim:schemas:extension:enterprise:2.0:User"],
            "externalId": f"object-{name}",
            "userName": f"{name}@acme.example",
            "active": True,
            "displayName": "Anna Arendt",
            "emails": [{"primary": True, "type": "work", "value": f"{name}@acme.example"}],
            "meta": {"resourceType": "User"},
            "name": {"formatted": "Anna Arendt", "familyName": "Arendt", "givenName": "Anna"},
            "title": "Engineer",
            "urn:ietf:params:scim:schemas:extension:enterprise:2.0:User": {"department": "Platform"},
        },
        201,
    )
    assert made["id"] == name
    path = f"Groups/{await group_id(shared, 'Developers')}"
    await shared.patch(path, {"op": "Add", "path": "members", "value": [{"$ref": None, "value": made["id"]}]})
    state = await shared.state(name)
    assert (state.name, state.status, state.keys) == ("Anna Arendt", "active", ())
    assert state.entitlements.scope == GROUPS[0].scope
    assert state.entitlements.source == "scim:acme"


@pytest.mark.parametrize(
    "operation",
    [
        {"op": "Replace", "path": "active", "value": False},
        {"op": "Replace", "path": "active", "value": "False"},
        {"op": "replace", "value": {"active": False}},
        {"op": "replace", "path": "ACTIVE", "value": "false"},
    ],
)
async def test_inactive_user_is_disabled(shared: Company, operation: dict[str, Any]):
    user = await member(shared)
    answer = await shared.patch(f"Users/{user}", operation)
    assert answer["active"] is False
    state = await shared.state(user)
    assert (state.status, state.provisioned and state.provisioned.groups) == ("disabled", ("Developers",))
    answer = await shared.patch(f"Users/{user}", {"op": "Replace", "path": "active", "value": "True"})
    assert answer["active"] is True
    assert (await shared.state(user)).status == "active"


async def test_entra_changes_attributes_by_paths_with_filters(shared: Company):
    user = (await shared.user(fresh()))["id"]
    enterprise = "urn:ietf:params:scim:schemas:extension:enterprise:2.0:User:department"
    answer = await shared.patch(
        f"Users/{user}",
        {"op": "Add", "path": 'emails[type eq "work"].value', "value": "m@acme.example"},
        {"op": "Replace", "path": "name.familyName", "value": "Ortiz"},
        {"op": "Add", "path": "displayName", "value": "Maria Ortiz"},
        {"op": "Add", "path": enterprise, "value": "Platform"},
    )
    assert answer["emails"] == [{"type": "work", "value": "m@acme.example"}]
    answer = await shared.patch(
        f"Users/{user}",
        {"op": "Replace", "path": 'emails[type eq "work"].value', "value": "maria@acme.example"},
        {"op": "Replace", "value": {"name.givenName": "Maria", "displayName": "Maria O."}},
    )
    assert answer["emails"][0]["value"] == "maria@acme.example"
    assert answer["name"] == {"familyName": "Ortiz", "givenName": "Maria"}
    assert (await shared.state(user)).name == "Maria O."


@pytest.mark.parametrize(
    "removal",
    [
        {"op": "Remove", "path": "members", "value": [{"$ref": None, "value": "USER"}]},
        {"op": "Remove", "path": 'members[value eq "USER"]'},
        {"op": "remove", "path": "members"},
    ],
)
async def test_user_removed_from_a_group_loses_its_roles_and_entitlements(
    own: Company, removal: dict[str, Any]
):
    path = f"Groups/{(await own.group('Leads'))['id']}"
    user = await member(own, "Leads")
    assert (await own.state(user)).roles == ("sponsor",)
    await own.patch(path, json.loads(json.dumps(removal).replace("USER", user)))
    state = await own.state(user)
    assert (state.roles, state.entitlements.scope, state.status) == ((), (), "active")
    assert (await own.call("GET", path)).get("members") is None


async def test_entra_deletes_a_user_and_who_comes_later_is_somebody_else(shared: Company):
    name = fresh("leaver")
    user = (await shared.user(name))["id"]
    claims = enrolling(shared, await shared.state(user))
    await shared.world.accepted(claims, shared.world.operator)
    assert await shared.world.runtimes["scim"].tables_caught_up(30)
    await shared.call("DELETE", f"Users/{user}", status=204)
    await shared.call("GET", f"Users/{user}", status=404)
    await shared.call("DELETE", f"Users/{user}", status=404)
    state = await shared.state(user)
    assert (state.status, [key.not_after > claims.iat + 60 for key in state.keys]) == ("disabled", [False])
    again = await shared.user(name)
    assert again["id"] == f"{user}-2"
    assert (await shared.state(f"{user}-2")).keys == ()


# --- Okta -------------------------------------------------------------------------------------------------------------


async def test_okta_replaces_a_user_whole(shared: Company):
    user = await member(shared, externalId="00u1")
    body = {
        "schemas": [USER_SCHEMA],
        "id": user,
        "userName": f"{user}@acme.example",
        "name": {"givenName": "Another", "middleName": "X", "familyName": "Username"},
        "emails": [{"primary": True, "value": "another@acme.example", "type": "work"}],
        "displayName": "Another Username",
        "locale": "en-US",
        "externalId": "00u2",
        "groups": [],
        "password": "1mz050nq",
        "active": True,
        "meta": {"resourceType": "User"},
    }
    answer = await shared.call("PUT", f"Users/{user}", body)
    assert (answer["externalId"], answer["displayName"]) == ("00u2", "Another Username")
    assert "password" not in answer
    state = await shared.state(user)
    # `groups` is read-only: who is in which is said of the groups.
    assert state.provisioned is not None
    assert (state.provisioned.groups, state.provisioned.external_id) == (("Developers",), "00u2")
    assert "1mz050nq" not in str(await shared.records(user))
    body["active"] = False
    await shared.call("PUT", f"Users/{user}", body)
    assert (await shared.state(user)).status == "disabled"


async def test_okta_pushes_a_group(own: Company):
    first, second = [(await own.user(fresh()))["id"] for _ in range(2)]
    made = await own.call(
        "POST", "Groups", {"schemas": [GROUP_SCHEMA], "displayName": "Leads", "members": []}, 201
    )
    path = f"Groups/{made['id']}"
    await own.patch(
        path,
        {"op": "replace", "value": {"id": made["id"], "displayName": "Leads"}},
        {"op": "add", "path": "members", "value": [{"value": first, "display": "x"}]},
    )
    await own.patch(
        path,
        {"op": "remove", "path": f'members[value eq "{first}"]'},
        {"op": "add", "path": "members", "value": [{"value": second}]},
    )
    assert [(await own.state(user)).roles for user in (first, second)] == [(), ("sponsor",)]
    await own.call(
        "PUT", path, {"schemas": [GROUP_SCHEMA], "displayName": "Leads", "members": [{"value": first}]}
    )
    assert [(await own.state(user)).roles for user in (first, second)] == [("sponsor",), ()]
    await own.call("DELETE", path, status=204)
    assert (await own.state(first)).roles == ()
    await own.call("GET", path, status=404)
    assert (await own.call("GET", "Groups"))["totalResults"] == 0


# --- lists ------------------------------------------------------------------------------------------------------------


async def test_lists_have_pages_and_filters(own: Company):
    for number in range(7):
        await own.user(f"user{number}", externalId=f"e{number}", displayName=f"User {number}")
    first = await own.call("GET", "Users?startIndex=1&count=3&sortBy=userName")
    assert (first["totalResults"], first["itemsPerPage"], first["startIndex"]) == (7, 3, 1)
    last = await own.call("GET", "Users?startIndex=7&count=3&sortBy=userName")
    assert [one["id"] for one in last["Resources"]] == ["user6"]
    assert (await own.call("GET", "Users?count=0"))["totalResults"] == 7
    for filter in (
        'userName eq "USER3@acme.example"', 'externalId eq "e3"', 'id eq "user3"', 'displayName sw "User 3"',
        'active eq true and externalId eq "e3"', 'USERNAME Eq "user3@acme.example"',
    ):  # fmt: skip
        found = await own.call("GET", f"Users?filter={filter}")
        assert [one["id"] for one in found["Resources"]] == ["user3"], filter
    only = await own.call("GET", 'Users?filter=id eq "user3"&attributes=userName')
    assert set(only["Resources"][0]) == {"schemas", "id", "userName"}


@pytest.mark.parametrize(
    ("query", "scim_type"),
    [
        ("filter=userName eq", "invalidFilter"),
        ("filter=nonsense xx 1", "invalidFilter"),
        ("startIndex=x", "invalidValue"),
    ],
)
async def test_a_query_that_means_nothing(shared: Company, query: str, scim_type: str):
    answer = await shared.call("GET", f"Users?{query}", status=400)
    assert (answer["schemas"], answer["status"], answer["scimType"]) == (
        ["urn:ietf:params:scim:api:messages:2.0:Error"], "400", scim_type,
    )  # fmt: skip


# --- refusals ---------------------------------------------------------------------------------------------------------


async def test_a_user_name_is_there_once_whatever_its_case(shared: Company):
    name = fresh()
    await shared.user(name)
    body = {"schemas": [USER_SCHEMA], "userName": f"{name.upper()}@ACME.example"}
    assert (await shared.call("POST", "Users", body, 409))["scimType"] == "uniqueness"
    other = (await shared.user(fresh()))["id"]
    rename = {"op": "replace", "path": "userName", "value": f"{name}@acme.example"}
    assert (await shared.patch(f"Users/{other}", rename, status=409))["scimType"] == "uniqueness"


async def test_users_whom_an_operator_made_are_not_there_and_are_not_taken(shared: Company):
    name = fresh("sam")
    await shared.world.user(name, ("sponsor",))
    assert await shared.world.runtimes["scim"].tables_caught_up(30)
    for method, body in (("GET", None), ("DELETE", None)):
        await shared.call(method, f"Users/{name}", body, 404)
    assert (await shared.call("GET", f'Users?filter=id eq "{name}"'))["totalResults"] == 0
    body = {"schemas": [USER_SCHEMA], "userName": f"{name}@acme.example"}
    answer = await shared.call("POST", "Users", body, 409)
    assert "does not come from here" in answer["detail"]
    assert (await shared.state(name)).provisioned is None


async def test_a_group_that_nobody_delegated_is_refused(shared: Company):
    admins = {"schemas": [GROUP_SCHEMA], "displayName": "Admins"}
    async with expect_trail(shared.world, NOTHING):
        answer = await shared.call("POST", "Groups", admins, 403)
    assert "not delegated" in answer["detail"]
    path = f"Groups/{await group_id(shared, 'Developers')}"
    rename = {"op": "Replace", "path": "displayName", "value": "Leads"}
    assert (await shared.patch(path, rename, status=400))["scimType"] == "mutability"
    stranger = {"op": "add", "path": "members", "value": [{"value": "olga"}]}
    assert (await shared.patch(path, stranger, status=400))["scimType"] == "invalidValue"


async def test_directory_cannot_enable_a_user_disabled_by_an_operator(shared: Company):
    user = await member(shared)
    operator = shared.world.operator
    await shared.world.accepted(
        shared.world.claims(UserDisable, operator, user_id=user, reason="x"), operator
    )
    assert await shared.world.runtimes["scim"].tables_caught_up(30)
    async with expect_trail(shared.world, LET_ACT_AGAIN, user=user):
        answer = await shared.patch(
            f"Users/{user}", {"op": "replace", "path": "active", "value": True}, status=403
        )
    assert "disabled_by_operator" in answer["detail"]
    assert (await shared.state(user)).status == "disabled"


@pytest.mark.parametrize(
    ("body", "scim_type"),
    [
        ("{", "invalidSyntax"),
        ("[]", "invalidSyntax"),
        (f'{{"schemas": ["{USER_SCHEMA}"]}}', "invalidValue"),
        (f'{{"schemas": ["{USER_SCHEMA}"], "userName": "{LONG}"}}', "invalidValue"),
        (f'{{"schemas": ["{USER_SCHEMA}"], "userName": "@"}}', "invalidValue"),
        (f'{{"schemas": ["{USER_SCHEMA}"], "userName": "y", "active": "maybe"}}', "invalidValue"),
    ],
)
async def test_a_body_that_means_nothing(shared: Company, body: str, scim_type: str):
    response = await shared.http.post("Users", content=body)
    assert (response.status_code, response.json()["scimType"]) == (400, scim_type), response.text
    assert response.headers["content-type"] == "application/scim+json"


async def test_a_patch_that_means_nothing(shared: Company):
    user = (await shared.user(fresh()))["id"]
    for operation, code in (
        ({"op": "move", "path": "active", "value": 1}, "invalidValue"),
        ({"op": "remove"}, "noTarget"),
        ({"op": "replace", "path": "emails[type eq", "value": "x"}, "invalidPath"),
        ({"op": "replace", "path": "active", "value": "maybe"}, "invalidValue"),
        ({"op": "replace", "path": "id", "value": "olga"}, "mutability"),
    ):
        answer = await shared.patch(f"Users/{user}", operation, status=400)
        assert answer["scimType"] == code, operation


async def test_a_body_beyond_all_measure_is_not_read(shared: Company):
    response = await shared.http.post("Users", content=b" " * (1024 * 1024 + 1))
    assert response.status_code == 413


# --- who may call -----------------------------------------------------------------------------------------------------


async def test_missing_or_wrong_tokens_are_rejected_and_rate_limited(own: Company):
    async with expect_trail(own.world, WRONG_TOKENS), httpx.AsyncClient(base_url=f"{own.url}/") as http:
        for number in range(MAX_WRONG):
            header = {} if number == 0 else {"Authorization": f"Bearer wrong{number}"}
            response = await http.get("Users", headers=header)
            assert response.status_code == 401
            assert response.headers["www-authenticate"].startswith("Bearer")
        response = await http.get("Users", headers={"Authorization": "Bearer wrong"})
        assert (response.status_code, response.headers["retry-after"]) == (429, "60")
    assert (await own.call("GET", "Users"))["totalResults"] == 0  # who has one is not held up
    events = [
        own.world.event(record) for record in await own.world.records(SERVICE_EVENT) if record.key == "scim"
    ]
    told = [event for event in events if event.reasons and event.reasons[0].code == "token_unknown"]
    assert len(told) == MAX_WRONG
    assert "wrong" not in str(told)


async def test_a_token_is_replaced_without_a_stop(own: Company):
    token, line = new_token("next")
    file = own.world.folder / "tokens"
    file.write_text(file.read_text() + line + "\n")
    async with httpx.AsyncClient(
        base_url=f"{own.url}/", headers={"Authorization": f"Bearer {token}"}
    ) as http:
        assert (await http.get("Users")).status_code == 200
        file.write_text(line + "\n")
        assert (await own.http.get("Users")).status_code == 401
        file.unlink()
        assert (await http.get("Users")).status_code == 401


# --- from records, and within the delegation --------------------------------------------------------------------------


async def test_restarted_scim_service_answers_from_the_records(own: Company):
    path = f"Groups/{(await own.group('Leads'))['id']}"
    user = await member(own, "Leads", externalId="e1", displayName="Maria")
    before = [await own.call("GET", f"Users/{user}"), await own.call("GET", path)]
    world, url = own.world, own.url
    settings = world.runtimes["scim"]
    async with world.running("scim", own={"scim": _settings(own)}):
        assert world.runtimes["scim"] is not settings
        other = f"http://127.0.0.1:{world.ports['scim']}/scim/v2"
        async with httpx.AsyncClient(headers=own.http.headers) as http:
            after = [(await http.get(f"{other}/{at}")).json() for at in (f"Users/{user}", path)]
    assert str(after).replace(other, url) == str(before)


def _settings(company: Company) -> ScimSettings:
    folder = company.world.folder
    return ScimSettings(
        provisioner=folder / "acme.json", tokens=folder / "tokens", mail_domain="acme.example"
    )


async def test_another_delegation_counts_for_those_who_are_there(kafka: Kafka):
    async with (
        World.open(kafka.bootstrap, paced=kafka.embedded) as world,
        opened_company(world, check_s=0.05) as company,
    ):
        await company.group("Leads")
        user = await member(company, "Leads")
        assert (await company.state(user)).roles == ("sponsor",)
        wider = GroupDelegation(
            group="Leads", roles=("sponsor",), scope=scope("staging", ["read", "deploy"], ["**"])
        )
        await company.delegate(wider)
        async with asyncio.timeout(60):
            while (await company.state(user)).entitlements.scope != wider.scope:
                await asyncio.sleep(0.05)
        await company.delegate(GROUPS[0])
        async with asyncio.timeout(60):
            while (await company.state(user)).roles:
                await asyncio.sleep(0.05)
        assert (await company.call("GET", "Groups"))["totalResults"] == 0


async def test_disabled_provisioner_changes_nothing(own: Company):
    operator = own.world.operator
    await own.world.accepted(
        own.world.claims(UserDisable, operator, user_id="acme", reason="stolen"), operator
    )
    assert await own.world.runtimes["scim"].tables_caught_up(30)
    async with expect_trail(own.world, NOTHING):
        answer = await own.call("POST", "Users", {"schemas": [USER_SCHEMA], "userName": "x"}, 503)
    assert "disabled the provisioner" in answer["detail"]


async def test_a_key_that_was_stolen_from_the_directory_makes_nobody_more_than_was_delegated(own: Company):
    """It is used without the endpoint, which would not say such things."""
    world, olga, user = own.world, own.world.operator.name, fresh()
    fields = {
        "user_id": user,
        "name": user,
        "roles": (),
        "keys": (),
        "provisioned": Provisioning(groups=("Leads",)),
    }
    nothing = Entitlements(scope=(), source="scim:acme", as_of=int(time.time()))
    wide = nothing.model_copy(update={"scope": scope("production", ["read"], ["**"])})

    def synced(**more: Any) -> UserSet:
        return world.claims(UserSet, own.key, **{**fields, "entitlements": nothing, **more})

    tries: list[tuple[ExpiringClaims, str]] = [
        (synced(provisioned=Provisioning(groups=("Admins",))), "group_not_delegated"),
        (synced(roles=("operator",)), "beyond_delegation"),
        (synced(entitlements=wide), "beyond_delegation"),
        (synced(keys=(own.key.key_record(),)), "keys_not_delegated"),
        (synced(user_id=olga), "not_its_user"),
        (world.claims(UserDisable, own.key, user_id=olga, reason="x"), "not_its_user"),
        (world.claims(UserDisable, own.key, user_id="acme", reason="x"), "not_its_user"),
    ]
    async with expect_trail(world, STOLEN_KEY):
        codes = [(await world.command(claims, own.key)).reasons[0].code for claims, _ in tries]
    assert codes == [code for _, code in tries]
    assert await own.records(user) == []


async def test_a_sponsor_from_the_directory_has_agents_until_they_leave_the_group(own: Company):
    path = f"Groups/{(await own.group('Leads'))['id']}"
    user = await member(own, "Leads")
    state = await own.state(user)
    sam = own.world.party("user", user)
    claims = enrolling(own, state, sam)
    await own.world.accepted(claims, own.world.operator)
    await own.world.agent("deploy-bot", sam)
    await own.patch(path, {"op": "Remove", "path": f'members[value eq "{user}"]'})
    bot = own.world.claims(
        AgentRegister, sam, agent_id="second", sponsor=user, description="x",
        keys=(own.world.party("agent", "second").key_record(),), ceiling=(),
    )  # fmt: skip
    async with expect_trail(own.world, NO_SPONSOR_ANY_MORE, sam=user):
        event = await own.world.command(bot, sam)
    assert (event.kind, event.reasons[0].code) == ("refused", "not_sponsor")


# --- entitlements grow old --------------------------------------------------------------------------------------------


async def test_entitlements_are_confirmed_while_the_directory_calls_and_no_longer(own: Company):
    await own.group("Leads")
    user, blocked = await member(own, "Leads"), await member(own, "Leads")
    operator = own.world.operator
    await own.world.accepted(own.world.claims(UserDisable, operator, user_id=blocked, reason="x"), operator)
    runtime = own.world.runtimes["scim"]
    assert await runtime.tables_caught_up(30)
    before = (await own.state(user)).entitlements.as_of
    clock = FixedClock(before * 1000)
    settings = _settings(own)
    async with Provisioner.connect(own.key.key, _client(own), clock=SystemClock()) as provisioner:
        directory = Directory(runtime.trust, clock, grace_ms=None)
        async with _following(own, directory) as caught_up:
            people = DirectoryView(directory, "acme")
            refresh = EntitlementRefresh(
                people, ProvisioningWriter(people, provisioner, caught_up, None), settings, clock
            )
            clock.ms += (settings.confirm_s + 60) * 1000
            assert await refresh.refresh() == 0  # it has not called
            clock.ms = (before + 1) * 1000
            refresh.note_request()
            assert await refresh.refresh() == 0  # they are young
            young = settings.model_copy(update={"confirm_s": 0})
            refresh = EntitlementRefresh(
                people, ProvisioningWriter(people, provisioner, caught_up, None), young, clock
            )
            refresh.note_request()
            assert await refresh.refresh() == 1
            assert (await own.state(user)).entitlements.as_of == before + 1
            clock.ms += (settings.heard_s + 60) * 1000
            assert await refresh.refresh() == 0


def _client(company: Company) -> ClientSettings:
    shared = company.world.settings("registry")
    return ClientSettings(**{name: getattr(shared, name) for name in BusSettings.model_fields})


@asynccontextmanager
async def _following(company: Company, directory: Directory) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """A table of users of its own, and what waits until it holds all."""
    follower = Follower(company.world.settings("scim"), (USER, HEARTBEAT), directory.on_records)
    await follower.start()

    async def caught_up() -> None:
        assert await follower.caught_up(30)

    try:
        await caught_up()
        yield caught_up
    finally:
        await follower.stop()
