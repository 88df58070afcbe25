"""Filters what a server answers: lists and capabilities show what may be used, cache hints end with the lease. Pure.

Every list of tools, prompts, resources and tasks is filtered, whichever request it answers: a resumed stream may repeat
answers to other requests of its session.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.codes import Code
from ringfence.model.mcp.headers import (
    CACHEABLE,
    INPUT_REQUIRED,
    STATELESS,
    WITH_HANDSHAKE,
    Declared,
    declarations,
)
from ringfence.model.mcp.messages import CALL, COMPLETE, LISTED, MAX_STATE_CHARS, SUBSCRIBE

MAX_LISTED: Final = 1000
"""The most entries of one page of a list: each is matched with the request map."""

_TASKS: Final = "io.modelcontextprotocol/tasks"
_BEHIND: Final[Mapping[str, tuple[str, ...]]] = {
    "tools": ("tools/list", CALL),
    "prompts": ("prompts/list", "prompts/get"),
    "resources": ("resources/list", "resources/templates/list", "resources/read", SUBSCRIBE),
    "completions": (COMPLETE,),
}
"""By capability of a server: the methods that it stands for. It is shown if one of them may be used."""
_SHOWN: Final = frozenset({"logging", "experimental"})
"""Capabilities without methods of their own."""


class UnreadableResultError(RingfenceError):
    """Raised when a server's message cannot be understood for certain. Its text is for the client too."""

    code = Code.TARGET_UNREADABLE


class TooLongListError(RingfenceError):
    """Raised when a page of a list has too many entries."""

    code = Code.TARGET_TOO_LARGE


@dataclass(frozen=True, slots=True)
class Grants:
    """What the sender of a request may see of the answers. Functions of the lease that allowed it."""

    is_visible: Callable[[str, str], bool]
    """Whether a lease may allow a method for a name, with some arguments."""
    is_offered: Callable[[str], bool]
    """Whether a lease may allow a method for some name."""
    fresh_ms: Callable[[], int]
    """The time until the first lease that shaped the answer ends, in milliseconds."""
    seal_state: Callable[[str | None], str]
    """Seals the server's state to the sender and the call."""
    bind_task: Callable[[str], bool]
    """Binds a task of the server to the lease. False if it is another lease's."""
    owns_task: Callable[[str], bool]
    """Whether a task of the server is the lease's."""
    learn_headers: Callable[[str, Declared], None]
    """Keeps the `x-mcp-header` declarations of a tool."""


class ResultFilter:
    """Filters the messages that answer one request."""

    def __init__(
        self, method: str | None, id: str | int | None, revision: str | None, grants: Grants
    ) -> None:
        """`method` and `id` of the request; None if it opened a stream. `revision`: as the request stated it."""
        self._method = method
        self._id = id
        self._stateless = revision == STATELESS
        self._grants = grants

    def apply(self, message: dict[str, Any]) -> bool | None:
        """Filter a message in place. Returns whether it was changed; None if it must not be shown at all.

        Raises UnreadableResultError, TooLongListError.
        """
        if "method" in message:
            return self._filter_unasked(message)
        if (
            self._stateless
            and message.get("id") != self._id
            and not ("error" in message and message.get("id") is None)
        ):
            raise UnreadableResultError("it answers another request than the one that was sent")
        result = message.get("result")
        if not isinstance(result, dict):
            return False
        changed = self._filter_lists(result)
        if self._method is None or message.get("id") != self._id:
            return changed
        changed |= self._filter_tasks(result)
        if not self._stateless:
            return changed
        if result.get("resultType") == "input_required":
            return self._seal(result)
        if self._method == "server/discover":
            changed |= self._filter_discovered(result)
        return self._limit_cache(result) or changed

    def _filter_unasked(self, message: dict[str, Any]) -> bool | None:
        """Filter a notification, or a request of the server."""
        if self._stateless and "id" in message:
            raise UnreadableResultError(f"a server of {STATELESS} sends no requests")
        params = message.get("params")
        uri = params.get("uri") if isinstance(params, dict) else None
        if message.get("method") == "notifications/resources/updated":
            shown = isinstance(uri, str) and any(
                self._grants.is_visible(method, uri) for method in (SUBSCRIBE, "resources/read")
            )
            return False if shown else None
        if message.get("method") in ("notifications/tasks", "notifications/tasks/status"):
            task = params.get("taskId") if isinstance(params, dict) else None
            return False if isinstance(task, str) and self._grants.owns_task(task) else None
        return False

    def _filter_lists(self, result: dict[str, Any]) -> bool:
        changed = False
        for member, (method, key) in LISTED.items():
            listed = result.get(member)
            if not isinstance(listed, list):
                continue
            if len(listed) > MAX_LISTED:
                raise TooLongListError(f"a page of a list may have {MAX_LISTED} entries")
            visible = [entry for entry in listed if self._is_visible(entry, method, key)]
            changed |= len(visible) != len(listed)
            result[member] = visible
            if member == "tools":
                for tool in visible:
                    self._grants.learn_headers(tool["name"], declarations(tool.get("inputSchema")))
        return changed

    def _is_visible(self, listed: Any, method: str, key: str) -> bool:
        name = listed.get(key) if isinstance(listed, dict) else None
        return isinstance(name, str) and self._grants.is_visible(method, name)

    def _filter_tasks(self, result: dict[str, Any]) -> bool:
        """Bind a task that the request created; show no other sender's."""
        created = result.get("task") if isinstance(result.get("task"), dict) else result
        if (
            self._method in INPUT_REQUIRED
            and isinstance(created, dict)
            and isinstance(created.get("taskId"), str)
        ):
            if not self._grants.bind_task(created["taskId"]):
                raise UnreadableResultError("the target gives out a task that is another lease's already")
            return False
        tasks = result.get("tasks")
        if self._method != "tasks/list" or not isinstance(tasks, list):
            return False
        own = [
            task
            for task in tasks
            if isinstance(task, dict)
            and isinstance(task.get("taskId"), str)
            and self._grants.owns_task(task["taskId"])
        ]
        result["tasks"] = own
        return len(own) != len(tasks)

    def _seal(self, result: dict[str, Any]) -> bool:
        state = result.get("requestState")
        if self._method not in INPUT_REQUIRED or not (state is None or isinstance(state, str)):
            raise UnreadableResultError(
                "it requires input where none can be given, or has a state that is no text"
            )
        sealed = self._grants.seal_state(state)
        if len(sealed) > MAX_STATE_CHARS:
            raise UnreadableResultError("its requestState is longer than a client could send back")
        result["requestState"] = sealed
        return True

    def _filter_discovered(self, result: dict[str, Any]) -> bool:
        before = (result.get("capabilities"), result.get("supportedVersions"))
        capabilities = result.get("capabilities")
        if isinstance(capabilities, dict):
            result["capabilities"] = {
                name: self._shown_extensions(value) if name == "extensions" else value
                for name, value in capabilities.items()
                if name in _SHOWN
                or name == "extensions"
                or any(map(self._grants.is_offered, _BEHIND.get(name, ())))
            }
        versions = result.get("supportedVersions")
        if isinstance(versions, list):
            result["supportedVersions"] = [one for one in versions if one in (*WITH_HANDSHAKE, STATELESS)]
        return before != (result.get("capabilities"), result.get("supportedVersions"))

    def _shown_extensions(self, extensions: Any) -> Any:
        """Of extensions, which may have methods that nobody decides here, only tasks are shown."""
        if not isinstance(extensions, dict):
            return {}
        return {
            name: value
            for name, value in extensions.items()
            if name == _TASKS and self._grants.is_offered("tasks/get")
        }

    def _limit_cache(self, result: dict[str, Any]) -> bool:
        """Make cache hints private, and no longer than the lease."""
        before = (result.get("cacheScope"), result.get("ttlMs"))
        if self._method in CACHEABLE or "cacheScope" in result or "ttlMs" in result:
            ttl_ms = before[1]
            known = ttl_ms if type(ttl_ms) is int and ttl_ms > 0 else 0
            result["cacheScope"], result["ttlMs"] = "private", min(known, self._grants.fresh_ms())
        return before != (result.get("cacheScope"), result.get("ttlMs"))
