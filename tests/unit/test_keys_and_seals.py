"""Private keys stay private, replies are for one reader, and only the pinned root makes services."""

from __future__ import annotations

import gc
import hashlib
import json
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from joserfc import jwe
from joserfc.jwk import ECKey, OKPKey

from ringfence.client.admin.trust_setup import (
    CeremonyError,
    TrustFolder,
    add_gateways,
    add_runners,
    add_services,
    first_operator,
    make_trust,
    missing_on_demand_services,
)
from ringfence.kernel.base.errors import (
    InvalidMessageError,
    RingfenceError,
    SignatureError,
    UnavailableError,
)
from ringfence.kernel.crypto.jwe import (
    EncryptionKey,
    ReplyKey,
    check_reply_key,
    enclose,
    seal,
    unverified_kid,
)
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import KeyFileError, SigningKey, b64decode, b64encode
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.base import PublicJwk, ServiceRole
from ringfence.messages.trust import ServiceIdentity, TrustBundle
from tests.support.old_trust import without_signals

TD = "acme.example"
NOW_S = 1_790_000_000


@pytest.mark.parametrize("alg", ["ES256", "EdDSA"])
def test_a_key_survives_its_file(tmp_path: Path, alg: str) -> None:
    key = SigningKey.generate(f"spiffe://{TD}/agent/bot", alg)
    key.save(tmp_path / "k" / "bot.json")
    assert SigningKey.load(tmp_path / "k" / "bot.json").kid == key.kid
    assert SigningKey.load(f"{tmp_path}/k/bot.json").kid == key.kid
    assert (tmp_path / "k" / "bot.json").stat().st_mode & 0o777 == 0o600


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bot.json"
    SigningKey.generate(f"spiffe://{TD}/agent/bot").save(path)
    path.chmod(0o640)
    with pytest.raises(KeyFileError, match="chmod 600"):
        SigningKey.load(path)


def test_a_key_file_is_never_overwritten(tmp_path: Path) -> None:
    SigningKey.generate(f"spiffe://{TD}/agent/bot").save(tmp_path / "bot.json")
    with pytest.raises(KeyFileError, match="exists already"):
        SigningKey.generate(f"spiffe://{TD}/agent/bot").save(tmp_path / "bot.json")


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b'{"id":"x","jwk":{"crv":"P-256","d":"AAAA"}}', b'{"id":1,"jwk":[]}', b"\xa0\xff"],
)
def test_a_broken_key_file_is_named_and_not_quoted(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bot.json"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(KeyFileError, match="does not hold a private key") as refused:
        SigningKey.load(path)
    assert "AAAA" not in str(refused.value)


def test_a_private_key_is_not_in_its_repr() -> None:
    key = SigningKey.generate(f"spiffe://{TD}/agent/bot")
    assert "PrivateKey" not in repr(key)


def test_a_reply_opens_with_its_own_key_alone() -> None:
    mine, other = ReplyKey(), ReplyKey()
    sealed = seal(b"secret", mine.public, kid="request-1")
    assert b"secret" not in sealed.encode()
    assert unverified_kid(sealed.encode()) == "request-1"
    assert mine.open(sealed) == b"secret"
    with pytest.raises(InvalidMessageError):
        other.open(sealed)
    with pytest.raises(InvalidMessageError):
        mine.open(sealed[:-4] + "AAAA")


def test_a_long_reply_is_opened_as_well() -> None:
    """One that repeats a request of 64 KiB; joserfc opens no more than that by itself."""
    mine, long = ReplyKey(), os.urandom(700_000)
    assert mine.open(seal(long, mine.public, kid="request-1")) == long


def test_a_reply_that_others_sealed_opens_as_well() -> None:
    mine = ReplyKey()
    key = OKPKey.import_key(mine.public.model_dump(exclude_none=True))
    header = {"alg": "ECDH-ES", "enc": "A256GCM", "kid": "r"}
    sealed = jwe.encrypt_compact(header, b"secret", key, algorithms=["ECDH-ES", "A256GCM"])
    assert mine.open(sealed) == b"secret"


def test_a_reply_by_another_algorithm_is_refused_and_so_is_an_envelope() -> None:
    """Replies are ECDH-ES alone, envelopes ECDH-ES+A256KW alone, however well others sealed them."""
    mine, key = ReplyKey(), EncryptionKey.generate(f"spiffe://{TD}/service/gateway")
    to_mine, to_key = (OKPKey.import_key(one.public.model_dump(exclude_none=True)) for one in (mine, key))
    wrapped = {"alg": "ECDH-ES+A256KW", "enc": "A256GCM", "kid": "r"}
    with pytest.raises(InvalidMessageError, match="UnsupportedAlgorithmError"):
        mine.open(jwe.encrypt_compact(wrapped, b"secret", to_mine, algorithms=["ECDH-ES+A256KW", "A256GCM"]))
    direct = jwe.GeneralJSONEncryption({"enc": "A256GCM"}, b"secret")
    direct.add_recipient({"alg": "ECDH-ES", "kid": key.kid}, to_key)
    with pytest.raises(InvalidMessageError, match="UnsupportedAlgorithmError"):
        key.open(json.dumps(jwe.encrypt_json(direct, None, algorithms=["ECDH-ES", "A256GCM"])))


def test_other_members_of_a_reply_key_are_ignored() -> None:
    """A key that was checked can be sealed to: or a decision would be lost for the word `use`."""
    mine = ReplyKey()
    said = PublicJwk.model_validate(
        {**mine.public.model_dump(exclude_none=True), "use": "sig", "key_ops": ["sign"]}
    )
    check_reply_key(said)
    assert mine.open(seal(b"secret", said, kid="r")) == b"secret"


def by_hand(to: ReplyKey, header: dict[str, object]) -> str:
    """The same, by RFC 7518, 4.6, whatever the header says besides."""
    own = x25519.X25519PrivateKey.generate()
    epk = {"kty": "OKP", "crv": "X25519", "x": b64encode(own.public_key().public_bytes_raw())}
    head = b64encode(json.dumps({"alg": "ECDH-ES", "enc": "A256GCM", "epk": epk, **header}).encode())
    secret = own.exchange(x25519.X25519PublicKey.from_public_bytes(b64decode(to.public.x)))
    info = b"\0\0\0\7A256GCM" + bytes(8) + (256).to_bytes(4)
    key = hashlib.sha256(b"\0\0\0\1" + secret + info).digest()
    sealed = AESGCM(key).encrypt(bytes(12), b"secret", head.encode())
    return f"{head}..{b64encode(bytes(12))}.{b64encode(sealed[:-16])}.{b64encode(sealed[-16:])}"


@pytest.mark.parametrize("name", ["crit", "zip", "apu", "apv"])
def test_seal_with_a_meaning_changing_header_is_rejected(name: str) -> None:
    mine = ReplyKey()
    assert mine.open(by_hand(mine, {"from_a_newer_writer": 1})) == b"secret"
    with pytest.raises(InvalidMessageError, match="cannot open"):
        mine.open(by_hand(mine, {name: "DEF"}))


EPK = {"kty": "OKP", "crv": "X25519", "x": ReplyKey().public.x}
HOW = {"alg": "ECDH-ES", "enc": "A256GCM", "epk": EPK}


@pytest.mark.parametrize(
    "header",
    [
        [],
        None,
        {},
        {**HOW, "alg": "dir"},
        {**HOW, "enc": "A128GCM"},
        {**HOW, "crit": ["exp"]},
        {**HOW, "epk": "x"},
        {**HOW, "epk": {**EPK, "x": 5}},
        {**HOW, "epk": {**EPK, "x": "AAAA"}},
        {**HOW, "epk": {**EPK, "x": b64encode(bytes(32))}},
        {**HOW, "epk": {**EPK, "crv": "P-256"}},
    ],
)
def test_a_seal_that_strangers_made_up_is_refused(header: object) -> None:
    head = b64encode(json.dumps(header).encode())
    iv, tag = b64encode(bytes(12)), b64encode(bytes(16))
    for compact in (
        head,
        f"{head}..{iv}.AAAA.{tag}",
        f"{head}.AAAA.{iv}.AAAA.{tag}",
        f"{head}..{iv}.é.{tag}",
    ):
        with pytest.raises(InvalidMessageError, match="cannot open"):
            ReplyKey().open(compact)


def test_a_seal_is_whole_or_refused() -> None:
    mine = ReplyKey()
    head, _, iv, ciphertext, tag = seal(b"secret", mine.public, kid="r").split(".")
    for broken in (
        f"{head}..{iv}.{ciphertext}.{tag[:16]}",
        f"{head}..{iv}.{ciphertext}.",
        f"{head}..{iv}AAAA.{ciphertext}.{tag}",
        f"{head}..{iv}..{tag}",
        f"{head}.AAAA.{iv}.{ciphertext}.{tag}",
        f"{head}..{iv}.{ciphertext}.{tag}.",
    ):
        with pytest.raises(InvalidMessageError, match="cannot open"):
            mine.open(broken)


@pytest.mark.parametrize("key", [ECKey.generate_key("P-256"), OKPKey.generate_key("X25519")])
def test_strangers_keys_of_both_kinds_are_sealed_to(key: ECKey | OKPKey) -> None:
    fields = {
        name: value for name, value in key.as_dict(private=False).items() if name in ("kty", "crv", "x", "y")
    }
    sealed = seal(b"secret", PublicJwk.model_validate(fields), kid="r")
    assert jwe.decrypt_compact(sealed, key, algorithms=["ECDH-ES", "A256GCM"]).plaintext == b"secret"


@pytest.mark.parametrize(
    "jwk",
    [
        PublicJwk(kty="EC", crv="P-256", x="AAAA", y="AAAA"),
        PublicJwk(kty="EC", crv="P-256", x="f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU"),
        PublicJwk(kty="OKP", crv="X25519", x="not base64!"),
        PublicJwk(kty="EC", crv="X25519", x="f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU"),
    ],
)
def test_a_reply_key_off_the_curve_is_refused(jwk: PublicJwk) -> None:
    with pytest.raises(InvalidMessageError, match="reply_key"):
        seal(b"secret", jwk, kid="r")


def bundle(version: int, root: SigningKey, service: SigningKey, **changed: object) -> str:
    identity = ServiceIdentity(id=service.id, roles=("policy",), keys=(service.record(NOW_S + 100, NOW_S),))
    claims = TrustBundle(
        iss=f"spiffe://{TD}/root", aud=TD, iat=NOW_S, exp=NOW_S + 1000, jti=str(version), version=version,
        services=(identity,),
    )  # fmt: skip
    return sign(claims.model_copy(update=changed), root, header_jwk=True)


@pytest.fixture
def root() -> SigningKey:
    return SigningKey.generate(f"spiffe://{TD}/root")


@pytest.fixture
def service() -> SigningKey:
    return SigningKey.generate(f"spiffe://{TD}/service/policy")


def test_a_bundle_of_the_pinned_root_says_who_is_who(root: SigningKey, service: SigningKey) -> None:
    store = TrustStore(TD, root.kid)
    assert store.unready()
    assert store.load(bundle(1, root, service), NOW_S)
    assert store.service_key(service.id, service.kid, ("policy",), NOW_S + 1) is not None
    assert store.service_key(service.id, service.kid, ("issuer",), NOW_S + 1) is None, "another role"
    assert store.service_key(service.id, service.kid, ("policy",), NOW_S + 100) is None, "past the key's end"
    assert store.service_key(service.id, service.kid, ("policy",), NOW_S - 1) is None, (
        "before the key's start"
    )
    assert store.service_key(f"spiffe://{TD}/service/other", service.kid, ("policy",), NOW_S + 1) is None


def test_a_bundle_of_another_root_is_refused(root: SigningKey, service: SigningKey) -> None:
    store = TrustStore(TD, root.kid)
    other = SigningKey.generate(f"spiffe://{TD}/root")
    with pytest.raises(SignatureError, match="pinned"):
        store.load(bundle(9, other, service), NOW_S)
    assert store.unready()


def test_a_bundle_is_not_rolled_back(root: SigningKey, service: SigningKey) -> None:
    store = TrustStore(TD, root.kid)
    store.load(bundle(2, root, service), NOW_S)
    assert not store.load(bundle(1, root, service), NOW_S)
    assert store.version == 2


def test_a_bundle_that_was_tampered_with_is_refused(root: SigningKey, service: SigningKey) -> None:
    head, body, tail = bundle(1, root, service).split(".")
    other_body = bundle(2, root, service).split(".")[1]
    with pytest.raises(SignatureError):
        TrustStore(TD, root.kid).load(f"{head}.{other_body}.{tail}", NOW_S)
    assert body


def test_after_an_expired_bundle_nobody_is_believed(root: SigningKey, service: SigningKey) -> None:
    store = TrustStore(TD, root.kid)
    store.load(bundle(1, root, service), NOW_S + 1000)
    assert "expired" in str(store.expired(NOW_S + 1000))
    assert store.service_key(service.id, service.kid, ("policy",), NOW_S + 1000) is None


def test_the_ceremony_makes_one_root_and_pins_it(tmp_path: Path) -> None:
    folder = TrustFolder(tmp_path)
    fingerprint = make_trust(folder, TD, "olga")
    store = TrustStore(TD, fingerprint)
    store.load(folder.bundle.read_text().strip(), _iat(folder))
    issuer = SigningKey.load(folder.service_key("issuer"))
    assert store.service_key(issuer.id, issuer.kid, ("issuer",), _iat(folder)) is not None
    with pytest.raises(CeremonyError, match="exists already"):
        make_trust(folder, TD, "olga")


def test_credentials_are_sealed_to_gateways_and_the_issuer(tmp_path: Path) -> None:
    folder = TrustFolder(tmp_path)
    store = TrustStore(TD, make_trust(folder, TD, "olga", gateways=["gw-1", "gw-2"]))
    store.load(folder.bundle.read_text().strip(), at_s := _iat(folder))
    sealed_to: dict[ServiceRole, list[str]] = {"gateway": ["gw-1", "gw-2"], "issuer": ["issuer"]}
    for role, names in sealed_to.items():
        keys = store.encryption_keys(role, at_s)
        files = [EncryptionKey.load(folder.encryption_key(name)) for name in names]
        assert [key.kid for key in keys] == [file.kid for file in files]
        for file in files:
            assert file.open(enclose(b"x", keys, about="x")) == b"x"
            assert [key.kid for key in store.encryption_keys(role, at_s, of=file.id)] == [file.kid]
    assert store.encryption_keys("policy", at_s) == ()
    assert store.encryption_keys("gateway", at_s, of="spiffe://acme.example/service/issuer") == ()
    assert store.encryption_keys("gateway", at_s + 10**9) == (), "past the end of the bundle"


def test_one_more_gateway_changes_nothing_for_the_others(tmp_path: Path) -> None:
    folder = TrustFolder(tmp_path)
    store = TrustStore(TD, make_trust(folder, TD, "olga", gateways=["gw-1"]))
    store.load(folder.bundle.read_text().strip(), at_s := _iat(folder))
    before = store.require()
    with pytest.raises(CeremonyError, match="in the trust bundle already"):
        add_gateways(folder, ["gw-1"])
    with pytest.raises(CeremonyError, match="name of a service"):
        add_gateways(folder, ["issuer"])
    add_gateways(folder, ["gw-2", "gw-3"])
    assert store.load(folder.bundle.read_text().strip(), at_s + 1)
    after = store.require()
    assert (after.version, after.exp) == (2, before.exp)
    assert after.services[: len(before.services)] == before.services
    added = EncryptionKey.load(folder.encryption_key("gw-3"))
    assert added.kid in {key.kid for key in store.encryption_keys("gateway", at_s + 1)}
    signing = SigningKey.load(folder.service_key("gw-2"))
    assert store.service_key(signing.id, signing.kid, ("gateway",), at_s + 1) is not None


def test_a_runner_has_a_key_of_its_own_and_is_nothing_else(tmp_path: Path) -> None:
    folder = TrustFolder(tmp_path)
    store = TrustStore(TD, make_trust(folder, TD, "olga"))
    store.load(folder.bundle.read_text().strip(), at_s := _iat(folder))
    before = store.require()
    for names, says in (
        (["gateway"], "gateway is in the trust bundle already; give the runner another name"),
        (["runner-1", "issuer"], "issuer is the name of a service"),
        (["runner-seal"], "ends in -seal"),
    ):
        with pytest.raises(CeremonyError, match=says):
            add_runners(folder, names)
    assert not folder.service_key("runner-1").exists()
    add_runners(folder, ["runner-1", "runner-2", "runner-1"])
    assert store.load(folder.bundle.read_text().strip(), at_s + 1)
    after = store.require()
    assert (after.version, after.exp) == (2, before.exp)
    assert after.services[: len(before.services)] == before.services
    assert [service.roles for service in after.services[len(before.services) :]] == [("runner",)] * 2
    one, other = (SigningKey.load(folder.service_key(name)) for name in ("runner-1", "runner-2"))
    assert one.kid != other.kid
    assert store.service_key(one.id, one.kid, ("runner",), at_s + 1) is not None
    assert store.service_key(one.id, other.kid, ("runner",), at_s + 1) is None
    assert store.service_key(one.id, one.kid, ("gateway", "registry", "issuer", "revoker"), at_s + 1) is None
    assert not folder.encryption_key("runner-1").exists(), "nothing is sealed to a runner"
    with pytest.raises(CeremonyError, match="in the trust bundle already"):
        add_runners(folder, ["runner-1"])


def test_an_installation_of_before_a_service_gets_its_key(tmp_path: Path) -> None:
    folder = TrustFolder(tmp_path)
    store = TrustStore(TD, make_trust(folder, TD, "olga"))
    without_signals(folder)
    assert store.load(folder.bundle.read_text().strip(), at_s := _iat(folder))
    before = store.require()
    assert missing_on_demand_services(before) == ["signals"]
    for names, says in (
        (["signals", "scim"], "scim is in the trust bundle already; a new key for it: --rotate-service scim"),
        (["gateway"], "gateway is no service that can be added; these can: scim, signals"),
        (["../x"], "no service that can be added"),
    ):
        with pytest.raises(CeremonyError, match=says):
            add_services(folder, names)
    assert not folder.service_key("signals").exists()
    add_services(folder, ["signals", "signals"])
    assert store.load(folder.bundle.read_text().strip(), at_s + 1)
    after = store.require()
    assert (after.version, after.exp, missing_on_demand_services(after)) == (
        before.version + 1,
        before.exp,
        [],
    )
    assert after.services[: len(before.services)] == before.services
    key = SigningKey.load(folder.service_key("signals"))
    assert store.service_key(key.id, key.kid, ("signals",), at_s + 1) is not None
    assert store.service_key(key.id, key.kid, ("scim", "revoker"), at_s + 1) is None


def test_a_gateway_is_added_by_the_root_that_is_there_alone(tmp_path: Path) -> None:
    with pytest.raises(CeremonyError, match="run: ringfence init"):
        add_gateways(TrustFolder(tmp_path), ["gw-2"])
    make_trust(TrustFolder(tmp_path), TD, "olga")
    make_trust(TrustFolder(tmp_path / "other"), TD, "olga")
    TrustFolder(tmp_path / "other").bundle.rename(TrustFolder(tmp_path).bundle)
    with pytest.raises(CeremonyError):
        add_gateways(TrustFolder(tmp_path), ["gw-2"])


@pytest.mark.parametrize(
    ("operator", "gateways", "says"),
    [("Olga Ops", [], "'Olga Ops': it: must be a name"), ("olga", ["../gw"], "must be a name"),
     ("olga", ["registry"], "is the name of a service"), ("olga", ["issuer-token"], "is the name of a service"),
    ("olga", ["gw", "gw-seal"], "ends in -seal"), ("olga", ["gw-seal-before-x"], "has -seal-before-")],
)  # fmt: skip
def test_a_ceremony_with_a_wrong_name_leaves_nothing(
    tmp_path: Path, operator: str, gateways: list[str], says: str
) -> None:
    with pytest.raises(RingfenceError, match=says):
        make_trust(TrustFolder(tmp_path / "new"), TD, operator, gateways=gateways)
    assert not list(tmp_path.iterdir())


def test_the_first_operator_is_the_one_that_the_root_was_made_with(tmp_path: Path) -> None:
    make_trust(TrustFolder(tmp_path), TD, "operator")
    with pytest.raises(CeremonyError, match="made with another operator"):
        first_operator(TrustFolder(tmp_path), TD, "olga", "Olga")


def test_a_bundle_of_another_root_is_told_with_both_fingerprints(
    root: SigningKey, service: SigningKey
) -> None:
    store = TrustStore(TD, "A" * 43)
    with pytest.raises(SignatureError):
        store.load(bundle(1, root, service), NOW_S)
    with pytest.raises(UnavailableError, match=f"{root.kid}.*RINGFENCE_TRUST_ROOT pins {'A' * 43}"):
        store.require()


def _iat(folder: TrustFolder) -> int:
    return parse(folder.bundle.read_text().strip()).unverified_claims(TrustBundle).iat


def test_plaintext_is_freed_without_a_search_for_cycles() -> None:
    reader, reply_key = EncryptionKey.generate("spiffe://ringfence.local/gateway/a"), ReplyKey()
    record = reader.record(2_000_000_000)
    gc.collect()
    gc.disable()
    try:
        assert reply_key.open(seal(b"secret", reply_key.public, kid="k")) == b"secret"
        assert reader.open(enclose(b"secret", [record], about="lease")) == b"secret"
        with pytest.raises(InvalidMessageError):
            seal(b"secret", reader.public.model_copy(update={"x": "AA"}), kid="k")
        left = [
            type(one).__name__
            for one in gc.get_objects()
            if type(one).__module__.startswith("joserfc._rfc7516.models")
        ]
    finally:
        gc.enable()
    assert left == []
