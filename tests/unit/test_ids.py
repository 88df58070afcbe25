"""Derived ids are what RFC 9562 says, whoever computes them."""

from __future__ import annotations

import uuid

from hypothesis import given
from hypothesis import strategies as st

from ringfence.kernel.base.ids import NAMESPACE, derived_id, lease_id, message_id

texts = st.text(st.characters(codec="utf-8"))


@given(texts, texts | st.integers())
def test_a_derived_id_is_the_uuid5_of_its_parts(first: str, second: str | int) -> None:
    assert derived_id(first, second) == str(uuid.uuid5(NAMESPACE, f"{first} {second}"))


@given(texts)
def test_a_lease_id_is_the_uuid5_within_its_request(jti: str) -> None:
    request_id = message_id("spiffe://acme.example/agent/bot", jti)
    assert lease_id(request_id) == str(uuid.uuid5(uuid.UUID(request_id), "lease"))
