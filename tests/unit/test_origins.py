"""Origins of passkeys in the trust bundle: which can be one, and that none is ever left out again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ringfence.cli.main import main
from ringfence.client.admin.key_rotation import renew, rotate_root
from ringfence.client.admin.origins import OriginChange, changed_origins, origin_of, set_origins
from ringfence.client.admin.trust_setup import (
    CeremonyError,
    TrustFolder,
    add_gateways,
    load_root_and_bundle,
    make_trust,
)
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.trust import Origin, TrustBundle
from tests.support.passkeys import SESSION_ORIGIN, SIGN_ORIGIN

NOW_S = 1_790_000_000
SIGN, CONSOLE = "https://sign.acme.example", "https://console.acme.example:8443"


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://sign.acme.example", SIGN),
        ("HTTPS://Sign.ACME.example:443/", SIGN),
        ("https://sign.acme.example.", SIGN),
        ("https://sign.acme.example:8443", f"{SIGN}:8443"),
        ("http://localhost:8551", SIGN_ORIGIN),
        ("http://localhost:80", "http://localhost"),
        ("https://localhost:8551", "https://localhost:8551"),
    ],
)
def test_an_origin_is_written_as_browsers_write_it(url: str, origin: str) -> None:
    assert origin_of(url) == origin


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://sign.acme.example", "must begin with https://"),
        ("sign.acme.example", "must begin with https://"),
        ("https://", "domain name"),
        ("ftp://localhost", "must begin with https://"),
        ("https://127.0.0.1:8551", "an IP address is no rpId"),
        ("https://[::1]:8551", "an IP address is no rpId"),
        ("http://127.0.0.1:8551", "an IP address is no rpId"),
        ("https://1", "an IP address is no rpId"),
        ("https://sign.acme.example/page", "more than an origin"),
        ("https://sign.acme.example?x=1", "more than an origin"),
        ("https://me@sign.acme.example", "more than an origin"),
        ("https://sign.acme.example:99999", "no URL"),
        ("https://sign_page.example", "is no origin"),
        ("https://zeichnen.bücher.example", "xn--"),
    ],
)
def test_other_urls_are_refused(url: str, says: str) -> None:
    with pytest.raises(CeremonyError, match=says):
        origin_of(url)


@pytest.mark.parametrize(
    ("sign", "session", "rp_id"),
    [
        ([SIGN], [CONSOLE], "acme.example"),
        ([SIGN], [], "sign.acme.example"),
        (["https://a.b.acme.example"], ["https://c.b.acme.example"], "b.acme.example"),
        (["https://acme.example"], [CONSOLE], "acme.example"),
        ([SIGN_ORIGIN], [SESSION_ORIGIN], "localhost"),
        (["https://intranet"], ["https://intranet:8443"], "intranet"),
    ],
)
def test_the_relying_party_id_is_what_all_origins_have_in_common(
    sign: list[str], session: list[str], rp_id: str
) -> None:
    assert changed_origins(OriginChange(sign, session), NOW_S)[0] == rp_id


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (OriginChange([SIGN], ["https://console.other.example"]), "no domain in common"),
        (OriginChange([SIGN], [SIGN_ORIGIN]), "no domain in common"),
        (OriginChange([SIGN], rp_id="other.example"), "rpId other.example is neither"),
        (OriginChange([SIGN], rp_id="me.example"), "rpId me.example is neither"),
        (OriginChange([SIGN], [CONSOLE], rp_id="sign.acme.example"), "neither the host of https://console"),
        (OriginChange([SIGN], rp_id="example"), "top-level domain"),
        (OriginChange([SIGN], [SIGN]), "its use never changes"),
        (OriginChange(end=[SIGN]), "no origin that is in force; these are: none"),
    ],
)
def test_impossible_origin_change_is_refused(change: OriginChange, says: str) -> None:
    with pytest.raises(CeremonyError, match=says):
        changed_origins(change, NOW_S)


def test_ending_an_origin_keeps_it_and_its_use() -> None:
    rp_id, first = changed_origins(OriginChange([SIGN], [CONSOLE]), NOW_S)
    assert [(one.use, one.not_before, one.not_after) for one in first] == [
        ("sign", NOW_S - 60, None),
        ("session", NOW_S - 60, None),
    ]
    end = OriginChange(["https://sign2.acme.example"], end=[SIGN])
    _, second = changed_origins(end, NOW_S + 100, rp_id, first)
    assert [(one.origin, one.not_after) for one in second] == [
        (SIGN, NOW_S + 100),
        (CONSOLE, None),
        ("https://sign2.acme.example", None),
    ]
    assert (
        changed_origins(OriginChange([CONSOLE.replace("console", "sign3")]), NOW_S, rp_id, second)[0] == rp_id
    )
    for change in (OriginChange(session=[SIGN]), OriginChange(sign=[CONSOLE])):
        with pytest.raises(CeremonyError, match="its use never changes"):
            changed_origins(change, NOW_S + 200, rp_id, second)
    with pytest.raises(CeremonyError, match=f"these are: {CONSOLE}, https://sign2"):
        changed_origins(OriginChange(end=[SIGN]), NOW_S + 200, rp_id, second)
    _, third = changed_origins(OriginChange([SIGN]), NOW_S + 120, rp_id, second)
    assert third[:3] == second
    assert third[3] == Origin(origin=SIGN, use="sign", not_before=NOW_S + 100)
    assert changed_origins(OriginChange([SIGN]), NOW_S + 300, rp_id, third)[1] == third


def test_an_origin_that_was_added_ahead_of_now_does_not_end_before_it_begins() -> None:
    before = (Origin(origin=SIGN, use="sign", not_before=NOW_S + 50),)
    _, (ended,) = changed_origins(OriginChange(end=[SIGN]), NOW_S, "acme.example", before)
    assert ended.not_after == NOW_S + 50


def test_each_next_bundle_has_all_origins_of_the_one_before(tmp_path: Path) -> None:
    folder = TrustFolder(tmp_path)
    rp_id, origins = changed_origins(OriginChange([SIGN], [CONSOLE]), NOW_S)
    make_trust(folder, "acme.example", "olga", rp_id=rp_id, origins=origins)
    set_origins(folder, OriginChange(end=[SIGN]))
    ended = load_root_and_bundle(folder)[1].origins
    assert [one.not_after is None for one in ended] == [False, True]
    renew(folder)
    add_gateways(folder, ["edge"])
    rotate_root(folder)
    bundle = load_root_and_bundle(folder)[1]
    assert (bundle.version, bundle.rp_id, bundle.origins) == (5, "acme.example", ended)
    bundle = renew(folder, origins=OriginChange(["https://sign2.acme.example"]))
    assert bundle.origins[:2] == ended
    assert bundle.origins[2].origin == "https://sign2.acme.example"


def test_the_trust_store_has_the_origins_of_a_moment(tmp_path: Path) -> None:
    folder = TrustFolder(tmp_path)
    origins = (
        Origin(origin=SIGN, use="sign", not_before=NOW_S, not_after=NOW_S + 10),
        Origin(origin=CONSOLE, use="session", not_before=NOW_S + 5),
        Origin(origin=f"{SIGN}:99", use="sign", not_before=0, only_on="tuesdays"),  # type: ignore[call-arg]
    )
    pin = make_trust(folder, "acme.example", "olga", rp_id="acme.example", origins=origins)
    store = TrustStore("acme.example", pin)
    assert store.origins(NOW_S) == ()
    assert store.load(folder.bundle.read_text().strip(), NOW_S)

    def uses(at_s: float) -> list[str]:
        return [one.use for one in store.origins(at_s)]

    assert [uses(NOW_S + at) for at in (-1, 0, 5, 9.9, 10)] == [
        [], ["sign"], ["sign", "session"], ["sign", "session"], ["session"],
    ]  # fmt: skip
    bundle: TrustBundle = store.require()
    assert uses(bundle.exp + 1) == ["session"]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RINGFENCE_CONFIG", "/dev/null")
    monkeypatch.chdir(tmp_path)


def init(capsys: pytest.CaptureFixture[str], *args: str, status: int = 0) -> Any:
    assert main(["init", "--folder", "trust", "--json", *args]) == status
    said = capsys.readouterr()
    return json.loads(said.out) if status == 0 else " ".join(said.err.split())


@pytest.mark.usefixtures("elsewhere")
def test_init_sets_origins_from_the_beginning_later_and_with_renew(
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = init(capsys, "--sign-origin", SIGN, "--session-origin", CONSOLE)
    assert made["trust_bundle"] == 1
    assert made["rp_id"] == "acme.example"
    assert [(one["origin"], one["use"]) for one in made["origins"]] == [(SIGN, "sign"), (CONSOLE, "session")]
    ended = init(capsys, "--end-origin", SIGN)
    assert (ended["trust_bundle"], "not_after" in ended["origins"][0]) == (2, True)
    new = "https://sign2.acme.example"
    renewed = init(capsys, "--renew", "--sign-origin", new)
    assert (renewed["trust_bundle"], renewed["origins"][2]["origin"]) == (3, new)
    assert renewed["origins"][:2] == ended["origins"]
    moved = init(capsys, "--end-origin", new, "--end-origin", CONSOLE, "--sign-origin", "https://s.b.example",
                 "--rp-id", "b.example")  # fmt: skip
    assert (moved["rp_id"], len(moved["origins"])) == ("b.example", 4)
    assert "one change at a time" in init(capsys, "--sign-origin", SIGN, "--rotate-root", status=2)
    assert "must begin with https" in init(capsys, "--sign-origin", "http://x.example", status=1)
    assert load_root_and_bundle(TrustFolder(Path("trust")))[1].version == 4


@pytest.mark.usefixtures("elsewhere")
def test_init_without_origins_makes_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert "origins" not in init(capsys)
    bundle = load_root_and_bundle(TrustFolder(Path("trust")))[1]
    assert (bundle.rp_id, bundle.origins) == (None, ())


@pytest.mark.usefixtures("elsewhere")
def test_a_wrong_origin_makes_no_trust_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no rpId" in init(capsys, "--sign-origin", "https://10.0.0.1", status=1)
    assert not Path("trust").exists()
