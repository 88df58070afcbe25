"""Whose passkey was touched at sign-in: its own key says so, and not the credential id that somebody wrote down."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, cast

import pytest
from starlette.requests import Request

from ringfence.kernel.base.api_errors import NotFoundError, WrongQueryError
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.crypto.keys import b64encode
from ringfence.messages.base import KeyRecord
from ringfence.messages.registry import UserDisable, UserState
from ringfence.model.records.api_access import Authenticator
from ringfence.registry.http import MAX_SIGN_INS_PER_S, RegistryApi
from tests.support.in_memory_registry import InMemoryRegistry
from tests.support.passkeys import SIGN_ORIGIN, first_touch
from tests.support.user_keys import add_key, new_passkey, record_of


class AnyConsole:
    def console(self, authorization: str | None) -> str:
        return "console"


@pytest.fixture
def ledger() -> InMemoryRegistry:
    ledger = InMemoryRegistry()
    ledger.organisation()
    return ledger


def api(
    ledger: InMemoryRegistry,
    *more: tuple[UserState, KeyRecord],
    seconds: Callable[[], float] = time.monotonic,
) -> RegistryApi:
    """`more`: what a passkey of a record that an honest registry refuses would be."""
    return RegistryApi(
        ledger.directory,
        cast(Authenticator, AnyConsole()),
        ledger.clock,
        passkeys=lambda credential_id, at_s: [*more, *ledger.memory.passkeys(credential_id, at_s)],
        seconds=seconds,
    )


async def ask(api: RegistryApi, touched: dict[str, str]) -> Any:
    query = f"nonce={touched['nonce']}&assertion={touched['assertion']}"
    request = Request(
        {
            "type": "http",
            "headers": [],
            "query_string": query.encode(),
            "path_params": {"credential_id": touched["credential_id"]},
        }
    )
    route = next(one for one in api.routes() if "passkeys" in one.path)  # type: ignore[attr-defined]
    return json.loads((await route.endpoint(request)).body)  # type: ignore[attr-defined]


async def test_user_whose_key_verifies_the_touch_is_named(ledger: InMemoryRegistry):
    """suzy claims the credential id of sam's passkey, in a record of before such ids were refused."""
    passkey, claiming = new_passkey("sam"), new_passkey("suzy")
    ledger.give(add_key(ledger, "sam", "sam", passkey))
    suzy = ledger.memory.user("suzy")
    assert suzy is not None
    touched = first_touch(passkey)
    claimed = record_of(claiming).model_copy(update={"credential_id": touched["credential_id"]})
    found = await ask(api(ledger, (suzy, claimed)), touched)
    assert found == {"user_id": "sam", "kid": passkey.kid}


async def test_touch_that_no_live_key_verifies_names_no_user(ledger: InMemoryRegistry):
    passkey = new_passkey("sam")
    ledger.give(add_key(ledger, "sam", "sam", passkey))
    touched = first_touch(passkey)
    elsewhere = passkey.but(origin=SIGN_ORIGIN).sign(touched["nonce"].encode())
    for wrong in (
        touched | {"nonce": "m" * 43},
        touched | {"credential_id": "a" * 24},
        touched | {"assertion": b64encode(elsewhere)},
        first_touch(new_passkey("sam")) | {"credential_id": touched["credential_id"]},
    ):
        with pytest.raises(NotFoundError):
            await ask(api(ledger), wrong)
    for malformed in ({"nonce": "n" * 42}, {"nonce": "n" * 21 + "." + "n" * 21}, {"assertion": "a=b"}):
        with pytest.raises(WrongQueryError):
            await ask(api(ledger), touched | malformed)
    await ask(api(ledger), touched)
    ledger.give(ledger.claims(UserDisable, "olga", user_id="sam", reason="left"))
    with pytest.raises(NotFoundError):
        await ask(api(ledger), touched)


async def test_first_touches_beyond_limit_are_refused_until_second_is_over(ledger: InMemoryRegistry):
    """By a monotonic clock: the wall clock may be set back meanwhile."""
    passkey = new_passkey("sam")
    ledger.give(add_key(ledger, "sam", "sam", passkey))
    seconds = iter([*[0.0] * MAX_SIGN_INS_PER_S, 0.9, 1.0])
    asked, touched = api(ledger, seconds=lambda: next(seconds)), first_touch(passkey)
    for _ in range(MAX_SIGN_INS_PER_S):
        await ask(asked, touched)
    with pytest.raises(UnavailableError):
        await ask(asked, touched)
    ledger.clock.ms -= 5000
    assert (await ask(asked, touched))["user_id"] == "sam"


async def test_first_touches_of_unknown_passkeys_take_no_turn_of_others(ledger: InMemoryRegistry):
    passkey = new_passkey("sam")
    ledger.give(add_key(ledger, "sam", "sam", passkey))
    asked, strange = api(ledger, seconds=lambda: 0.0), first_touch(new_passkey("sam"))
    for _ in range(MAX_SIGN_INS_PER_S + 1):
        with pytest.raises(NotFoundError):
            await ask(asked, strange)
        with pytest.raises(WrongQueryError):
            await ask(asked, first_touch(passkey) | {"nonce": "short"})
    assert (await ask(asked, first_touch(passkey)))["user_id"] == "sam"
