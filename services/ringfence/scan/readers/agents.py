"""Readers of coding agents: their login files (OAuth tokens, keys), and their settings of MCP servers and model keys.

Logins are those of Claude Code, Codex, Gemini, Copilot and others. Of MCP servers, it reads variables, headers and
arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from ringfence.scan import kinds
from ringfence.scan.candidates import Candidate, candidate_of, classify, host_of, of_format, of_jwt
from ringfence.scan.documents import mapping, parse_json, parse_toml, parse_yaml, sequence, text_of, walk
from ringfence.scan.findings import Access
from ringfence.scan.readers.reader import FileReader, classify_document, classify_words, once
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


SERVER_TABLES: Final = frozenset(
    (
        "mcpServers",
        "mcp_servers",
        "mcp-servers",
        "context_servers",
        "servers",
        "mcp",
        "extensions",
        "amp.mcpServers",
    )
)


@dataclass(frozen=True, slots=True)
class _Client:
    id: str
    title: str
    paths: tuple[str, ...]
    on_machine: tuple[str, ...]
    format: Literal["json", "toml", "yaml"] = "json"


_EDITORS: Final = tuple(
    f"~/{folder}/User" for folder in (
        ".config/Code", ".config/Code - Insiders", ".config/VSCodium", ".config/Cursor", ".config/Windsurf",
        ".vscode-server/data", "Library/Application Support/Code", "Library/Application Support/Cursor",
    )
)  # fmt: skip
"""Folders of VS Code and of the editors made of it, in which extensions such as Cline keep their settings."""


def _in_editors(path: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{path}" for folder in _EDITORS)


_CLIENTS: Final = (
    _Client(
        "claude-desktop", "Claude Desktop", ("claude_desktop_config.json",),
        ("~/.config/Claude/claude_desktop_config.json",
         "~/Library/Application Support/Claude/claude_desktop_config.json"),
    ),
    _Client(
        "claude-code", "Claude Code",
        (".claude.json", ".claude/settings.json", ".claude/settings.local.json", ".mcp.json",
         "claude-code/managed-settings.json", "claude-code/managed-mcp.json"),
        ("~/.claude.json", "~/.claude/settings.json", "~/.claude/settings.local.json",
         "/etc/claude-code/managed-settings.json", "/etc/claude-code/managed-mcp.json"),
    ),
    _Client("cursor", "Cursor", (".cursor/mcp.json",), ("~/.cursor/mcp.json",)),
    _Client(
        "vscode", "VS Code",
        (".vscode/mcp.json", ".vscode/settings.json", "User/mcp.json", "User/settings.json", "profiles/*/mcp.json",
         "*.code-workspace", "devcontainer.json"),
        (*_in_editors("mcp.json"), *_in_editors("settings.json"), *_in_editors("profiles/*/mcp.json")),
    ),
    _Client(
        "windsurf", "Windsurf", ("windsurf/mcp_config.json", ".codeium/mcp_config.json"),
        ("~/.codeium/windsurf/mcp_config.json", "~/.codeium/mcp_config.json"),
    ),
    _Client("zed", "Zed", ("zed/settings.json", ".zed/settings.json"), ("~/.config/zed/settings.json",)),
    _Client(
        "antigravity", "Antigravity",
        ("antigravity/mcp_config.json", "antigravity-cli/mcp_config.json", ".gemini/config/mcp_config.json",
         ".agents/mcp_config.json"),
        ("~/.gemini/antigravity/mcp_config.json", "~/.gemini/antigravity-cli/mcp_config.json",
         "~/.gemini/config/mcp_config.json"),
    ),
    _Client(
        "gemini-cli", "Gemini CLI",
        (".gemini/settings.json", "gemini-cli/settings.json", "gemini-cli/system-defaults.json",
         "gemini-extension.json"),
        ("~/.gemini/settings.json", "~/.gemini/extensions/*/gemini-extension.json", "/etc/gemini-cli/settings.json",
         "/etc/gemini-cli/system-defaults.json"),
    ),
    _Client("qwen-code", "Qwen Code", (".qwen/settings.json",), ("~/.qwen/settings.json",)),
    _Client(
        "cline", "Cline", ("cline_mcp_settings.json", ".cline/data/settings/providers.json"),
        (*_in_editors("globalStorage/saoudrizwan.claude-dev/settings/cline_mcp_settings.json"),
         "~/.cline/data/settings/cline_mcp_settings.json", "~/.cline/data/settings/providers.json"),
    ),
    _Client(
        "kilo-code", "Kilo Code",
        ("kilocode.kilo-code/settings/mcp_settings.json", ".kilocode/cli/global/settings/mcp_settings.json",
         ".kilocode/mcp.json", "kilo.json", "kilo.jsonc"),
        (*_in_editors("globalStorage/kilocode.kilo-code/settings/mcp_settings.json"),
         "~/.kilocode/cli/global/settings/mcp_settings.json", "~/.config/kilo/kilo.json", "~/.config/kilo/kilo.jsonc"),
    ),
    _Client(
        "roo-code", "Roo Code", ("settings/mcp_settings.json", ".roo/mcp.json"),
        _in_editors("globalStorage/rooveterinaryinc.roo-cline/settings/mcp_settings.json"),
    ),
    _Client(
        "amazon-q", "Amazon Q", ("amazonq/mcp.json", ".amazonq/mcp.json", "amazonq/cli-agents/*.json"),
        ("~/.aws/amazonq/mcp.json", "~/.aws/amazonq/cli-agents/*.json"),
    ),
    _Client("junie", "Junie", (".junie/mcp/mcp.json",), ("~/.junie/mcp/mcp.json",)),
    _Client("lm-studio", "LM Studio", (".lmstudio/mcp.json",), ("~/.lmstudio/mcp.json",)),
    _Client(
        "kiro", "Kiro", (".kiro/settings/mcp.json", ".kiro/agents/*.json"),
        ("~/.kiro/settings/mcp.json", "~/.kiro/agents/*.json"),
    ),
    _Client("copilot-cli", "Copilot CLI", (".copilot/mcp-config.json",), ("~/.copilot/mcp-config.json",)),
    _Client(
        "opencode", "opencode", ("opencode.json", "opencode.jsonc"),
        ("~/.config/opencode/opencode.json", "~/.config/opencode/opencode.jsonc"),
    ),
    _Client(
        "crush", "Crush", ("crush.json", ".crush.json"),
        ("~/.config/crush/crush.json", "~/.local/share/crush/crush.json"),
    ),
    _Client("amp", "Amp", ("amp/settings.json",), ("~/.config/amp/settings.json",)),
    _Client(
        "droid", "Droid", (".factory/mcp.json", ".factory/config.json", ".factory/settings.json"),
        ("~/.factory/mcp.json", "~/.factory/config.json", "~/.factory/settings.json"),
    ),
    _Client("gitlab-duo", "GitLab Duo", (".gitlab/duo/mcp.json",), ("~/.gitlab/duo/mcp.json",)),
    _Client(
        "openclaw", "OpenClaw", (".openclaw/openclaw.json", ".openclaw/agents/*/agent/auth-profiles.json"),
        ("~/.openclaw/openclaw.json", "~/.openclaw/agents/*/agent/auth-profiles.json"),
    ),
    _Client("continue-json", "Continue", (".continue/config.json",), ("~/.continue/config.json",)),
    _Client(
        "codex", "Codex", (".codex/config.toml", ".codex/*.config.toml", "codex/config.toml"),
        ("~/.codex/config.toml", "~/.codex/*.config.toml", "/etc/codex/config.toml"), "toml",
    ),
    _Client(
        "continue", "Continue", (".continue/config.yaml", ".continue/mcpServers/*.yaml", ".continue/models/*.yaml"),
        ("~/.continue/config.yaml", "~/.continue/mcpServers/*.yaml"), "yaml",
    ),
    _Client(
        "goose", "Goose", ("goose/config.yaml", "goose/secrets.yaml"),
        ("~/.config/goose/config.yaml", "~/.config/goose/secrets.yaml"), "yaml",
    ),
    _Client("aider", "aider", (".aider.conf.yml",), ("~/.aider.conf.yml",), "yaml"),
)  # fmt: skip


class McpClientReader(FileReader):
    """Reads the settings of one client."""

    def __init__(self, client: _Client) -> None:
        self.name = f"mcp-{client.id}"
        self.paths = client.paths
        self.on_machine = client.on_machine
        self.user = client.title
        self._client = client

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        if self._client.format == "toml":
            documents: list[Any] = [parse_toml(file.text)]
        elif self._client.format == "yaml":
            documents = parse_yaml(file.text)
        else:
            documents = [parse_json(file.text)]
        for document in documents:
            yield from once(self._of_document(document))

    def _of_document(self, document: Any) -> Iterator[Candidate]:
        title = self._client.title
        for _ in walk(document):  # raises for one that is too deep or too large
            pass
        for path, server, settings in _servers(document, ()):
            yield from _of_server(settings, ".".join(path), f"{title}: MCP server {server}")
        yield from classify_document(document, used_by=(title,))


def _servers(document: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    for name, value in mapping(document).items():
        if name in SERVER_TABLES:
            named = mapping(value).items() or (
                (str(mapping(one).get("name", n)), one) for n, one in enumerate(sequence(value))
            )
            for server, settings in named:
                if {"command", "cmd", "url", "serverUrl", "httpUrl", "env", "envs", "headers", "args"} & set(
                    mapping(settings)
                ):
                    yield (*path, name, server), server, settings
        if isinstance(value, dict):
            yield from _servers(value, (*path, name))


def _of_server(settings: Any, field: str, used_by: str) -> Iterator[Candidate]:
    server = mapping(settings)
    url = (
        text_of(server.get("url")) or text_of(server.get("serverUrl")) or text_of(server.get("httpUrl")) or ""
    )
    used = {"used_by": (used_by,)}
    opens = Access(host=host_of(url)) if url else Access()
    for table in ("env", "envs", "environment"):
        for name, value in mapping(server.get(table)).items():
            if isinstance(value, str):
                yield from classify(name, value, f"{field}.{table}.{name}", **used)
    for table in ("headers", "http_headers", "requestOptions"):
        for name, value in mapping(server.get(table)).items():
            if isinstance(value, str):
                yield from classify(name, value, f"{field}.{table}.{name}", opens=opens, **used)
    command = server.get("command")
    words = [one for one in (*sequence(command), *sequence(server.get("args"))) if isinstance(one, str)]
    if isinstance(mapping(command).get("args"), list):  # older Zed
        words += [one for one in mapping(command)["args"] if isinstance(one, str)]
    yield from classify_words(words, f"{field}.args", **used)
    for name, value in mapping(mapping(command).get("env")).items():
        if isinstance(value, str):
            yield from classify(name, value, f"{field}.command.env.{name}", **used)
    for name in ("bearer_token", "apiKey", "api_key"):
        if isinstance(value := server.get(name), str):
            yield from classify(name, value, f"{field}.{name}", opens=opens, **used)
    if "?" in url:
        for pair in url.partition("?")[2].split("&"):
            name, _, value = pair.partition("=")
            yield from classify(name, value, f"{field}.url.{name}", opens=opens, **used)
    yield from classify("url", url, f"{field}.url", **used)


def readers() -> tuple[McpClientReader, ...]:
    return tuple(map(McpClientReader, _CLIENTS))
