"""Readers of cloud credentials: AWS, Azure, Google Cloud, and secrets that a platform mounts into containers.

AWS: shared credentials and config files, and the caches of IAM Identity Center and of assumed roles.
Azure: the token cache of the az command, its service principals, and older token files.
Google Cloud: application default credentials, service account keys, and the databases of the gcloud command.
Mounted: tokens of service accounts, and secrets of Docker and Compose.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime
from typing import Any, Final

from ringfence.scan import kinds
from ringfence.scan.candidates import Candidate, candidate_of, classify, of_jwt, of_pem
from ringfence.scan.documents import DocumentLimitError, ini_options, mapping, parse_json, sequence, text_of
from ringfence.scan.findings import Access, limit_reached
from ringfence.scan.names import is_placeholder
from ringfence.scan.readers.reader import FileReader, secret_or_format
from ringfence.scan.source_files import SourceFile

_AWS_USERS = ("AWS CLI, SDKs and every process of the user",)


class AwsCredentialsReader(FileReader):
    """Reads `~/.aws/credentials` and `~/.aws/config`."""

    name = "aws-credentials"
    paths = (".aws/credentials", ".aws/config")
    on_machine = ("~/.aws/credentials", "~/.aws/config")

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        profiles: dict[str, dict[str, tuple[str, int]]] = defaultdict(dict)
        for section, name, value, line in ini_options(file.text):
            profiles[section.removeprefix("profile ").strip()][name.strip().lower()] = (value, line)
        for profile, options in profiles.items():
            yield from self._of_profile(profile, options)

    def _of_profile(self, profile: str, options: dict[str, tuple[str, int]]) -> Iterator[Candidate]:
        key_id = options.get("aws_access_key_id", ("", 0))[0]
        role = options.get("role_arn", ("", 0))[0] or None
        account = kinds.aws_account(key_id) if key_id[:4] in ("AKIA", "ASIA") else None
        is_session = key_id.startswith("ASIA") or "aws_session_token" in options
        for name, (value, line) in options.items():
            if (
                name not in ("aws_secret_access_key", "aws_session_token")
                or len(value) < 16
                or is_placeholder(value)
            ):
                continue
            kind = kinds.AWS_SESSION if is_session else kinds.AWS_SECRET
            opens = Access(account=account, role=role, subject=f"profile {profile}")
            yield candidate_of(kind, value, f"{profile}.{name}", opens=opens, line=line, used_by=_AWS_USERS)


class AwsCacheReader(FileReader):
    """Reads the token caches below `~/.aws`."""

    name = "aws-cache"
    paths = (".aws/sso/cache/*.json", ".aws/cli/cache/*.json", ".aws/login/cache/*.json")
    on_machine = ("~/.aws/sso/cache/*.json", "~/.aws/cli/cache/*.json", "~/.aws/login/cache/*.json")

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        document = mapping(parse_json(file.text))
        start_url = text_of(document.get("startUrl"))
        opens = Access(issuer=start_url, expires_s=unix_time(document.get("expiresAt")))
        for name in ("accessToken", "refreshToken", "clientSecret"):
            if value := text_of(document.get(name)):
                yield candidate_of(kinds.AWS_SSO, value, name, opens=opens, used_by=_AWS_USERS)
        session = mapping(document.get("Credentials"))
        arn = text_of(mapping(document.get("AssumedRoleUser")).get("Arn"))
        account = arn.split(":")[4] if arn and arn.count(":") >= 5 else None
        opens = Access(account=account, role=arn, expires_s=unix_time(session.get("Expiration")))
        for name in ("SecretAccessKey", "SessionToken"):
            if value := text_of(session.get(name)):
                yield candidate_of(
                    kinds.AWS_SESSION, value, f"Credentials.{name}", opens=opens, used_by=_AWS_USERS
                )
        if not session and not start_url:
            for name, other in document.items():
                if isinstance(other, str):
                    yield from classify(name, other, name, used_by=_AWS_USERS)


def unix_time(value: Any) -> int | None:
    """Return the Unix time, in seconds, of an RFC 3339 text; None if the text is malformed."""
    if not isinstance(value, str):
        return None
    try:
        return int(datetime.fromisoformat(value.replace("UTC", "+00:00")).timestamp())
    except (ValueError, OverflowError):
        return None


_AZURE_USERS = ("az, Azure SDKs and every process of the user",)


class AzureReader(FileReader):
    """Reads the JSON files of the az command."""

    name = "azure"
    paths = (
        ".azure/msal_token_cache.json",
        ".azure/accessTokens.json",
        ".azure/service_principal_entries.json",
    )
    on_machine = (
        "~/.azure/msal_token_cache.json", "~/.azure/accessTokens.json", "~/.azure/service_principal_entries.json"
    )  # fmt: skip

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        document = parse_json(file.text)
        if file.name == "service_principal_entries.json":
            for entry in sequence(document):
                yield from _principal(mapping(entry))
        elif file.name == "accessTokens.json":
            for number, entry in enumerate(sequence(document)):
                yield from _tokens(
                    mapping(entry), str(number), ("accessToken", "refreshToken"), "userId", "tenantId"
                )
        else:
            accounts = {
                text_of(mapping(one).get("home_account_id")): text_of(mapping(one).get("username"))
                for one in mapping(mapping(document).get("Account")).values()
            }
            for table in ("AccessToken", "RefreshToken", "IdToken"):
                for number, one in enumerate(mapping(mapping(document).get(table)).values()):
                    entry = dict(mapping(one))
                    entry["user"] = accounts.get(text_of(entry.get("home_account_id")))
                    yield from _tokens(entry, f"{table}.{number}", ("secret",), "user", "realm")


def _tokens(entry: Any, field: str, names: tuple[str, ...], user: str, tenant: str) -> Iterator[Candidate]:
    target = text_of(entry.get("target")) or text_of(entry.get("resource")) or ""
    expires = str(entry.get("expires_on", ""))
    opens = Access(
        subject=text_of(entry.get(user)), account=text_of(entry.get(tenant)), scopes=tuple(target.split())[:50],
        expires_s=int(expires) if expires.isdigit() and len(expires) < 12 else None,
    )  # fmt: skip
    for name in names:
        if (value := text_of(entry.get(name))) and len(value) >= 16:
            place = f"{field}.{name}"
            yield of_jwt(
                value, place, kind=kinds.AZURE_USER, opens=opens, used_by=_AZURE_USERS
            ) or candidate_of(kinds.AZURE_USER, value, place, opens=opens, used_by=_AZURE_USERS)


def _principal(entry: Any) -> Iterator[Candidate]:
    client = text_of(entry.get("client_id")) or text_of(entry.get("servicePrincipalId"))
    tenant = text_of(entry.get("tenant")) or text_of(entry.get("servicePrincipalTenant"))
    for name in ("client_secret", "accessToken", "secret"):
        if value := text_of(entry.get(name)):
            yield candidate_of(
                kinds.AZURE_SERVICE_PRINCIPAL, value, f"{client or 'entry'}.{name}",
                opens=Access(subject=client, account=tenant), used_by=_AZURE_USERS,
            )  # fmt: skip


_GCLOUD_USERS: Final = ("gcloud, Google SDKs and every process of the user",)
_MOST_ROWS: Final = 200
_SQLITE_LIMITS: Final = {
    sqlite3.SQLITE_LIMIT_LENGTH: 1024 * 1024, sqlite3.SQLITE_LIMIT_SQL_LENGTH: 10_000,
    sqlite3.SQLITE_LIMIT_COLUMN: 100, sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 20, sqlite3.SQLITE_LIMIT_VDBE_OP: 1000,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
}  # fmt: skip


def of_credentials(
    document: Any, prefix: str = "", used_by: tuple[str, ...] = _GCLOUD_USERS
) -> Iterator[Candidate]:
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


_USED = {"used_by": ("every process in the container",)}


class ServiceAccountReader(FileReader):
    """Reads the tokens of service accounts that a platform mounts."""

    name = "service-account"
    paths = ("serviceaccount/token", "tokens/azure-identity-token", "secrets/tokens/*")
    on_machine = (
        "/var/run/secrets/kubernetes.io/serviceaccount/token",
        "/var/run/secrets/eks.amazonaws.com/serviceaccount/token",
        "/var/run/secrets/azure/tokens/azure-identity-token", "/var/run/secrets/tokens/*",
    )  # fmt: skip

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        token = file.text.strip()
        found = of_jwt(token, "token", kind=kinds.KUBERNETES_SERVICE_ACCOUNT, **_USED)
        if found is not None:
            yield found
        elif 16 <= len(token) <= 8192 and len(token.split()) == 1:
            yield from secret_or_format(token, "token", kinds.KUBERNETES_SERVICE_ACCOUNT, **_USED)


class MountedSecretReader(FileReader):
    """Secrets of Docker and Compose: one file each, named after the secret."""

    name = "mounted-secret"
    paths = ("run/secrets/*",)
    on_machine = ("/run/secrets/*",)

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        value = file.text.strip()
        if 4 <= len(value) <= 8192 and "\n" not in value:
            yield from secret_or_format(
                value, file.name, kinds.for_name(kinds.KEY, ()), confidence="likely", **_USED
            )
