"""Files with secrets: the credential in a file, its move to its place, and the file without it.

A file is edited only while it is the one that was looked at: the same inode with the same content.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from ringfence.cli.adopt.adoption import LEASE_TTL, AdoptFolder, Adoption, AdoptStoppedError
from ringfence.cli.adopt.locations import SecretLocation, location_of
from ringfence.kernel.base.private_files import open_private, write_private
from ringfence.scan.file_scan import FileScanner
from ringfence.scan.findings import Finding, Fingerprinter, SecretValue
from ringfence.scan.output_guard import OutputGuard
from ringfence.scan.readers.agents import SERVER_TABLES
from ringfence.scan.readers.database_clients import PgpassReader, pgpass_fields, pgpass_text
from ringfence.scan.source_files import MAX_FILE_BYTES, Root, UnreadableError

PLACEHOLDER = "replaced-by-ringfence"
"""Programs want some text as a key. The gateway puts the credential in its place."""
_SHORTEST = 16
"""A shorter value may be part of something else in the file, and is not replaced."""


def credentials_in(
    path: Path, fingerprinter: Fingerprinter, name: Path | None = None
) -> Iterator[tuple[Finding, SecretValue]]:
    """Yield each credential of a file once, with its finding. `name`: the path of the file that this is a copy of.

    Raises AdoptStoppedError if the file cannot be read.
    """
    try:
        with Root(path) as root:
            scanner = FileScanner((root,), fingerprinter, OutputGuard(), MAX_FILE_BYTES)
            found = list(scanner.credentials(str(name or path)))
    except (UnreadableError, OSError) as error:
        raise AdoptStoppedError(f"{path} cannot be read: {error}") from None
    seen = set()
    for finding, value in found:
        if finding.fingerprint not in seen:
            seen.add(finding.fingerprint)
            yield finding, value


def secret_of(adoption: Adoption, path: Path, fingerprinter: Fingerprinter) -> SecretValue:
    """Return the credential of an adoption from a file: its own, or the copy. Raises AdoptStoppedError."""
    for finding, value in credentials_in(path, fingerprinter, adoption.file):
        if finding.fingerprint == adoption.exposed:
            return value
    raise AdoptStoppedError(
        f"the credential is no longer in {path}; check the file, then run --undo and adopt it again"
    )


def identity_of(path: Path, fingerprinter: Fingerprinter) -> tuple[str, bytes, int]:
    """Return the identity of a file, its content and its mode. Raises AdoptStoppedError.

    The digest is keyed, so that it cannot serve to test guesses of a password.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status, data = os.fstat(descriptor), file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise AdoptStoppedError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or len(data) > MAX_FILE_BYTES:
        raise AdoptStoppedError(f"{path} is no small file of this user; it is left alone")
    digest = fingerprinter.of(SecretValue(data.decode("utf-8", "surrogateescape")))
    return f"{status.st_ino}:{digest}", data, stat.S_IMODE(status.st_mode)


def put_secret(adoption: Adoption, fingerprinter: Fingerprinter) -> None:
    """Write the secret to its location: a key, or the URL of a database with the password.

    A URL that is there already stays: Ringfence needs a role that may create roles, which the exposed one seldom may.
    Raises AdoptStoppedError if another key is there.
    """
    secret, location = secret_of(adoption, adoption.file, fingerprinter), location_of(adoption)
    placed = placed_fingerprint(adoption, location, fingerprinter)
    if placed is not None:
        if adoption.kind == "postgres" or placed == adoption.exposed:
            return  # or an interrupted start put it there
        raise AdoptStoppedError(
            f"{location} exists: it has another secret for target {adoption.target}; name another --target"
        )
    content = secret.reveal()
    if adoption.kind == "postgres":
        server = urlsplit(adoption.url)
        user, _, host = server.netloc.rpartition("@")
        content = server._replace(netloc=f"{user}:{quote(content, safe='')}@{host}").geturl()
    location.create(content)


def placed_fingerprint(
    adoption: Adoption, location: SecretLocation, fingerprinter: Fingerprinter
) -> str | None:
    """Return the fingerprint of the secret in its location; None if there is none. Raises what `read` raises."""
    content = location.read()
    if content is not None and adoption.kind == "postgres":
        content = unquote(urlsplit(content).password or "")
    return fingerprinter.of(SecretValue(content)) if content is not None else None


def remove_secret(adoption: Adoption, fingerprinter: Fingerprinter) -> str:
    """Delete the secret from its location, unless it was replaced there. Returns what was left, for people."""
    location = location_of(adoption)
    placed = placed_fingerprint(adoption, location, fingerprinter)
    if placed not in (None, adoption.exposed):
        return f"{location} has a newer secret, and stays; delete it yourself"
    location.delete()
    return ""


def edit_file(adoption: Adoption, folder: AdoptFolder) -> None:
    """Write the file without the credential, and keep a private copy of it as it was.

    Raises AdoptStoppedError if it changed since it was looked at.
    """
    now, data, mode = identity_of(adoption.file, folder.fingerprinter)
    copy = folder.copy_file(adoption.target)
    if now != adoption.content:
        if copy.exists() and data == _edited(adoption, copy.read_bytes(), folder.fingerprinter, copy):
            return  # an interrupted start wrote it
        raise AdoptStoppedError(
            f"{adoption.file} changed since it was looked at, and is left alone; take the credential out of it "
            f"yourself, or undo and adopt it again: ringfence adopt --target {adoption.target} --undo"
        )
    after = _edited(adoption, data, folder.fingerprinter, adoption.file)
    copy.unlink(missing_ok=True)  # of an interrupted start: the file is still as it was
    with os.fdopen(open_private(copy, os.O_WRONLY | os.O_EXCL), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if identity_of(adoption.file, folder.fingerprinter)[0] != adoption.content:
        raise AdoptStoppedError(f"{adoption.file} changed just now, and is left alone; run the command again")
    write_private(adoption.file, after, durable=True)
    adoption.file.chmod(mode)


def restore_file(adoption: Adoption, folder: AdoptFolder) -> None:
    """Write the file as it was, from the copy. Raises AdoptStoppedError if it changed since the edit."""
    now, data, mode = identity_of(adoption.file, folder.fingerprinter)
    if now == adoption.content:
        return
    copy = folder.copy_file(adoption.target)
    if not copy.exists():
        raise AdoptStoppedError(f"the copy of {adoption.file} is gone; write the credential into it yourself")
    before = copy.read_bytes()
    if data != _edited(adoption, before, folder.fingerprinter, copy):
        raise AdoptStoppedError(
            f"{adoption.file} changed since it was edited, and is left alone; its copy is {copy}: take what you need, "
            "and delete the copy"
        )
    write_private(adoption.file, before, durable=True)
    adoption.file.chmod(mode)


def _edited(adoption: Adoption, data: bytes, fingerprinter: Fingerprinter, path: Path) -> bytes:
    """Return the content of the file without the credential. Raises AdoptStoppedError."""
    value = secret_of(adoption, path, fingerprinter).reveal()
    if adoption.reader == PgpassReader.name:
        return b"".join(_pgpass_line(line, value) for line in data.splitlines(keepends=True))
    secret = value.encode()
    if len(secret) < _SHORTEST or secret not in data:
        raise AdoptStoppedError(f"the credential in {adoption.file} is too short, or written in another form")
    after = data.replace(secret, PLACEHOLDER.encode())
    return _with_launch(adoption, after) if adoption.server else after


def server_of(data: bytes, secret: str) -> tuple[str, ...]:
    """Return where a JSON file has the command of an MCP server with this credential, by the names of its tables.

    Empty if no such server is in the file, if it is one by URL, or if the file is no plain JSON.
    """
    try:
        document = json.loads(data)
    except ValueError:
        return ()
    tables: list[tuple[tuple[str, ...], object]] = [((), document)]
    while tables:
        path, table = tables.pop()
        if not isinstance(table, dict):
            continue
        if len(path) > 1 and path[-2] in SERVER_TABLES and _starts_with(table, secret):
            return path
        tables += [((*path, str(name)), value) for name, value in table.items()]
    return ()


def server_entry(document: Any, path: Sequence[str]) -> dict[str, Any]:
    """Return the entry of an MCP server in a configuration, as `server_of` found it."""
    for name in path:
        document = document[name]
    assert isinstance(document, dict)
    return document


def _starts_with(entry: dict[str, object], secret: str) -> bool:
    command = entry.get("command"), entry.get("args", [])
    return isinstance(command[0], str) and isinstance(command[1], list) and secret in json.dumps(entry)


def _with_launch(adoption: Adoption, data: bytes) -> bytes:
    """Return a JSON file in which the server starts with a lease, behind the gateway."""
    document = json.loads(data)
    entry = server_entry(document, adoption.server)
    this = (adoption.program,)
    if adoption.wrapped is not None:
        words = adoption.server_launch(this)
    else:
        words = (
            *adoption.launch(LEASE_TTL, adoption.purpose, this), entry["command"], *entry.get("args", []),
        )  # fmt: skip
    entry["command"], entry["args"] = words[0], list(words[1:])
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _pgpass_line(line: bytes, password: str) -> bytes:
    """Return a line of `.pgpass`, with the placeholder if it has this password."""
    text = line.decode("utf-8", "surrogateescape")
    fields = pgpass_fields(text)
    if fields is None or pgpass_text(fields[-1]) != password:
        return line
    before, after = text.split(text.strip(), 1)
    return (before + ":".join((*fields[:-1], PLACEHOLDER)) + after).encode("utf-8", "surrogateescape")
