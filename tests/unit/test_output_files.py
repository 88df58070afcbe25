"""Output paths of the command line: every option and argument that names one refuses links, before it does anything."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ringfence
from ringfence.cli.main import COMMANDS, load, main
from ringfence.cli.shared.output import kept_file, output_file, output_folder

INPUTS = frozenset({
    "--attestation-root", "--baseline", "--bundle", "--ca-file", "--consent", "--delegation", "--endorsement",
    "--id-token", "--identity", "--invitation", "--jwks", "--key-file", "--openapi", "--operator",
    "--package", "--public-key", "--second-operator", "--socket", "--sponsor", "--user",
    "adopt file", "adopt report", "adopt vault_token",
    "key prove file", "key show file", "scan paths", "trust publish file", "user sync file",
})  # fmt: skip
"""Options and arguments whose files are only read. A new path is either here, or has a callback of `output_files`."""
OUTPUTS = (output_file, kept_file, output_folder)


def paths(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each parameter of a command and of those inside it that is a path."""
    inner = getattr(command, "commands", {})
    for name, one in inner.items():
        yield from paths(one, (*words, name))
    if not inner:
        for param in command.params:
            if "Path" in str(param.type_descriptor.annotation):
                yield words, param


ALL = [found for name, entry in COMMANDS.items() for found in paths(load(name, entry), (name,))]


def callback(param: Any) -> Any:
    return param.type_descriptor.parameter_info.callback


def is_input(words: tuple[str, ...], param: Any) -> bool:
    return param.opts[0] in INPUTS or " ".join((*words, param.name)) in INPUTS


def named(found: tuple[tuple[str, ...], Any]) -> str:
    return " ".join((*found[0], found[1].opts[0]))


OUTPUT_PARAMS = [found for found in ALL if callback(found[1]) in OUTPUTS]


def test_every_path_is_either_input_or_output() -> None:
    assert [named(found) for found in ALL if is_input(*found) == (callback(found[1]) in OUTPUTS)] == []
    assert len(OUTPUT_PARAMS) > 15


@pytest.mark.parametrize("dangling", [False, True], ids=["link", "dangling"])
@pytest.mark.parametrize("found", OUTPUT_PARAMS, ids=named)
def test_link_as_output_is_refused(
    tmp_path: Path, found: tuple[tuple[str, ...], Any], dangling: bool, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    words, param = found
    monkeypatch.chdir(tmp_path)
    victim, link = tmp_path / "victim", tmp_path / "link"
    if not dangling:
        if callback(param) is output_folder:
            victim.mkdir()
        else:
            victim.write_text("untouched")
    link.symlink_to(victim)
    value = [str(link)] if param.param_type_name == "argument" else [param.opts[0], str(link)]
    assert main([*words, *value]) == 1
    assert f"{link} is a symbolic link" in " ".join(capsys.readouterr().err.split())
    assert link.is_symlink()
    if dangling:
        assert not victim.exists()
    else:
        assert victim.is_dir() or victim.read_text() == "untouched"
    assert {path.name for path in tmp_path.iterdir()} <= {"victim", "link"}


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_scan_writes_report_to_stdout(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert main(["scan", "folder", "--no-history", "--write-baseline", name]) == 0
    document, _ = json.JSONDecoder().raw_decode(capsys.readouterr().out)
    assert document == {"version": 1, "findings": []}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_scan_baseline_link_of_repository_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".bashrc").write_text("# mine")
    (tmp_path / "home" / ".bashrc").chmod(0o600)
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / ".ringfence-baseline.json").symlink_to("../home/.bashrc")
    monkeypatch.chdir(tmp_path / "repo")
    for option in ("--write-baseline", "--sarif", "--ocsf", "--html"):
        assert main(["scan", ".", "--no-history", option, ".ringfence-baseline.json"]) == 1
    assert (tmp_path / "home" / ".bashrc").read_text() == "# mine"
    assert (tmp_path / "home" / ".bashrc").stat().st_mode & 0o777 == 0o600


def writes(tree: ast.AST) -> Iterator[ast.Call]:
    """Yield the calls that may create or truncate a file at a path."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = [
            one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)
        ]
        if name in ("write_text", "write_bytes", "copyfile", "touch") or (
            name == "open" and any(set(mode) <= set("rwabt+") and set(mode) & set("wa+") for mode in modes)
        ) or "O_CREAT" in ast.unparse(node):  # fmt: skip
            yield node


def test_commands_write_files_only_by_the_one_writer() -> None:
    root = Path(ringfence.__file__).parent
    found = [
        f"{file.relative_to(root)}: {ast.unparse(call)[:80]}"
        for folder in ("cli", "client", "sign_page")
        for file in sorted((root / folder).rglob("*.py"))
        for call in writes(ast.parse(file.read_text()))
    ]
    assert [one for one in found if "os.devnull" not in one] == []
