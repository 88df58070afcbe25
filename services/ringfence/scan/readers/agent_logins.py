"""Logins of coding agents: the OAuth tokens and keys that Claude Code, Codex, Gemini, Copilot and others keep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from ringfence.scan import kinds
from ringfence.scan.candidates import Candidate, candidate_of, of_format, of_jwt
from ringfence.scan.documents import mapping, parse_json, walk
from ringfence.scan.findings import Access
from ringfence.scan.readers.reader import FileReader
from ringfence.scan.source_files import SourceFile

_TOKENS: Final = frozenset(
    (
        "accesstoken",
        "refreshtoken",
        "idtoken",
        "oauthtoken",
        "access",
        "refresh",
        "key",
        "openaiapikey",
        "apikey",
        "token",
    )
)
_AGENTS: Final = {
    ".claude": ("Claude Code", "Anthropic", "api.anthropic.com"),
    ".codex": ("Codex", "OpenAI", "api.openai.com"),
    ".gemini": ("Gemini CLI", "Google", "googleapis.com"),
    ".qwen": ("Qwen Code", "Qwen", "chat.qwen.ai"),
    "github-copilot": ("GitHub Copilot", "GitHub", "api.github.com"),
    "opencode": ("opencode", "", ""),
    "cursor": ("Cursor", "Cursor", "api2.cursor.sh"),
}


class AgentLoginReader(FileReader):
    """Reads the login files of coding agents."""

    name = "agent-login"
    paths = (
        ".claude/.credentials.json", ".codex/auth.json", ".codex/.credentials.json", ".gemini/oauth_creds.json",
        ".gemini/mcp-oauth-tokens.json", ".qwen/oauth_creds.json", "github-copilot/apps.json",
        "github-copilot/hosts.json", "opencode/auth.json", "opencode/mcp-auth.json", "cursor/auth.json",
    )  # fmt: skip
    on_machine = (
        "~/.claude/.credentials.json", "~/.codex/auth.json", "~/.codex/.credentials.json",
        "~/.gemini/oauth_creds.json", "~/.gemini/mcp-oauth-tokens.json", "~/.qwen/oauth_creds.json",
        "~/.config/github-copilot/apps.json", "~/.config/github-copilot/hosts.json",
        "~/.local/share/opencode/auth.json", "~/.local/share/opencode/mcp-auth.json", "~/.config/cursor/auth.json",
    )  # fmt: skip

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        title, service, host = _AGENTS.get(file.parts[-2] if len(file.parts) > 1 else "", ("", "", ""))
        document = parse_json(file.text)
        for path, value in walk(document):
            name = path[-1].replace("_", "").replace("-", "").lower() if path else ""
            if name not in _TOKENS or len(value) < 16:
                continue
            opens = _facts(document, path)
            opens = replace(opens, service=service or path[0], host=host or None)
            used = {"used_by": (title,) if title else ()}
            # The provider is the field in some files: a key with a host name in it is no secret.
            field = ".".join(path)
            yield (
                of_format(value, field, opens=opens, **used)
                or of_jwt(value, field, kind=kinds.OAUTH_LOGIN, opens=opens, **used)
                or candidate_of(_kind(name, title), value, field, opens=opens, **used)
            )


def _kind(name: str, title: str) -> kinds.Kind:
    if "key" in name:
        return kinds.KEY
    return kinds.GITHUB_LOGIN if title == "GitHub Copilot" else kinds.OAUTH_LOGIN


def _facts(document: Any, path: tuple[str, ...]) -> Access:
    """Return the facts beside a token: account, scopes, expiry (Unix time in milliseconds)."""
    beside = mapping(document)
    for part in path[:-1]:
        beside = mapping(beside.get(part))
    scopes = beside.get("scopes") or beside.get("scope") or ()
    expires = beside.get("expiresAt") or beside.get("expiry_date") or beside.get("expires")
    account = beside.get("user") or beside.get("account_id")
    return Access(
        account=account if isinstance(account, str) else None,
        scopes=tuple(map(str, scopes.split() if isinstance(scopes, str) else scopes))[:50],
        expires_s=int(expires) // 1000 if isinstance(expires, int | float) and 0 < expires < 10**14 else None,
    )
