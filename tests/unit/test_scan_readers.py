"""Readers of `ringfence scan`: each finds what tools write where it looks, and passes over what only looks like it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from random import Random

import pytest

from ringfence.scan.candidates import formats_in
from ringfence.scan.file_scan import PathIndex
from ringfence.scan.findings import Finding, Fingerprinter, Report, SecretValue
from ringfence.scan.kinds import FORMATS
from ringfence.scan.readers import FILE_READERS, MACHINE_READERS, TEXT_READER
from ringfence.scan.readers.reader import Machine
from ringfence.scan.scanner import ScanOptions, scanning
from tests.support.scan_corpus import Case, Maker, cases, plant

SEEDS = 6
FINGERPRINTS = Fingerprinter(b"k" * 32)


def fingerprint(value: str) -> str:
    return FINGERPRINTS.of(SecretValue(value))


def scan(*paths: Path, machine: Machine | None = None, home: Path | None = None) -> Report:
    options = ScanOptions(paths=paths, machine=machine, etc=False, home=home or Path("/nonexistent"))
    with scanning(options, FINGERPRINTS) as scanner:
        return scanner.run()


@pytest.fixture(scope="module")
def corpus(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[list[tuple[Path, Case]], dict[str, list[Finding]]]:
    folder = tmp_path_factory.mktemp("corpus")
    planted = list(plant(folder, SEEDS))
    found = defaultdict(list)
    report = scan(folder)
    assert not [note for note in report.notes if note.limits]
    for one in report.findings:
        found[one.place.path].append(one)
    return planted, found


def test_every_planted_secret_is_found_by_its_reader_with_its_pattern(corpus) -> None:
    planted, found = corpus
    for path, case in planted:
        by_print = {one.fingerprint: one for one in found[str(path)]}
        for secret in case.secrets:
            one = by_print.get(fingerprint(secret.value))
            assert one is not None, f"{case.label}: {case.path} has one that is not found"
            assert one.pattern.value == secret.pattern, (case.path, one.place.field)
            assert one.length == len(secret.value)
        unread = sorted(one.pattern.value for one in found[str(path)] if one.fingerprint is None)
        assert unread == sorted(case.unread), case.path
        if case.secrets or case.unread:
            assert case.reader in {one.reader for one in found[str(path)]}, case.path


def test_readers_find_only_planted_secrets(corpus) -> None:
    planted, found = corpus
    extra: Counter[tuple[str, str]] = Counter()
    for path, case in planted:
        wanted = {fingerprint(secret.value) for secret in case.secrets}
        extra.update(
            (case.path, one.place.field)
            for one in found[str(path)]
            if one.fingerprint is not None and one.fingerprint not in wanted
        )
    assert not extra


def test_every_reader_has_a_planted_case_and_a_look_alike() -> None:
    readers = {reader.name for reader in (*FILE_READERS, TEXT_READER)}
    assert readers - {case.reader for case in cases(0) if case.secrets or case.unread} == set()
    assert readers - {case.reader for case in cases(0) if not case.secrets and not case.unread} == set()
    # Those of machines have tests below, by these names.
    assert {reader.name for reader in MACHINE_READERS} == {
        "environment",
        "process",
        "ssh-agent",
        "cloud-metadata",
    }


def test_every_format_has_planted_cases_and_look_alikes() -> None:
    formats = {one.regex.pattern for one in FORMATS}
    for planted in (True, False):
        texts = [
            case.content.decode() for case in cases(0)
            if case.reader == TEXT_READER.name and bool(case.secrets) is planted
        ]  # fmt: skip
        markers = {one.regex.pattern for one in FORMATS if any(one.marker in text for text in texts)}
        assert formats - markers == set()
    found = {
        one.regex.pattern for case in cases(0) if case.reader == TEXT_READER.name
        for one, value, _ in formats_in(case.content.decode()) if value in {secret.value for secret in case.secrets}
    }  # fmt: skip
    assert formats - found == set()


def test_the_index_of_paths_finds_what_each_declaration_says() -> None:
    """Against the plain meaning of a declaration: an end of the path, in which `*` is anything within one component."""
    declared = [
        (reader, path, re.compile(r"(?:^|.*/)" + re.escape(path.strip("/")).replace(r"\*", "[^/]*"), re.DOTALL))
        for reader in FILE_READERS for path in reader.paths
    ]  # fmt: skip
    index = PathIndex(FILE_READERS)
    random = Random(1)
    for _, path, _ in declared:
        for _ in range(12):
            told = "".join(
                random.choice(("", "x", "a.b", "-", ".env")) if char == "*" else char for char in path
            )
            told = random.choice(
                (told, told[len(told) // 3 :], f"z{told}", f"{told}.bak", f"{told}/y")
            ).strip("/")
            whole = f"{random.choice(('/home/m/', '/'))}{told}"
            wanted = {reader.name for reader, _, regex in declared if regex.fullmatch(whole)}
            assert {reader.name for reader in index.readers_of(whole)} == wanted, whole


def test_names_of_readers_are_unique() -> None:
    names = [*(one.name for one in (*FILE_READERS, TEXT_READER)), *(one.name for one in MACHINE_READERS)]
    assert len(names) == len(set(names))


def test_the_known_places_of_a_home_folder_are_read_without_a_path(tmp_path: Path) -> None:
    for one in cases(1):
        if one.secrets and one.path.startswith((".aws/", ".kube/", ".ssh/", ".config/gh/")):
            file = tmp_path / one.path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(one.content)
    report = scan(machine=Machine(environ={}, proc=str(tmp_path / "no-proc")), home=tmp_path)
    assert {one.place.path for one in report.findings} >= {
        "~/.aws/credentials",
        "~/.kube/config",
        "~/.ssh/id_ed25519",
    }


def test_a_root_within_a_known_folder_still_tells_the_reader(tmp_path: Path) -> None:
    case = next(one for one in cases(0) if one.reader == "aws-credentials")
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_bytes(case.content)
    assert {one.reader for one in scan(tmp_path / ".aws").findings} >= {"aws-credentials"}
    assert {one.reader for one in scan(tmp_path / ".aws/credentials").findings} >= {"aws-credentials"}


def test_environment() -> None:
    token = Maker(1).crc_token("ghp")
    report = scan(
        machine=Machine(environ={"GITHUB_TOKEN": token, "HOME": "/home/maria"}, proc="/nonexistent")
    )
    (one,) = [one for one in report.findings if one.reader == "environment"]
    assert (one.place.field, one.kind, one.opens.host) == ("GITHUB_TOKEN", "github-pat", "api.github.com")


def test_processes_are_named_by_whom_they_are_and_a_value_is_reported_once(tmp_path: Path) -> None:
    token = Maker(2).token(40)
    code = "import sys; print('up', flush=True); sys.stdin.read()"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code], env={"SERVICE_API_KEY": token}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()
        report = scan(machine=Machine(environ={}))
    finally:
        for child in children:
            child.communicate()
    (one,) = [one for one in report.findings if one.fingerprint == fingerprint(token)]
    assert one.reader == "process"
    assert {f"({child.pid})" for child in children} == {user.rpartition(" ")[2] for user in one.used_by}


def test_processes_of_others_are_read_only_where_asked(tmp_path: Path) -> None:
    process = tmp_path / "4711"
    process.mkdir()
    (process / "comm").write_text("agent\n")
    (process / "environ").write_bytes(b"SERVICE_API_KEY=" + Maker(3).token(40).encode() + b"\0")
    (tmp_path / "4712").mkdir()  # one that ended meanwhile
    if os.geteuid() == 0:
        os.chown(process, 12345, 12345)
        assert not scan(machine=Machine(environ={}, proc=str(tmp_path))).findings
    report = scan(machine=Machine(environ={}, proc=str(tmp_path), all_processes=True))
    assert [one.used_by for one in report.findings] == [("agent (4711)",)]


def test_ssh_agent_is_told_by_its_socket_and_not_asked(tmp_path: Path) -> None:
    path = tmp_path / "agent"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    listener.settimeout(0)
    report = scan(machine=Machine(environ={"SSH_AUTH_SOCK": str(path)}, proc="/nonexistent"))
    (one,) = [one for one in report.findings if one.reader == "ssh-agent"]
    assert (one.pattern.value, one.fingerprint) == ("user-token", None)
    with pytest.raises(BlockingIOError):
        listener.accept()
    listener.close()
    report = scan(machine=Machine(environ={"SSH_AUTH_SOCK": str(tmp_path / "none")}, proc="/nonexistent"))
    assert not report.findings


class _Metadata(BaseHTTPRequestHandler):
    asked: list[str]
    answers: dict[str, str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        answer = self.answers.get(self.path)
        self.send_response(200 if answer else 404)
        self.end_headers()
        self.wfile.write((answer or "").encode())

    def do_PUT(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def metadata() -> Iterator[tuple[str, type[_Metadata]]]:
    handler = type("Handler", (_Metadata,), {"asked": [], "answers": {}})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("path", "answer", "service"), [
    ("/latest/meta-data/iam/security-credentials/", "agent-role", "AWS"),
    ("/computeMetadata/v1/instance/service-accounts/default/email", "bot@shop.iam.gserviceaccount.com", "Google Cloud"),
    ("/metadata/instance/compute/resourceId?api-version=2021-02-01&format=text", "/subscriptions/1/vm", "Azure"),
])  # fmt: skip
def test_cloud_metadata_is_asked_for_names_alone_and_only_where_asked(
    metadata, path, answer, service
) -> None:
    url, handler = metadata
    handler.answers[path] = answer
    machine = Machine(environ={}, proc="/nonexistent", metadata_url=url)
    assert not scan(machine=machine).findings
    assert not handler.asked
    machine.metadata = True
    (one,) = scan(machine=machine).findings
    assert (one.pattern.value, one.opens.service, one.fingerprint) == ("service-account", service, None)
    assert not [
        asked for asked in handler.asked if asked.endswith(("/agent-role", "/token?", "default/token"))
    ]


_WRONG_CHECKSUM = Maker(21).counterfeit("ghp")
_WRONG_LENGTH = f"ghp_{Maker(22).token(20)}"
PLACES_OF_SECRETS = {
    ".mcp.json": '{{"mcpServers": {{"a": {{"command": "x", "env": {{"GITHUB_PERSONAL_ACCESS_TOKEN": "{}"}}}}}}}}',
    ".env": "GITHUB_PERSONAL_ACCESS_TOKEN={}\n",
    ".github/workflows/a.yml": "env:\n  GITHUB_PERSONAL_ACCESS_TOKEN: {}\n",
    "compose.yml": "services: {{a: {{environment: {{GITHUB_PERSONAL_ACCESS_TOKEN: {}}}}}}}\n",
    "a.service": "[Service]\nEnvironment=GITHUB_PERSONAL_ACCESS_TOKEN={}\n",
    ".bashrc": "export GITHUB_PERSONAL_ACCESS_TOKEN={}\n",
}


@pytest.mark.parametrize("path", PLACES_OF_SECRETS)
@pytest.mark.parametrize("value", [_WRONG_CHECKSUM, _WRONG_LENGTH])
def test_token_without_a_valid_format_in_a_place_of_secrets_is_reported_as_such(
    tmp_path: Path, path: str, value: str
) -> None:
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(PLACES_OF_SECRETS[path].format(value))
    (one,) = scan(tmp_path).findings
    assert (one.fingerprint, one.confidence, one.opens.service) == (fingerprint(value), "likely", "GitHub")
    assert [remark.startswith("format not valid") for remark in one.remarks] == [True]


@pytest.mark.parametrize("value", [
    f"ghp_{'x' * 36}", "ghp_xxxx", "<your token>", "changeme", "ghp_your_token_here", f"ghp_{'0' * 36}",
    "${GITHUB_TOKEN}", "ghp_1234567890abcdefghijklmnopqrstuvwxyz", "YOUR_GITHUB_TOKEN",
])  # fmt: skip
@pytest.mark.parametrize("path", PLACES_OF_SECRETS)
def test_placeholder_in_a_place_of_secrets_is_no_finding(tmp_path: Path, path: str, value: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(PLACES_OF_SECRETS[path].format(value))
    assert not scan(tmp_path).findings


def test_token_with_a_valid_format_has_no_remark(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        f"GITHUB_TOKEN={Maker(23).crc_token('ghp')}\nOTHER_TOKEN={Maker(24).token(40)}\n"
    )
    assert [one.remarks for one in scan(tmp_path).findings] == [(), ()]


GENERATED_USERS = {
    ".git-credentials": "https://{}:x-oauth-basic@github.com\n",
    ".env": "REMOTE=https://{}:x-oauth-basic@github.com/a/b\n",
    ".bashrc": "curl -u {}:api_token https://api.track.test/me\n",
    "crontab": "* * * * * root curl -u {}: https://api.pay.test/charges\n",
    ".netrc": "machine api.heroku.test login {} password x-oauth-basic\n",
}


@pytest.mark.parametrize("path", GENERATED_USERS)
def test_generated_user_name_is_the_secret_and_is_shown_nowhere(tmp_path: Path, path: str) -> None:
    token = Maker(25).chars("0123456789abcdef", 40)
    (tmp_path / path).write_text(GENERATED_USERS[path].format(token))
    (one,) = scan(tmp_path).findings
    assert one.fingerprint == fingerprint(token)
    assert token[:6] not in repr(one)
