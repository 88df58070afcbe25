"""Credentials in the gateway's memory: whose word they are, for which lease, and until when."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from ringfence.backends.http import StaticSecrets
from ringfence.backends.secret_sources import TargetAccess
from ringfence.gateway.decision.injection import Injector, SealedCredentials
from ringfence.gateway.state.leases import LeaseTable
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.crypto.jwe import EncryptionKey, enclose
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.base import ServiceRole
from ringfence.messages.credential import Credential, CredentialDelivery
from ringfence.messages.lease import Lease
from ringfence.messages.registry import BackendSettings, TargetRecord, TargetState
from ringfence.messages.topics import CREDENTIAL_REPLY
from ringfence.messages.trust import ServiceIdentity, TrustBundle
from tests.support import leases
from tests.support.in_memory_registry import START_MS, TD, FixedClock, InMemoryRegistry
from tools.schemas.examples import EXAMPLES

NOW_S = START_MS // 1000
YEAR_S = 365 * 86_400
ROOT = SigningKey.generate(f"spiffe://{TD}/root")
KEYS = {
    role: SigningKey.generate(f"spiffe://{TD}/service/{role}")
    for role in ("issuer", "gateway", "policy", "revoker")
}
SEAL, OTHER = (EncryptionKey.generate(f"spiffe://{TD}/service/{name}") for name in ("gateway", "other"))


def _trust() -> TrustStore:
    def identity(role: Any) -> ServiceIdentity:
        roles: tuple[ServiceRole, ...] = (role,)
        return ServiceIdentity(id=KEYS[role].id, roles=roles, keys=(KEYS[role].record(NOW_S + YEAR_S),))

    bundle = TrustBundle(
        iss=ROOT.id, aud=TD, iat=NOW_S, exp=NOW_S + YEAR_S, jti="b", version=1,
        services=tuple(identity(role) for role in KEYS),
    )  # fmt: skip
    trust = TrustStore(TD, ROOT.kid)
    trust.load(sign(bundle, ROOT, header_jwk=True), NOW_S)
    return trust


class Memory:
    def __init__(self) -> None:
        self.clock = FixedClock()
        self.table = LeaseTable(self.clock)
        self.sealed = SealedCredentials(
            self.table,
            _trust(),
            self.clock,
            key=lambda: KEYS["gateway"],
            seal=SEAL,
            issuer_url="http://issuer.example",
        )
        self.ledger = InMemoryRegistry()
        self.lease = leases.lease(
            agent_id="bot", target_id="hub", backend="jwt", delivery="gateway", deadline=NOW_S + 600
        ).claims
        self.table.apply(self.lease)
        self.asked: list[httpx.Request] = []

    def delivery(self, by: str = "issuer", value: str = "secret-1", **fields: Any) -> str:
        credential = Credential(
            kind=fields.pop("kind", "jwt"), value=value, token_type=fields.pop("token_type", "Bearer"),
            expires_at=fields.pop("expires_at", self.lease.deadline),
        )  # fmt: skip
        given = {
            "iss": KEYS[by].id, "aud": TD, "iat": NOW_S, "jti": "d", "request_id": self.lease.request_id,
            "lease_id": self.lease.lease_id, "target_id": "hub", "credential": credential, **fields,
        }  # fmt: skip
        return sign(CredentialDelivery(**given), KEYS[by])

    def envelope(self, plain: str, key: EncryptionKey = SEAL) -> str:
        to = [one.record(int(time.time()) + YEAR_S) for one in (key, OTHER)]
        return enclose(plain.encode(), to if key is not OTHER else to[:1], about=self.lease.request_id)

    def comes(self, *values: str) -> None:
        self.sealed.on_records(
            [self.ledger.received(CREDENTIAL_REPLY, "bot", one, START_MS) for one in values]
        )

    def issuer(self, answer: Callable[[httpx.Request], Awaitable[httpx.Response]]) -> None:
        async def handle(request: httpx.Request) -> httpx.Response:
            self.asked.append(request)
            return await answer(request)

        self.sealed._http = httpx.AsyncClient(transport=httpx.MockTransport(handle))

    def issuer_says(self, status: int, content: str = "") -> None:
        async def answer(_: httpx.Request) -> httpx.Response:
            return httpx.Response(status, content=content)

        self.issuer(answer)


@pytest.fixture
def memory() -> Memory:
    return Memory()


async def test_credential_sealed_by_the_issuer_is_cached(memory: Memory) -> None:
    memory.comes("a.b.c.d.e", memory.envelope(memory.delivery()), "{}", "{")
    assert (await memory.sealed.get(memory.lease)).value == "secret-1"


@pytest.mark.parametrize(
    "wrong",
    [
        {"by": "revoker"}, {"by": "policy"}, {"by": "gateway"}, {"lease_id": "00000000-0000-5000-8000-000000000000"},
        {"expires_at": NOW_S},
    ],
)  # fmt: skip
async def test_credential_of_another_signer_or_lease_is_rejected(
    memory: Memory, wrong: dict[str, Any]
) -> None:
    memory.comes(memory.envelope(memory.delivery(**wrong)))
    memory.issuer_says(404)
    with pytest.raises(UnavailableError):
        await memory.sealed.get(memory.lease)


@pytest.mark.parametrize(
    "wrong", [{"target_id": "other"}, {"request_id": "00000000-0000-5000-8000-000000000000"}, {"kind": "ssh"}]
)
async def test_credential_for_another_target_or_kind_is_not_injected(
    memory: Memory, wrong: dict[str, Any]
) -> None:
    memory.comes(memory.envelope(memory.delivery(**wrong)))
    with pytest.raises(UnavailableError):
        await memory.sealed.get(memory.lease)


async def test_cached_credential_is_dropped_with_its_lease(memory: Memory) -> None:
    memory.comes(memory.envelope(memory.delivery()))
    memory.table.revoke(memory.lease.lease_id, START_MS)
    assert memory.sealed._deliveries == {}
    memory.comes(memory.envelope(memory.delivery()))
    assert memory.sealed._deliveries == {}, "what came after the end was kept"


async def test_credential_not_sealed_to_this_gateway_is_fetched_once(memory: Memory) -> None:
    memory.comes(memory.envelope(memory.delivery(), OTHER))
    go_on = asyncio.Event()

    async def answer(_: httpx.Request) -> httpx.Response:
        await go_on.wait()
        return httpx.Response(200, content=memory.envelope(memory.delivery()))

    memory.issuer(answer)
    asking = [asyncio.create_task(memory.sealed.get(memory.lease)) for _ in range(5)]
    await asyncio.sleep(0)
    go_on.set()
    assert {credential.value for credential in await asyncio.gather(*asking)} == {"secret-1"}
    await memory.sealed.get(memory.lease)
    (request,) = memory.asked
    assert request.url.path == f"/v1/leases/{memory.lease.lease_id}/sealed-credential"
    assert request.headers["authorization"].startswith("Bearer ")


@pytest.mark.parametrize(("status", "content"), [(404, ""), (503, ""), (200, "{}"), (200, "x")])
async def test_an_issuer_that_has_none_is_not_asked_by_each_request(
    memory: Memory, status: int, content: str
) -> None:
    memory.issuer_says(status, content)
    for _ in range(3):
        with pytest.raises(UnavailableError):
            await memory.sealed.get(memory.lease)
    assert len(memory.asked) == 1
    memory.clock.ms += 1000
    with pytest.raises(UnavailableError):
        await memory.sealed.get(memory.lease)
    assert len(memory.asked) == 2


def _target(kind: str = "jwt", **settings: Any) -> TargetState:
    record = EXAMPLES[TargetRecord]
    assert isinstance(record, TargetRecord)
    backend = BackendSettings.model_validate({"kind": kind, **settings})
    return record.state.model_copy(update={"target_id": "hub", "backend": backend})


def _injector(memory: Memory) -> Injector:
    return Injector(memory.table, memory.sealed, StaticSecrets(TargetAccess({"hub": "env:HUB_SECRET"})))


async def test_a_cut_while_the_credential_is_fetched_lets_nothing_out(memory: Memory) -> None:
    async def answer(_: httpx.Request) -> httpx.Response:
        memory.table.revoke(memory.lease.lease_id, START_MS)
        return httpx.Response(200, content=memory.envelope(memory.delivery()))

    memory.issuer(answer)
    with pytest.raises(UnavailableError, match="revoked"):
        await _injector(memory).headers(memory.lease, _target())
    assert memory.sealed._deliveries == {}


async def test_headers_are_those_of_the_kind(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    injector = _injector(memory)
    memory.comes(memory.envelope(memory.delivery()))
    assert await injector.headers(memory.lease, _target()) == {"Authorization": "Bearer secret-1"}
    with pytest.raises(UnavailableError):
        await injector.headers(memory.lease, _target("http", url="https://hub.example"))
    http = memory.lease.model_copy(update={"backend": "http", "seq": 2})
    memory.table.apply(http)
    target = _target("http", url="https://hub.example")
    with pytest.raises(UnavailableError, match="no credential") as raised:
        await injector.headers(http, target)
    assert "HUB_SECRET" not in str(raised.value)
    for secret in ("first", "second"):
        monkeypatch.setenv("HUB_SECRET", secret)
        assert await injector.headers(http, target) == {"Authorization": f"Bearer {secret}"}


async def test_a_token_that_needs_the_agents_key_is_not_injected(memory: Memory) -> None:
    memory.comes(memory.envelope(memory.delivery(token_type="DPoP")))
    with pytest.raises(UnavailableError):
        await _injector(memory).headers(memory.lease, _target())


def test_no_secret_is_in_what_is_shown_of_it(memory: Memory) -> None:
    lease: Lease = memory.lease
    memory.comes(memory.envelope(memory.delivery()))
    assert "secret-1" not in repr(memory.sealed)
    assert "secret-1" not in repr(lease)


async def test_cached_headers_are_returned_without_the_issuer(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    injector, hub = _injector(memory), _target("http", url="https://hub.example")
    assert injector.cached_headers(memory.lease, _target()) is None  # the issuer would have to be asked
    memory.comes(memory.envelope(memory.delivery()))
    assert injector.cached_headers(memory.lease, _target()) == {"Authorization": "Bearer secret-1"}
    with pytest.raises(UnavailableError):
        injector.cached_headers(memory.lease, hub)
    static = memory.lease.model_copy(update={"backend": "http"})
    for secret in ("first", "second"):
        monkeypatch.setenv("HUB_SECRET", secret)
        assert injector.cached_headers(static, hub) == {"Authorization": f"Bearer {secret}"}
    memory.clock.ms = memory.lease.deadline * 1000
    with pytest.raises(UnavailableError):
        injector.cached_headers(memory.lease, _target())
