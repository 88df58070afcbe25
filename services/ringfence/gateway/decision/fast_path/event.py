"""A template for the events of allowed actions, which are most: formatted once, with places for what differs.

The result is the JSON of an `ActionDecided`, without a model in between.
"""

from __future__ import annotations

from typing import Final

import orjson

from ringfence.gateway.contract import Attempt
from ringfence.gateway.domain import Access, run_id_of_lease
from ringfence.gateway.events.recorder import act_of, digest_of, entry_head, label_of, method_of
from ringfence.messages.lease import Lease
from ringfence.model.http_targets import Action

_ID: Final = "00000000-0000-4000-8000-000000000000"
"""A placeholder for the action id."""


class AllowedEvents:
    """The events of one sender that does one action by one lease."""

    __slots__ = ("_template",)

    def __init__(
        self,
        gateway: str,
        agent_id: str,
        lease: Lease,
        action: Action,
        access: Access | None,
        attempt: Attempt,
    ) -> None:
        before: dict[str, object] = {"gateway": gateway, "agent_id": agent_id}
        if (act := act_of(lease, agent_id)) is not None:
            before["act"] = act
        before["task_id"] = lease.task_id
        if (run_id := run_id_of_lease(lease)) is not None:
            before["run_id"] = run_id
        before |= {
            "lease_id": lease.lease_id, "target_id": lease.target_id,
            "verb": action.verb, "resource": action.resource, "allowed": True, "reasons": (),
        }  # fmt: skip
        if access is not None:
            before["access"] = access
        if (method := method_of(attempt)) is not None:
            before["method"] = method
        before["request_digest"] = digest_of(attempt)
        label = label_of(attempt)
        between = {} if label is None else {"label": label}
        after = {} if lease.traceparent is None else {"traceparent": lease.traceparent}
        head = entry_head(agent_id, _ID, lease.traceparent).split(_ID.encode())
        self._template = b"".join((
            _literal(head[0]), b"%b", _literal(head[1]), b'{"action_id":"%b",', _members(before), b',"latency_us":%d,',
            _members(between), b"," if between else b"", b'"at_ms":%d', b"," if after else b"", _members(after), b"}",
        ))  # fmt: skip

    def entry(self, id: str, took_us: int, at_ms: int) -> bytes:
        """One event, as an entry of the spool. `id`: a UUID."""
        raw = id.encode()
        return self._template % (raw, raw, took_us, at_ms)


def _members(members: dict[str, object] | dict[str, str]) -> bytes:
    return _literal(orjson.dumps(members)[1:-1])


def _literal(text: bytes) -> bytes:
    return text.replace(b"%", b"%%")
