"""Which target a request is for: by its id, or by exactly where it is."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from ringfence.gateway.contract import Attempt
from ringfence.gateway.decision.targets import CompiledTarget, Targets, endpoint_of
from ringfence.gateway.domain import Refusal
from ringfence.messages.registry import BackendSettings, RequestRule, TargetRemove
from tests.support.in_memory_registry import InMemoryRegistry

RULES = (RequestRule(method="GET", path="/{path*}", verb="read", resource="path/{path*}"),)


class Map:
    def __init__(self) -> None:
        self.ledger = InMemoryRegistry()
        self.targets = Targets(self.ledger.directory)
        self.ledger.organisation()
        self.put("hub", url="https://hub.example")
        self.put("local", url="http://127.0.0.1:8080", kind="http")
        self.put("nowhere")

    def put(self, id: str, *, kind: str = "jwt", requests: Any = RULES, **settings: Any) -> None:
        backend = BackendSettings.model_validate({"kind": kind, **settings})
        self.ledger.give_as_before(self.ledger.target_set("olga", id, backend=backend, requests=requests))

    def at(
        self, authority: str | None, scheme: Literal["http", "https"] = "https", id: str | None = None
    ) -> str:
        found = self.targets.find(
            Attempt(authority=authority, scheme=scheme, method="GET", target="/", target_id=id)
        )
        return found.state.target_id if isinstance(found, CompiledTarget) else found.reasons[0].code


@pytest.fixture
def map() -> Map:
    return Map()


@pytest.mark.parametrize("authority", ["hub.example", "HUB.example", "hub.example:443"])
def test_one_place_has_several_spellings(map: Map, authority: str) -> None:
    assert map.at(authority) == "hub"


@pytest.mark.parametrize(
    "authority",
    [
        "hub.example:444", "hub.example.", "x.hub.example", "example", "hub.example:0443x", "user@hub.example",
        "hub.example:", "hub.example:0", "hub.example:65536", "hub.example/", "hub.example,hub.example", "", " ",
        "hub.example\x00", "hub\u3002example", "[::1]", None,
    ],
)  # fmt: skip
def test_authority_of_no_target_is_unknown(map: Map, authority: str | None) -> None:
    assert map.at(authority) == "target_unknown"


def test_the_scheme_counts(map: Map) -> None:
    assert map.at("hub.example", "http") == "target_unknown"
    assert map.at("127.0.0.1:8080", "http") == "local"
    assert map.at("127.0.0.1:8080", "https") == "target_unknown"


def test_by_id_it_need_not_be_anywhere(map: Map) -> None:
    assert map.at(None, id="nowhere") == "nowhere"
    assert map.at(None, id="unknown") == "target_unknown"
    assert map.at("hub.example", id="local") == "local", "the id says it, and nothing else"


def test_two_at_one_place_are_told_apart_by_their_ids_alone(map: Map) -> None:
    map.put("twin", url="https://hub.example:443")
    assert map.at("hub.example") == "target_ambiguous"
    assert map.at(None, id="twin") == "twin"
    map.ledger.give(map.ledger.claims(TargetRemove, "olga", target_id="twin", reason="x"))
    assert map.at("hub.example") == "hub"
    assert map.at(None, id="twin") == "target_removed"


def test_a_target_that_moves_is_where_it_is_now(map: Map) -> None:
    map.put("hub", url="https://new.example")
    assert map.at("hub.example") == "target_unknown"
    assert map.at("new.example") == "hub"


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": "ftp://hub.example"}, {"url": "https://hub.example/path"}, {"unknown": "x"},
        {"requests": (RequestRule(method="GET", path="x", verb="read", resource="x"),)},
    ],
)  # fmt: skip
def test_a_record_that_makes_no_sense_denies(map: Map, wrong: dict[str, Any]) -> None:
    map.put("hub", **{"url": "https://hub.example", **wrong})
    assert map.at(None, id="hub") == "target_invalid"


def test_a_revision_is_compiled_once(map: Map) -> None:
    attempt = Attempt(authority="hub.example", scheme="https", method="GET", target="/")
    once = map.targets.find(attempt)
    assert once is map.targets.find(attempt)
    map.put("hub", url="https://hub.example", requests=())
    later = map.targets.find(attempt)
    assert isinstance(later, CompiledTarget)
    assert not isinstance(once, Refusal)
    assert (once.map.action("GET", "/a"), later.map.action("GET", "/a")) != (None, None)
    assert later.map.action("GET", "/a") is None


def test_target_hosts_follow_the_records(map: Map) -> None:
    assert map.targets.hosts() == {"hub.example", "127.0.0.1"}
    for known in ("hub.example", "HUB.example:443", "127.0.0.1:8080"):
        assert map.targets.is_target_host(known), known
    for unknown in ("hub.example:8080", "127.0.0.1", "example", "", "hub.example/"):
        assert not map.targets.is_target_host(unknown), unknown
    map.put("hub", url="https://new.example")
    assert map.targets.hosts() == {"new.example", "127.0.0.1"}
    assert not map.targets.is_target_host("hub.example")


def test_a_place_is_scheme_host_and_port() -> None:
    assert endpoint_of("https", "A.example") == ("https", "a.example", 443)
    assert endpoint_of("http", "[::1]:8080") == ("http", "[::1]", 8080)
    assert endpoint_of("ftp", "a.example") is None
