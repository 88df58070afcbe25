"""Requests to Git servers: what they do by a target's rules, answers to refused pushes, filtered advertisements."""

from __future__ import annotations

from typing import Any

import pytest

from ringfence.cli.commands.target_templates import TEMPLATES
from ringfence.messages.registry import GitRule, RequestRule
from ringfence.model.git.advertisement import AdvertisementFilter
from ringfence.model.git.endpoints import GitService
from ringfence.model.git.fetch import read_fetch
from ringfence.model.git.pkt_lines import GitRequestError, Special, packet
from ringfence.model.git.push import CommandList, CommandReader, RefUpdate
from ringfence.model.http_targets import Action, RequestMap, RequestMapError

MAP = RequestMap(TEMPLATES["git"].requests)
OLD, NEW, ZEROS = "1" * 40, "2" * 40, "0" * 40
FLUSH = b"0000"
RULE = RequestRule(
    method="GIT",
    path="/{repo*}",
    git=GitRule(operation="push"),
    verb="push",
    resource="repo/{repo*}/ref/{ref*}",
)


def parsed(body: bytes, *, ended: bool = True) -> CommandList:
    reader = CommandReader()
    reader.enough(body)
    return reader.command_list(body, ended=ended)


def actions(path: str, *updates: RefUpdate, map: RequestMap = MAP) -> tuple[Action, ...] | None:
    endpoint = map.git_endpoint("POST", path)
    assert endpoint is not None
    return map.git_actions(endpoint, updates)


@pytest.mark.parametrize(
    ("update", "verb", "resource"),
    [
        (RefUpdate(OLD, NEW, "refs/heads/a/b"), "push", "heads/a/b"),
        (RefUpdate(ZEROS, NEW, "refs/heads/a"), "push", "heads/a"),
        (RefUpdate(ZEROS, NEW, "refs/tags/v1"), "tag", "tags/v1"),
        (RefUpdate(OLD, ZEROS, "refs/tags/v1"), "delete", "tags/v1"),
        (RefUpdate(OLD, ZEROS, "refs/notes/x"), "delete", "notes/x"),
        (RefUpdate(OLD, NEW, "refs/notes/x"), "push-other", "notes/x"),
        (RefUpdate(OLD, NEW, "refs/Heads/a"), "push-other", "Heads/a"),
    ],
    ids=["update", "create", "tag", "delete tag", "delete other", "other", "other case"],
)
@pytest.mark.parametrize("path", ["/o/n.git", "/o/n", "/group/sub/n.git", "/n.git", "/a/b.git/n.git"])
def test_update_has_the_verb_of_its_ref(path: str, update: RefUpdate, verb: str, resource: str) -> None:
    repository = path[1:].removesuffix(".git")
    found = (Action(verb, f"repo/{repository}/ref/{resource}"),)
    assert actions(f"{path}/git-receive-pack", update) == found
    assert actions(f"{path}/git-upload-pack") == (Action("fetch", f"repo/{repository}"),)


@pytest.mark.parametrize("path", ["/o/ref/x", "/ref", "/o/.git", "/o/n.git.git", "/o//n", "/o/..", ""])
def test_repository_without_a_resource_of_its_own_has_no_action(path: str) -> None:
    assert MAP.git_endpoint("POST", f"{path}/git-upload-pack") is None
    assert MAP.action("POST", f"{path}/git-upload-pack") is None


def test_other_rules_do_not_map_requests_to_git_services() -> None:
    rules = [
        RequestRule(method=method, path="/{path*}", verb="x", resource="{path*}")
        for method in ("GET", "POST")
    ]
    map = RequestMap((*rules, *TEMPLATES["git"].requests))
    for path in ("/o/n/git-receive-pack", "/o/n/Git-Receive-Pack", "/o/n/git-upload-pack?x=1"):
        assert map.action("POST", path) is None
    assert map.action("GET", "/o/n/info/refs") is None
    assert map.action("GET", "/o/n/info/packs") == Action("x", "o/n/info/packs")


@pytest.mark.parametrize(
    "changed",
    [
        {"method": "POST"},
        {"git": None},
        {"query": {"a": ("b",)}},
        {"body": {"a": ("b",)}},
        {"path": "/{ref*}"},
        {"git": GitRule(operation="fetch")},
        {"resource": "repo/{other}"},
    ],
    ids=["method", "no git", "query", "body", "ref in path", "ref of fetch", "unknown capture"],
)
def test_rule_without_a_meaning_is_refused(changed: dict[str, Any]) -> None:
    RequestMap([RULE])
    with pytest.raises(RequestMapError):
        RequestMap([RULE.model_copy(update=changed)])


def test_rule_with_an_unknown_field_and_those_after_it_map_nothing() -> None:
    unknown = RULE.model_copy(
        update={"git": GitRule.model_validate({"operation": "fetch", "only": "main"}), "resource": "x"}
    )
    map = RequestMap([unknown, RULE])
    assert actions("/o/n/git-receive-pack", RefUpdate(OLD, NEW, "refs/heads/a"), map=map) is None


def test_sha256_ids_need_their_object_format() -> None:
    old, new = "1" * 64, "2" * 64
    for capabilities, accepted in (
        ("object-format=sha256", True),
        ("object-format=sha1", False),
        ("", False),
    ):
        body = packet(f"{old} {new} refs/heads/a\0{capabilities}".encode()) + FLUSH + b"PACK"
        if accepted:
            assert parsed(body).updates == (RefUpdate(old, new, "refs/heads/a"),)
        else:
            with pytest.raises(GitRequestError):
                parsed(body)


def test_command_list_is_read_from_any_pieces() -> None:
    updates = RefUpdate(OLD, NEW, "refs/heads/a"), RefUpdate(OLD, ZEROS, "refs/tags/é")
    commands = CommandList(updates, (OLD,), ("atomic",))
    body = commands.encoded() + b"PACK and more"
    reader = CommandReader()
    first = next(length for length in range(len(body)) if reader.enough(body[:length]))
    assert first == len(commands.encoded()) + 4
    assert reader.command_list(body[:first], ended=False) == commands
    assert reader.end == len(commands.encoded())


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        (("report-status",), packet(b"unpack ok\n") + packet(b"ng refs/heads/a no such thing\n") + FLUSH),
        (
            ("report-status-v2", "side-band-64k"),
            packet(b"\x02try this\n")
            + packet(b"\x01" + packet(b"unpack ok\n") + packet(b"ng refs/heads/a no such thing\n") + FLUSH)
            + FLUSH,
        ),
        (("side-band-64k",), None),
        ((), None),
    ],
    ids=["plain", "side-band", "no report", "none"],
)
def test_rejection_has_the_form_that_was_asked_for(
    capabilities: tuple[str, ...], expected: bytes | None
) -> None:
    commands = CommandList((RefUpdate(OLD, NEW, "refs/heads/a"),), (), capabilities)
    assert commands.rejection("no such\nthing", "try this") == expected


@pytest.mark.parametrize("piece", [1, 3, 1000])
@pytest.mark.parametrize(
    ("service", "sent", "passed"),
    [
        (
            "git-receive-pack",
            [b"# service=git-receive-pack\n", None, b"version 1\n", b"1 x\0report-status push-options\n", b"2 x\n"],
            [b"# service=git-receive-pack\n", None, b"version 1\n", b"1 x\0report-status\n", b"2 x\n"],
        ),
        (
            "git-upload-pack",
            [
                b"version 2\n", b"agent=x\n", b"bundle-uri\n", b"bundle-uri=x\n",
                b"fetch=shallow packfile-uris filter\n", None,
            ],
            [b"version 2\n", b"agent=x\n", b"fetch=shallow filter\n", None],
        ),
        (
            "git-upload-pack",
            [b"# service=git-upload-pack\n", None, b"version 2\n", b"ls-refs=unborn\n", b"bundle-uri", None],
            [b"# service=git-upload-pack\n", None, b"version 2\n", b"ls-refs=unborn\n", None],
        ),
        ("git-upload-pack", [b"# service=git-upload-pack\n", None, None], [b"# service=git-upload-pack\n", None, None]),
    ],
    ids=["push", "version 2", "announced", "empty"],
)  # fmt: skip
def test_advertisement_is_filtered_in_any_pieces(
    service: GitService, sent: list[bytes | None], passed: list[bytes | None], piece: int
) -> None:
    def encoded(lines: list[bytes | None]) -> bytes:
        return b"".join(packet(one) if one is not None else Special.FLUSH.value for one in lines)

    filter, data = AdvertisementFilter(service), encoded(sent)
    out = b"".join(filter.feed(data[at : at + piece]) for at in range(0, len(data), piece))
    assert out + filter.last(b"") == encoded(passed)


def test_fetch_of_any_version_passes() -> None:
    for body in (
        b"",
        FLUSH,
        packet(b"want 1\n") + FLUSH + packet(b"have 1\n") + packet(b"done\n"),
        packet(b"command=ls-refs\n") + b"0001" + packet(b"peel\n") + FLUSH,
    ):
        assert read_fetch(body, "identity") == body
