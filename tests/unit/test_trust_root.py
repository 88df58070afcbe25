"""Which bundles a process believes, whichever root it is pinned to, while one root follows another."""

from __future__ import annotations

import pytest

from ringfence.kernel.errors import InvalidMessageError, SignatureError, UnavailableError
from ringfence.kernel.jws import sign
from ringfence.kernel.keys import SigningKey
from ringfence.kernel.trust import TrustStore
from ringfence.messages.registry import UserRecord
from ringfence.messages.trust import RootHandover, TrustBundle
from ringfence.model.chains import ChainError
from tests.ledger import START_MS, TD, FixedClock, Ledger

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
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def roots() -> list[SigningKey]:
    return [new_root() for _ in range(3)]


@pytest.fixture
def both(roots: list[SigningKey]) -> tuple[str, str]:
    """The word of the first root on the second, and of the second on the third."""
    return handover(roots[0], roots[1]), handover(roots[1], roots[2])


def test_who_is_pinned_to_the_old_root_follows_while_running(
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


def test_nobody_makes_themselves_the_next_root(roots: list[SigningKey], both: tuple[str, str]) -> None:
    store = TrustStore(TD, roots[0].kid)
    thief = new_root()
    for handovers in ((), (handover(thief, thief),), both, (both[1],), (handover(roots[1], thief),)):
        with pytest.raises(SignatureError):
            store.load(bundle(9, thief, *handovers), NOW_S)
    assert store.version is None
    assert thief.kid in str(store.unready())


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


def renewed(ledger: Ledger, by: SigningKey, pinned: str, *, ended_s: int) -> None:
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
def test_records_that_the_old_root_began_hold_under_the_new_one(ledger: Ledger, pin: str) -> None:
    ledger.give(ledger.user_set("root", "olga", ("operator",)))
    ledger.give(ledger.user_set("olga", "sam", ("sponsor",)))
    new = new_root()
    renewed(ledger, new, ledger.root.kid if pin == "old" else new.kid, ended_s=ledger.clock.ms // 1000)
    for user in ("olga", "sam"):
        entry = ledger.directory.user(user)
        assert entry is not None
        assert isinstance(entry.record, UserRecord)


def test_what_a_stolen_root_signed_counts_for_nothing(ledger: Ledger) -> None:
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


def test_what_an_agent_of_the_thiefs_signs_counts_for_nothing_either(ledger: Ledger) -> None:
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


def test_a_bundle_that_has_expired_denies_and_says_so(ledger: Ledger) -> None:
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
