"""AWS: shared credentials and config files, and the caches of IAM Identity Center and of assumed roles."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from ringfence.scan import checksums, kinds
from ringfence.scan.candidates import Candidate, candidate_of, classify
from ringfence.scan.documents import ini_options, mapping, parse_json, text_of
from ringfence.scan.findings import Access
from ringfence.scan.names import is_placeholder
from ringfence.scan.readers.reader import FileReader
from ringfence.scan.source_files import SourceFile

_USERS = ("AWS CLI, SDKs and every process of the user",)


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
        account = checksums.aws_account(key_id) if key_id[:4] in ("AKIA", "ASIA") else None
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
            yield candidate_of(kind, value, f"{profile}.{name}", opens=opens, line=line, used_by=_USERS)


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
                yield candidate_of(kinds.AWS_SSO, value, name, opens=opens, used_by=_USERS)
        session = mapping(document.get("Credentials"))
        arn = text_of(mapping(document.get("AssumedRoleUser")).get("Arn"))
        account = arn.split(":")[4] if arn and arn.count(":") >= 5 else None
        opens = Access(account=account, role=arn, expires_s=unix_time(session.get("Expiration")))
        for name in ("SecretAccessKey", "SessionToken"):
            if value := text_of(session.get(name)):
                yield candidate_of(
                    kinds.AWS_SESSION, value, f"Credentials.{name}", opens=opens, used_by=_USERS
                )
        if not session and not start_url:
            for name, other in document.items():
                if isinstance(other, str):
                    yield from classify(name, other, name, used_by=_USERS)


def unix_time(value: Any) -> int | None:
    """Return the Unix time, in seconds, of an RFC 3339 text; None if the text is malformed."""
    if not isinstance(value, str):
        return None
    try:
        return int(datetime.fromisoformat(value.replace("UTC", "+00:00")).timestamp())
    except (ValueError, OverflowError):
        return None
