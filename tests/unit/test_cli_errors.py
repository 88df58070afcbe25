"""Errors of the command line: as JSON where JSON was asked for, with suggestions, in the words of the product."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError

from ringfence.cli.main import COMMANDS, load, main
from ringfence.cli.shared.refused_records import REMEDIES, with_options
from ringfence.client.errors import ApiError, InvalidCallError, RefusedError, RequestDeniedError
from ringfence.client.reports.read_api import ReadApi
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.validation_problems import explain
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Permission
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from tests.support.terminal_lists import IDS, WHO_AUDIT
from tests.unit.test_cli_ids import commands


@pytest.mark.parametrize(
    ("args", "status", "code", "says", "remedy"),
    [
        (["--json", "aprovals"], 2, "wrong_use", "did you mean approvals", "ringfence --help"),
        (["approvals", "lst", "--json"], 2, "wrong_use", "'list'", "ringfence approvals --help"),
        (["revoke", "--json", "--resn", "x"], 2, "wrong_use", "--reason", "ringfence revoke --help"),
        (["--json", "approvals"], 2, "wrong_use", "name a command", "ringfence approvals --help"),
        (["--json", "revoke", "--all", "--reason", "x"], 2, "wrong_use", "add --yes", None),
        (
            ["--json", "--identity", "none.json", "task", "list"],
            1,
            "key_file_invalid",
            "none.json",
            REMEDIES["key_file_invalid"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_with_json_errors_are_json(
    args: list[str],
    status: int,
    code: str,
    says: str,
    remedy: str | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115, PTH123
    assert main(args) == status
    document = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert set(document) == {"code", "message", "remedy", "reasons"}
    assert document["code"] == code
    assert says in document["message"]
    assert document["remedy"] == remedy
    assert document["reasons"] == []


def test_json_errors_have_the_reasons_of_a_refusal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = (Reason(code="a", message="one \x1b[2J"), Reason(code="b", message="two"))

    def refuse(*_: object) -> None:
        raise RefusedError("task.assign", reasons, "registry")

    monkeypatch.setattr("ringfence.cli.commands.topics.load", refuse)
    assert main(["--json", "topics", "check"]) == 1
    told = capsys.readouterr().err
    assert "\x1b" not in told
    assert [reason["code"] for reason in json.loads(told)["reasons"]] == ["a", "b"]


def test_remedies_are_of_codes_that_there_are() -> None:
    names = (Path(__file__).parents[1] / "contract/golden/public_names.txt").read_text().splitlines()
    assert {f"error code {code}" for code in REMEDIES} - set(names) == set()


def test_a_record_that_is_not_there_has_its_list_as_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def record(*_: object) -> None:
        raise ApiError("there is no agent deploy-bt that sam may see", code=Code.NOT_FOUND, status=404)

    async def records(*_: object) -> list[dict[str, str]]:
        return [{"id": "deploy-bot"}]

    monkeypatch.setattr(ReadApi, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(ReadApi, "close", records)
    monkeypatch.setattr(ReadApi, "record", record)
    monkeypatch.setattr(ReadApi, "records", records)
    assert main(["--json", "agent", "show", "deploy-bt"]) == 1
    document = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert document["message"].endswith("did you mean deploy-bot?")
    assert document["remedy"] == "ringfence agent list"


def test_a_word_of_a_command_that_is_run_is_no_option_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["request", "--task", "x", "--exec", "--", "tool", "--json"]) == 2
    assert not capsys.readouterr().err.startswith("{")


def test_an_error_names_its_remedy() -> None:
    assert RingfenceError("it is broken").with_remedy("mend \x1b it").remedy == "mend ‹U+001B› it"
    assert RingfenceError("it is broken").remedy is None


@pytest.mark.parametrize(
    ("side", "resource", "remedy"),
    [
        ("task", "env/x", "ringfence task assign AGENT --purpose WHY --for TIME --allow shop:read:env/x"),
        ("ceiling:bot", "env/x", "ringfence agent set-ceiling bot --add shop:read:env/x"),
        (
            "entitlements:maria",
            "a:b c",
            """ringfence user set maria --add '{"target":"shop","verbs":["read"],""",
        ),
        ("entitlements:maria", "it's", "ringfence user set maria --add 'shop:read:it'\"'\"'s'"),
    ],
)
def test_denial_names_the_command_that_gives_the_permission(side: str, resource: str, remedy: str) -> None:
    lacks = Permission(target="shop", verbs=("read",), resources=(resource,))
    reasons = [Reason(code="beyond_task", message="no", permission=lacks, side=side)] * 2
    denied = RequestDeniedError("r", reasons, "policy")
    assert denied.remedy is not None
    assert denied.remedy.count(remedy) == 1


def test_denial_that_no_permission_mends_names_no_command() -> None:
    assert RequestDeniedError("r", [Reason(code="too_fast", message="no")], "policy").remedy is None


def test_a_mistyped_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inventry"]) == 2
    assert "did you mean inventory?" in capsys.readouterr().err
    assert main(["xyzzy"]) == 2
    assert "did you mean" not in capsys.readouterr().err


class _Model(BaseModel):
    count: Annotated[int, Field(ge=1, le=5)] = 1
    purpose: Annotated[str, Field(min_length=1, max_length=3)] = "x"
    kind: Literal["a", "b"] = "a"
    verbs: Annotated[tuple[str, ...], Field(max_length=1)] = ()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"count": 9}, "count: must be at most 5"),
        ({"count": "x"}, "count: must be a whole number"),
        ({"purpose": ""}, "purpose: must not be empty"),
        ({"purpose": "long"}, "purpose: must have at most 3 characters"),
        ({"purpose": 5}, "purpose: must be a text"),
        ({"kind": "c"}, "kind: must be 'a' or 'b'"),
        ({"verbs": ("a", "b")}, "verbs: must have at most 1 entries"),
    ],
)
def test_validation_errors_are_in_our_words(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError) as error:
        _Model.model_validate(fields)
    assert explain(error.value) == says


def test_validation_errors_name_the_option() -> None:
    error = InvalidCallError(
        "the task: terms.purpose: must not be empty; not_after: must be at least 1; x: y"
    )
    assert with_options(error) == (
        "the task: --purpose: must not be empty; --for or --until: must be at least 1; x: y"
    )
    other = RingfenceError("the task: purpose: must not be empty")
    assert with_options(other) == other.message


def test_a_file_that_is_no_key_is_said_to_be_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "README.md"
    file.write_text("# A project\n")
    file.chmod(0o644)
    assert main(["--identity", str(file), "task", "list"]) == 1
    assert "is no key file" in capsys.readouterr().err
    # A key that others can read is refused as before.
    key = tmp_path / "maria.json"
    SigningKey.generate("spiffe://ringfence.local/user/maria").save(key)
    key.chmod(0o644)
    assert main(["--identity", str(key), "task", "list"]) == 1
    assert "chmod 600" in capsys.readouterr().err


def test_a_new_key_makes_no_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "typo" / "maria.json"
    assert main(["key", "new", str(file), "--id", "user/maria"]) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert not file.parent.exists()


WHO = ["audit", "who", "--target", "stagign"]


@pytest.mark.parametrize(("lines", "status"), [((), 1), ((1,), 0)], ids=["never was", "was removed"])
def test_audit_who_for_an_unknown_or_removed_target(
    lines: tuple[int, ...],
    status: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def get(self: ReadApi, service: str, *path: str, **_: Any) -> Any:
        match service:
            case "policy":
                return {"agents": [], "after": None, "gaps": [], "exists": False}
            case "audit":
                done = WHO_AUDIT["lines"] if lines else []
                return {**WHO_AUDIT, "lines": done}
            case _:
                return {"targets": [{"id": "staging", "revision": 1, "state": {}}]}

    monkeypatch.setattr(ReadApi, "get", get)
    key = tmp_path / "maria.json"
    SigningKey.generate("spiffe://ringfence.local/user/maria").save(key)
    assert main(["--identity", str(key), *WHO]) == status
    told = capsys.readouterr()
    if status:
        assert "there is no target stagign; did you mean staging?" in told.err
    else:
        assert "there is no target stagign now" in told.err
        assert "allowed" in told.out


def test_help_shows_flags_without_a_type_and_whole_sentences(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name, entry in COMMANDS.items():
        for path, command in commands(load(name, entry), name):
            assert "\n" not in (command.help or "").replace("\n\n", ""), path
    told = ""
    for args in (["--help"], ["approvals", "approve", "--help"], ["request", "--help"]):
        assert main(args) == 0
        told = capsys.readouterr().out
        assert "<bool>" not in told
        assert "<str>" not in told
    assert "For redis: REDIS_URL. For ssh" in " ".join(told.split())


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["request", "--task", IDS[0], "--reason", "x", "--allow", "a:b:c", "--ttl", "5"], "--ttl: '5' has no unit"),
        (["request", "--task", IDS[0], "--reason", "x", "--allow", "a:b"], "--allow: 'a:b': a colon is missing"),
        (["request", "--task", IDS[0], "--reason", "x", "--allow", "@no"], "--allow: @no: No such file"),
        (["request", "--task", IDS[0], "--reason", "x", "--allow", "a:b:c", "--ttl", "25h"], "--ttl: '25h' is longer"),
        (["target", "add", "t", "--description", "x", "--verb", "V"], "--verb: 'V': verb: must be a verb"),
        (["target", "add", "t", "--description", "x", "--verb", "v", "--max-ttl", "2d"], "--max-ttl: '2d' is longer"),
        (["audit", "who", "--target", "t", "--since", "5"], "--since: '5' has no unit"),
        (["inventory", "--limit", "-3"], "'--limit' / '-n': '-3' must be at least 0"),
        (["inventory", "--limit", "few"], "'few' must be a whole number"),
        (["audit", "tail", "--status", "maybe"], "'--status': 'maybe' is not one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_wrong_values_name_their_option_in_our_words(
    args: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*args, "--json"]) == 2
    document = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert says in document["message"]
    assert document["remedy"].endswith("--help")
    assert document["remedy"] != "ringfence --help"


def every_command() -> Iterator[list[str]]:
    for name, entry in COMMANDS.items():
        inner = getattr(load(name, entry), "commands", {})
        yield from ([name, one] for one in inner)
        if not inner:
            yield [name]


def test_help_cuts_nothing_at_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    for command in every_command():
        assert main([*command, "--help"]) == 0
        # Only an option's second name may be cut; docs/cli.md has it.
        text = capsys.readouterr().out.replace("--on-behalf-of,--…", "")
        assert "…" not in text, command
        assert "<int range>" not in text, command


def test_help_of_selectors_tells_all_that_one_may_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["agent", "register", "--help"]) == 0
    assert "key-bound" in capsys.readouterr().out
