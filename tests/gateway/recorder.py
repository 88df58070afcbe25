"""A recorder of actions that is played: what the core writes without a model must be what the model writes."""

from __future__ import annotations

from ringfence.messages.operations import ActionDecided


class PlayedRecorder:
    """Whoever plays it says what `record` does."""

    def record(self, event: ActionDecided) -> None:
        raise NotImplementedError

    def keep(self, key: str, id: str, value: bytes, traceparent: str = "") -> None:
        event = ActionDecided.model_validate_json(value)
        assert (event.agent_id, event.action_id) == (key, id)
        as_by_its_model = event.model_dump_json(exclude_none=True).encode()
        assert value == as_by_its_model
        self.record(event)
