"""People with passkeys in a realm: how they come to them, and the commands that they sign by them."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any, Self

from playwright.async_api import Page

from ringfence.client.connection import Connection
from ringfence.client.passkeys.questions import invitation_question, question_link, sign_origin
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey, thumbprint
from ringfence.messages.keys import KeyRecord, PublicJwk
from ringfence.messages.registry import Role, UserInvite
from tests.passkeys.browser import Person
from tests.passkeys.command import Command
from tests.support.stack import RunningStack


class Organisation:
    """The realm `realm`, whose people sign with passkeys. An async context manager: it ends commands that wait."""

    def __init__(self, realm: RunningStack, environment: dict[str, str]) -> None:
        self.realm = realm
        self.environment = environment
        self._commands: list[Command] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for command in self._commands:
            command.stop()

    async def run(self, *arguments: str, as_user: str | None = None) -> Command:
        """Start a command line; as `--passkey` of a user where one is named."""
        who = {"RINGFENCE_USER": as_user} if as_user else {}
        command = await Command.start(
            {**self.environment, **who}, *arguments, *(["--passkey"] if as_user else [])
        )
        self._commands.append(command)
        return command

    def operator(self) -> SigningKey:
        """The key file of the stack's first operator."""
        return SigningKey.load(self.realm.stack.trust.user_key(self.realm.stack.options.operator))

    async def invitation(self, user_id: str) -> str:
        """The link of an operator's invitation."""
        olga, now_s = self.operator(), int(time.time())
        invite = UserInvite(
            iss=olga.id, aud=self.realm.settings.trust_domain, iat=now_s, exp=now_s + 3600,
            jti=str(uuid.uuid4()), user_id=user_id,
        )  # fmt: skip
        async with Connection(olga, self.realm.settings) as connection:
            question = invitation_question(
                sign(invite, olga), user_id, self.realm.stack.options.operator, await connection.directory(),
                connection.trust,
            )  # fmt: skip
            return question_link(sign_origin(connection.trust, time.time()), question)

    async def enrol(self, person: Person, user_id: str, roles: Sequence[Role] = ("sponsor",)) -> None:
        """Make a user whose only key is a passkey of this person."""
        page = await person.open(await self.invitation(user_id))
        offer = await enrolled(page)
        async with self.realm.as_operator() as olga:
            await olga.set_user(
                user_id, name=user_id.title(), roles=roles, keys=[key_record(offer)],
                entitlements=[self.realm.permission(["read", "write"], "env/**")],
            )  # fmt: skip

    async def sponsor(self, person: Person) -> str:
        """Make the realm's agent the agent of somebody who has only a passkey. Returns their id."""
        user_id = self.realm.name("pia")
        await self.enrol(person, user_id)
        async with self.realm.as_operator() as olga:
            await olga.transfer_agent(self.realm.agent, sponsor=user_id, without_consent=True)
        return user_id


async def enrolled(page: Page) -> dict[str, Any]:
    """Go through the enrolment on an open invitation. Returns the package that the page hands over."""
    await page.get_by_role("button", name="Make a passkey").click()
    await page.get_by_role("button", name="Prove it", exact=True).click()
    await page.get_by_role("heading", name="The passkey is ready").wait_for()
    package: dict[str, Any] = json.loads(await page.get_by_label("Answer").input_value())
    return package


def key_record(offer: dict[str, Any]) -> KeyRecord:
    """The record of the key in a package, as an operator signs it in."""
    jwk = PublicJwk(**offer["jwk"])
    return KeyRecord(
        kid=thumbprint(jwk), jwk=jwk, not_after=int(time.time()) + 86_400, use="webauthn",
        credential_id=offer["credential_id"], rp_id=offer["rp_id"], aaguid=offer["aaguid"],
        backup_eligible=offer["backup_eligible"],
    )  # fmt: skip
