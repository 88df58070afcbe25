"""What Kafka's controller acknowledged and its broker does not show yet."""

from __future__ import annotations

import pytest

from ringfence.kernel.kafka import topics_admin
from ringfence.kernel.kafka.topics_admin import TopicError


async def test_missing_topics_are_waited_for() -> None:
    answers = [["lease.v1", "audit.v1"], ["lease.v1"], []]

    async def find() -> list[str]:
        return answers.pop(0)

    await topics_admin._until_none(find)
    assert answers == []


async def test_topic_that_does_not_appear_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topics_admin, "_SEEN_WITHIN_S", 0.1)

    async def find() -> list[str]:
        return ["lease.v1", "audit.v1"]

    with pytest.raises(TopicError, match=r"after 0\.1 s: audit\.v1, lease\.v1; look at the broker's log"):
        await topics_admin._until_none(find)
