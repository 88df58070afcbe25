"""`ringfence scan --with` and the real scanners: no value and no path reaches anybody, and nothing is asked online."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.scan_corpus import Maker

pytestmark = [pytest.mark.tools, pytest.mark.timeout(600)]

_MAIN = "import sys; from ringfence.cli.main import main; sys.exit(main(sys.argv[1:]))"
_ROOT = Path(__file__).parents[2]
NAMES = ("detect-secrets", "kingfisher", "gitleaks")
VALIDATION_IS_OFF = {"detect-secrets": "--no-verify", "kingfisher": "--no-validate", "gitleaks": "dir"}
"""gitleaks knows no validation: of its commands, `dir` reads files alone."""


@pytest.fixture(scope="session")
def programs() -> dict[str, Path]:
    """The real ones."""
    done = subprocess.run([_ROOT / ".ci/scanners"], capture_output=True, text=True, check=True)
    folder = Path(done.stdout.strip())
    return {name: folder / name for name in NAMES if (folder / name).exists()}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest, programs: dict[str, Path]) -> str:
    if request.param not in programs:
        pytest.skip(f"{request.param} needs Go to be built")
    return str(request.param)


@pytest.fixture
def noted(tmp_path: Path, programs: dict[str, Path]) -> Path:
    """A folder of programs, each of which notes its arguments and environment and then is the real one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for one, real in programs.items():
        script = folder / one
        script.write_text(
            f"#!/bin/sh\nprintf '%s\\n' \"$@\" >{folder}/{one}.words\nenv >{folder}/{one}.env\n"
            f'ulimit -c >{folder}/{one}.core\nexec {shlex.quote(str(real))} "$@"\n'
        )
        script.chmod(0o755)
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> tuple[Path, list[str]]:
    """A folder whose name repeats a secret, with secrets that our readers find and one that only others know."""
    make = Maker(31)
    token, other = make.crc_token("ghp"), f"{make.chars('0123456789abcdef', 32)}-us12"
    slack = f"xoxb-{make.digits(12)}-{make.digits(13)}-{make.token(24)}"
    folder = tmp_path / f"tree-{token}"
    (folder / ".git").mkdir(parents=True)
    (folder / "app.py").write_text(f'token = "{token}"\nslack = "{slack}"\nmailchimp_key = "{other}"\n')
    # What would keep others from looking, or have them run something.
    (folder / ".gitleaks.toml").write_text("[allowlist]\npaths = ['''.*''']\n")
    run = f"touch {tmp_path}/ran"
    (folder / ".git/config").write_text(
        f"[core]\n\tfsmonitor = {run}\n\tpager = {run}\n\tsshCommand = {run}\n"
    )
    (folder / ".git/HEAD").write_text("ref: refs/heads/main\n")
    for name in ("objects", "refs"):
        (folder / ".git" / name).mkdir()
    return folder, [token, slack, other]


def scan(
    tmp_path: Path, path: Path, *words: str, before: tuple[str, ...] = (), after: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a scan with a home folder and a PATH of its own; `after`: a line of shell that follows in the same place."""
    (tmp_path / "home").mkdir(exist_ok=True)
    environment = {
        "PATH": f"{path}:{os.environ['PATH']}", "HOME": str(tmp_path / "home"), "RINGFENCE_CONFIG": os.devnull,
        "GITHUB_TOKEN": "not-for-children",
    }  # fmt: skip
    command = shlex.join([sys.executable, "-c", _MAIN, "scan", *words])
    return subprocess.run(
        [*before, "sh", "-c", f"{command}; status=$?; {after} exit $status"], env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


def test_findings_of_the_real_scanner_are_included_without_values(
    name: str, noted: Path, tree: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, secrets = tree
    done = scan(tmp_path, noted, str(folder), "--with", name, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [note for note in report["notes"] if note["path"] == name] == []
    theirs = [one for one in report["findings"] if one["reader"] == name]
    assert [(Path(one["path"]).name, one["line"], one["pattern"]) for one in theirs] == [
        ("app.py", 3, "other")
    ]
    words = (noted / f"{name}.words").read_text()
    assert VALIDATION_IS_OFF[name] in words.splitlines()
    for secret in secrets:
        body = secret.removeprefix("ghp_").removeprefix("xoxb-")
        pieces = [body[at : at + 6] for at in range(len(body) - 5)]
        for text in (done.stdout, done.stderr, words):
            assert [piece for piece in pieces if piece in text] == []
    assert "not-for-children" not in (noted / f"{name}.env").read_text()
    assert (noted / f"{name}.core").read_text().strip() == "0"  # blocks of 1,024 bytes
    assert not (tmp_path / "ran").exists()
    assert list((tmp_path / "home").rglob("*kingfisher*")) == []
    assert {one.name for one in folder.iterdir()} == {"app.py", ".git", ".gitleaks.toml"}


def test_one_file_is_read_as_well(
    name: str, noted: Path, tree: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, _ = tree
    done = scan(tmp_path, noted, str(folder / "app.py"), "--with", name, "--json")
    report = json.loads(done.stdout)
    assert [one["line"] for one in report["findings"] if one["reader"] == name] == [3], report["notes"]


_COUNTERS = "cat /proc/net/snmp /proc/net/snmp6 >&2;"


def attempts(text: str) -> int:
    """How many packets, connections and lookups without a route a network namespace has seen since it was made."""
    heads: dict[str, list[str]] = {}
    total = 0
    for line in text.splitlines():
        table, _, rest = line.partition(":")
        if table in ("Ip", "Tcp", "Udp"):
            if table not in heads:
                heads[table] = rest.split()
                continue
            values = dict(zip(heads[table], map(int, rest.split()), strict=True))
            wanted = ("OutRequests", "OutNoRoutes", "ActiveOpens", "OutDatagrams")
            total += sum(values.get(one, 0) for one in wanted)
        elif match := re.match(r"Ip6Out(?:Requests|NoRoutes)\s+(\d+)", line):
            total += int(match[1])
    assert set(heads) == {"Ip", "Tcp", "Udp"}
    return total


@pytest.fixture
def alone() -> tuple[str, ...]:
    """What starts a command in a network of its own, which leads nowhere and counts what is tried."""
    command = ("unshare", "--user", "--map-root-user", "--net")
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], check=False).returncode:
        pytest.skip("no network namespaces here")
    return command


def test_no_connection_is_even_tried(
    alone: tuple[str, ...],
    programs: dict[str, Path],
    noted: Path,
    tree: tuple[Path, list[str]],
    tmp_path: Path,
) -> None:
    folder, _ = tree
    words = [word for one in programs for word in ("--with", one)]
    done = scan(tmp_path, noted, str(folder), *words, "--json", before=alone, after=_COUNTERS)
    assert done.returncode == 0
    readers = {one["reader"] for one in json.loads(done.stdout)["findings"]}
    assert readers >= {"text", "detect-secrets"}
    assert attempts(done.stderr) == 0


@pytest.mark.parametrize("words", [
    ("kingfisher", "scan", "--git-history", "none", "--no-update-check", "."),
    ("detect-secrets", "scan", "--all-files", "."),
])  # fmt: skip
def test_the_counters_see_what_the_scanners_would_ask(
    alone: tuple[str, ...], programs: dict[str, Path], tree: tuple[Path, list[str]], words: tuple[str, ...]
) -> None:
    command = shlex.join([str(programs[words[0]]), *words[1:]])
    done = subprocess.run(
        [*alone, "sh", "-c", f"{command} >/dev/null 2>&1; {_COUNTERS}"], cwd=tree[0], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert attempts(done.stderr) > 0
