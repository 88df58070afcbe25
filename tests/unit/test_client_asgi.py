"""The guard of ASGI applications: who reaches the application, and in which words the others are refused."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from ringfence.client.agent.dpop import proof
from ringfence.client.agent.httpx_auth import BearerAuth, DpopAuth
from ringfence.client.errors import InvalidCallError, TokenRejectedError
from ringfence.client.resource_server.asgi import TOKEN, Needs, TokenGuard
from ringfence.client.resource_server.challenges import read_presented_token, refusal
from ringfence.client.resource_server.dpop_proofs import Nonces
from ringfence.client.resource_server.verifier import TokenVerifier, VerifiedToken
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.codes import Code
from tests.unit.test_client_verify import AUDIENCE, ISSUER, TARGET, Clock, Issuer

BASE = "https://staging.example"
WEB = f"{BASE}/env/staging/web"
BOT = SigningKey.generate("spiffe://acme.example/agent/deploy-bot")
BOUND = {"cnf": {"jkt": BOT.kid}}
ALGS = 'algs="ES256 EdDSA"'


class Application:
    """What is behind the guard: it says whose token it was given."""

    def __init__(self) -> None:
        self.tokens: list[VerifiedToken | None] = []
        self.types: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.types.append(scope["type"])
        if scope["type"] == "http":
            self.tokens.append(scope.get(TOKEN))
            await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"1")]})
            await send({"type": "http.response.body", "body": b"ok"})
        elif scope["type"] == "websocket":
            self.tokens.append(scope.get(TOKEN))
            await send({"type": "websocket.accept"})


def needs(scope: Any) -> tuple[str, str] | Needs:
    if scope["path"] == "/healthz":
        return Needs.NO_TOKEN
    if scope["path"] == "/whoami":
        return Needs.ANY_TOKEN
    return "deploy", scope["path"][1:]


class Place:
    """A guarded application, and the issuer of its tokens."""

    def __init__(self, issuer: Issuer, http: httpx.AsyncClient, clock: Clock, **options: Any) -> None:
        self.issuer, self.clock, self.application = issuer, clock, Application()
        self.verifier = TokenVerifier(ISSUER, AUDIENCE, http=http, clock=clock, **options)
        self.guard = TokenGuard(self.application, self.verifier, base_url=BASE, needs=needs)

    def token(self, **claims: Any) -> str:
        return self.issuer.token(self.clock, **claims)

    async def ask(self, auth: httpx.Auth | None = None, url: str = WEB, **request: Any) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.guard)) as http:
            return await http.request(request.pop("method", "PUT"), url, auth=auth, **request)

    def dpop(self, token: str, key: SigningKey = BOT) -> DpopAuth:
        return DpopAuth(token, key, clock=self.clock)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def make(clock: Clock) -> AsyncIterator[Callable[..., Place]]:
    issuer = Issuer()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(issuer.app())) as http:
        yield lambda **options: Place(issuer, http, clock, **options)


@pytest.fixture
def place(make: Callable[..., Place]) -> Place:
    return make()


# --- who passes -------------------------------------------------------------------------------------------------------


async def test_a_good_token_passes_and_is_in_the_scope(place: Place) -> None:
    response = await place.ask(BearerAuth(place.token()))
    assert (response.status_code, response.content) == (200, b"ok")
    (token,) = place.application.tokens
    assert token is not None
    assert token.agent == "spiffe://acme.example/agent/deploy-bot"
    assert "dpop-nonce" not in response.headers


async def test_a_bound_token_passes_with_a_proof_of_its_key(place: Place) -> None:
    auth = place.dpop(place.token(**BOUND))
    for _ in range(2):
        assert (await place.ask(auth, f"{WEB}?q=1")).status_code == 200
    assert [token and token.key_thumbprint for token in place.application.tokens] == [BOT.kid] * 2


async def test_exempt_request_passes_without_a_token(place: Place) -> None:
    for auth in (None, BearerAuth("garbage")):
        assert (await place.ask(auth, f"{BASE}/healthz")).status_code == 200
    assert place.application.tokens == [None, None]
    await place.guard({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
    assert place.application.types[-1] == "lifespan"


VERBS = {"GET": "read", "PUT": "deploy"}


def by_table(scope: Any) -> tuple[str, str]:
    return VERBS[scope["method"]], scope["path"][1:]


def by_path(scope: Any) -> tuple[str, str] | None:
    return ("read", "all") if scope["path"] == "/all" else None


@pytest.mark.parametrize(
    ("table", "method", "status", "code", "allow"),
    [
        (by_table, "DELETE", 405, "method_unmapped", "GET, PUT"),
        (by_table, "PROPFIND", 405, "method_unmapped", "GET, PUT"),
        (by_path, "PUT", 403, "path_unmapped", None),
    ],
)
async def test_a_request_without_an_entry_passes_with_no_token(
    place: Place, table: Any, method: str, status: int, code: str, allow: str | None
) -> None:
    place.guard = TokenGuard(place.application, place.verifier, base_url=BASE, needs=table)
    for auth in (None, BearerAuth(place.token())):
        answer = await place.ask(auth, method=method)
        assert (answer.status_code, answer.json()["error"]) == (status, code)
        assert answer.headers.get("allow") == allow
    assert place.application.tokens == []


async def test_a_websocket_without_an_entry_does_not_open(place: Place) -> None:
    place.guard = TokenGuard(place.application, place.verifier, base_url=BASE, needs=by_path)
    sent = await _sent(place, {"type": "websocket", "path": "/other", "headers": [], "extensions": {}})
    assert [message["type"] for message in sent] == ["websocket.close"]


async def test_any_token_is_enough_where_the_application_asks_by_itself(place: Place) -> None:
    token = place.token(authorization_details=[])
    assert (await place.ask(BearerAuth(token), f"{BASE}/whoami")).status_code == 200
    assert (await place.ask(BearerAuth(token))).status_code == 403
    assert (await place.ask(url=f"{BASE}/whoami")).status_code == 401


# --- who does not -----------------------------------------------------------------------------------------------------


def challenges(response: httpx.Response) -> list[str]:
    return response.headers.get_list("www-authenticate")


async def test_a_request_without_a_token_is_told_what_is_taken(
    place: Place, make: Callable[..., Place]
) -> None:
    for headers in (
        {},
        {"Authorization": "Basic abc"},
        {"Authorization": "Bearer"},
        {"Authorization": "DPoP "},
    ):
        response = await place.ask(headers=headers)
        assert response.status_code == 401
        assert challenges(response) == ["Bearer", f"DPoP {ALGS}"]  # RFC 6750, 3.1: and of no error
        assert response.json()["error"] == "token_missing"
    assert challenges(await make(require_proof=True).ask()) == [f"DPoP {ALGS}"]
    assert place.application.tokens == []


async def test_a_token_that_is_not_good(place: Place) -> None:
    for token in (place.token(aud="spiffe://acme.example/target/other"), place.token(exp=1), "not.a.jwt"):
        response = await place.ask(BearerAuth(token))
        (challenge,) = challenges(response)
        assert response.status_code == 401
        assert challenge.startswith('Bearer error="invalid_token", error_description="')
        assert response.headers["cache-control"] == "no-store"
        assert token not in response.text
    assert place.application.tokens == []


async def test_a_token_that_does_not_allow_it(place: Place) -> None:
    url = f"{BASE}/env/production/web"
    response = await place.ask(BearerAuth(place.token()), url)
    assert response.status_code == 403
    assert challenges(response)[0].startswith('Bearer error="insufficient_scope", error_description="')
    response = await place.ask(place.dpop(place.token(**BOUND)), url)
    assert response.status_code == 403
    assert challenges(response)[0].startswith('DPoP error="insufficient_scope", ')
    assert place.application.tokens == []


async def test_a_token_that_was_recalled(make: Callable[..., Place]) -> None:
    place = make(introspection_key=TARGET)
    auth = BearerAuth(place.token())
    assert (await place.ask(auth)).status_code == 200
    place.issuer.active = False
    response = await place.ask(auth)
    assert (response.status_code, response.json()["error"]) == (401, "inactive")
    assert 'error="invalid_token"' in challenges(response)[0]


async def test_stolen_bound_token_is_rejected_without_a_proof(place: Place) -> None:
    token = place.token(**BOUND)
    response = await place.ask(BearerAuth(token))
    assert response.status_code == 401
    assert 'error="invalid_token"' in challenges(response)[0]
    assert "bound" in response.json()["message"]
    for auth in (place.dpop(token, SigningKey.generate(BOT.id)), place.dpop(place.token())):
        assert (await place.ask(auth)).status_code == 401
    headers = [("Authorization", f"DPoP {token}")]
    response = await place.ask(headers=headers)
    assert challenges(response)[0].startswith('DPoP error="invalid_dpop_proof", ')
    assert challenges(response)[0].endswith(ALGS)
    assert place.application.tokens == []


async def test_a_proof_that_was_seen_opens_nothing_else(place: Place) -> None:
    token = place.token(**BOUND)

    def shown(method: str, url: str) -> dict[str, str]:
        one = proof(BOT, method, url, access_token=token, now_s=place.clock.now)
        return {"Authorization": f"DPoP {token}", "DPoP": one}

    used = shown("PUT", WEB)
    assert (await place.ask(headers=used)).status_code == 200
    for request in (
        {"headers": used},
        {"headers": shown("GET", WEB)},
        {"headers": shown("PUT", f"{BASE}/env/staging/api")},
        {"headers": shown("PUT", "https://evil.example/env/staging/web") | {"Host": "evil.example"}},
        {"headers": [*shown("PUT", WEB).items(), ("DPoP", shown("PUT", WEB)["DPoP"])]},
    ):
        assert (await place.ask(**request)).status_code == 401
    assert len(place.application.tokens) == 1


async def test_two_authorizations_are_one_too_many(place: Place) -> None:
    value = f"Bearer {place.token()}"
    response = await place.ask(headers=[("Authorization", value), ("authorization", value)])
    assert response.status_code == 400
    assert 'error="invalid_request"' in challenges(response)[0]


async def test_bearer_tokens_are_refused_where_a_proof_is_required(make: Callable[..., Place]) -> None:
    place = make(require_proof=True)
    response = await place.ask(BearerAuth(place.token()))
    assert response.status_code == 401
    assert challenges(response)[0].startswith('DPoP error="invalid_token"')
    assert (await place.ask(place.dpop(place.token(**BOUND)))).status_code == 200


async def test_an_issuer_that_does_not_answer_lets_nobody_pass(place: Place) -> None:
    place.issuer.up = False
    response = await place.ask(BearerAuth(place.token()))
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert ISSUER not in response.text
    assert challenges(response) == []
    assert place.application.tokens == []


async def test_nonces_are_asked_for_given_and_renewed(make: Callable[..., Place]) -> None:
    place = make(nonces=Nonces())
    token = place.token(**BOUND)
    one = proof(BOT, "PUT", WEB, access_token=token, now_s=place.clock.now)
    response = await place.ask(headers={"Authorization": f"DPoP {token}", "DPoP": one})
    assert response.status_code == 401
    assert 'error="use_dpop_nonce"' in challenges(response)[0]
    assert response.headers["dpop-nonce"]
    response = await place.ask(place.dpop(token))
    assert (response.status_code, response.headers["x-own"]) == (200, "1")
    assert response.headers["dpop-nonce"]


# --- paths and sockets ------------------------------------------------------------------------------------------------


async def test_a_proof_is_for_the_path_as_it_was_written(place: Place) -> None:
    """With and without the `raw_path` of newer servers."""
    place.guard._needs = lambda scope: Needs.ANY_TOKEN
    token = place.token(**BOUND)
    for url, path, raw in (
        (f"{BASE}/a%20b/%C3%A9", "/a b/é", b"/a%20b/%C3%A9"),
        (f"{BASE}/a%20b/%C3%A9", "/a b/é", None),
        (f"{BASE}/a%2Fb", "/a/b", b"/a%2Fb"),
    ):
        one = proof(BOT, "GET", url, access_token=token, now_s=place.clock.now)
        headers = [(b"authorization", f"DPoP {token}".encode()), (b"dpop", one.encode())]
        scope = {"type": "http", "method": "GET", "path": path, "raw_path": raw, "headers": headers}
        sent = await _sent(place, scope)
        assert sent[0]["status"] == 200, url


async def _sent(place: Place, scope: dict[str, Any]) -> list[Any]:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await place.guard(scope, receive, send)
    return sent


async def test_a_websocket_opens_with_a_token_alone(place: Place) -> None:
    scope: dict[str, Any] = {"type": "websocket", "path": "/env/staging/web", "raw_path": None}
    good = [(b"authorization", f"Bearer {place.token()}".encode())]
    assert [m["type"] for m in await _sent(place, {**scope, "headers": good})] == ["websocket.accept"]
    assert [m["type"] for m in await _sent(place, {**scope, "headers": []})] == ["websocket.close"]
    able = {**scope, "headers": [], "extensions": {"websocket.http.response": {}}}
    start, body = await _sent(place, able)
    assert (start["type"], start["status"]) == ("websocket.http.response.start", 401)
    assert b"token_missing" in body["body"]
    assert len(place.application.tokens) == 1


# --- words ------------------------------------------------------------------------------------------------------------


def test_a_description_has_no_characters_that_end_it() -> None:
    error = TokenRejectedError('a "quoted" \\ é\r\nSet-Cookie: x', code=Code.INVALID_TOKEN)
    (challenge,) = [value for name, value in refusal(error).headers if name == "WWW-Authenticate"]
    assert (
        challenge
        == 'Bearer error="invalid_token", error_description="a ?quoted? ? ??U+000D??U+000A?Set-Cookie: x"'
    )


def test_presented_token_hides_its_secrets_in_repr() -> None:
    shown = read_presented_token({"AUTHORIZATION": "dpop  secret-token ", "dPoP": "secret-proof"})
    assert (shown.scheme, shown.token, shown.proofs) == ("DPoP", "secret-token", ("secret-proof",))
    assert "secret" not in repr(shown)


@pytest.mark.parametrize("url", ["", "staging.example", "/env", "https://a:b@staging.example"])
def test_a_guard_wants_to_know_where_it_is(place: Place, url: str) -> None:
    with pytest.raises(InvalidCallError, match="base_url"):
        TokenGuard(place.application, place.verifier, base_url=url)
