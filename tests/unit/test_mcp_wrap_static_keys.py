"""Static keys in the command of `ringfence mcp wrap`: refused in every common form, before anything connects."""

from __future__ import annotations

import pytest

from ringfence.cli.main import main

KEY = "8f3c9b1e7a2d4056be91c3d7f0a8e25461b79cd3"
WRAP = ["mcp", "wrap", "--task", "0192d3a0-0000-7000-8000-000000000000", "--target", "notes"]


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> bool:
    """Whether the command is refused for a static key. It fails in any case: no trust root is set."""
    assert main([*WRAP, *words]) == 1
    said = "".join(capsys.readouterr())
    assert KEY not in said
    return "looks like a static key" in said


@pytest.mark.parametrize(
    "server",
    [
        ["srv", f"--api-key={KEY}"],
        ["srv", "--api-key", KEY],
        ["srv", "-api-key", KEY],
        ["srv", "-H", f"Authorization: Bearer {KEY}"],
        ["srv", "--user", f"bot:{KEY}"],
        ["env", f"API_KEY={KEY}", "srv"],
        ["sh", "-c", f"API_KEY={KEY} exec srv"],
        ["bash", "-lc", f"export API_KEY={KEY}; srv"],
        ["sh", "-c", f"srv --api-key {KEY}"],
        ["srv", f"https://{KEY}@notes.example/mcp"],
        ["srv", f"--url=https://{KEY}:@notes.example/mcp"],
        ["srv", f"https://bot:{KEY}@notes.example/mcp"],
        ["sh", "-c", f"srv https://{KEY}@notes.example"],
    ],
)
def test_static_key_in_the_command_is_refused(capsys: pytest.CaptureFixture[str], server: list[str]) -> None:
    assert refused(capsys, "--", *server)


@pytest.mark.parametrize(
    "variable",
    [
        f"API_KEY={KEY}",
        f"URL=https://{KEY}@notes.example",
        f"OPTIONS=--api-key {KEY}",
        f"RUN=API_KEY={KEY} srv",
    ],
)
def test_static_key_in_a_variable_is_refused(capsys: pytest.CaptureFixture[str], variable: str) -> None:
    assert refused(capsys, "--env", variable, "--", "srv")


@pytest.mark.parametrize(
    "server",
    [
        ["npx", "-y", "@scope/server@1.2.3", "--root", "/srv/notes"],
        ["srv", "--url", "https://git@notes.example/mcp", "--token-file", "/run/token"],
        ["srv", "--api-key", "{api_key}"],
        ["sh", "-c", 'exec srv --api-key "$NOTES_API_KEY"'],
        ["python", "-m", "notes", "--commit", KEY],
    ],
)
def test_command_without_a_static_key_is_not(capsys: pytest.CaptureFixture[str], server: list[str]) -> None:
    assert not refused(capsys, "--env", "LANG=C.UTF-8", "--", *server)
