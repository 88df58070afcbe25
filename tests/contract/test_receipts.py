"""People with a webhook have a receipt of each message that their passkey signed, wherever it is embedded."""

from __future__ import annotations

from collections.abc import Iterator

from ringfence.messages import topics
from ringfence.messages.base import Claims, Topic
from ringfence.messages.registry import KeyPossession, UserAddKey
from ringfence.policy.notifications.receipts import EMBEDDED
from ringfence.policy.subscribers import SIGNED_BY_PEOPLE


def _kinds_of(base: type[Claims]) -> Iterator[type[Claims]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _kinds_of(kind)


def test_each_message_that_a_passkey_signs_has_a_receipt() -> None:
    signed = {kind for kind in _kinds_of(Claims) if kind.passkey_use == "sign"}
    published = {model for topic in SIGNED_BY_PEOPLE for model in topic.models}
    assert signed - published - set(EMBEDDED) == {KeyPossession}
    assert "possession" in UserAddKey.model_fields  # the notice of an added key is about it


def test_receipts_are_for_all_topics_with_messages_of_passkeys() -> None:
    for topic in vars(topics).values():
        models = topic.models if isinstance(topic, Topic) else ()
        if any(issubclass(model, Claims) and model.passkey_use == "sign" for model in models):
            assert topic in SIGNED_BY_PEOPLE
