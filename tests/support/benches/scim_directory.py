"""A company's directory before a real SCIM endpoint: an HTTP client with its token, and the records that come of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from ringfence.kernel.service.bearer_tokens import new_token
from ringfence.messages.registry import Delegation, GroupDelegation, ProvisionerSet, UserRecord, UserState
from ringfence.messages.topics import USER
from ringfence.scim.settings import ScimSettings
from tests.support.http_client import plain_client
from tests.support.openapi import document
from tests.support.world import Party, World, scope

PATCH = "urn:ietf:params:scim:api:messages:2.0:PatchOp"
USER_SCHEMA = "urn:ietf:params:scim:schemas:core:2.0:User"
GROUP_SCHEMA = "urn:ietf:params:scim:schemas:core:2.0:Group"
GROUPS = (
    GroupDelegation(group="Developers", scope=scope("staging", ["deploy"], ["env/**"])),
    GroupDelegation(group="Leads", roles=("sponsor",), scope=scope("staging", ["read"], ["**"])),
)


class Company:
    """A directory, its provisioner, and what became of its users."""

    def __init__(self, world: World, key: Party, token: str, url: str) -> None:
        self.world = world
        self.key = key
        self.token = token
        self.url = url
        self.http = plain_client(base_url=f"{url}/", headers={"Authorization": f"Bearer {token}"}, timeout=30)
        document("scim").watch(self.http)

    async def call(self, method: str, path: str, body: Any = None, status: int = 200) -> Any:
        """The answer to a request, which must have this status."""
        response = await self.http.request(method, path, json=body)
        assert response.status_code == status, response.text
        return response.json() if response.content else None

    async def user(self, user: str, **more: Any) -> Any:
        """A new user, as a directory makes one."""
        body = {"schemas": [USER_SCHEMA], "userName": f"{user}@acme.example", "active": True, **more}
        return await self.call("POST", "Users", body, 201)

    async def group(self, name: str, *members: str) -> Any:
        """A group that the directory now tells of."""
        body = {
            "schemas": [GROUP_SCHEMA],
            "displayName": name,
            "members": [{"value": member} for member in members],
        }
        return await self.call("POST", "Groups", body, 201)

    async def patch(self, path: str, *operations: dict[str, Any], status: int = 200) -> Any:
        """Some attributes changed."""
        return await self.call("PATCH", path, {"schemas": [PATCH], "Operations": list(operations)}, status)

    async def state(self, user_id: str) -> UserState:
        """What the last record says of a user."""
        return (await self.records(user_id))[-1].state

    async def records(self, user_id: str) -> list[UserRecord]:
        """All records of a user, in order."""
        return [
            self.world.opened(record, UserRecord, "registry")
            for record in await self.world.records(USER)
            if record.key == user_id
        ]

    async def delegate(self, *groups: GroupDelegation) -> None:
        """An operator's command."""
        claims = self.world.claims(
            ProvisionerSet,
            self.world.operator,
            provisioner_id=self.key.name,
            name="Directory of ACME",
            keys=(self.key.key_record(),),
            delegation=Delegation(source="scim:acme", groups=groups),
        )
        await self.world.accepted(claims, self.world.operator)


@asynccontextmanager
async def opened_company(
    world: World, *groups: GroupDelegation, clock: Any = None, **own: Any
) -> AsyncIterator[Company]:
    """A registry and a SCIM endpoint, and who calls it. `clock`: of the endpoint alone."""
    key = world.party("user", "acme")
    key.key.save(world.folder / "acme.json")
    token, line = new_token("acme")
    tokens = world.folder / "tokens"
    tokens.write_text(line + "\n")
    tokens.chmod(0o600)
    settings = ScimSettings(
        provisioner=world.folder / "acme.json", tokens=tokens, mail_domain="acme.example", **own
    )
    async with world.running("registry"), world.running("scim", own={"scim": settings}, clock=clock):
        company = Company(world, key, token, f"http://127.0.0.1:{world.ports['scim']}/scim/v2")
        await company.delegate(*(groups or GROUPS))
        assert await world.runtimes["scim"].tables_caught_up(30)
        async with company.http:
            yield company
