"""`ringfence target add --template`: templates for kinds of targets: verbs, each with an approval floor to start
from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ringfence.messages.registry import (
    ApprovalClass,
    GitOperation,
    GitRule,
    McpRule,
    ModelApi,
    ModelRule,
    RequestRule,
)


@dataclass(frozen=True, slots=True)
class Template:
    """Defaults for a target of one kind. Options of the command replace them."""

    backend: str
    verbs: dict[str, ApprovalClass]
    """With the approval floor, which no policy may go below. A verb that changes something needs a person, an
    irreversible one an operator.
    """
    requests: tuple[RequestRule, ...] = ()
    """The gateway's map from requests to verbs; the first match counts."""
    settings: Mapping[str, str | int] = field(default_factory=dict)


# --- an unknown HTTP API ----------------------------------------------------------------------------------------------

_HTTP_VERBS: Mapping[str, tuple[str, ...]] = {
    "read": ("GET", "HEAD"),
    "write": ("POST", "PUT", "PATCH"),
    "delete": ("DELETE",),
}


def _http() -> Iterator[RequestRule]:
    for verb, methods in _HTTP_VERBS.items():
        for method in methods:
            yield RequestRule(method=method, path="/", verb=verb, resource="path")
            yield RequestRule(method=method, path="/{path*}", verb=verb, resource="path/{path*}")


# --- a Model Context Protocol server with unknown tools ---------------------------------------------------------------

_MCP_CONNECTS = (
    "server/discover", "initialize", "ping", "notifications/*", "logging/setLevel", "tools/list",
    "subscriptions/listen",
)  # fmt: skip


def _mcp() -> Iterator[RequestRule]:
    for method in ("GET", "DELETE"):
        yield RequestRule(method=method, path="/mcp", verb="connect", resource="server")
    for method in _MCP_CONNECTS:
        mcp = McpRule(method=method)
        yield RequestRule(method="MCP", path="/mcp", mcp=mcp, verb="connect", resource="server")
    mcp = McpRule(method="tools/call", name="{tool*}")
    yield RequestRule(method="MCP", path="/mcp", mcp=mcp, verb="call", resource="tool/{tool*}")


# --- language models, in the shapes of OpenAI's and Anthropic's APIs --------------------------------------------------

_MODEL_PATHS: Mapping[ModelApi, tuple[str, ...]] = {
    "openai": ("/v1/chat/completions", "/v1/responses", "/v1/embeddings"),
    "anthropic": ("/v1/messages", "/v1/messages/count_tokens"),
}
_MODEL_BATCHES = {"batches": "/v1/batches", "messages/batches": "/v1/messages/batches", "files": "/v1/files"}


def _model() -> Iterator[RequestRule]:
    for api, paths in _MODEL_PATHS.items():
        for path in paths:
            for verb, rule in (
                ("generate", ModelRule(api=api)),
                ("server-tools", ModelRule(api=api, server_tools=True)),
            ):
                yield RequestRule(method="POST", path=path, model=rule, verb=verb, resource="model/{model*}")
    yield RequestRule(method="GET", path="/v1/models", verb="read", resource="models")
    yield RequestRule(method="GET", path="/v1/models/{name*}", verb="read", resource="model/{name*}")
    for resource, path in _MODEL_BATCHES.items():
        for method in ("GET", "POST", "DELETE"):
            yield RequestRule(method=method, path=path, verb="batch", resource=resource)
            yield RequestRule(
                method=method, path=f"{path}/{{path*}}", verb="batch", resource=f"{resource}/{{path*}}"
            )


# --- a Git server over smart HTTP -------------------------------------------------------------------------------------

_GIT_FLOORS: dict[GitOperation, ApprovalClass] = {
    "fetch": "none",
    "push": "sponsor",
    "tag": "sponsor",
    "delete": "operator",
    "push-other": "operator",
}


def _git() -> Iterator[RequestRule]:
    for operation in _GIT_FLOORS:
        resource = "repo/{repo*}" if operation == "fetch" else "repo/{repo*}/ref/{ref*}"
        git = GitRule(operation=operation)
        yield RequestRule(method="GIT", path="/{repo*}", git=git, verb=operation, resource=resource)


# --- GitHub's REST API ------------------------------------------------------------------------------------------------

_REPO = "/repos/{owner}/{repo}"
_NO_APPROVAL: dict[str, tuple[str, ...]] = {"event": ("COMMENT", "REQUEST_CHANGES")}
_GITHUB_READS: tuple[tuple[str, str], ...] = (
    ("metadata:read", ""),
    ("metadata:read", "/languages"),
    ("metadata:read", "/topics"),
    ("contents:read", "/contents"),
    ("contents:read", "/contents/{path*}"),
    ("contents:read", "/readme"),
    ("contents:read", "/git/{object*}"),
    ("contents:read", "/commits"),
    ("contents:read", "/commits/{ref*}"),
    ("contents:read", "/compare/{range*}"),
    ("contents:read", "/branches"),
    ("contents:read", "/branches/{branch*}"),
    ("contents:read", "/tags"),
    ("issues:read", "/issues"),
    ("issues:read", "/issues/{what*}"),
    ("issues:read", "/labels"),
    ("pulls:read", "/pulls"),
    ("pulls:read", "/pulls/{what*}"),
    ("actions:read", "/actions/runs"),
    ("actions:read", "/actions/runs/{run*}"),
    ("actions:read", "/actions/workflows"),
    ("actions:read", "/actions/workflows/{workflow*}"),
)
_GITHUB_CHANGES: tuple[tuple[str, str, str, dict[str, tuple[str, ...]] | None], ...] = (
    # CI configuration and review rules are no content like any other, although the API is the same.
    ("workflows:write", "PUT", "/contents/.github", None),
    ("workflows:write", "DELETE", "/contents/.github", None),
    ("workflows:write", "PUT", "/contents/.github/{path*}", None),
    ("workflows:write", "DELETE", "/contents/.github/{path*}", None),
    ("contents:write", "PUT", "/contents/{path*}", None),
    ("contents:write", "DELETE", "/contents/{path*}", None),
    # Objects, references and merges bring in whole trees, workflows among them; the request does not show which.
    ("git:write", "POST", "/git/{object*}", None),
    ("git:write", "PATCH", "/git/{object*}", None),
    ("git:write", "DELETE", "/git/{object*}", None),
    ("git:write", "POST", "/merges", None),
    ("git:write", "POST", "/merge-upstream", None),
    ("git:write", "PUT", "/pulls/{number}/update-branch", None),
    ("pulls:merge", "PUT", "/pulls/{number}/merge", None),
    # A review that does not say that it only comments may approve.
    ("pulls:write", "POST", "/pulls/{number}/reviews", _NO_APPROVAL),
    ("pulls:approve", "POST", "/pulls/{number}/reviews", None),
    ("pulls:write", "POST", "/pulls/{number}/reviews/{review}/events", _NO_APPROVAL),
    ("pulls:approve", "POST", "/pulls/{number}/reviews/{review}/events", None),
    ("pulls:write", "POST", "/pulls", None),
    ("pulls:write", "PATCH", "/pulls/{number}", None),
    ("pulls:write", "POST", "/pulls/{number}/comments", None),
    ("pulls:write", "POST", "/pulls/{number}/comments/{comment}/replies", None),
    ("pulls:write", "POST", "/pulls/{number}/requested_reviewers", None),
    ("issues:write", "POST", "/issues", None),
    ("issues:write", "PATCH", "/issues/{number}", None),
    ("issues:write", "POST", "/issues/{number}/comments", None),
    ("issues:write", "PATCH", "/issues/comments/{comment}", None),
    ("issues:write", "POST", "/issues/{number}/labels", None),
    ("actions:run", "POST", "/actions/workflows/{workflow}/dispatches", None),
    ("actions:run", "POST", "/actions/runs/{run}/rerun", None),
    ("actions:run", "POST", "/actions/runs/{run}/rerun-failed-jobs", None),
    ("actions:run", "POST", "/actions/runs/{run}/cancel", None),
    ("actions:run", "POST", "/dispatches", None),
)


def _github() -> Iterator[RequestRule]:
    """Yield the request rules of GitHub's API.

    A resource is named like its path: `repos/OWNER/REPO/contents/src/main.py`.
    """
    for verb, path in _GITHUB_READS:
        for method in ("GET", "HEAD"):
            yield _github_rule(verb, method, path, None)
    for verb, method, path, body in _GITHUB_CHANGES:
        yield _github_rule(verb, method, path, body)


def _github_rule(verb: str, method: str, path: str, body: dict[str, tuple[str, ...]] | None) -> RequestRule:
    whole = _REPO + path
    return RequestRule(method=method, path=whole, body=body, verb=verb, resource=whole[1:])


TEMPLATES: dict[str, Template] = {
    "postgres": Template(
        "postgres",
        {
            "read": "none",
            "select": "none",
            "usage": "sponsor",
            "write": "sponsor",
            "insert": "sponsor",
            "update": "sponsor",
            "delete": "sponsor",
            "temporary": "sponsor",
            "truncate": "operator",
            "create": "operator",
        },
    ),
    "mysql": Template(
        "mysql",
        {
            "read": "none",
            "select": "none",
            "write": "sponsor",
            "insert": "sponsor",
            "update": "sponsor",
            "delete": "sponsor",
        },
    ),
    "redis": Template("redis", {"read": "none", "write": "sponsor"}),
    "ssh": Template(
        "ssh",
        {
            "read": "none",
            "write": "sponsor",
            "terminal": "sponsor",
            "shell": "operator",
            "forward": "operator",
        },
    ),
    # A token leads to a role in a cloud or a cluster. Its holder may do everything that the role may.
    "federation": Template("jwt", {"assume": "sponsor"}),
    "http": Template(
        "http", {"read": "none", "write": "sponsor", "delete": "operator"}, requests=tuple(_http())
    ),
    "mcp": Template("http", {"connect": "none", "call": "sponsor"}, requests=tuple(_mcp())),
    # A batch names its models in a file, and a provider's tools reach whatever the provider lets them reach.
    "model": Template(
        "http",
        {"generate": "none", "read": "none", "server-tools": "operator", "batch": "operator"},
        requests=tuple(_model()),
    ),
    "git": Template(
        "http", {str(verb): floor for verb, floor in _GIT_FLOORS.items()}, requests=tuple(_git())
    ),
    "github-api": Template(
        "http",
        {
            "metadata:read": "none",
            "contents:read": "none",
            "issues:read": "none",
            "pulls:read": "none",
            "actions:read": "none",
            "contents:write": "sponsor",
            "issues:write": "sponsor",
            "pulls:write": "sponsor",
            "workflows:write": "operator",
            "git:write": "operator",
            "pulls:approve": "operator",
            "pulls:merge": "operator",
            "actions:run": "operator",
        },
        requests=tuple(_github()),
        settings={"url": "https://api.github.com", "auth": "bearer"},
    ),
}
"""By name. `docs/targets/` has a page for each."""
