"""The link of `ringfence dev` that makes a person's first passkey and adds it, without a further command."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from ringfence.client.admin.administrator import Administrator
from ringfence.client.admin.user_keys import INVITATION_LIFE_S, KeyPackage, invite, read_package
from ringfence.client.errors import InvalidCallError
from ringfence.client.passkeys.questions import (
    NotSignedError,
    QuestionServer,
    invitation_question,
    server_link,
    sign_origin,
)
from ringfence.client.settings import ClientSettings
from ringfence.kernel.crypto.keys import SigningKey

_KEY_LIFE_S = 365 * 24 * 3600


def offer_first_passkey(
    key: SigningKey, user_id: str, settings: ClientSettings, say: Callable[[str], None]
) -> str | None:
    """Invite a user by their own key file, and return the link to the sign page; None if they have a passkey.

    A thread waits for the passkey and adds it, signed by the key file. Then it calls `say` with a line for people. It
    ends with the process, or with the invitation after a day. Raises RingfenceError if there is no invitation.
    """
    link: Future[str | None] = Future()

    def serve() -> None:
        try:
            asyncio.run(_serve(key, user_id, settings, link, say))
        except Exception as error:  # noqa: BLE001 - the thread hands on whatever ended it
            if not link.done():
                link.set_exception(error)
            elif not isinstance(error, NotSignedError):
                say(f"the passkey was not added: {error}")

    threading.Thread(target=serve, name="first passkey", daemon=True).start()
    return link.result()


async def _serve(
    key: SigningKey,
    user_id: str,
    settings: ClientSettings,
    link: Future[str | None],
    say: Callable[[str], None],
) -> None:
    async with Administrator.connect(key, settings) as person:
        directory, connection = await person.directory(), person.connection
        entry = directory.user(user_id)
        if entry is None or any(one.credential_id for one in entry.state.keys):
            link.set_result(None)
            return
        origin = sign_origin(connection.trust, connection.clock.now_ms() / 1000)
        server = QuestionServer(origin, lambda answer: _package(user_id, answer))
        await server.start()
        server.ask(
            invitation_question(
                invite(connection, user_id), user_id, person.id, directory, connection.trust, server.url
            )
        )
    try:
        link.set_result(server_link(origin, server.url))
        package = await server.answer(INVITATION_LIFE_S)
        # Connected anew: a connection that is idle for a day would only cost.
        async with Administrator.connect(key, settings) as person:
            until_s = person.connection.clock.now_ms() // 1000 + _KEY_LIFE_S
            await person.add_user_key(
                user_id, package.record(until_s), invitation=package.invitation, possession=package.possession
            )
        say(f"{user_id} has a passkey now, and can sign in to the console.")
    finally:
        await server.close()


def _package(user_id: str, answer: Mapping[str, Any]) -> KeyPackage:
    """Return the passkey that the sign page hands over. Raises InvalidCallError."""
    package = read_package(json.dumps(answer.get("offer")))
    if package.user_id != user_id:
        raise InvalidCallError(f"this passkey is for {package.user_id}, and {user_id} was invited")
    return package
