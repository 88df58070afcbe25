"""Google Cloud: application default credentials, service account keys, and the databases of the gcloud command."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from typing import Any, Final

from ringfence.scan import kinds
from ringfence.scan.candidates import Candidate, candidate_of, of_pem
from ringfence.scan.documents import DocumentError, mapping, parse_json, text_of
from ringfence.scan.findings import Access
from ringfence.scan.readers.reader import FileReader
from ringfence.scan.source_files import SourceFile

_USERS: Final = ("gcloud, Google SDKs and every process of the user",)
_MOST_STEPS: Final = 1_000_000
_MOST_ROWS: Final = 200


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
            for account, value in _rows(file.data, "SELECT account_id, value FROM credentials"):
                try:
                    document = json.loads(value)
                except (ValueError, TypeError, RecursionError):
                    continue
                yield from of_credentials({"account": account, **mapping(document)}, f"{account}.")
        else:
            for account, value in _rows(file.data, "SELECT account_id, access_token FROM access_tokens"):
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


def _rows(data: bytes, query: str) -> list[tuple[str, str]]:
    """Return rows of a SQLite database that is only in memory. Raises DocumentError.

    A hostile schema can hold views and triggers: the steps are limited, and its functions are not trusted.
    """
    connection = sqlite3.connect(":memory:")
    steps = 0

    def interrupt() -> int:
        nonlocal steps
        steps += 10_000
        return int(steps > _MOST_STEPS)

    try:
        connection.deserialize(data)
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA query_only = ON")
        connection.set_progress_handler(interrupt, 10_000)
        rows = connection.execute(query).fetchmany(_MOST_ROWS)
        return [(str(account), str(value)) for account, value in rows if value]
    except (sqlite3.Error, ValueError, OverflowError):
        raise DocumentError("is no database of gcloud's") from None
    finally:
        connection.close()
