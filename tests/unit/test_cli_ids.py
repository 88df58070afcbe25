"""Ids that cannot be any are wrong use: nobody is asked, and the exit status says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from ringfence.cli.main import COMMANDS, load, main
from ringfence.cli.shared.id_lookup import known_ids, only_one
from ringfence.client.errors import ApiError, InvalidCallError
from ringfence.kernel.crypto.keys import SigningKey

IDS = {"AGENT", "USER", "PROVISIONER", "TARGET", "TASK", "[TASK]", "LEASE", "GRANT", "REQUEST"}


def commands(command: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    under = getattr(command, "commands", None)
    if under is None:
        yield path, command
    for name, one in (under or {}).items():
        yield from commands(one, *path, name)


def test_no_command_takes_just_anything_for_an_id(capsys: pytest.CaptureFixture[str]) -> None:
    seen = set()
    for name, entry in COMMANDS.items():
        for path, command in commands(load(name, entry), name):
            for param in command.params:
                if param.metavar not in IDS or param.multiple:
                    continue
                seen.add(param.metavar)
                # What is there is looked at before what is missing besides.
                said = ["no id"] if param.param_type_name == "argument" else [param.opts[0], "no id"]
                assert (main([*path, *said]), path, param.name) == (2, path, param.name)
                assert "'no id'" in capsys.readouterr().err, (path, param.name)
    assert seen == IDS


@pytest.mark.parametrize(
    ("args", "status"),
    [
        (["lease", "show", "5F0C0E6E-0000-4000-8000-000000000000"], 2),
        (["approvals", "show", "5f0"], 2),
        (["approvals", "show", "5f0c"], 1),
        (["lease", "show", "5f0c0e6e-0000-4000-8000-000000000000"], 1),
    ],
)
def test_possible_id_prefix_is_looked_up(
    args: list[str], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RINGFENCE_IDENTITY", "RINGFENCE_TRUST_ROOT", "RINGFENCE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    assert main(args) == status


TASK = "3f2a9c1d-0a4d-5d39-9b5e-0a4d7e6c0f5d"
SAME = ("77777777-1111-4d39-9b5e-0a4d7e6c0f5d", "77777777-2222-4d39-9b5e-0a4d7e6c0f5d")
KNOWN = {TASK: "task of deploy-bot: release 41", SAME[0]: "task of a", SAME[1]: "task of \x1b[2Jb"}


@pytest.mark.parametrize(
    ("text", "found"), [(TASK, TASK), ("3f2a", TASK), ("77777777-2", SAME[1]), (SAME[0], SAME[0])]
)
def test_the_only_id_that_begins_so_is_found(text: str, found: str) -> None:
    assert only_one("task", text, KNOWN) == found


def test_several_ids_that_begin_so_are_all_named_and_none_is_taken() -> None:
    with pytest.raises(InvalidCallError) as refused:
        only_one("task", "77777777", KNOWN)
    for id in SAME:
        assert id in refused.value.message
    assert "\x1b" not in refused.value.message


@pytest.mark.parametrize("text", ["3f2", "", "9999"])
def test_prefix_of_no_known_id_is_not_found(text: str) -> None:
    with pytest.raises(InvalidCallError, match="ringfence task list"):
        only_one("task", text, KNOWN)


def test_a_whole_id_that_is_unknown_is_not_called_a_beginning() -> None:
    other = "99999999-1111-4d39-9b5e-0a4d7e6c0f5d"
    with pytest.raises(
        InvalidCallError, match=f"there is no task {other} that you may see; see: ringfence task list"
    ):
        only_one("task", other, KNOWN)
    with pytest.raises(InvalidCallError, match=f"no open request {other} that you may see, or it is over"):
        only_one("open request", other, KNOWN)


def test_a_mistyped_id_gets_a_suggestion() -> None:
    with pytest.raises(InvalidCallError, match="did you mean 3f2a9c1d"):
        only_one("task", "3f2a9c11", KNOWN)


class _Api:
    """Answers of the services; `broken`: those that do not answer."""

    def __init__(self, *broken: str) -> None:
        self.broken = broken

    def _answer(self, service: str, answer: Any) -> Any:
        if service in self.broken:
            raise ApiError(f"the {service} does not answer")
        return answer

    async def events(self, **_: Any) -> Any:
        fields = {"task": TASK, "lease": SAME[0], "request": SAME[1], "agent": "deploy-bot"}
        return self._answer("audit", {"events": [{"unmapped": fields}, {"unmapped": None}]})

    async def records(self, kind: str) -> Any:
        return self._answer("registry", [{"id": TASK, "state": {"agent_id": "a", "purpose": "p"}}])

    async def leases(self) -> Any:
        return self._answer("revoker", {"leases": [{"id": SAME[0], "agent_id": "a", "status": "active"}]})


async def test_ids_are_known_from_lists_and_from_audit() -> None:
    assert set(await known_ids(cast(Any, _Api()))) == {TASK, *SAME}
    assert set(await known_ids(cast(Any, _Api()), "request")) == {SAME[1]}
    assert set(await known_ids(cast(Any, _Api("audit")), "lease")) == {SAME[0]}
    with pytest.raises(ApiError, match="audit"):
        await known_ids(cast(Any, _Api("audit")), "request")


@pytest.mark.parametrize(
    "args",
    [
        ["request", "--task", "3f2a9c1d", "--reason", "r", "--allow", "a:b:c"],
        ["release", "3f2a9c1d"],
        ["task", "delegate", "3f2a9c1d", "bot", "--purpose", "p", "--allow", "a:b:c", "--for", "5m"],
        ["approvals", "approve", "3f2a9c1d", "--yes"],
        ["approvals", "deny", "3f2a9c1d", "--yes"],
        ["approvals", "grant", "--like", "3f2a9c1d", "--yes"],
    ],
)
def test_prefix_is_refused_where_an_agent_could_forge_a_collision(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 2
    told = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "'3f2a9c1d' is only how an id begins" in told
    assert "whole id" in told


def test_an_agent_ends_a_task_by_its_whole_id(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RINGFENCE_TRUST_ROOT", "x" * 43)
    SigningKey.generate("spiffe://ringfence.local/agent/bot").save(tmp_path / "bot.json")
    assert main(["--identity", str(tmp_path / "bot.json"), "task", "end", "3f2a9c1d", "--reason", "r"]) == 2
    assert "is only how an id begins" in capsys.readouterr().err
