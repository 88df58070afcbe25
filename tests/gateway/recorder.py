"""A recorder of actions that is played: what the core writes without a model must be what the model writes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ringfence.messages.operations import ActionDecided


class PlayedRecorder:
    """Whoever plays it says what `record` does."""

    def record(self, event: ActionDecided) -> None:
        raise NotImplementedError

    def append(self, entry: bytes) -> None:
        key, id, traceparent, value = entry.split(b"\n", 3)
        event = ActionDecided.model_validate_json(value)
        assert event.agent_id is not None
        assert (event.agent_id.encode(), event.action_id.encode()) == (key, id)
        assert (event.traceparent or "").encode() == traceparent
        as_by_its_model = event.model_dump_json(exclude_none=True).encode()
        assert value == as_by_its_model
        self.record(event)

    def append_at_end_of_turn(self, entry: bytes, then: Callable[[bool], None]) -> None:
        """Not in this very moment, as the real one."""
        self.append(entry)
        asyncio.get_running_loop().call_soon(then, True)
