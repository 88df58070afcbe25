"""The command line where streams are closed, terminals narrow, words unreadable, and proxies in the way."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from ringfence.cli.main import main
from ringfence.cli.shared.output import console, print_table
from ringfence.kernel.base.errors import SettingsError
from ringfence.kernel.base.http_client import web_client
from ringfence.kernel.crypto.keys import SigningKey


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings and no proxies of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith("RINGFENCE_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def in_shell(line: str) -> subprocess.CompletedProcess[str]:
    """`ringfence` in a shell's line is this one."""
    function = f'ringfence() {{ {sys.executable} -m ringfence.cli.main "$@"; }}\n'
    return subprocess.run(["bash", "-c", function + line], capture_output=True, text=True, check=False)


def test_with_stdout_closed_nothing_is_done_and_it_is_said() -> None:
    done = in_shell("ringfence key new k.json --id agent/a >&-")
    assert (done.returncode, Path("k.json").exists()) == (1, False)
    assert (
        done.stderr == "error: stdout is closed, so nothing could be printed; to throw it away: >/dev/null\n"
    )


def test_with_stderr_or_stdin_closed_the_exit_status_is_the_same() -> None:
    assert in_shell("ringfence nosuch 2>&-").returncode == 2
    assert in_shell("ringfence key show nowhere 2>&-").returncode == 1
    done = in_shell("ringfence revoke --all --reason x <&-")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "add --yes" in done.stderr


def test_argument_that_is_not_utf8_is_refused() -> None:
    done = in_shell("ringfence agent show $'\\xff'")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "is not UTF-8" in done.stderr


def test_no_error_moves_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", "show", "\x1b[2Jgone\u202e.json"]) == 1
    assert "‹U+001B›[2Jgone‹U+202E›.json" in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["0", "1", "20"])
def test_narrow_terminal_still_shows_every_word(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "dumb")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stdout", terminal)
        print_table(["!agent", "!lease", "reason"], [["deploy-bot", "db453985", "roll out"]], empty="")
        assert console().width == 80
        monkeypatch.undo()
    shown = _read_all(ours).decode()
    for word in ("deploy-bot", "db453985", "roll out"):
        assert word in shown


def _read_all(terminal: int) -> bytes:
    """Read what a pseudo-terminal still holds once its other side is closed, and close it."""
    text = b""
    with contextlib.suppress(OSError):  # EIO at the end (pty(7))
        while piece := os.read(terminal, 4096):
            text += piece
    os.close(terminal)
    return text


async def test_no_proxy_stands_between_us_and_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        writer.close()

    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, web_client(timeout_s=5) as http:
        for host in ("127.0.0.1", "localhost"):
            assert (await http.get(f"http://{host}:{port}/readyz")).status_code == 204


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "gopher://127.0.0.1"])
def test_a_proxy_that_cannot_be_used_is_named(
    proxy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(SettingsError, match="ALL_PROXY"):
        web_client(timeout_s=1)
    file = tmp_path / "olga.json"
    SigningKey.generate("spiffe://ringfence.local/user/olga").save(file)
    assert main(["--identity", str(file), "agent", "list"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: the proxy in")
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KAFKA", "127.0.0.1:99999"),
        ("KAFKA", ""),
        ("KAFKA", "a:1,,b:2"),
        ("KAFKA", "localhost:nine"),
        ("REGISTRY_URL", ""),
        ("POLICY_URL", "localhost:8702"),
        ("AUDIT_URL", "ftp://localhost"),
        ("CONFIG", "/tmp"),
    ],
)
def test_an_address_that_can_be_none_names_its_setting(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"RINGFENCE_{name}", value)
    assert main(["agent", "list"]) == 1
    assert f"RINGFENCE_{name}" in capsys.readouterr().err
