"""Google Cloud: application default credentials, service account keys, and the databases of the gcloud command."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from typing import Any, Final

from ringfence.scan import kinds
from ringfence.scan.candidates import Candidate, candidate_of, of_pem
from ringfence.scan.documents import DocumentLimitError, mapping, parse_json, text_of
from ringfence.scan.findings import Access
from ringfence.scan.limits import limit_reached
from ringfence.scan.readers.reader import FileReader
from ringfence.scan.source_files import SourceFile

_USERS: Final = ("gcloud, Google SDKs and every process of the user",)
_MOST_ROWS: Final = 200
_SQLITE_LIMITS: Final = {
    sqlite3.SQLITE_LIMIT_LENGTH: 1024 * 1024, sqlite3.SQLITE_LIMIT_SQL_LENGTH: 10_000,
    sqlite3.SQLITE_LIMIT_COLUMN: 100, sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 20, sqlite3.SQLITE_LIMIT_VDBE_OP: 1000,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
}  # fmt: skip


def of_credentials(document: Any, prefix: str = "", used_by: tuple[str, ...] = _USERS) -> Iterator[Candidate]:
    """Yield the credential of one document of Google's: a user's, a service account's, or an external account's."""
    found = mapping(document)
    if found.get("type") == "service_account":
        opens = Access(
            account=text_of(found.get("project_id")), subject=text_of(found.get("client_email")),
            issuer=text_of(found.get("token_uri")),
        )  # fmt: skip
        pem = of_pem(str(found.get("private_key", "")), f"{prefix}private_key")
        if pem is not None and pem.value is not None:
            yield candidate_of(
                kinds.GCP_SERVICE_ACCOUNT,
                pem.value.reveal(),
                f"{prefix}private_key",
                opens=opens,
                used_by=used_by,
            )
        return
    for name in ("refresh_token", "access_token", "token"):
        value = text_of(found.get(name))
        if value and len(value) >= 16:
            scopes = found.get("scopes") or found.get("scope") or ()
            opens = Access(
                account=text_of(found.get("quota_project_id")), subject=text_of(found.get("account")),
                scopes=tuple(map(str, scopes.split() if isinstance(scopes, str) else scopes))[:50],
            )  # fmt: skip
            yield candidate_of(kinds.GCP_USER, value, f"{prefix}{name}", opens=opens, used_by=used_by)


class GcloudReader(FileReader):
    """Reads the files and databases of the gcloud command."""

    name = "gcloud"
    paths = (
        "gcloud/application_default_credentials.json", "legacy_credentials/*/adc.json", "gcloud/credentials.db",
        "gcloud/access_tokens.db",
    )  # fmt: skip
    on_machine = (
        "~/.config/gcloud/application_default_credentials.json", "~/.config/gcloud/legacy_credentials/*/adc.json",
        "~/.config/gcloud/credentials.db", "~/.config/gcloud/access_tokens.db",
    )  # fmt: skip

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        if not file.name.endswith(".db"):
            yield from of_credentials(parse_json(file.text))
        elif file.name == "credentials.db":
            for account, value in _rows(file.data, "credentials", ("account_id", "value")):
                try:
                    document = json.loads(value)
                except (ValueError, RecursionError):
                    document = None
                if isinstance(document, dict):
                    yield from of_credentials({"account": account, **document}, f"{account}.")
                else:
                    limit_reached("has a row that is no JSON object")
        else:
            for account, value in _rows(file.data, "access_tokens", ("account_id", "access_token")):
                yield from of_credentials({"account": account, "access_token": value}, f"{account}.")


class GcpServiceAccountReader(FileReader):
    """Service account keys. Their files can have any name, so their content decides."""

    name = "gcp-service-account"
    paths = ("*.json",)

    def accepts(self, file: SourceFile) -> bool:
        return b'"service_account"' in file.data and b'"private_key"' in file.data

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        yield from of_credentials(
            parse_json(file.text), used_by=("whatever GOOGLE_APPLICATION_CREDENTIALS points here",)
        )


def _rows(data: bytes, table: str, columns: tuple[str, str]) -> list[tuple[str, str]]:
    """Return two columns of a table of a SQLite database that is only in memory. Raises DocumentError.

    SQL of the file would run if the table were a view or had generated columns, so the text of its schema may have
    names alone between its parentheses. Besides, SQLite may read these columns and call no function.
    """
    connection = sqlite3.connect(":memory:")
    readable = {("sqlite_master", "sql"), ("sqlite_master", "name"), ("sqlite_master", "type")}
    readable |= {(table, column) for column in columns}

    def authorize(
        action: int, first: str | None, second: str | None, _: str | None, inside: str | None
    ) -> int:
        is_read = action == sqlite3.SQLITE_READ and (first, second) in readable
        allowed = inside is None and (is_read or action == sqlite3.SQLITE_SELECT)
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

    try:
        for limit, most in _SQLITE_LIMITS.items():
            connection.setlimit(limit, most)
        connection.deserialize(data)
        connection.set_authorizer(authorize)
        found = connection.execute("SELECT type, sql FROM sqlite_master WHERE name = ?", (table,)).fetchmany(
            2
        )
        if len(found) != 1 or found[0][0] != "table" or not _is_plain_table(table, found[0][1]):
            raise DocumentLimitError("has no plain table of gcloud's, so its SQL is not run")
        rows = connection.execute(f"SELECT {columns[0]}, {columns[1]} FROM {table}").fetchmany(_MOST_ROWS + 1)  # noqa: S608
    except (sqlite3.Error, ValueError, OverflowError):
        raise DocumentLimitError("is no database of gcloud's") from None
    finally:
        connection.close()
    if len(rows) > _MOST_ROWS:
        limit_reached(f"has more than {_MOST_ROWS} rows; the rest is left out")
    return [(_text(account), _text(value)) for account, value in rows[:_MOST_ROWS] if value]


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _is_plain_table(table: str, sql: object) -> bool:
    """Return whether the schema of a table has names and types alone: no expression can be without a parenthesis."""
    return (
        isinstance(sql, str) and re.fullmatch(rf'CREATE TABLE "?{table}"?\s*\([\w\s,"]*\)', sql) is not None
    )
