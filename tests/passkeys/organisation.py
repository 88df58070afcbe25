"""People with passkeys in a realm: how they come to them, and the commands that they sign by them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from playwright.async_api import Page

from ringfence.client.admin import user_keys
from ringfence.client.passkeys import questions
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.registry import Role
from tests.passkeys.browser import Person
from tests.passkeys.command import Command
from tests.support.stack import RunningStack


class Organisation:
    """The realm `realm`, whose people sign with passkeys. An async context manager: it ends commands that wait."""

    def __init__(self, realm: RunningStack, environment: dict[str, str], folder: Path) -> None:
        """`folder`: for files that people hand to each other."""
        self.realm = realm
        self.environment = environment
        self.folder = folder
        self._commands: list[Command] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for command in self._commands:
            command.stop()

    async def run(self, *arguments: str, as_user: str | None = None, identity: Path | None = None) -> Command:
        """Start a command line: as `--passkey` of a user, or with a key file."""
        who = {"RINGFENCE_USER": as_user} if as_user else {}
        who |= {"RINGFENCE_IDENTITY": str(identity)} if identity else {}
        command = await Command.start(
            {**self.environment, **who}, *arguments, *(["--passkey"] if as_user else [])
        )
        self._commands.append(command)
        return command

    @property
    def operator_file(self) -> Path:
        """The key file of the stack's first operator."""
        return self.realm.stack.trust.user_key(self.realm.stack.options.operator)

    def operator(self) -> SigningKey:
        """The key of the stack's first operator."""
        return SigningKey.load(self.operator_file)

    def key_file(self, who: str) -> Path:
        """The key file of somebody of the realm."""
        path = self.folder / f"{who}.json"
        if not path.exists():
            self.realm.key("user", self.realm.name(who)).save(path)
        return path

    async def invitation(self, user_id: str) -> str:
        """The link of an operator's invitation."""
        command = await self.run("user", "invite", user_id, identity=self.operator_file)
        link: str = (await command.result())["link"]
        return link

    async def package(self, person: Person, user_id: str) -> Path:
        """What the page gives out for a new passkey of this person, in a file."""
        page = await person.open(await self.invitation(user_id))
        path = self.folder / f"passkey-{user_id}.json"
        path.write_text(json.dumps(await enrolled(page)))
        return path

    async def add_key(self, user_id: str, package: Path, *more: str) -> Any:
        """Let the operator add a key."""
        words = ["user", "add-key", user_id, "--package", str(package), "--yes", *more]
        return await (await self.run(*words, identity=self.operator_file)).result()

    async def add_user(self, user_id: str, roles: Sequence[Role] = ("sponsor",)) -> None:
        """Make a user who has no key yet."""
        async with self.realm.as_operator() as olga:
            await olga.set_user(
                user_id, name=user_id.title(), roles=roles,
                entitlements=[self.realm.permission(["read", "write"], "env/**")],
            )  # fmt: skip

    async def enrol(self, person: Person, user_id: str, roles: Sequence[Role] = ("sponsor",)) -> None:
        """Make a user whose only key is a passkey of this person, as the commands do, without a process for each."""
        await self.add_user(user_id, roles)
        async with self.realm.as_operator() as olga:
            connection, directory = olga.connection, await olga.directory()
            now_s = connection.clock.now_ms() // 1000
            invitation = user_keys.invite(connection, user_id)
            question = questions.invitation_question(
                invitation, user_id, olga.id, directory, connection.trust
            )
            origin = questions.sign_origin(connection.trust, now_s)
            page = await person.open(questions.question_link(origin, question))
            package = user_keys.read_package(json.dumps(await enrolled(page)))
            await olga.add_user_key(
                user_id, package.record(now_s + 86_400, attested=False), invitation=package.invitation,
                possession=package.possession,
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
