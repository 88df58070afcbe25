"""Strict parser of Model Context Protocol messages: no other reader can read them differently.

Pure.

A message is one JSON-RPC 2.0 object. A batch, which the protocol no longer has, is refused. Names that differ only in
case from others, or from meaningful ones, are refused too: some JSON readers take `Name` for `name`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.strict_json import MAX_EXACT, case_folded, json_object
from ringfence.messages.codes import Code

RESPONSE: Final = "response"
"""Stands for the method of a response to a request of the server. A response has no method."""
CALL: Final = "tools/call"
COMPLETE: Final = "completion/complete"
LISTEN: Final = "subscriptions/listen"
SUBSCRIBE: Final = "resources/subscribe"
"""Also stands for each resource that `subscriptions/listen` names, so that one rule counts in every revision."""
NAMED_BY: Final[Mapping[str, str]] = {
    "tools/call": "name", "prompts/get": "name",
    "resources/read": "uri", "resources/subscribe": "uri", "resources/unsubscribe": "uri",
    "tasks/get": "taskId", "tasks/result": "taskId", "tasks/update": "taskId", "tasks/cancel": "taskId",
    "completion/complete": "ref",
}  # fmt: skip
"""By method: the member of `params` that names the tool, prompt, resource or task. A `ref` has the name inside."""
TASK_METHODS: Final = frozenset(method for method, member in NAMED_BY.items() if member == "taskId")
_READ_METHODS: Final = frozenset({
    "initialize", "ping", "tools/list", "prompts/list", "prompts/get", "resources/list", "resources/templates/list",
    "resources/read", "completion/complete", "server/discover", "subscriptions/listen", "tasks/get", "tasks/result",
    "tasks/list",
})  # fmt: skip
"""Methods that change nothing at the server, according to the protocol."""
_NOTIFIES: Final = "notifications/"
WITH_ARGUMENTS: Final = frozenset({"tools/call", "prompts/get", "completion/complete"})
LISTED: Final[Mapping[str, tuple[str, str]]] = {
    "tools": ("tools/call", "name"), "prompts": ("prompts/get", "name"), "resources": ("resources/read", "uri"),
}  # fmt: skip
"""By member of a list result: the method that uses an entry, and the member that names the entry."""
VERSION_KEY: Final = "io.modelcontextprotocol/protocolVersion"
CAPABILITIES_KEY: Final = "io.modelcontextprotocol/clientCapabilities"

_GONE: Final = frozenset({"resources/subscribe", "resources/unsubscribe", "tasks/result"})
"""Methods that name something, and that revisions which state themselves in `_meta` do not have."""
_TOP: Final = frozenset({"jsonrpc", "id", "method", "params", "result", "error"})
_MEANT: Final[Mapping[str, str]] = {
    case_folded(name): name
    for name in (
        "name", "uri", "arguments", "_meta", "taskId", "ref", "argument", "context", "notifications", "task",
        "requestState", "inputResponses",
    )
}  # fmt: skip
_LISTENS: Final = frozenset({"toolsListChanged", "promptsListChanged", "resourcesListChanged"})
_MAX_NAME_CHARS: Final = 1024
MAX_STATE_CHARS: Final = 256 * 1024
"""The longest `requestState`, sealed as a client has it."""
_MAX_ID_CHARS: Final = 256
MAX_SUBSCRIBED: Final = 16
"""The most resources and tasks that one `subscriptions/listen` may name: each is decided by itself."""


class McpMessageError(RingfenceError):
    """Raised when a body is not exactly one message that can be read unambiguously. The message says what is wrong."""

    def __init__(self, code: Code, message: str, *, id: str | int | None = None) -> None:
        super().__init__(message, code=code)
        self.id = id
        """The id of the request, if that could be read."""


@dataclass(frozen=True, slots=True)
class McpMessage:
    """One message from a client to a server."""

    kind: Literal["request", "notification", "response"]
    method: str
    """The JSON-RPC method; `RESPONSE` for a response."""
    id: str | int | None = None
    name: str | None = None
    """The name of the tool or prompt, the URI of the resource, or the id of the task."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    """All params, as they were sent."""

    @property
    def only_asks(self) -> bool:
        """Return whether the message changes nothing at any server. For a tool call that is unknown, so it is False."""
        return self.method in _READ_METHODS or self.method.startswith(_NOTIFIES)

    @property
    def meta(self) -> Mapping[str, Any]:
        """`params._meta`; empty if there is none."""
        meta: Mapping[str, Any] = self.params.get("_meta", {})
        return meta

    @property
    def request_state(self) -> str | None:
        """`params.requestState`, which a client echoes (2026-07-28)."""
        state: str | None = self.params.get("requestState")
        return state

    @property
    def input_responses(self) -> Mapping[str, Any] | None:
        """`params.inputResponses`: what the client answers to the server's input requests (2026-07-28)."""
        responses: Mapping[str, Any] | None = self.params.get("inputResponses")
        return responses

    def parts(self) -> tuple[McpMessage, ...]:
        """All messages whose permissions this one needs together: itself, and what it asks for besides.

        `subscriptions/listen` needs that of each resource (`resources/subscribe`) and task (`tasks/get`) that it names.
        Input responses need that of a response, which they are.
        """
        more: list[McpMessage] = []
        if self.method == LISTEN:
            listened = self.params["notifications"]
            more += (
                McpMessage("request", SUBSCRIBE, name=uri)
                for uri in listened.get("resourceSubscriptions", ())
            )
            more += (McpMessage("request", "tasks/get", name=task) for task in listened.get("taskIds", ()))
            return (*more, self)
        if self.input_responses:
            more.append(McpMessage("response", RESPONSE))
        return (self, *more)


def read_message(body: bytes) -> McpMessage:
    """Parse a body into one message. Raises McpMessageError."""
    if body.lstrip(b" \t\r\n")[:1] == b"[":
        raise McpMessageError(Code.MCP_BATCH, "several messages at once are not taken: post each by itself")
    try:
        document = json_object(body)
    except ValueError as error:
        raise McpMessageError(
            Code.MCP_UNREADABLE, f"the message is not one JSON object: {_without_quotation(error)}"
        ) from None
    if not document.keys() <= _TOP or document.get("jsonrpc") != "2.0":
        raise invalid("it is not JSON-RPC 2.0, or has members that JSON-RPC does not know")
    id = document.get("id")
    if "id" in document and not _is_id(id):
        raise invalid("its id is neither a text nor a whole number")
    if "method" not in document:
        return _response(document, id)
    if "result" in document or "error" in document:
        raise invalid("it is a request and a response", id)
    method, params = document["method"], document.get("params", {})
    if not isinstance(method, str) or method == RESPONSE:
        raise invalid("its method is none", id)
    if not isinstance(params, dict):
        raise invalid("its params are no object", id)
    _check_params(params, id)
    name = _name(method, params, id)
    arguments = _arguments(method, params, id)
    if method == LISTEN:
        _check_listened(params.get("notifications"), id)
    kind: Literal["request", "notification"] = "request" if "id" in document else "notification"
    if (kind == "notification") != method.startswith("notifications/"):
        raise invalid("a notification has no id and a method notifications/..., a request has an id", id)
    return McpMessage(kind, method, id, name, arguments, params)


def _response(given: Mapping[str, Any], id: str | int | None) -> McpMessage:
    if id is None or "params" in given or ("result" in given) == ("error" in given):
        raise invalid("it is neither a request, nor a notification, nor a response")
    return McpMessage("response", RESPONSE, id)


def _check_params(params: Mapping[str, Any], id: str | int | None) -> None:
    """Check what the params of every method may have. Raises McpMessageError."""
    if clash(params) or any(_MEANT.get(case_folded(name), name) != name for name in params):
        raise invalid("names in its params differ by upper and lower case alone", id)
    meta = params.get("_meta", {})
    if not isinstance(meta, dict) or clash(meta):
        raise invalid("its _meta is no object, or has names that differ by upper and lower case alone", id)
    known = {case_folded(VERSION_KEY): VERSION_KEY, case_folded(CAPABILITIES_KEY): CAPABILITIES_KEY}
    if any(known.get(case_folded(key), key) != key for key in meta):
        raise invalid(
            "a name in its _meta differs by upper and lower case alone from one of the protocol", id
        )
    state = params.get("requestState")
    if "requestState" in params and not (isinstance(state, str) and len(state) <= MAX_STATE_CHARS):
        raise invalid("its requestState is no text, or a longer one than there can be", id)
    if "inputResponses" in params and not isinstance(params["inputResponses"], dict):
        raise invalid("its inputResponses are no object", id)


def _name(method: str, params: Mapping[str, Any], id: str | int | None) -> str | None:
    """Return what a request names. Raises McpMessageError."""
    if method not in NAMED_BY:
        return None
    name = _name_in_ref(params.get("ref"), id) if method == COMPLETE else params.get(NAMED_BY[method])
    if not (isinstance(name, str) and 0 < len(name) <= _MAX_NAME_CHARS):
        if method in _GONE and VERSION_KEY in params.get("_meta", {}):
            raise McpMessageError(Code.MCP_METHOD, f"the stated revision of MCP has no {method}", id=id)
        raise invalid(f"{method} needs params.{NAMED_BY[method]}, which names something", id)
    return name


def _name_in_ref(ref: Any, id: str | int | None) -> Any:
    """Return the name of a prompt, or the URI or URI template of a resource, whose argument is to be completed."""
    if not isinstance(ref, dict) or clash(ref) or not ref.keys() <= {"type", "name", "uri", "title"}:
        raise invalid("its ref is none of a prompt or a resource", id)
    if ref.get("type") == "ref/resource" and "name" not in ref:
        return ref.get("uri")
    if ref.get("type") != "ref/prompt" or "uri" in ref:
        raise invalid("its ref is none of a prompt or a resource", id)
    if "://" in str(ref.get("name")):
        raise invalid("its ref is of a prompt with the name of a resource", id)
    return ref.get("name")


def _arguments(method: str, params: Mapping[str, Any], id: str | int | None) -> Mapping[str, Any]:
    """Return the arguments of a request. Raises McpMessageError."""
    if method not in WITH_ARGUMENTS:
        return {}
    arguments = _completed(params, id) if method == COMPLETE else params.get("arguments", {})
    if not isinstance(arguments, dict) or clash(arguments):
        raise invalid(
            "its arguments are no object, or have names that differ by upper and lower case alone", id
        )
    return arguments


def _completed(params: Mapping[str, Any], id: str | int | None) -> dict[str, Any]:
    """Return the argument that is to be completed, and those that are known already, as one request's arguments."""
    argument, context = params.get("argument"), params.get("context", {})
    known = context.get("arguments", {}) if isinstance(context, dict) else None
    if (
        not isinstance(argument, dict)
        or argument.keys() != {"name", "value"}
        or not isinstance(argument["name"], str)
        or not isinstance(known, dict)
        or argument["name"] in known
    ):
        raise invalid("it does not say which argument is to be completed, or says it twice", id)
    return {**known, argument["name"]: argument["value"]}


def _check_listened(listened: Any, id: str | int | None) -> None:
    """Check what a subscription asks for. Raises McpMessageError."""
    if not isinstance(listened, dict):
        raise invalid("its params.notifications are no object", id)
    named = 0
    for member, value in listened.items():
        if member in _LISTENS and isinstance(value, bool):
            continue
        if member not in ("resourceSubscriptions", "taskIds") or not isinstance(value, list):
            raise invalid("its params.notifications have what is not known here", id)
        if not all(isinstance(name, str) and 0 < len(name) <= _MAX_NAME_CHARS for name in value):
            raise invalid(f"its params.notifications.{member} are no names", id)
        named += len(value)
    if named > MAX_SUBSCRIBED:
        raise invalid(f"it subscribes to more than {MAX_SUBSCRIBED} resources and tasks: send several", id)


def clash(names: Iterable[str]) -> bool:
    """Return whether two of the names differ only in case."""
    listed = list(names)
    return len({case_folded(name) for name in listed}) != len(listed)


def _is_id(id: Any) -> bool:
    if isinstance(id, str):
        return len(id) <= _MAX_ID_CHARS
    return isinstance(id, int) and not isinstance(id, bool) and abs(id) <= MAX_EXACT


def invalid(what: str, id: str | int | None = None) -> McpMessageError:
    """Return the refusal of a message that is none of the protocol."""
    return McpMessageError(Code.MCP_INVALID, f"the message is refused: {what}", id=id)


def _without_quotation(error: ValueError) -> str:
    """Return the error's text without what the parser quotes: that may be a secret."""
    quotable = ("nested too deeply", "no JSON object", "a name comes twice")
    return str(error) if str(error) in quotable else "it cannot be parsed"
