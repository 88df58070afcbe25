"""What `ringfence scan` says: forms, exit statuses, remedies that run, and no piece of a secret in any of it."""

from __future__ import annotations

import base64
import html.parser
import json
import os
import shlex
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.cells import cell_len

from ringfence.cli.commands.scan import _is_accepted, _print
from ringfence.scan.candidates import MARKERS, public_prefix_length
from ringfence.scan.findings import Fingerprinter, Pattern
from ringfence.scan.output_guard import PIECE
from ringfence.scan.reports import baseline_text, html_document, ocsf_events, report_document, sarif_document
from ringfence.scan.rings import verdicts
from ringfence.scan.scanner import ScanOptions, scanning
from tests.support.ocsf import problems
from tests.support.scan_corpus import Maker, cases, plant
from tests.support.scan_corpus.formats import FORMAT_CASES
from tests.support.scan_corpus.maker import ALNUM, BASE36, HEX, UPPER36, URL_SAFE
from tests.support.terminal import ESCAPES, Terminal

_MAIN = "import sys; from ringfence.cli.main import main; sys.exit(main(sys.argv[1:]))"
SARIF_SCHEMA = Path(__file__).parents[1] / "support" / "sarif" / "sarif-schema-2.1.0.json"


@dataclass(frozen=True)
class Home:
    """A home folder, and the environment of commands that have it."""

    folder: Path
    environment: Mapping[str, str]

    def scan(self, *words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", _MAIN, "scan", *words], env=dict(self.environment), cwd=folder or self.folder,
            capture_output=True, text=True, check=False,
        )  # fmt: skip


@pytest.fixture
def home(tmp_path: Path) -> Home:
    folder = tmp_path / "home"
    folder.mkdir()
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("RINGFENCE_", "XDG_"))
        and name in ("PATH", "PYTHONPATH", "LANG", "VIRTUAL_ENV")
    }  # fmt: skip
    return Home(folder, {**environment, "HOME": str(folder), "RINGFENCE_CONFIG": os.devnull})


@pytest.fixture
def project(home: Home) -> Path:
    """A folder with a token in two places, a password, and a service account."""
    folder = home.folder / "project"
    make = Maker(11)
    token, password = make.crc_token("ghp"), make.token(20)
    (folder / "sub").mkdir(parents=True)
    (folder / ".env").write_text(f"GITHUB_TOKEN={token}\nDB_PASSWORD={password}\n")
    (folder / "sub/.env").write_text(f"GH_TOKEN={token}\n")
    key = next(one for one in cases(1) if one.reader == "gcp-service-account")
    (folder / "key.json").write_bytes(key.content)
    return folder


def document(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_json_says_all_of_a_finding(home: Home, project: Path) -> None:
    report = document(home.scan(str(project), "--json"))
    assert report["summary"] == {
        "findings": 4, "new": 4, "shared": 2,
        "patterns": {"static-key": 2, "user-token": 0, "service-account": 1, "password": 1, "other": 0},
        "rings": {"1": 4, "2": 4, "3": 1, "4": 1},
    }  # fmt: skip
    one = next(one for one in report["findings"] if one["field"] == "GITHUB_TOKEN")
    assert one["opens"] == {"service": "GitHub", "host": "api.github.com"}
    assert (one["line"], one["length"], len(one["fingerprint"])) == (1, 40, 16)
    assert [place["path"].endswith("sub/.env") for place in one["shared_with"]] == [True]
    assert [ring["state"] for ring in one["rings"]] == ["violated", "violated", "unknown", "unknown"]
    assert one["remedies"][0]["command"].startswith("ringfence adopt ")


def test_the_rings_are_those_of_the_contract() -> None:
    states = {pattern: tuple(one.state for one in verdicts(pattern)) for pattern in Pattern}
    assert states == {
        Pattern.STATIC_KEY: ("violated", "violated", "unknown", "unknown"),
        Pattern.USER_TOKEN: ("violated", "partly", "unknown", "unknown"),
        Pattern.SERVICE_ACCOUNT: ("violated", "violated", "compromised", "compromised"),
        Pattern.PASSWORD: ("violated", "violated", "unknown", "unknown"),
        Pattern.OTHER: ("violated", "unknown", "unknown", "unknown"),
    }


@pytest.mark.parametrize(("words", "status"), [
    ((), 0),
    (("--fail-on", "any"), 1),
    (("--fail-on", "3"), 1),
    (("--fail-on", "user-token"), 0),
    (("--fail-on", "user-token", "--fail-on", "password"), 1),
    (("--fail-on", "ring-3"), 2),
    (("--time-limit", "5"), 2),
])  # fmt: skip
def test_exit_statuses(home: Home, project: Path, words: tuple[str, ...], status: int) -> None:
    done = home.scan(str(project), *words)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("accepted", "status"), [
    ((), 1),
    (("big.env",), 1),
    (("big.env", "sub"), 0),
    (("./big.env", "sub/many.py"), 0),
    ((".",), 0),
    (("sub/..",), 0),
    (("..",), 1),
    (("su", "big.env"), 1),
])  # fmt: skip
def test_fail_on_fails_for_what_was_not_read_unless_its_path_is_accepted(
    home: Home, accepted: tuple[str, ...], status: int
) -> None:
    folder = home.folder / "unread"
    (folder / "sub").mkdir(parents=True)
    (folder / "big.env").write_text(f"API_KEY={Maker(12).token(40)}\n" + "x" * 4000)
    (folder / "sub/many.py").write_text("token = 1\n" * 21_000)
    os.truncate(folder / "big.env", 1024 * 1024)
    words = [word for one in accepted for word in ("--accept-unread", one)]
    done = home.scan(".", "--fail-on", "any", "--max-size", "512", *words, folder=folder)
    assert done.returncode == status, done.stderr
    assert ("--accept-unread PATH" in done.stderr) is (status == 1)
    assert home.scan(".", "--max-size", "512", folder=folder).returncode == 0


@pytest.mark.parametrize("path", ["", "environment", "~/.netrc", "/etc/passwd", "../sibling", ".."])
def test_accepted_working_directory_has_only_relative_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/.env").touch()
    (tmp_path / "sibling").touch()
    monkeypatch.chdir(tmp_path / "here")
    assert _is_accepted("./.env", ["."])
    assert not _is_accepted(path, ["."])


HANGING = (
    "import hashlib, sys, os\nfrom ringfence.scan.readers import TEXT_READER\n"
    "def hang(self, file):\n"
    " print(os.getpid(), file=sys.stderr, flush=True)\n"
    " hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)\n yield\n"
    "type(TEXT_READER).read = hang\nfrom ringfence.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"
)
"""A scan whose worker hangs in C, and says its process id before."""


def test_scan_that_ended_early_fails_also_with_accepted_paths(home: Home) -> None:
    (home.folder / "notes.txt").write_text("text\n")
    words = ("scan", "notes.txt", "--fail-on", "any", "--accept-unread", "notes.txt", "--time-limit", "1s")
    done = subprocess.run(
        [sys.executable, "-c", HANGING, *words], env=dict(home.environment), cwd=home.folder, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, "raise --time-limit" in done.stderr) == (1, True)


def test_ctrl_c_ends_a_scan_whose_worker_hangs(home: Home, project: Path) -> None:
    (project / "notes.txt").write_text("text\n")
    with subprocess.Popen(
        [sys.executable, "-c", HANGING, "scan", str(project)], env=dict(home.environment), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stderr is not None
        worker = int(child.stderr.readline())
        child.send_signal(signal.SIGINT)
        child.stderr.read()
        assert child.wait() == 130
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_baseline_that_is_no_regular_file_is_refused(home: Home, project: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        done = home.scan(str(project), "--baseline", str(path))
        assert (done.returncode, "is no regular file" in done.stderr) == (1, True)


def test_a_path_that_is_not_there_and_a_scanner_that_is_not_there_say_what_to_do(home: Home) -> None:
    done = home.scan("none")
    assert (done.returncode, "name a folder or a file" in done.stderr) == (1, True)
    done = home.scan(".", "--with", "kingfisherr")
    assert (done.returncode, "did you mean kingfisher?" in done.stderr) == (1, True)


def test_a_baseline_hides_what_it_names_and_says_what_has_gone(
    home: Home, project: Path, tmp_path: Path
) -> None:
    baseline = tmp_path / "baseline.json"
    assert home.scan(".", "--write-baseline", str(baseline), folder=project).returncode == 0
    text = baseline.read_text()
    assert set(json.loads(text)["findings"][0]) == {"reader", "path", "field", "pattern"}
    assert home.scan(".", "--baseline", str(baseline), "--fail-on", "any", folder=project).returncode == 0
    (project / "new.env").write_text(f"API_KEY={Maker(12).token(40)}\n")
    (project / "sub/.env").unlink()
    done = home.scan(".", "--baseline", str(baseline), "--fail-on", "any", "--json", folder=project)
    assert done.returncode == 1
    assert document(done)["summary"]["new"] == 1
    assert [one["path"] for one in document(done)["gone"]] == ["sub/.env"]


_ENTRY = '{"reader": "a", "path": "b", "field": "c", "pattern": "all"}'


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", '{"version": 2, "findings": []}', '{"version": 1, "findings": [{"path": "x"}]}',
        f'{{"version": 1, "findings": [{_ENTRY}]}}',
    ],
)  # fmt: skip
def test_a_baseline_that_is_not_understood_hides_nothing(
    home: Home, project: Path, tmp_path: Path, text: str
) -> None:
    baseline = tmp_path / "baseline.json"
    baseline.write_text(text)
    done = home.scan(str(project), "--baseline", str(baseline))
    assert (done.returncode, "is no baseline" in done.stderr) == (1, True)


def test_a_later_scan_says_what_has_gone(home: Home, project: Path) -> None:
    assert "gone" not in home.scan(str(project)).stdout
    (project / "sub/.env").unlink()
    assert "gone since" in home.scan(str(project)).stdout
    assert "gone since" not in home.scan(str(project)).stdout
    folder = home.folder / ".local/state/ringfence/scan"
    assert {stat.S_IMODE(one.stat().st_mode) for one in folder.iterdir()} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_fingerprints_are_of_this_machine_alone(home: Home, project: Path) -> None:
    def prints() -> set[str]:
        return {one["fingerprint"] for one in document(home.scan(str(project), "--json"))["findings"]}

    first = prints()
    assert first == prints()
    (home.folder / ".local/state/ringfence/scan/fingerprint.key").unlink()
    assert first.isdisjoint(prints())


def test_a_key_that_is_a_link_is_not_used(home: Home, project: Path) -> None:
    folder = home.folder / ".local/state/ringfence/scan"
    folder.mkdir(parents=True)
    (home.folder / "other").write_bytes(b"x" * 32)
    (home.folder / "other").chmod(0o644)
    (folder / "fingerprint.key").symlink_to(home.folder / "other")
    done = home.scan(str(project))
    assert "fingerprints are for this scan alone" in done.stderr
    assert stat.S_IMODE((home.folder / "other").stat().st_mode) == 0o644


def test_the_table_fits_80_columns_on_a_terminal(home: Home, project: Path) -> None:
    command = [sys.executable, "-c", _MAIN, "scan", str(project)]
    with Terminal(command, home.environment, width=80) as terminal:
        status, told = terminal.to_the_end()
    assert status == 0, told
    lines = ESCAPES.sub("", told).replace("\r", "").split("\n")
    # Folded by the terminal, as all sentences are.
    sentences = ("what ", "4 credentials", "    ", "  /")
    assert [line for line in lines if cell_len(line) > 80 and not line.startswith(sentences)] == []
    whole = "\n".join(lines)
    for word in (
        "GitHub, api.github.com: breaks inputs",
        "GitHub personal access token",
        "promotion",
        "unknown",
        "compromised",
    ):
        assert word in whole.replace("\n", " "), word


def test_details_have_the_way_out(home: Home, project: Path) -> None:
    told = home.scan(str(project), "--details").stdout
    for text in ("breaks ", "outputs", "ringfence adopt", "--field GITHUB_TOKEN",
                 "https://github.com/settings/tokens",
                 "ringfence target add", "ringfence task assign"):  # fmt: skip
        assert text in told


def test_remedies_are_commands_that_there_are(home: Home, tmp_path: Path) -> None:
    """Each gets so far that only the organisation is missing."""
    from ringfence.kernel.crypto.keys import SigningKey

    list(plant(tmp_path / "corpus", 1))
    report = document(home.scan(str(tmp_path / "corpus"), "--json"))
    commands = {
        step["command"] for one in report["findings"] for step in one["remedies"]
        if step.get("command", "").startswith("ringfence ")
    }  # fmt: skip
    adopting = {one for one in commands if one.startswith("ringfence adopt ")}
    assert adopting  # run whole in its own tests
    commands -= adopting
    by_shape: dict[tuple[str, ...], list[str]] = {}
    for command in sorted(commands):
        words = shlex.split(command)
        template = words[words.index("--template") + 1] if "--template" in words else ""
        options = (word for word in words if word.startswith("--"))
        by_shape.setdefault((words[1], template, *options), words[1:])
    assert {shape[1] for shape in by_shape} >= {"github-api", "http", "federation", "ssh", "postgres"}
    SigningKey.generate("spiffe://ringfence.local/user/sam").save(tmp_path / "sam.json")
    environment = {
        **home.environment, "RINGFENCE_IDENTITY": str(tmp_path / "sam.json"), "RINGFENCE_KAFKA": "127.0.0.1:1",
        "RINGFENCE_TRUST_ROOT": "9-4CSVnbJ0bIEZYyJjmZ0-3fQPWrAqSyOqVVF1jwN1g",
        **{f"RINGFENCE_{name}_URL": "http://127.0.0.1:1" for name in ("REGISTRY", "POLICY", "REVOKER", "AUDIT")},
    }  # fmt: skip
    for number, words in enumerate(by_shape.values()):
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        known = [word.replace("HOST", "host.test").replace("USER", "maria") for word in words]
        done = subprocess.run(
            [sys.executable, "-c", _MAIN, *known, "--json"],
            env=environment, cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        error = json.loads(done.stderr.strip().splitlines()[-1])
        assert error["code"] in ("unavailable", "registry_unreachable", "not_answered", "api_unreachable"), (
            words,
            error,
        )


def sarif_problems(log: object) -> list[str]:
    """What is wrong with a log by the schema of the standard, also the forms of its URIs."""
    schema = json.loads(SARIF_SCHEMA.read_text())
    assert schema["id"].startswith("https://docs.oasis-open.org/sarif/sarif/v2.1.0/")
    validator = jsonschema.Draft4Validator(schema, format_checker=jsonschema.FormatChecker())
    return [
        f"{'.'.join(map(str, error.path))}: {error.message[:200]}" for error in validator.iter_errors(log)
    ]


def test_sarif_is_valid(home: Home, project: Path, tmp_path: Path) -> None:
    file = tmp_path / "scan.sarif"
    assert home.scan(".", "--sarif", str(file), folder=project).returncode == 0
    log = json.loads(file.read_text())
    assert sarif_problems(log) == []
    (run,) = log["runs"]
    rules = {rule["id"] for rule in run["tool"]["driver"]["rules"]}
    assert {result["ruleId"] for result in run["results"]} <= rules
    places = {
        (one["physicalLocation"]["artifactLocation"]["uri"], one["physicalLocation"]["region"]["startLine"])
        for result in run["results"] for one in result["locations"]
    }  # fmt: skip
    assert (".env", 1) in places


def test_sarif_and_ocsf_of_every_kind_of_finding_are_valid(home: Home, tmp_path: Path) -> None:
    """The whole corpus, a baseline, a place of the machine, notes, names of files that are hostile."""
    corpus = tmp_path / "corpus"
    list(plant(corpus, 1))
    odd = corpus / "a b%20#?ä\n\u202e<script>"
    odd.mkdir()
    (odd / ".env").write_text(f"API_KEY={Maker(13).token(40)}\n")
    os.mkfifo(odd / "fifo.env")
    (home.folder / ".netrc").write_text(f"machine a.test login m password {Maker(1).token(20)}\n")
    sarif, ocsf, baseline = tmp_path / "o.sarif", tmp_path / "o.ocsf", tmp_path / "b.json"
    assert home.scan(str(corpus), "--write-baseline", str(baseline)).returncode == 0
    for words in ([str(corpus), "--baseline", str(baseline)], []):
        done = home.scan(*words, "--sarif", str(sarif), "--ocsf", str(ocsf), folder=corpus)
        assert done.returncode == 0, done.stderr
        log = json.loads(sarif.read_text())
        assert sarif_problems(log) == []
        events = [json.loads(line) for line in ocsf.read_text().splitlines()]
        assert [found for event in events if (found := problems(event))] == []
        assert len(events) == len(log["runs"][0]["results"]) > 200
    log = json.loads(sarif.read_text())
    assert {"HOME"} == {
        one["physicalLocation"]["artifactLocation"]["uriBaseId"]
        for result in log["runs"][0]["results"] for one in result["locations"]
        if one["physicalLocation"]["artifactLocation"]["uri"] == ".netrc"
    }  # fmt: skip


def test_names_of_files_that_are_no_utf8_are_in_every_form(home: Home, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "odd")
    Path(os.fsdecode(folder + b"/\xff\xfe")).mkdir(parents=True)
    token = Maker(13).token(40)
    for name in (b"/\xff\xfe/.env", b"/\xe9.env"):
        Path(os.fsdecode(folder + name)).write_text(f"API_KEY={token}\n")
    # A name in a document that is half of a character.
    (tmp_path / "odd/.claude.json").write_text(
        f'{{"mcpServers": {{"a\\ud800": {{"env": {{"API_KEY": "{token}"}}}}}}}}'
    )
    sarif, baseline = tmp_path / "o.sarif", tmp_path / "b.json"
    for words in (
        ("--sarif", str(sarif), "--write-baseline", str(baseline)), ("--html", str(tmp_path / "o.html")),
        ("--ocsf", str(tmp_path / "o.ocsf")), ("--json",), ("--details",),
        ("--baseline", str(baseline), "--fail-on", "any"),
    ):  # fmt: skip
        done = home.scan(".", *words, folder=tmp_path / "odd")
        assert done.returncode == 0, (words, done.stderr)
    log = json.loads(sarif.read_text())
    assert sarif_problems(log) == []
    uris = {
        result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for result in log["runs"][0]["results"]
    }  # fmt: skip
    assert uris == {"%FF%FE/.env", "%E9.env", ".claude.json"}
    (tmp_path / "odd/.claude.json").unlink()
    assert "gone since" in home.scan(".", folder=tmp_path / "odd").stdout


def test_the_schemas_can_refuse(home: Home, project: Path, tmp_path: Path) -> None:
    file = tmp_path / "scan.sarif"
    home.scan(".", "--sarif", str(file), "--ocsf", str(tmp_path / "o"), folder=project)
    log = json.loads(file.read_text())
    log["runs"][0]["results"][0]["locations"][0]["physicalLocation"]["region"]["startLine"] = 0
    log["runs"][0]["results"][1]["unknown"] = 1
    assert len(sarif_problems(log)) == 2
    event = json.loads((tmp_path / "o").read_text().splitlines()[0])
    assert problems({**event, "severity_id": 17})


def test_ocsf_is_valid(home: Home, project: Path, tmp_path: Path) -> None:
    file = tmp_path / "scan.ocsf"
    assert home.scan(str(project), "--ocsf", str(file)).returncode == 0
    events = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(events) == 4
    assert [found for event in events if (found := problems(event))] == []


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action")]


def test_html_needs_nothing_from_elsewhere_and_runs_nothing(
    home: Home, project: Path, tmp_path: Path
) -> None:
    (project / "<script>alert(1)<").mkdir()
    (project / "<script>alert(1)<" / ".env").write_text(f"API_KEY={Maker(13).token(40)}\n")
    file = tmp_path / "scan.html"
    assert home.scan(str(project), "--html", str(file)).returncode == 0
    page = _Page()
    page.feed(file.read_text())
    assert "script" not in page.tags
    assert page.links == []
    text = file.read_text()
    assert "default-src 'none'" in text
    assert '<td class="compromised">compromised</td>' in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


# --- no piece of a secret anywhere ------------------------------------------------------------------------------------


def pieces(value: str) -> Iterator[str]:
    """Six consecutive characters, but for those that are the same in all credentials of the kind."""
    start = public_prefix_length(value)
    if value.startswith("eyJ"):
        start = value.index(".")  # the header of a JWT is the same in all of an issuer's
    body = value[start:]
    for at in range(len(body) - PIECE + 1):
        piece = body[at : at + PIECE]
        if not any(piece in marker for marker in MARKERS):
            yield piece


def test_no_piece_of_any_secret_is_in_any_output(home: Home, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    planted = list(plant(corpus, 2))
    make = Maker(99)
    # A secret in the name of a field, of a file and of a folder, in a subject, and one in an unreadable document.
    odd = make.crc_token("ghp")
    (corpus / odd).mkdir()
    (corpus / odd / ".env").write_text(f"TOKEN={odd}\n")
    (corpus / ".claude.json").write_text(
        json.dumps({"mcpServers": {odd: {"env": {odd: odd}, "args": ["--token", odd]}}})
    )
    (corpus / "broken").mkdir()
    (corpus / "broken/.claude.json").write_text('{"a": "' + odd)
    files = [tmp_path / name for name in ("o.sarif", "o.ocsf", "o.html", "o.baseline")]
    options = [
        "--sarif", str(files[0]), "--ocsf", str(files[1]), "--html", str(files[2]), "--write-baseline", str(files[3])
    ]  # fmt: skip
    told = ""
    for words in (options, ["--json"], ["--details"], ["--wide"], ["--max-size", "1"], ["--with", "none"]):
        done = home.scan(str(corpus), *words)
        told += done.stdout + done.stderr
    told += "".join(file.read_text() for file in files)
    told += "".join(one.read_text() for one in home.folder.rglob("last-*.json"))
    secrets = {secret.value for _, case in planted for secret in case.secrets} | {odd}
    assert len(told) > 100_000
    said = {told[at : at + PIECE] for at in range(len(told) - PIECE + 1)}
    leaked = said.intersection(piece for value in secrets for piece in pieces(value))
    # Random pieces coincide with fingerprints and base text now and then: a piece must be more than chance.
    assert not {
        piece for piece in leaked if not piece.isdigit() and not set(piece) <= set("0123456789abcdef-")
    }


WORDS_OF_CORPUS: tuple[Callable[[Maker], str], ...] = (
    *(partial(Maker.chars, alphabet=alphabet, length=length)
      for alphabet, length in ((ALNUM, 20), (HEX, 32), (HEX, 40), (URL_SAFE, 43), (BASE36, 32), (UPPER36, 24))),
    *(build for _, _, build in FORMAT_CASES[::6]),
)  # fmt: skip
"""Makers of generated values: of each alphabet, and of some formats."""


def positions(word: str, secret: str) -> Iterator[tuple[str, str]]:
    """Yield path and text of files that have a word where an account, a host, a name or a claim is."""
    for name in ("sub", "iss", "email", "role", "scope", "scp", "preferred_username"):
        yield f"jwt-{name}/.env", f"A_TOKEN={Maker(32).jwt(**{name: word})}\n"
    basic = base64.b64encode(f"{word}:{secret}".encode()).decode()
    if "/" not in word:
        yield (
            "url/.git-credentials",
            f"https://{word}:{secret}@github.com\nhttps://{word}:x-oauth-basic@github.com\n",
        )
        yield (
            "url/a.py",
            f'DB = "postgres://{word}:{secret}@db.test/a"\nURL = "https://u:{secret}@{word}.test"\n',
        )
        yield "url/.env", f"A=https://{word}:{secret}@a.test\nB=https://u:{secret}@{word}/\n"
    yield "curl/.bashrc", f"curl -u {word}:{secret} https://a.test\n"
    yield "curl/crontab", f"* * * * * root curl -u {word}:api_token https://a.test\n"
    yield "login/.netrc", f"machine {word} login {word} password {secret}\n"
    yield "pg/.pgpass", f"{word}:5432:{word}:{word}:{secret}\n"
    yield "my/.my.cnf", f"[client]\nuser={word}\nhost={word}\npassword={secret}\n"
    yield "npm/.npmrc", f"//{word}/:_authToken={secret}\n//a.test/:_auth={basic}\n"
    yield "pip/.pypirc", f"[{word}]\nrepository=https://{word}/\nusername={word}\npassword={secret}\n"
    auths = {word: {"auth": basic}, f"{word}.test": {"username": word, "password": secret}}
    yield ".docker/config.json", json.dumps({"auths": auths})
    yield (
        ".m2/settings.xml",
        (
            f"<settings><server><id>{word}</id><username>{word}</username><password>{secret}</password></server></settings>"
        ),
    )
    server = {
        "command": word, "url": f"https://{word}.test/{word}", "env": {word: word, "API_TOKEN": secret},
        "headers": {"Authorization": f"Basic {basic}"}, "args": [word, "--token", secret, f"--{word}", word],
    }  # fmt: skip
    yield ".mcp.json", json.dumps({"mcpServers": {word: server}})
    user = {"name": word, "user": {"token": secret, "username": word}}
    cluster = {"name": word, "cluster": {"server": f"https://{word}.test"}}
    context = {"name": word, "context": {"cluster": word, "user": word}}
    yield ".kube/config", json.dumps({"clusters": [cluster], "users": [user], "contexts": [context]})
    yield (
        "aws/.aws/credentials",
        (
            f"[{word}]\naws_access_key_id = {Maker(33).aws_id()}\naws_secret_access_key = {Maker(33).aws_secret()}\n"
            f"role_arn = {word}\n"
        ),
    )
    yield (
        "gh/hosts.yml",
        json.dumps({word: {"user": word, "oauth_token": secret, "users": {word: {"oauth_token": secret}}}}),
    )
    yield (
        "compose.yml",
        json.dumps({"services": {word: {"environment": {"API_TOKEN": secret}, "command": [word]}}}),
    )
    metadata = {"name": word, "namespace": word}
    yield (
        "a.yaml",
        json.dumps(
            {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {word: secret}}
        ),
    )
    yield ".git/config", f'[http "https://{word}.test"]\nextraheader = Authorization: Basic {basic}\n'
    yield (
        ".cargo/credentials.toml",
        f'[registries."{word}"]\ntoken = "{secret}"\nindex = "https://{word}.test"\n',
    )
    yield ".azure/x.json", json.dumps([{"client_id": word, "tenant": word, "client_secret": secret}])


def test_generated_word_of_the_corpus_in_any_position_is_in_no_output(tmp_path: Path, capsys) -> None:
    words = []
    for number, build in enumerate(WORDS_OF_CORPUS):
        # A word has one position alone: where a reader recognises one as a secret, it is masked everywhere.
        for position in range(len(list(positions("", "")))):
            make = Maker(1000 * number + position)
            words.append(build(make))
            found = list(positions(words[-1], make.token(40)))
            path, text = found[position % len(found)]
            file = tmp_path / f"n{number}-{position}" / path
            file.parent.mkdir(parents=True)
            file.write_text(text)
    with scanning(ScanOptions(paths=[tmp_path]), Fingerprinter(b"k" * 32)) as scanner:
        report = scanner.run()
    assert not [note for note in report.notes if note.limits]
    _print(report, wide=True, details=True)
    _print(report, wide=True, details=False)
    told = capsys.readouterr().out + html_document(report, "1") + baseline_text(report.findings)
    told += json.dumps([report_document(report), sarif_document(report, "1"), list(ocsf_events(report, "1"))])
    assert len(told) > 500_000
    assert len(words) > 400
    shown = {told[at : at + 12] for at in range(len(told) - 11)}
    prefixes = {
        word: max(public_prefix_length(word), word.find(".") if word.startswith("eyJ") else 0)
        for word in words
    }
    assert not {
        (word, piece) for word in words for at in range(prefixes[word], len(word) - 11)
        if (piece := word[at : at + 12]) in shown
    }  # fmt: skip


def test_an_unexpected_error_shows_neither_message_nor_traceback(home: Home, project: Path) -> None:
    code = (
        "import sys\nfrom ringfence.scan import scanner\n"
        "def fail(*_): raise RuntimeError('ghp_secretsecret')\n"
        "scanner._finish = fail\nfrom ringfence.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "scan", str(project)], env=dict(home.environment), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "unexpected error (RuntimeError)" in done.stderr
    assert "ghp_" not in done.stderr
    assert "Traceback" not in done.stderr


def test_the_process_is_not_dumpable_and_writes_no_core(home: Home, project: Path) -> None:
    code = (
        "import ctypes, resource, sys\nfrom ringfence.scan import scanner\nwas = scanner._finish\n"
        "def look(*args):\n was(*args)\n sys.stderr.write(f'{ctypes.CDLL(None).prctl(3)} '\n"
        "  f'{resource.getrlimit(resource.RLIMIT_CORE)[0]}')\n"
        "scanner._finish = look\nfrom ringfence.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "scan", str(project)], env=dict(home.environment), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stderr.startswith(
        ("0 0", "0 1")
    )  # a limit of 1 byte also keeps the kernel from piping a core


def test_a_scan_opens_no_connection_and_starts_no_program(home: Home, project: Path) -> None:
    code = (
        "import sys\nseen = []\n"
        "sys.addaudithook(lambda name, args: seen.append(name) if name in "
        "('socket.connect', 'socket.getaddrinfo', 'subprocess.Popen', 'os.exec', 'os.posix_spawn', 'os.system') "
        "else None)\n"
        "from ringfence.cli.main import main\nstatus = main(sys.argv[1:])\nsys.stderr.write(repr(seen))\n"
    )
    for words in ((str(project),), ()):
        done = subprocess.run(
            [sys.executable, "-c", code, "scan", *words], env=dict(home.environment), cwd=project, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.stderr.endswith("[]"), done.stderr


def test_other_scanners_are_included_without_their_values(home: Home, project: Path, tmp_path: Path) -> None:
    """A stand-in that prints what kingfisher prints, with the value in it."""
    secret = Maker(14).token(40)
    program = tmp_path / "bin/kingfisher"
    program.parent.mkdir()
    (project / "odd.bin.txt").write_text("x\n")
    answer = {"findings": [{"rule": {"name": "odd-key"}, "finding": {
        "snippet": secret, "path": "./odd.bin.txt", "line": 1,
        "validate_command": f"kingfisher validate {secret}"}}]}  # fmt: skip
    program.write_text(
        f'#!/bin/sh\necho "$@" >{tmp_path}/words\ncat <<\'E\'\n{json.dumps(answer)}\n{{"findings":1}}\nE\n'
    )
    program.chmod(0o755)
    other = Home(home.folder, {**home.environment, "PATH": f"{program.parent}:{home.environment['PATH']}"})
    done = other.scan(".", "--with", "kingfisher", "--json", folder=project)
    (one,) = [one for one in document(done)["findings"] if one["reader"] == "kingfisher"]
    assert (one["path"], one["line"], one["pattern"], one["field"]) == ("odd.bin.txt", 1, "other", "odd-key")
    assert secret not in done.stdout + done.stderr
    words = (tmp_path / "words").read_text()
    assert "--no-validate" in words
    assert "--no-update-check" in words


EXPECTED_HOME = Path(__file__).parents[1] / "support" / "scan_home.json"


def test_the_home_folder_of_a_developer_has_the_report_that_is_expected(home: Home, tmp_path: Path) -> None:
    """Every case in its place, scanned without a path. `scan_home.json` is the baseline of what must be found there."""
    for one in cases(5):
        if not one.secrets and not one.unread:
            continue
        file = home.folder / one.path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(one.content)
    written = tmp_path / "baseline.json"
    done = home.scan("--write-baseline", str(written))
    assert done.returncode == 0, done.stderr
    # What the machine has besides depends on where the test runs.
    entries = [one for one in json.loads(written.read_text())["findings"] if one["path"].startswith("~/")]
    assert entries == json.loads(EXPECTED_HOME.read_text())["findings"]


def test_findings_are_grouped_by_target_the_most_dangerous_first(home: Home, project: Path) -> None:
    lines = [line for line in home.scan(str(project)).stdout.splitlines() if ": breaks " in line]
    assert [line.partition(",")[0] for line in lines] == [
        "Google Cloud",
        "GitHub",
        "unknown service: breaks inputs",
    ]


def test_interpreters_and_package_caches_of_a_home_are_skipped(home: Home, project: Path) -> None:
    token = (project / ".env").read_text()
    for folder in (
        ".pyenv/versions/3.11.7/lib", "go/pkg/mod/example.com", ".cache/pip/http", ".cache/huggingface/hub",
        ".m2/repository/a", ".local/share/uv/python/x", "usr/lib/python3.11/test", ".cargo/registry/src",
    ):  # fmt: skip
        (project / folder).mkdir(parents=True)
        (project / folder / "settings.env").write_text(token)
    (project / ".cache/huggingface/token.env").write_text(token)
    found = {one["path"] for one in document(home.scan(str(project), "--json"))["findings"]}
    assert str(project / ".cache/huggingface/token.env") in found
    assert not [path for path in found if path.endswith("settings.env")]
    named = document(home.scan(str(project / "go/pkg/mod"), "--json"))
    assert named["summary"]["findings"] > 0
