"""Azure: the token cache of the az command, its service principals, and older token files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ringfence.scan import kinds
from ringfence.scan.candidates import Candidate, candidate_of, of_jwt
from ringfence.scan.documents import mapping, parse_json, sequence, text_of
from ringfence.scan.findings import Access
from ringfence.scan.readers.reader import FileReader
from ringfence.scan.source_files import SourceFile

_USERS = ("az, Azure SDKs and every process of the user",)


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
            yield of_jwt(value, place, kind=kinds.AZURE_USER, opens=opens, used_by=_USERS) or candidate_of(
                kinds.AZURE_USER, value, place, opens=opens, used_by=_USERS
            )


def _principal(entry: Any) -> Iterator[Candidate]:
    client = text_of(entry.get("client_id")) or text_of(entry.get("servicePrincipalId"))
    tenant = text_of(entry.get("tenant")) or text_of(entry.get("servicePrincipalTenant"))
    for name in ("client_secret", "accessToken", "secret"):
        if value := text_of(entry.get(name)):
            yield candidate_of(
                kinds.AZURE_SERVICE_PRINCIPAL, value, f"{client or 'entry'}.{name}",
                opens=Access(subject=client, account=tenant), used_by=_USERS,
            )  # fmt: skip
