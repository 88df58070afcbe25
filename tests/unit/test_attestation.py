"""Selectors of running instances: what they match, which are too wide, and who may set them."""

from __future__ import annotations

from typing import Any

import pytest
import typer

from ringfence.cli.shared.attestation import parse_selectors, show_selector
from ringfence.messages.enrolment import AttestationSelector
from ringfence.messages.registry import AgentRegister, AgentSetAttestation, AgentState
from ringfence.model.identity.attestation import claim, matches, matching, problem, selector_id
from ringfence.model.lifecycle import CommandRefusedError
from tests.support.in_memory_registry import InMemoryRegistry

URL = "https://token.actions.githubusercontent.com"


def selector(**claims: str) -> AttestationSelector:
    return AttestationSelector(issuer=URL, claims=claims)


@pytest.mark.parametrize(
    ("pattern", "value", "fits"),
    [
        ("a", "a", True),
        ("a", "A", False),
        ("a", "ab", False),
        ("*", "", True),
        ("a*", "a", True),
        ("a*", "ba", False),
        ("*a", "ba", True),
        ("a*a", "a", False),
        ("a*a", "aa", True),
        ("a*b*c", "a-b-c", True),
        ("a*b*c", "a-c-b-c", True),
        ("a*b*c", "a-c-c", False),
        ("ab*ba", "aba", False),
        ("a?c", "abc", False),
        ("a[b]c", "abc", False),
        ("refs/heads/*", "refs/heads/a/b", True),
        ("*" * 20 + "b", "a" * 2000, False),
    ],
)
def test_a_star_stands_for_any_characters_and_all_else_for_itself(
    pattern: str, value: str, fits: bool
) -> None:
    assert matches(pattern, value) is fits


CLAIMS: dict[str, Any] = {
    "sub": "repo:acme/deploy:ref:refs/heads/main",
    "n": 7,
    "yes": True,
    "list": ["a"],
    "null": None,
    "half": 1.5,
    "kubernetes.io": {"pod": {"name": "p", "a/b": "c", "a~b": "d"}},
    "kubernetes": {"io": {"pod": {"name": "other"}}},
    "long": "x" * 3000,
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sub", CLAIMS["sub"]),
        ("n", "7"),
        ("yes", "true"),
        ("/kubernetes.io/pod/name", "p"),
        ("/kubernetes.io/pod/a~1b", "c"),
        ("/kubernetes.io/pod/a~0b", "d"),
        ("/kubernetes.io/pod", None),
        ("kubernetes.io.pod.name", None),
        ("/sub/x", None),
        ("/list/0", None),
        ("list", None),
        ("null", None),
        ("half", None),
        ("long", None),
        ("absent", None),
    ],
)
def test_claims_are_read_in_one_way(name: str, value: str | None) -> None:
    assert claim(CLAIMS, name) == value


def test_every_claim_of_a_selector_must_match() -> None:
    wanted = selector(sub="repo:acme/deploy:*", n="7")
    assert matching([wanted], URL, CLAIMS) == (wanted, {"sub": CLAIMS["sub"], "n": "7"})
    assert matching([wanted], URL + "/", CLAIMS) is None
    assert matching([selector(sub="repo:acme/deploy:*", n="8")], URL, CLAIMS) is None
    assert matching([selector(sub="repo:acme/deploy:*", absent="*")], URL, CLAIMS) is None
    both = matching([selector(sub="nobody"), wanted], URL, CLAIMS)
    assert both is not None
    assert both[0] is wanted


@pytest.mark.parametrize(
    ("claims", "narrow"),
    [
        ({"sub": "x"}, True),
        ({"repository_id": "74"}, True),
        ({"repository": "acme/deploy", "ref": "*"}, True),
        ({"/kubernetes.io/serviceaccount/uid": "14ee"}, True),
        ({"sub": "repo:acme/deploy:*"}, True),
        ({"sub": "spiffe://acme.example/ns/*"}, True),
        ({"sub": "*"}, False),
        ({"sub": "repo:*"}, False),
        ({"sub": "repo:acme/dep*"}, False),
        ({"sub": "repo:acme/*:main"}, False),
        ({"repository": "acme/*"}, False),
        ({"ref": "refs/heads/main"}, False),
        ({"email": "a@b.example"}, False),
    ],
)
def test_a_selector_says_whose_workload_it_lets_in(claims: dict[str, str], narrow: bool) -> None:
    assert (problem(selector(**claims)) is None) is narrow


def test_a_selector_is_known_by_all_that_it_says() -> None:
    one = AttestationSelector(issuer=URL, claims={"sub": "a", "n": "1"})
    same = AttestationSelector(issuer=URL, claims={"n": "1", "sub": "a"})
    others = [
        one.model_copy(update={"key_bound": True}),
        one.model_copy(update={"max_life_s": 60}),
        one.model_copy(update={"issuer": URL + "/"}),
        one.model_copy(update={"claims": {"sub": "a"}}),
    ]
    assert selector_id(one) == selector_id(same)
    assert len({selector_id(one), *map(selector_id, others)}) == 5


# --- commands ---


@pytest.fixture
def ledger() -> InMemoryRegistry:
    ledger = InMemoryRegistry()
    ledger.organisation()
    return ledger


def attest(ledger: InMemoryRegistry, by: str, *selectors: AttestationSelector) -> AgentState:
    change = ledger.give(ledger.claims(AgentSetAttestation, by, agent_id="bot", attestation=selectors))
    assert change is not None
    assert isinstance(change.state, AgentState)
    return change.state


def test_sponsor_and_operator_set_who_is_let_in(ledger: InMemoryRegistry) -> None:
    ledger.give(ledger.register("sam", "bot", "sam"))
    one, two = selector(sub="a"), selector(sub="b")
    assert attest(ledger, "sam", one).attestation == (one,)
    assert attest(ledger, "olga", one, two).attestation == (one, two)
    assert attest(ledger, "sam").attestation == ()
    record = ledger.directory.agent("bot")
    assert record is not None
    assert len(record.record.commands) == 2, "those that are replaced are not kept"
    with pytest.raises(CommandRefusedError) as refused:
        attest(ledger, "uma", one)
    assert refused.value.code == "not_sponsor"


@pytest.mark.parametrize(
    ("selectors", "code"),
    [((selector(sub="*"),), "selector_too_wide"), ((selector(sub="a"), selector(sub="a")), "selector_twice")],
)
def test_selectors_that_let_in_too_many_are_refused(
    ledger: InMemoryRegistry, selectors: tuple[AttestationSelector, ...], code: str
) -> None:
    ledger.give(ledger.register("sam", "bot", "sam"))
    with pytest.raises(CommandRefusedError) as refused:
        attest(ledger, "sam", *selectors)
    assert refused.value.code == code


def test_an_agent_has_a_key_or_instances_that_enrol_one(ledger: InMemoryRegistry) -> None:
    def register(agent: str, **fields: Any) -> AgentRegister:
        given = {"agent_id": agent, "sponsor": "sam", "description": "x", "keys": (), "ceiling": ()}
        return ledger.claims(AgentRegister, "sam", **{**given, **fields})

    with pytest.raises(CommandRefusedError) as refused:
        ledger.give(register("one"))
    assert refused.value.code == "no_valid_key"
    ledger.give(register("one", attestation=(selector(sub="a"),)))
    entry = ledger.directory.agent("one")
    assert entry is not None
    assert entry.state.keys == ()


# --- the command line ---


def test_selectors_are_written_in_a_line(tmp_path: Any) -> None:
    line = f"{URL} sub=repo:acme/deploy:* 'environment=my prod' key-bound life=30m"
    (found,) = parse_selectors([line])
    assert found == AttestationSelector(
        issuer=URL,
        claims={"sub": "repo:acme/deploy:*", "environment": "my prod"},
        key_bound=True,
        max_life_s=1800,
    )
    assert parse_selectors([show_selector(found)]) == (found,)
    file = tmp_path / "s.json"
    file.write_text(f"[{found.model_dump_json()}]")
    assert parse_selectors([f"@{file}", found.model_dump_json()]) == (found, found)


@pytest.mark.parametrize(
    "text",
    [
        "",
        URL,
        "ftp://x sub=a",
        f"{URL} sub",
        f"{URL} =a",
        f"{URL} sub=a life=x",
        "{",
        "@/nowhere",
        f"{URL} 'a",
    ],
)
def test_a_selector_that_is_none_says_so(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_selectors([text])
