"""`ringfence scan` over hostile trees: whatever is there ends in a note, nothing outside is read, and the scan ends."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringfence.scan.documents import (
    DocumentError,
    DocumentLimitError,
    parse_json,
    parse_toml,
    parse_yaml,
    walk,
    xml_texts,
)
from ringfence.scan.file_scan import FileScanner, Job, JobResults
from ringfence.scan.findings import Fingerprinter, Note, Report
from ringfence.scan.output_guard import OutputGuard
from ringfence.scan.readers import FILE_READERS, TEXT_READER
from ringfence.scan.readers.clouds import _rows
from ringfence.scan.scanner import ScanError, ScanOptions, scanning
from ringfence.scan.source_files import FileFacts, Root, SourceFile, UnreadableError
from ringfence.scan.tree_walk import walk_tree
from tests.support.scan_corpus import Maker

TOKEN = Maker(7).crc_token("ghp")
FACTS = FileFacts(0o600, 0, 1)


def scan(*paths: Path, **more: object) -> Report:
    options = ScanOptions(paths=paths, **more)  # type: ignore[arg-type]
    with scanning(options, Fingerprinter(b"k" * 32)) as scanner:
        return scanner.run()


def reasons(report: Report) -> dict[str, str]:
    return {note.path.rpartition("/")[2]: note.reason for note in report.notes}


def test_irregular_file_is_a_note(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".env")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket.env"))
    (tmp_path / "huge.env").touch()
    os.truncate(tmp_path / "huge.env", 10 * 1024**3)
    found = reasons(scan(tmp_path))
    listener.close()
    assert "FIFO" in found[".env"]
    assert "socket" in found["socket.env"]
    assert "larger" in found["huge.env"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
def test_a_device_is_a_note(tmp_path: Path) -> None:
    try:
        os.mknod(tmp_path / "zero.env", 0o20666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("no devices in this container")
    assert "device" in reasons(scan(tmp_path)).get("zero.env", "device")  # a mount without devices denies it


def test_links_out_of_the_tree_are_not_followed_and_links_within_are(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "tree"
    outside.mkdir()
    inside.mkdir()
    (outside / "secret").write_text(f"TOKEN={TOKEN}\n")
    (inside / ".env").symlink_to(outside / "secret")
    (inside / "folder").symlink_to(outside)
    (inside / "loop").symlink_to(inside)
    (inside / "dotfiles").mkdir()
    (inside / "dotfiles/npmrc").write_text("x\n")
    (inside / ".netrc").symlink_to("dotfiles/netrc")
    (inside / "dotfiles/netrc").write_text(f"machine a.test login m password {Maker(1).token(20)}\n")
    report = scan(inside)
    assert "symbolic link out of" in reasons(report)[".env"]
    assert {one.place.path.rpartition("/")[2] for one in report.findings} == {".netrc"}


def test_a_folder_that_becomes_a_link_meanwhile_is_not_entered(tmp_path: Path) -> None:
    (tmp_path / "tree/a").mkdir(parents=True)
    (tmp_path / "tree/a/.env").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/.env").write_text(f"TOKEN={TOKEN}\n")
    with Root(tmp_path / "tree") as root:
        (tmp_path / "tree/a/.env").unlink()
        (tmp_path / "tree/a").rmdir()
        (tmp_path / "tree/a").symlink_to(tmp_path / "other")
        with pytest.raises(UnreadableError):
            root.read("a/.env")
        for path in ("../other/.env", "a/../../other/.env", "./.env", "/etc/passwd"):
            with pytest.raises(UnreadableError):
                root.read(path)


def test_a_file_that_goes_and_one_that_grows_are_notes(tmp_path: Path) -> None:
    (tmp_path / "a.env").write_text("A=1\n" * 1000)
    with Root(tmp_path) as root:
        with pytest.raises(UnreadableError, match="larger than 1 KiB"):
            root.read("a.env", max_bytes=1024)
        (tmp_path / "a.env").unlink()
        with pytest.raises(UnreadableError, match="gone"):
            root.read("a.env")


def test_depth_is_limited(tmp_path: Path) -> None:
    deep = tmp_path
    for _ in range(70):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / ".env").write_text(f"TOKEN={TOKEN}\n")
    report = scan(tmp_path)
    assert not report.findings
    assert any("folders deep" in note.reason for note in report.notes)


def test_time_is_limited_and_the_report_says_so(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"TOKEN={TOKEN}\n")
    report = scan(tmp_path, time_limit_s=0.0)
    assert not report.complete
    assert any("--time-limit" in note.reason for note in report.notes)


def test_a_path_that_is_not_there_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ScanError, match="name a folder or a file"):
        scan(tmp_path / "none")


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)
)
LAUGHS = (
    '<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]><settings>&b;</settings>'
)
OUTSIDE = '<!DOCTYPE r [<!ENTITY x SYSTEM "file:///etc/passwd">]><r>&x;</r>'


def test_bombs_are_refused_or_cost_nothing() -> None:
    with pytest.raises(DocumentError, match="aliases counted"):
        for _ in walk(parse_yaml(BOMB)[0]):
            pass
    with pytest.raises(DocumentError):
        parse_yaml("[" * 100_000)
    with pytest.raises(DocumentError):
        list(walk(parse_yaml("a: &a [*a]")))  # an anchor within itself
    for text in (LAUGHS, OUTSIDE, "<a>" * 10_000, "<a"):
        with pytest.raises(DocumentError):
            list(xml_texts(text))
    for text in ("[" * 100_000, '{"a":' * 100_000, "{", "", '{"a": 1e', "nul"):
        with pytest.raises(DocumentError):
            parse_json(text)
    with pytest.raises(DocumentError):
        parse_toml("a = " + "[" * 100_000)
    assert parse_json('{"n": ' + "9" * 100_000 + "}")["n"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "x-unknown"])
def test_xml_is_read_whatever_encoding_it_declares(encoding: str) -> None:
    assert list(xml_texts(f'<?xml version="1.0" encoding="{encoding}"?><a>\u00fc</a>')) == [
        (("a",), "\u00fc")
    ]


def test_yaml_runs_no_tag(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    parse_yaml(f"a: !!python/object/apply:os.system ['touch {marker}']\n")
    assert not marker.exists()


def test_hostile_documents_in_known_places_are_notes_and_are_still_read_as_text(tmp_path: Path) -> None:
    (tmp_path / ".kube").mkdir()
    (tmp_path / ".kube/config").write_text(f"clusters: users: contexts: [ {TOKEN}\n")
    (tmp_path / ".claude.json").write_text("[" * 1000 + TOKEN)
    (tmp_path / ".m2").mkdir()
    (tmp_path / ".m2/settings.xml").write_text(LAUGHS + TOKEN)
    report = scan(tmp_path)
    assert len(report.findings) == 3
    assert all("it was read as plain text" in note.reason for note in report.notes)
    assert len(report.notes) == 3


def test_an_unexpected_error_of_a_reader_is_a_note_without_its_message(tmp_path: Path, monkeypatch) -> None:
    def fail(file: SourceFile) -> None:
        raise RuntimeError(TOKEN)

    monkeypatch.setattr(type(TEXT_READER), "read", lambda self, file: fail(file))
    (tmp_path / "a.txt").write_text("x")
    assert scan(tmp_path).notes == [Note(f"{tmp_path}/a.txt", "could not be read (RuntimeError)")]


def hang_in_c(self: object, file: SourceFile) -> Iterator[None]:
    """Hang in one long call into C, which no signal handler of Python ends, for a file that asks for it."""
    if b"hang" in file.data:
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
    yield from ()


def test_worker_that_hangs_in_c_is_killed_and_other_files_are_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ringfence.scan.scanner.FILE_TIME_LIMIT_S", 0.3)
    monkeypatch.setattr(type(TEXT_READER), "read", hang_in_c)
    for name in ("a", "c"):
        (tmp_path / f"{name}.txt").write_text("hang")
    for name in ("b", "d"):
        (tmp_path / f"{name}.env").write_text(f"TOKEN={Maker(ord(name)).crc_token('ghp')}\n")
    for number in range(700):
        (tmp_path / f"f{number}.txt").write_text("nothing\n")
    for workers in (1, 2):
        report = scan(tmp_path, workers=workers)
        took_long = {
            note.path for note in report.notes if note.reason.startswith("took more than") and note.limits
        }
        assert took_long == {f"{tmp_path}/a.txt", f"{tmp_path}/c.txt"}
        assert len(report.findings) == 2
        assert report.files == 702


def test_scan_over_its_time_kills_workers_that_hang(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(type(TEXT_READER), "read", hang_in_c)
    for number in range(6):
        (tmp_path / f"f{number}.txt").write_text("hang")
    before = set(psutil.Process().children())
    report = scan(tmp_path, time_limit_s=0.5)
    assert not report.complete
    assert any("--time-limit" in note.reason for note in report.notes)
    assert set(psutil.Process().children()) <= before, "no worker is left"


def test_worker_that_dies_is_replaced_and_its_file_is_a_note(tmp_path: Path, monkeypatch) -> None:
    def die(self: object, file: SourceFile) -> Iterator[None]:
        if b"die" in file.data:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from ()

    monkeypatch.setattr(type(TEXT_READER), "read", die)
    (tmp_path / "a.txt").write_text("die")
    (tmp_path / "b.env").write_text(f"TOKEN={TOKEN}\n")
    report = scan(tmp_path)
    assert [(note.path, note.limits) for note in report.notes] == [(f"{tmp_path}/a.txt", True)]
    assert len(report.findings) == 1


def gcloud_database(path: Path, *statements: str) -> None:
    path.parent.mkdir(parents=True)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


_ENDLESS = "instr(zeroblob(60000000), zeroblob(30000000)||x'01')"
_CREDENTIAL = """'{"refresh_token": "1//0abcdefghijklmnopqrstuv"}'"""


@pytest.mark.parametrize("schema", [
    (f"CREATE VIEW credentials AS SELECT 'a' AS account_id, {_ENDLESS} AS value",),
    (f"CREATE VIEW credentials AS SELECT 'a' AS account_id, {_CREDENTIAL} AS value",),
    ("CREATE TABLE credentials (account_id TEXT, value BLOB AS (zeroblob(10)))",
     "INSERT INTO credentials (account_id) VALUES ('a')"),
    ("CREATE TABLE credentials (account_id TEXT, value BLOB AS (account_id || account_id) STORED)",
     "INSERT INTO credentials (account_id) VALUES ('a')"),
    ("CREATE VIRTUAL TABLE credentials USING fts5 (account_id, value)",),
    ("CREATE TABLE credentials (account_id TEXT, value BLOB)",
     "INSERT INTO credentials VALUES ('a', zeroblob(3000000))"),
    (f"CREATE VIEW credentials AS SELECT 'a' AS account_id, {_CREDENTIAL} AS value", "PRAGMA writable_schema = ON",
     "UPDATE sqlite_master SET type = 'table'"),
])  # fmt: skip
def test_gcloud_database_whose_sql_would_run_is_refused(tmp_path: Path, schema: tuple[str, ...]) -> None:
    gcloud_database(tmp_path / "gcloud/credentials.db", *schema)
    report = scan(tmp_path)
    assert not report.findings
    assert [(note.path, note.limits) for note in report.notes] == [
        (f"{tmp_path}/gcloud/credentials.db", True)
    ]


@pytest.mark.parametrize("value", ["CAST({} AS BLOB)", "{}"])
def test_gcloud_credential_is_found_as_text_and_as_bytes(tmp_path: Path, value: str) -> None:
    gcloud_database(
        tmp_path / "gcloud/credentials.db", "CREATE TABLE credentials (account_id TEXT, value BLOB)",
        f"INSERT INTO credentials VALUES ('a', {value.format(_CREDENTIAL)})",
    )  # fmt: skip
    report = scan(tmp_path)
    assert [one.kind for one in report.findings] == ["gcp-user"]
    assert not report.notes


@pytest.mark.parametrize("value", ["'{'", "x'ff'", "'[]'", "5", f"'{'[' * 100_000}'"])
def test_gcloud_row_that_is_no_json_object_is_a_note(tmp_path: Path, value: str) -> None:
    gcloud_database(
        tmp_path / "gcloud/credentials.db", "CREATE TABLE credentials (account_id TEXT, value BLOB)",
        f"INSERT INTO credentials VALUES ('a', {value})",
    )  # fmt: skip
    assert [(note.reason, note.limits) for note in scan(tmp_path).notes] == [
        ("has a row that is no JSON object", True)
    ]


def test_gcloud_reader_authorizes_no_function_and_no_other_column(monkeypatch) -> None:
    """The authorizer holds without the look at the schema."""
    monkeypatch.setattr("ringfence.scan.readers.clouds._is_plain_table", lambda *_: True)
    for value in ("upper('a')", "(SELECT sql FROM sqlite_master)", "(SELECT x FROM other)"):
        with contextlib.closing(sqlite3.connect(":memory:")) as connection:
            connection.execute("CREATE TABLE other (x)")
            connection.execute(f"CREATE VIEW credentials AS SELECT 'a' AS account_id, {value} AS value")
            connection.execute("PRAGMA writable_schema = ON")
            connection.execute("UPDATE sqlite_master SET type = 'table' WHERE name = 'credentials'")
            connection.commit()
            data = connection.serialize()
        with pytest.raises(DocumentLimitError):
            _rows(data, "credentials", ("account_id", "value"))


LIMITED = {
    "gcloud/credentials.db": None,
    ".netrc": "machine a " * 50_001,
    ".bashrc": "export API_TOKEN=" + "a1" * 10_001,
    "long.service": "[Service]\nExecStart=/bin/a " + "b c" * 10_000,
    ".mcp.json": json.dumps({"mcpServers": {"a": {"command": "x", "args": ["a"] * 2001}}}),
    "many.py": "".join(f"token_{number} = None\n" for number in range(20_001)),
    "long.json": json.dumps({"api_token": "a1b2" * 5000}),
    "nested.yml": "apiVersion: v1\nkind: Secret\nmetadata: {}\ndata: " + "[" * 65 + "]" * 65,
    "huge.txt": "x" * 1_100_000,
    ".m2/settings.xml": "<!DOCTYPE settings><settings><server><password>a</password></server></settings>",
}


@pytest.mark.parametrize("name", LIMITED)
def test_limit_that_was_reached_is_a_note(tmp_path: Path, name: str) -> None:
    text = LIMITED[name]
    if text is None:
        rows = [f"INSERT INTO credentials VALUES ('a{number}', 'x')" for number in range(201)]
        gcloud_database(tmp_path / name, "CREATE TABLE credentials (account_id TEXT, value BLOB)", *rows)
    else:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    report = scan(tmp_path, max_bytes=1_000_000)
    assert {(note.path, note.limits) for note in report.notes} == {(f"{tmp_path}/{name}", True)}


def test_settings_in_late_and_in_long_lines_are_found(tmp_path: Path) -> None:
    make = Maker(20)
    values = [make.token(40) for _ in range(4)]
    filler = ",".join(f'"k{number}":"v{number}"' for number in range(1000))
    (tmp_path / "a.txt").write_text("x\n" * 25_000 + f'api_key = "{values[0]}"\n')
    (tmp_path / "b.json").write_text(f'{{{filler},"api_key":"{values[1]}",{filler}}}')
    (tmp_path / "c.js").write_text(f'x={{note:"{"y" * 5000} api_key=\'{values[2]}\'",api_key:"{values[3]}"}}')
    report = scan(tmp_path)
    assert len(report.findings) == 4
    assert not report.notes


def test_folder_that_becomes_a_link_during_the_walk_is_not_listed(tmp_path: Path) -> None:
    (tmp_path / "tree/b").mkdir(parents=True)
    (tmp_path / "tree/a.env").touch()
    (tmp_path / "tree/b/c.env").touch()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/host_key").touch()
    notes: list[Note] = []
    found = []
    with Root(tmp_path / "tree") as root:
        for one in walk_tree(root, "", notes, deadline_s=float("inf"), wants_link=lambda _: False):
            found.append(one.relative)
            if one.relative == "a.env":
                (tmp_path / "tree/b").rename(tmp_path / "tree/moved")
                (tmp_path / "tree/b").symlink_to(tmp_path / "outside")
    assert found == ["a.env"]
    assert [(note.path, note.limits) for note in notes] == [("b", True)]


def test_invalid_utf8_and_utf16_and_binary(tmp_path: Path) -> None:
    (tmp_path / "a.env").write_bytes(b"\xff\xfe\xfa=\xc3\x28\nTOKEN=" + TOKEN.encode() + b"\n")
    (tmp_path / "b.env").write_bytes(f"TOKEN={TOKEN}\n".encode("utf-16"))
    (tmp_path / "c.txt").write_bytes(b"\xc3\x28 " + TOKEN.encode())
    (tmp_path / "d.dat").write_bytes(b"\0\1\2" + TOKEN.encode())
    found = {one.place.path.rpartition("/")[2] for one in scan(tmp_path).findings}
    assert found >= {"b.env", "c.txt"}
    assert "d.dat" not in found


def test_text_with_a_few_nul_characters_is_read(tmp_path: Path) -> None:
    """A shell runs a script whose comment has one."""
    (tmp_path / "deploy.sh").write_bytes(f"#!/bin/bash\n# \0\nexport API_TOKEN={TOKEN}\n".encode())
    (tmp_path / ".bashrc").write_bytes(f"# {TOKEN} \0\n".encode())
    assert {one.place.path.rpartition("/")[2] for one in scan(tmp_path).findings} == {"deploy.sh", ".bashrc"}


def test_binary_file_that_a_reader_could_not_parse_is_a_limit(tmp_path: Path) -> None:
    (tmp_path / ".mcp.json").write_bytes(b"\0" * 100)
    (note,) = scan(tmp_path).notes
    assert (note.path, note.limits) == (f"{tmp_path}/.mcp.json", True)


def test_many_findings_in_one_file_are_limited(tmp_path: Path) -> None:
    make = Maker(9)
    (tmp_path / "a.txt").write_text("".join(f"{make.crc_token('ghp')}\n" for _ in range(1200)))
    report = scan(tmp_path)
    assert len(report.findings) == 1000
    assert "more than 1000 findings" in report.notes[0].reason


_MEBI = 1024 * 1024

# --- memory -----------------------------------------------------------------------------------------------------------


def test_findings_of_a_whole_scan_are_limited_and_the_report_says_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ringfence.scan.scanner.MOST_FINDINGS", 100)
    make = Maker(9)
    for number in range(900):
        (tmp_path / f"f{number}.txt").write_text(f"{make.crc_token('ghp')}\n")
    for workers in (1, 2):
        report = scan(tmp_path, workers=workers)
        assert 100 <= len(report.findings) < 900
        assert not report.complete
        assert any("too many findings" in note.reason for note in report.notes)


def test_guarded_secrets_are_limited_per_file_and_scan(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ringfence.scan.file_scan.MOST_PIECES_IN_A_FILE", 2000)
    make = Maker(9)
    (tmp_path / "a.txt").write_text("".join(f"{make.crc_token('ghp')}\n" for _ in range(200)))
    report = scan(tmp_path)
    assert 50 < len(report.findings) < 70
    assert "full of secrets" in report.notes[0].reason
    monkeypatch.setattr("ringfence.scan.scanner.MOST_PIECES", 1000)
    for number in range(700):
        (tmp_path / f"f{number}.txt").write_text("nothing\n")
    report = scan(tmp_path, workers=2)
    assert not report.complete
    assert any("too many findings" in note.reason for note in report.notes)


def test_notes_are_limited_and_the_others_counted(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ringfence.scan.scanner._MOST_NOTES", 5)
    for number in range(9):
        os.mkfifo(tmp_path / f"f{number}.env")
    report = scan(tmp_path)
    assert len(report.notes) == 6
    assert report.notes[-1].reason == "4 more notes were left out"


def test_a_worker_hands_over_what_it_has_and_the_rest_is_read_later(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ringfence.scan.file_scan._MOST_AT_ONCE", 3)
    make = Maker(10)
    for number in range(700):
        (tmp_path / f"f{number}.txt").write_text(
            f"{make.crc_token('ghp')}\n" if number % 7 == 0 else "nothing\n"
        )
    for workers in (1, 2):
        report = scan(tmp_path, workers=workers)
        assert (report.files, len(report.findings), report.complete) == (700, 100, True)


def test_entries_of_a_folder_are_limited(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ringfence.scan.tree_walk.MAX_ENTRIES", 10)
    for number in range(12):
        (tmp_path / f"f{number}.txt").write_text("nothing\n")
    monkeypatch.chdir(tmp_path)
    for path, shown in ((tmp_path, f"{tmp_path}/"), (Path(), ".")):
        report = scan(path)
        assert report.files == 10
        assert "more than 10 entries" in report.notes[0].reason
        assert report.notes[0].path == shown


def test_a_file_that_needs_too_much_memory_is_a_note_and_others_are_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ringfence.scan.file_scan.FILE_MEMORY", 0)
    monkeypatch.setattr("ringfence.scan.file_scan._MEMORY_FOR_EACH_BYTE", 4)

    def fill(self: object, file: SourceFile) -> Iterator[None]:
        if b"fill" in file.data:
            bytearray(512 * _MEBI)
        yield from ()

    monkeypatch.setattr(type(TEXT_READER), "read", fill)
    (tmp_path / "a.txt").write_text("fill")
    (tmp_path / "b.txt").write_text("x")
    report = scan(tmp_path)
    assert report.files == 2
    assert [note.reason for note in report.notes] == ["needs too much memory to be read"]
    mmap.mmap(-1, 512 * _MEBI).close()  # the limit is for the worker alone


SWELLING = (
    (".claude.json", "[" + "[]," * (_MEBI // 2) + "[]]"),
    ("b/.claude.json", "[" + '"a",' * (_MEBI // 2) + '"a"]'),
    ("c/.claude.json", '{"a":{' + ",".join(f'"k{number:06}":"v"' for number in range(100_000)) + "}}"),
    (".env", "A=b\n" * (_MEBI // 2)),
    (".netrc", "\n" * _MEBI),
    ("a.txt", "ab " * (_MEBI // 2)),
    ("urls.txt", "".join(f"https://u:p{number:07}@h " for number in range(50_000))),
    (".m2/settings.xml", f"<a>{'<a>b</a>' * 150_000}</a>"),
)


def test_documents_that_swell_stay_within_the_memory_of_a_scan(tmp_path: Path) -> None:
    for name, text in SWELLING:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom ringfence.scan.findings import Fingerprinter\n"
        "from ringfence.scan.scanner import ScanOptions, scanning\n"
        "with scanning(ScanOptions(paths=[Path(sys.argv[1])]), Fingerprinter(b'k' * 32)) as one: report = one.run()\n"
        "lines = Path('/proc/self/status').read_text().splitlines()\n"
        "own = next(line.split()[1] for line in lines if line.startswith('VmHWM'))\n"
        "print(report.files, max(int(own), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    files, most_kib = map(int, done.stdout.split())
    assert files == len(SWELLING)
    assert most_kib < 96 * 1024


def test_the_memory_of_a_scan_does_not_grow_with_the_number_of_files(tmp_path: Path) -> None:
    """Of a tree of many folders: the entries of one folder are in memory at once, for their order."""
    (tmp_path / "one").write_text("nothing\n")
    for number in range(3600):
        folder = tmp_path / ("few" if number < 800 else "many") / f"f{number // 20}"
        folder.mkdir(parents=True, exist_ok=True)
        os.link(tmp_path / "one", folder / f"a-file-with-a-long-name-{number}.txt")

    def most(folder: Path) -> int:
        tracemalloc.start()
        try:
            assert scan(folder, workers=1).files >= 800
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    most(tmp_path / "few")  # what is imported and cached
    assert most(tmp_path / "many") - most(tmp_path / "few") < 2000 * 40


def test_names_that_act_on_a_terminal_or_a_shell_reach_no_command(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine a;reboot login $(id) password " + Maker(1).token(20) + "\n")
    (one,) = scan(tmp_path).findings
    commands = " ".join(step.command or "" for step in one.remedies)
    assert ";" not in commands
    assert "$" not in commands


WORDS = st.sampled_from([
    "password", "token: ", "=", ":", "\n", "{", "}", "[", "]", '"', "'", "- ", "auths", "users", "clusters", "contexts",
    "apiVersion", "kind: Secret", "metadata", "data:", "mcpServers", "env", "machine", "login", "&a", "*a", "<a>",
    "</a>",     "\0", "\x85", "\u202e",
    "ghp_", "://a:b@c", "-----BEGIN PRIVATE KEY-----", "-----END ", "credentials", "export ",
    "!!x",
])  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(WORDS, st.text(max_size=12)), max_size=40).map("".join))
def test_no_reader_fails_on_any_text_but_by_a_document_error(text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    for reader in (*FILE_READERS, TEXT_READER):
        path = "/" + reader.paths[0].replace("*", "x")
        file = SourceFile(path, data, FACTS)
        try:
            if reader.accepts(file):
                for one in reader.read(file):
                    assert one.field is not None
        except DocumentError:
            continue


KEYS = st.one_of(WORDS, st.text(max_size=5))
DOCUMENTS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=20,
)


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS)
def test_no_reader_of_json_fails_on_any_document(document: object) -> None:
    data = json.dumps(document).encode("utf-8", "surrogatepass")
    for reader in FILE_READERS:
        for path in reader.paths:
            if path.endswith((".json", ".yml", ".yaml", ".tfstate")):
                file = SourceFile("/" + path.replace("*", "x"), data, FACTS)
                with contextlib.suppress(DocumentError):
                    list(reader.read(file))


def test_the_guard_masks_pieces_of_secrets_wherever_they_stand(tmp_path: Path) -> None:
    token = Maker(3).token(40)
    (tmp_path / f"export-{token}").mkdir()
    (tmp_path / f"export-{token}/.env").write_text(f"API_KEY={token}\n")
    report = scan(tmp_path)
    (one,) = report.findings
    assert token[:6] not in one.place.path
    assert "…" in one.place.path


def test_secret_found_by_another_worker_is_masked_in_paths(tmp_path: Path) -> None:
    """Findings of several processes: a secret of one file is masked in the path of another."""
    token = Maker(4).token(40)
    for number in range(700):
        (tmp_path / f"f{number}.txt").write_text("nothing\n")
    (tmp_path / ".env").write_text(f"API_KEY={token}\n")
    (tmp_path / token).mkdir()
    (tmp_path / token / ".env").write_text(f"OTHER_TOKEN={Maker(5).token(40)}\n")
    report = scan(tmp_path, workers=2)
    assert len(report.findings) == 2
    assert not [one for one in report.findings if token[:6] in one.place.path]


def test_a_scanner_says_what_is_a_known_place() -> None:
    scanner = FileScanner((), Fingerprinter(b"k" * 32), OutputGuard(), 1)
    assert scanner.is_known_place("/home/m/.aws/credentials")
    assert not scanner.is_known_place("/home/m/notes.txt")


LONG = {
    ".mcp.json": {"mcpServers": {"s" * 9000: {"command": "x", "env": {"A_API_KEY": Maker(30).token(40)}}}},
    ".docker/config.json": {"auths": {"a.test": {"username": "u " * 5000, "password": Maker(31).token(20)}}},
    "gcloud/application_default_credentials.json": {
        "refresh_token": f"1//{Maker(32).token(40)}", "account": "m " * 5000, "quota_project_id": "p " * 5000,
        "scopes": ["a " * 5000] * 60,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LONG)
def test_long_texts_of_a_finding_are_clipped_by_the_worker(tmp_path: Path, name: str) -> None:
    """The parent masks the texts of findings when the time of the scan is over."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps(LONG[name]))
    scanner = FileScanner((Root(tmp_path),), Fingerprinter(b"k" * 32), OutputGuard(), 1_000_000)
    results = JobResults()
    scanner.scan(Job(0, name, name), results)
    assert results.findings
    for one in results.findings:
        opens = [value for value in one.opens.words().values() if isinstance(value, str)]
        assert max(map(len, (one.place.field, *one.used_by, *one.opens.scopes, *opens))) <= 300
        assert len(one.opens.scopes) <= 20
