"""The ceremony of two people: modes in the trust bundle, and a second operator whose key the root never had."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from ringfence.cli.main import main
from ringfence.client.admin.trust_setup import (
    SECOND_PERSON_AFTER_S,
    CeremonyError,
    TrustFolder,
    load_root_and_bundle,
    make_trust,
    second_operator,
    set_second_person,
)
from ringfence.client.admin.user_keys import KeyPackage, prove
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.registry import UserInvite

TD = "acme.example"


@pytest.fixture
def folder(tmp_path: Path) -> TrustFolder:
    folder = TrustFolder(tmp_path)
    make_trust(folder, TD, "olga")
    return folder


def package(by: SigningKey, user: str = "otto") -> KeyPackage:
    now_s = int(time.time())
    invitation = UserInvite(iss=by.id, aud=TD, iat=now_s, exp=now_s + 60, jti="i", user_id=user)
    key = SigningKey.generate(f"spiffe://{TD}/user/{user}")
    return prove(key, sign(invitation, by), now_s)


def mode_at(folder: TrustFolder, at_s: float) -> str:
    store = TrustStore(TD, folder.fingerprint())
    store.load(folder.bundle.read_text().strip(), time.time())
    return store.second_person(at_s)


def test_mode_of_one_operator_is_reported(folder: TrustFolder) -> None:
    assert mode_at(folder, time.time() + 1) == "reported"


def test_required_begins_an_hour_after_its_signature(folder: TrustFolder) -> None:
    before = time.time()
    set_second_person(folder, "required")
    assert mode_at(folder, before + SECOND_PERSON_AFTER_S - 5) == "reported"
    assert mode_at(folder, time.time() + SECOND_PERSON_AFTER_S + 1) == "required"
    with pytest.raises(CeremonyError, match="required already"):
        set_second_person(folder, "required")
    set_second_person(folder, "reported")
    assert mode_at(folder, time.time() + 1) == "reported"


def test_second_operator_is_made_by_a_package_of_their_own_key(folder: TrustFolder) -> None:
    root, _ = load_root_and_bundle(folder)
    given = package(root)
    command = second_operator(folder, given, "Otto")
    assert (command.user_id, command.roles, command.iss) == ("otto", ("operator",), root.id)
    assert [key.kid for key in command.keys] == [given.kid]


def test_package_that_the_root_did_not_ask_for_is_refused(folder: TrustFolder) -> None:
    stranger = SigningKey.generate(f"spiffe://{TD}/root")
    with pytest.raises(CeremonyError, match="ringfence user invite otto"):
        second_operator(folder, package(stranger), "Otto")


def test_second_operator_whose_key_the_root_has_is_refused(folder: TrustFolder) -> None:
    root, _ = load_root_and_bundle(folder)
    with pytest.raises(CeremonyError, match="is one person"):
        second_operator(folder, package(root, "olga"), "Olga")


def test_bundle_with_mode_is_signed_by_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RINGFENCE_CONFIG", "/dev/null")
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--folder", "trust"]) == 0
    capsys.readouterr()
    assert main(["--json", "init", "--folder", "trust", "--second-person", "required"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["trust_bundle"], said["second_person"]["mode"]) == (2, "required")
    assert main(["init", "--folder", "trust", "--second-operator", "x", "--renew"]) == 2
    assert main(["init", "--folder", "trust", "--second-operator", "x"]) == 2
