"""The program of a run in a mounted folder: a link out of all mounts is refused before any request."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringfence.cli.main import main
from ringfence.cli.shared.run_options import check_program, node_problem
from ringfence.client.errors import InvalidCallError


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose `.venv/bin/python` leads out of it, as pyenv and uv make it."""
    python = tmp_path / "pyenv" / "versions" / "3.12" / "bin" / "python3.12"
    python.parent.mkdir(parents=True)
    python.write_text("")
    python.chmod(0o755)
    (python.parent / "python3").symlink_to("python3.12")
    folder = tmp_path / "project"
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python3").symlink_to(python.parent / "python3")
    (folder / ".venv" / "bin" / "python").symlink_to("python3")
    (folder / ".venv" / "bin" / "tool").write_text(f"#!{folder}/.venv/bin/python -I\n")
    return folder


@pytest.mark.parametrize(
    "program", [".venv/bin/python", "./.venv/bin/python3", "{}/.venv/bin/python", ".venv/bin/tool"]
)
def test_program_linked_out_of_mounts_is_refused_with_folder_to_mount(project: Path, program: str) -> None:
    with pytest.raises(InvalidCallError, match="in no mounted folder") as refused:
        check_program(program.format(project), [project])
    python = project.parent / "pyenv" / "versions" / "3.12"
    assert f"a link to {python}/bin/python3, " in refused.value.message
    assert refused.value.remedy == f"add --mount {python}"
    check_program(program.format(project), [project, python])


@pytest.mark.parametrize(
    ("link", "to"),
    [("inside", "real"), ("system", "/bin/sh"), ("up", "../project/real"), ("dangling", "/no/such")],
)
def test_program_that_sandbox_shows_is_allowed(project: Path, link: str, to: str) -> None:
    (project / "real").write_text("#!/bin/sh\n")
    (project / link).symlink_to(to)
    check_program(link, [project])


@pytest.mark.parametrize("program", ["python", "/no/such", "absent", "../outside"])
def test_program_elsewhere_is_left_to_sandbox(project: Path, program: str) -> None:
    check_program(program, [project])
    check_program(program, [])


def test_folder_linked_out_of_mounts_is_refused(project: Path) -> None:
    (project / "env").symlink_to(project.parent / "pyenv" / "versions" / "3.12")
    with pytest.raises(InvalidCallError, match="in no mounted folder"):
        check_program("env/bin/python3.12", [project])


def test_circle_of_links_is_left_to_sandbox(project: Path) -> None:
    (project / "a").symlink_to("b")
    (project / "b").symlink_to("a")
    check_program("a", [project])


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--task", "5b0a4d7e-6c0f-4d39-9b5e-0a4d7e6c0f5d"],
        ["mcp", "wrap", "--target", "notes", "--task", "5b0a4d7e-6c0f-4d39-9b5e-0a4d7e6c0f5d"],
    ],
    ids=["run", "mcp wrap"],
)
def test_command_refuses_program_before_it_connects(
    project: Path, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringfence.cli.commands.run_local.connected_host", None)
    assert main([*words, "--mount", str(project), "--", ".venv/bin/python"]) == 1
    assert f"add --mount {project.parent}/pyenv/versions/3.12" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("version", "fails"),
    [
        ("v20.20.2", True), ("v22.20.0", True), ("v22.21.0", False), ("v23.11.1", True), ("v24.0.0", False),
        ("v26.1.0-nightly", False), ("what?", False),
    ],
)  # fmt: skip
def test_node_that_knows_no_proxy_is_named(tmp_path: Path, version: str, fails: bool) -> None:
    node = tmp_path / "node"
    node.write_text(f"#!/bin/sh\necho '{version}'\n")
    node.chmod(0o755)
    for program in ("node", "npx"):
        problem = node_problem(program, str(tmp_path))
        assert (problem is not None) is fails
        assert not fails or (problem is not None and version in problem)
    assert node_problem("python3", str(tmp_path)) is None
    assert node_problem("node", str(tmp_path / "elsewhere")) is None
