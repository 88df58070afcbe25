"""Which bundles a process believes, whichever root it is pinned to, while one root follows another."""

from __future__ import annotations

import json

import pytest

from ringfence.kernel.base.clock import utc_text
from ringfence.kernel.base.errors import InvalidMessageError, SignatureError, UnavailableError
from ringfence.kernel.crypto.jwe import EncryptionKey
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey, b64encode
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.base import ServiceRole, typ_header
from ringfence.messages.lease import Lease
from ringfence.messages.registry import UserRecord
from ringfence.messages.topics import LEASE
from ringfence.messages.trust import OidcIssuer, OidcUse, RootHandover, ServiceIdentity, TrustBundle
from ringfence.model.records.command_chain import ChainError
from tests.support.in_memory_registry import START_MS, TD, FixedClock, InMemoryRegistry

NOW_S = START_MS // 1000
ROOT = f"spiffe://{TD}/root"


def new_root() -> SigningKey:
    return SigningKey.generate(ROOT)


def handover(by: SigningKey, to: SigningKey, **changed: object) -> str:
    claims = RootHandover(iss=ROOT, aud=TD, iat=NOW_S, jti="handover", next_root=to.public)
    return sign(claims.model_copy(update=changed), by, header_jwk=True)


def bundle(version: int, by: SigningKey, *handovers: str, **changed: object) -> str:
    claims = TrustBundle(
        iss=ROOT, aud=TD, iat=NOW_S, exp=NOW_S + 10**7, jti=str(version), version=version, services=(),
        handovers=handovers,
    )  # fmt: skip
    return sign(claims.model_copy(update=changed), by, header_jwk=True)


@pytest.fixture
def ledger() -> InMemoryRegistry:
    return InMemoryRegistry()


@pytest.fixture
def roots() -> list[SigningKey]:
    return [new_root() for _ in range(3)]


@pytest.fixture
def both(roots: list[SigningKey]) -> tuple[str, str]:
    """The word of the first root on the second, and of the second on the third."""
    return handover(roots[0], roots[1]), handover(roots[1], roots[2])


def test_process_pinned_to_an_old_root_follows_handovers(
    roots: list[SigningKey], both: tuple[str, str]
) -> None:
    store = TrustStore(TD, roots[0].kid)
    assert store.load(bundle(1, roots[0]), NOW_S)
    assert store.load(bundle(2, roots[1], both[0]), NOW_S)
    assert store.load(bundle(3, roots[2], *both), NOW_S)
    assert store.version == 3


@pytest.mark.parametrize("pinned", [0, 1, 2])
def test_one_bundle_is_enough_for_a_process_that_starts_later(
    roots: list[SigningKey], both: tuple[str, str], pinned: int
) -> None:
    """Whatever compaction and rewriting have left of the topic, and in whichever order."""
    store = TrustStore(TD, roots[pinned].kid)
    assert store.load(bundle(3, roots[2], *both), NOW_S)


def test_a_root_that_handed_over_signs_nothing_any_more(
    roots: list[SigningKey], both: tuple[str, str]
) -> None:
    store = TrustStore(TD, roots[0].kid)
    store.load(bundle(2, roots[1], both[0]), NOW_S)
    with pytest.raises(SignatureError, match="in force is"):
        store.load(bundle(3, roots[0]), NOW_S)
    stolen = handover(roots[0], thief := new_root())
    with pytest.raises(SignatureError):
        store.load(bundle(3, thief, stolen), NOW_S)
    assert store.version == 2


def test_root_without_a_handover_is_rejected(roots: list[SigningKey], both: tuple[str, str]) -> None:
    store = TrustStore(TD, roots[0].kid)
    thief = new_root()
    for handovers in ((), (handover(thief, thief),), both, (both[1],), (handover(roots[1], thief),)):
        with pytest.raises(SignatureError):
            store.load(bundle(9, thief, *handovers), NOW_S)
    assert store.version is None
    assert thief.kid in str(store.unready())


def test_bundle_of_another_trust_domain_is_named_and_not_answered_with_publish(
    roots: list[SigningKey],
) -> None:
    store = TrustStore("other.example", roots[0].kid)
    with pytest.raises(InvalidMessageError, match="another trust domain"):
        store.load(bundle(2, roots[0]), NOW_S)
    reason = str(store.unready())
    assert TD in reason
    assert "RINGFENCE_TRUST_DOMAIN" in reason
    assert "init --publish" not in reason


def test_a_handover_that_was_tampered_with_leads_nowhere(roots: list[SigningKey]) -> None:
    thief = new_root()
    head, _, tail = handover(roots[0], roots[1]).split(".")
    forged = ".".join((head, handover(roots[0], thief).split(".")[1], tail))
    store = TrustStore(TD, roots[0].kid)
    with pytest.raises(InvalidMessageError):
        store.load(bundle(2, thief, forged), NOW_S)
    elsewhere = handover(roots[0], thief, aud="other.example")
    with pytest.raises(InvalidMessageError, match="aud"):
        store.load(bundle(2, thief, elsewhere), NOW_S)
    assert store.version is None


def test_a_former_root_counts_for_its_time_alone(roots: list[SigningKey], both: tuple[str, str]) -> None:
    store = TrustStore(TD, roots[1].kid)
    store.load(bundle(2, roots[1], both[0], former_roots=(roots[0].record(NOW_S, NOW_S - 100),)), NOW_S)
    assert store.root_key(ROOT, roots[0].kid, NOW_S - 1) is not None
    assert store.root_key(ROOT, roots[0].kid, NOW_S) is None
    assert store.root_key(ROOT, roots[0].kid, NOW_S - 101) is None
    assert store.root_key(ROOT, roots[0].kid) is not None, "whose it is stays known"
    assert store.root_key(ROOT, roots[1].kid, NOW_S + 10**6) is not None
    assert store.root_key(ROOT, roots[2].kid) is None
    assert store.root_key(f"spiffe://{TD}/user/x", roots[1].kid) is None


def renewed(ledger: InMemoryRegistry, by: SigningKey, pinned: str, *, ended_s: int) -> None:
    """From now on the ledger's root is `by`; what the one before signed counts until `ended_s`."""
    first = ledger.trust.require()
    following = first.model_copy(
        update={
            "version": first.version + 1,
            "handovers": (handover(ledger.root, by),),
            "former_roots": (ledger.root.record(ended_s),),
        }
    )
    if pinned != ledger.root.kid:
        ledger.trust.__init__(TD, pinned)  # type: ignore[misc]
    assert ledger.trust.load(sign(following, by, header_jwk=True), NOW_S)


@pytest.mark.parametrize("pin", ["old", "new"])
def test_records_that_the_old_root_began_hold_under_the_new_one(ledger: InMemoryRegistry, pin: str) -> None:
    ledger.give(ledger.user_set("root", "olga", ("operator",)))
    ledger.give(ledger.user_set("olga", "sam", ("sponsor",)))
    new = new_root()
    renewed(ledger, new, ledger.root.kid if pin == "old" else new.kid, ended_s=ledger.clock.ms // 1000)
    for user in ("olga", "sam"):
        entry = ledger.directory.user(user)
        assert entry is not None
        assert isinstance(entry.record, UserRecord)


def test_operator_made_by_a_stolen_root_is_rejected(ledger: InMemoryRegistry) -> None:
    """An operator that the thief made was believed, and is not any more once the root that followed says since when."""
    ledger.give(ledger.user_set("root", "olga", ("operator",)))
    stolen_s = ledger.clock.ms // 1000
    ledger.clock.ms += 5000
    ledger.give(ledger.user_set("root", "mallory", ("operator",)))
    assert ledger.directory.user("mallory") is not None
    renewed(ledger, new_root(), ledger.root.kid, ended_s=stolen_s)
    assert ledger.directory.user("olga") is not None
    with pytest.raises(ChainError):
        ledger.directory.user("mallory")


def test_agent_of_an_operator_made_by_a_stolen_root_is_rejected(ledger: InMemoryRegistry) -> None:
    """Its commands were believed, so its record has been folded: it is folded anew."""
    ledger.give(ledger.user_set("root", "olga", ("operator",)))
    stolen_s = ledger.clock.ms // 1000
    ledger.clock.ms += 5000
    ledger.give(ledger.user_set("root", "mallory", ("operator", "sponsor")))
    ledger.give(ledger.register("mallory", "spy", "mallory"))
    spy, chains, at_ms = ledger.key("spy", "agent"), ledger.directory.chains, ledger.clock.ms + 1000
    assert chains.agent_key(spy.id, spy.kid, at_ms) is not None
    renewed(ledger, new_root(), ledger.root.kid, ended_s=stolen_s)
    with pytest.raises(ChainError):  # also where this is the first that is asked since
        ledger.directory.chains.agent_key(spy.id, spy.kid, at_ms)
    with pytest.raises(ChainError):
        ledger.directory.agent("spy")


def test_a_bundle_that_has_expired_denies_and_says_so(ledger: InMemoryRegistry) -> None:
    clock = FixedClock()
    reader = ledger.reader(grace_ms=5000)
    trust = ledger.trust
    end_s = trust.require().exp
    assert trust.expired(clock.ms / 1000) is None
    assert "--renew" in str(trust.expired(end_s))
    assert trust.service_key(ledger.registry.id, ledger.registry.kid, ("registry",), end_s) is None
    with pytest.raises(UnavailableError, match="expired at"):
        trust.require(end_s)
    ledger.clock.ms = end_s * 1000
    assert "trust bundle 1 expired" in str(reader.stale())


def test_an_expired_bundle_is_the_roots_last_word_all_the_same(roots: list[SigningKey]) -> None:
    """One that is not taken in would leave the one before in force, with the keys that it ended."""
    store = TrustStore(TD, roots[0].kid)
    store.load(bundle(1, roots[0]), NOW_S)
    assert store.load(bundle(2, roots[0], exp=NOW_S - 1), NOW_S)
    assert "trust bundle 2 expired" in str(store.expired(NOW_S))
    assert not store.load(bundle(1, roots[0]), NOW_S)
    assert store.load(bundle(3, roots[0]), NOW_S)
    assert store.expired(NOW_S) is None


# --- services ---------------------------------------------------------------------------------------------------------

END_S = NOW_S + 1000
ISSUER = SigningKey.generate(f"spiffe://{TD}/service/issuer")
GATEWAY = SigningKey.generate(f"spiffe://{TD}/gateway/edge", "EdDSA")
OIDC = OidcIssuer(issuer="https://idp.example", uses=("users",))


@pytest.fixture
def store() -> TrustStore:
    """Trusts an issuer and a gateway until `END_S`; the gateway's key ends before."""
    root = new_root()
    services = (
        ServiceIdentity(id=ISSUER.id, roles=("issuer",), keys=(ISSUER.record(END_S + 10**6),)),
        ServiceIdentity(id=GATEWAY.id, roles=("gateway",), keys=(GATEWAY.record(NOW_S + 500),)),
    )
    store = TrustStore(TD, root.kid)
    store.load(
        bundle(
            7,
            root,
            services=services,
            exp=END_S,
            oidc_issuers=(OIDC, OIDC.model_copy(update={"issuer": "https://b"})),
        ),
        NOW_S,
    )
    return store


def said(by: SigningKey, payload: bytes | None = None, **header: object) -> str:
    """Something of no shape that anybody knows, signed by a service."""
    head = json.dumps({"alg": by.alg, "kid": by.kid, "typ": "unheard-of", **header}).encode()
    body = json.dumps({"iss": by.id}).encode() if payload is None else payload
    text = f"{b64encode(head)}.{b64encode(body)}"
    return f"{text}.{b64encode(by.sign(text.encode()))}"


def test_a_store_that_has_seen_nothing_believes_nobody() -> None:
    store = TrustStore(TD, new_root().kid)
    assert (store.version, store.compact, store.expired(NOW_S)) == (None, b"", None)
    assert store.service_key(ISSUER.id, ISSUER.kid, ("issuer",), NOW_S) is None
    assert store.root_key(ROOT, new_root().kid) is None
    assert store.encryption_keys("gateway", NOW_S) == ()
    assert store.oidc_issuer(OIDC.issuer, "users", NOW_S) is None
    assert not store.may_be_vouched_for(LEASE, said(ISSUER, typ=typ_header(Lease)), NOW_S)
    assert not store.signed_by_service(parse(said(ISSUER)), NOW_S, ("issuer",))
    assert store.no_later_s(NOW_S) == NOW_S
    assert "ringfence init --publish" in str(store.unready())
    with pytest.raises(UnavailableError, match="ringfence init --publish"):
        store.require()


def test_another_with_the_same_pin_believes_the_same_bundle(roots: list[SigningKey]) -> None:
    store = TrustStore(TD, roots[0].kid)
    text = bundle(1, roots[0])
    assert store.load(text, NOW_S)
    assert store.compact == text.encode()
    again = store.anew()
    assert again.version is None
    assert again.load(text.encode(), NOW_S)
    assert again.compact == text.encode()
    with pytest.raises(SignatureError):
        store.anew().load(bundle(2, roots[1]), NOW_S)


def test_the_same_version_once_more_is_nothing_new(roots: list[SigningKey]) -> None:
    store = TrustStore(TD, roots[0].kid)
    assert store.load(bundle(2, roots[0]), NOW_S)
    assert not store.load(bundle(2, roots[0], jti="another"), NOW_S)
    assert not store.load(bundle(1, roots[0]), NOW_S)
    assert store.unready() is None


def test_a_bundle_that_is_out_of_date_is_logged(
    roots: list[SigningKey], caplog: pytest.LogCaptureFixture
) -> None:
    store = TrustStore(TD, roots[0].kid)
    store.load(bundle(1, roots[0]), NOW_S)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    store.load(bundle(2, roots[0], exp=NOW_S), NOW_S)
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "trust bundle 2 expired" in record.getMessage()
    assert utc_text(NOW_S) in record.getMessage()


def test_the_root_signs_as_the_root(roots: list[SigningKey]) -> None:
    store = TrustStore(TD, roots[0].kid)
    with pytest.raises(SignatureError):
        store.load(bundle(1, roots[0], iss=f"spiffe://{TD}/user/root"), NOW_S)
    for jwk in (None, {"kty": "EC"}, {**roots[0].public.model_dump(exclude_none=True), "x": 1}):
        _, body, tail = bundle(1, roots[0]).split(".")
        fields = {"alg": roots[0].alg, "kid": roots[0].kid, "typ": "ringfence.trust.bundle+jwt", "jwk": jwk}
        with pytest.raises(InvalidMessageError, match="jwk"):
            store.load(f"{b64encode(json.dumps(fields).encode())}.{body}.{tail}", NOW_S)
    assert store.version is None


@pytest.mark.parametrize(
    ("who", "roles", "at_s", "counts"),
    [
        (ISSUER, ("issuer",), NOW_S, True),
        (ISSUER, ("gateway", "issuer"), END_S - 1, True),
        (ISSUER, ("gateway",), NOW_S, False),
        (ISSUER, (), NOW_S, False),
        (ISSUER, ("issuer",), END_S, False),
        (GATEWAY, ("gateway",), NOW_S + 499, True),
        (GATEWAY, ("gateway",), NOW_S + 500, False),
    ],
)
def test_a_service_speaks_as_what_it_is_in_its_time(
    store: TrustStore, who: SigningKey, roles: tuple[ServiceRole, ...], at_s: int, counts: bool
) -> None:
    assert (store.service_key(who.id, who.kid, roles, at_s) is not None) == counts
    assert (store.finder(*roles, at_s=at_s)(who.id, who.kid) is not None) == counts


def test_whether_a_service_signed_it_whatever_it_says(store: TrustStore) -> None:
    both: tuple[ServiceRole, ...] = ("issuer", "gateway")

    def signed(compact: str, *roles: ServiceRole, at_s: float = NOW_S) -> bool:
        return store.signed_by_service(parse(compact), at_s, roles or both)

    assert signed(said(ISSUER))
    assert signed(said(ISSUER), "issuer", "policy")
    assert not signed(said(ISSUER), "gateway")
    assert not store.signed_by_service(parse(said(ISSUER)), NOW_S, ())
    assert signed(said(GATEWAY))
    assert not signed(said(GATEWAY), at_s=NOW_S + 500)
    thief = SigningKey.generate(ISSUER.id)
    assert not signed(said(thief))
    assert not signed(said(ISSUER, json.dumps({"iss": GATEWAY.id}).encode()))
    head, body, _ = said(ISSUER).split(".")
    assert not signed(f"{head}.{body}.{b64encode(thief.sign(f'{head}.{body}'.encode()))}")
    assert not signed(said(ISSUER, alg="EdDSA"))
    for payload in (
        b"", b"{", b"[]", b"1", b'"iss"', b"{}", b'{"iss": 1}', b'{"iss": null}', b'{"iss": ["x"]}', b"[" * 100_000,
    ):  # fmt: skip
        assert not signed(said(ISSUER, payload))


def test_signature_after_bundle_expiry_waits_for_the_next_bundle(store: TrustStore) -> None:
    typ = typ_header(Lease)
    for compact, at_s, waits in (
        (said(ISSUER, typ=typ), END_S, True),
        (said(ISSUER, typ=typ), END_S + 100, True),
        (said(ISSUER, typ=typ), END_S - 1, False),
        (said(ISSUER), END_S, False),  # no message of this topic
        (said(GATEWAY, typ=typ), END_S, False),  # whose word no lease is
        (said(SigningKey.generate(ISSUER.id), typ=typ), END_S, False),
        ("no jws", END_S, False),
    ):
        assert store.may_be_vouched_for(LEASE, compact, at_s) == waits
        assert store.may_be_vouched_for(LEASE, compact.encode(), at_s) == waits
        if waits:
            with pytest.raises(UnavailableError, match="trust bundle 7 expired") as caught:
                store.require_judgeable(LEASE, compact, at_s)
            assert caught.value.code == "trust_expired"
        else:
            store.require_judgeable(LEASE, compact, at_s)


@pytest.mark.parametrize(
    ("at_s", "judged_s"), [(NOW_S, NOW_S), (END_S - 1, END_S - 1), (END_S + 50, END_S - 1)]
)
def test_an_end_is_judged_within_the_bundle(store: TrustStore, at_s: int, judged_s: int) -> None:
    assert store.no_later_s(at_s) == judged_s


def test_a_bundle_in_force_is_required_in_its_time(store: TrustStore) -> None:
    assert store.require().version == store.require(END_S - 1).version == 7
    assert store.expired(END_S - 1) is None
    with pytest.raises(UnavailableError) as caught:
        store.require(END_S)
    assert caught.value.code == "trust_expired"


def test_the_signing_keys_of_a_service_are_those_of_its_time(
    store: TrustStore, roots: list[SigningKey]
) -> None:
    assert store.service_keys(GATEWAY.id, "gateway", NOW_S) == (GATEWAY.record(NOW_S + 500),)
    assert store.service_keys(GATEWAY.id, "gateway", NOW_S + 500) == ()
    assert store.service_keys(GATEWAY.id, "issuer", NOW_S) == ()
    assert store.service_keys("spiffe://elsewhere/x", "gateway", NOW_S) == ()
    assert store.service_keys(ISSUER.id, "issuer", END_S - 1) != ()
    assert store.service_keys(ISSUER.id, "issuer", END_S) == (), "no key outlives the bundle"
    later = ServiceIdentity(id=ISSUER.id, roles=("issuer",), keys=(ISSUER.record(END_S, NOW_S + 10),))
    coming = TrustStore(TD, roots[0].kid)
    assert coming.service_keys(ISSUER.id, "issuer", NOW_S) == (), "there is no bundle yet"
    coming.load(bundle(1, roots[0], services=(later,), exp=END_S), NOW_S)
    assert coming.service_keys(ISSUER.id, "issuer", NOW_S + 9) == ()
    assert coming.service_keys(ISSUER.id, "issuer", NOW_S + 10) == later.keys


def test_keys_to_seal_to_end_with_the_bundle(roots: list[SigningKey]) -> None:
    record = EncryptionKey.generate(GATEWAY.id).record(END_S + 10**6)
    services = (
        ServiceIdentity(id=GATEWAY.id, roles=("gateway",), keys=(), encryption_keys=(record,)),
        ServiceIdentity(id=f"{GATEWAY.id}2", roles=("gateway",), keys=(), encryption_keys=()),
    )
    store = TrustStore(TD, roots[0].kid)
    store.load(bundle(1, roots[0], services=services, exp=END_S), NOW_S)
    assert store.encryption_keys("gateway", END_S - 1) == (record,)
    assert store.encryption_keys("gateway", END_S - 1, of=GATEWAY.id) == (record,)
    assert store.encryption_keys("gateway", END_S - 1, of=f"{GATEWAY.id}2") == ()
    assert store.encryption_keys("issuer", END_S - 1) == ()
    assert store.encryption_keys("gateway", END_S) == ()


@pytest.mark.parametrize(
    ("issuer", "use", "at_s", "found"),
    [
        (OIDC.issuer, "users", NOW_S, True),
        (OIDC.issuer, "users", END_S - 1, True),
        (OIDC.issuer, "users", END_S, False),
        (OIDC.issuer, "instances", NOW_S, False),
        ("https://other.example", "users", NOW_S, False),
    ],
)
def test_an_issuer_of_tokens_counts_for_its_use(
    store: TrustStore, issuer: str, use: OidcUse, at_s: int, found: bool
) -> None:
    assert store.oidc_issuer(issuer, use, at_s) == (OIDC if found else None)
