"""How permissions, durations and moments are written, and what is shown of what strangers wrote."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import TypeAdapter

from ringfence.cli.commands.agent import set_ceiling_command
from ringfence.cli.shared.arguments import (
    parse_permission,
    parse_scope,
    show_permission,
    show_scope,
    write_permission,
)
from ringfence.cli.shared.options import duration_s, moment_s, when_ms
from ringfence.cli.shared.output import moment, until, visible, visible_name
from ringfence.client.errors import InvalidCallError, checked
from ringfence.kernel.base.text import span
from ringfence.messages.base import Name, Permission, SpiffeId, TargetId, Uuid


def test_a_permission_in_its_short_form() -> None:
    permission = parse_permission("staging:deploy,read:env/staging/*,env/test/web")
    assert permission == Permission(
        target="staging", verbs=("deploy", "read"), resources=("env/staging/*", "env/test/web")
    )
    assert show_permission(permission) == "staging:deploy,read:env/staging/*,env/test/web"


def test_a_resource_does_not_pass_for_words_beside_it() -> None:
    resources = ("env/a at nothing", 'b" at "c', "d,e")
    shown = show_permission(Permission(target="shop", verbs=("read",), resources=resources))
    assert shown == r'''shop:read:"env/a at nothing","b\" at \"c","d,e"'''


def test_json_where_names_have_colons_or_commas(tmp_path: Path) -> None:
    wanted = {"target": "images", "verbs": ["push"], "resources": ["web:v1", "a,b"]}
    assert parse_permission(json.dumps(wanted)).resources == ("web:v1", "a,b")
    file = tmp_path / "scope.json"
    file.write_text(json.dumps([wanted, {**wanted, "verbs": ["pull"]}]))
    assert [p.verbs for p in parse_scope(["images:list:**", f"@{file}"])] == [("list",), ("push",), ("pull",)]


@pytest.mark.parametrize(
    ("verbs", "resources"),
    [
        (("read",), ("env/**",)),
        (("read", "deploy"), ("env/staging/*", "a'b\"c", "$(x) `y`")),
        (("read:all",), ("env/*",)),
        (("read",), ("a,b", "web:v1")),
        (("read",), ("two words",)),
        (("read",), ("wéb/ж",)),
        (("read",), ("~", "-x", "@file", "*")),
    ],
)
def test_a_proposed_ceiling_comes_back_as_it_was(verbs: tuple[str, ...], resources: tuple[str, ...]) -> None:
    """What `agent show` prints goes through a shell and `--allow`."""
    permission = Permission(target="staging", verbs=verbs, resources=resources)
    assert parse_permission(write_permission(permission)) == permission
    command = set_ceiling_command("bot", [permission.model_dump(mode="json")], Path("my keys/sam.json"))
    assert command is not None
    assert command.isascii()
    *words, allowed = shlex.split(command)
    assert words == [
        "ringfence", "--identity", "my keys/sam.json", "agent", "set-ceiling", "bot", "--allow",
    ]  # fmt: skip
    assert parse_permission(allowed) == permission


def test_a_ceiling_of_which_nothing_or_all_was_used() -> None:
    assert set_ceiling_command("bot", [], None) == "ringfence agent set-ceiling bot --allow-nothing"
    assert set_ceiling_command("bot", None, None) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("staging", "a colon is missing"),
        ("staging:deploy", "a colon is missing"),
        ("images:push:web:v1", "more than two colons"),
        ("staging::env/*", "a verb is empty"),
        ("staging:deploy:", "a resource is empty"),
        (":deploy:env/*", "a target is empty"),
        ("staging:deploy, read:env/*", "spaces"),
        ("staging:deploy:env/a,,env/b", "a resource is empty"),
        ("staging,prod:deploy:env/*", "one target"),
        ("Staging:deploy:env/*", "target"),
        ("staging:Deploy:env/*", "verbs"),
        ("staging:*:env/*", "verbs"),
        ("staging:deploy:/env", "leading"),
        ("staging:deploy:env/../prod", "'..'"),
        ("staging:deploy:env/%2e%2e", "'%'"),
        ("staging:deploy:env/[ab]", "'['"),
        ('{"target": "staging", "verbs": ["deploy"]}', "resources"),
        ('{"target": "staging", "verbs": ["deploy"], "resources": ["a"], "if": "sunny"}', "unknown field"),
        ("{", "JSON"),
        ("@/nowhere/scope.json", "No such file"),
    ],
)
def test_a_permission_that_is_written_wrong_says_where(text: str, says: str) -> None:
    with pytest.raises(typer.BadParameter) as refused:
        parse_scope([text])
    assert says in str(refused.value)


def test_an_empty_scope_only_where_it_may_be_one() -> None:
    assert parse_scope([], may_be_empty=True) == ()
    with pytest.raises(typer.BadParameter):
        parse_scope(None)
    assert show_scope(()) == "nothing"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("15m", 900), ("1h", 3600), ("1h30m", 5400), ("2d", 172_800)],
)
def test_durations(text: str, seconds: int) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "0", "5", "90", "0s", "1h30", "-5", "1.5h", "h", "30m1h", "1 h", "1w", "٣m"]
)
def test_invalid_duration_is_rejected(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        duration_s(text)


def test_a_moment_needs_its_zone() -> None:
    assert moment_s("2030-01-31T18:00:00Z") == moment_s("2030-01-31T19:00:00+01:00") == 1896112800
    for text in ("2030-01-31T18:00:00", "tomorrow", "1896112800"):
        with pytest.raises(typer.BadParameter):
            moment_s(text)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (3600, "1 h"), (90061, "1 d 1 h")]
)
def test_spans(seconds: int, words: str) -> None:
    assert span(seconds) == words


@pytest.mark.parametrize(
    "char", list(map(chr, (0x34F, 0x1160, 0x180B, 0x20DD, 0x2800, 0x3164, 0xFE0F, 0xFFA0, 0xE0101)))
)
def test_letters_that_are_drawn_as_nothing_are_shown(char: str) -> None:
    shown = f"‹U+{ord(char):04X}›"
    assert visible(f"read{char}only") == f"read{shown}only"
    assert visible_name(f"env/prod{char}") == f"env/prod{shown}"


def test_invisible_characters_are_escaped() -> None:
    told = visible("ok\x1b[2J\r\u202egnp.exe\u200b \x07 straße")
    assert told == "ok‹U+001B›[2J‹U+000D›‹U+202E›gnp.exe‹U+200B› ‹U+0007› straße"


def test_a_name_that_looks_like_another_shows_that_it_is_not() -> None:
    assert visible_name("env/prod") == "env/prod"
    assert visible_name("env/prоd") == "env/prо‹U+043E›d"
    shown = show_permission(Permission(target="staging", verbs=("read",), resources=("env/prоd",)))
    assert "‹U+043E›" in shown


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (Uuid, "an id as Ringfence prints it"),
        (Name, "a name"),
        (TargetId, "a target's name"),
        (SpiffeId, "a SPIFFE ID"),
    ],
)
def test_invalid_value_is_described_in_words(wanted: Any, says: str) -> None:
    with (
        pytest.raises(InvalidCallError, match=f"^the call: it: must be {says}") as refused,
        checked("the call"),
    ):
        TypeAdapter(wanted).validate_python("NOT SO")
    assert "pattern" not in str(refused.value)


@pytest.mark.parametrize("seconds", [253_402_300_800, 2**53 - 1])
def test_an_end_beyond_all_calendars_can_be_shown(seconds: int) -> None:
    assert moment(seconds) == "the end of time"
    assert until(seconds, 0).startswith("the end of time (in ")
    assert moment(0) == "1970-01-01 00:00:00Z"


@pytest.mark.parametrize("since", ["1969-01-01T00:00:00Z", "0001-01-01T00:00:00+14:00", "99999999d"])
def test_time_before_all_records_means_from_the_first(since: str) -> None:
    assert when_ms(since, 1_700_000_000_000) == 0


@pytest.mark.parametrize("verb", ["Read", "*", "read,Deploy"])
def test_a_wrong_verb_is_told_once_and_in_words(verb: str) -> None:
    with pytest.raises(typer.BadParameter) as told:
        parse_permission(f"platform:{verb}:env/**")
    assert "must be a verb" in str(told.value)
    assert "Tuple" not in str(told.value)


def test_suggested_moment_for_a_day_is_valid() -> None:
    with pytest.raises(typer.BadParameter) as told:
        moment_s("2030-01-31")
    proposed = str(told.value).split()[-3]
    assert moment_s(proposed) == moment_s("2030-01-31T00:00:00Z")


def test_a_number_without_end_is_no_duration() -> None:
    with pytest.raises(typer.BadParameter, match="is no duration"):
        duration_s("9" * 5000 + "d")
