"""A body counts as JSON where its head leaves no other reading, and else as nothing that was seen."""

from __future__ import annotations

import pytest

from ringfence.gateway.dataplane.request_reader import is_json


@pytest.mark.parametrize(
    ("content_type", "coding"),
    [
        ("application/json", None),
        ("application/json", "identity"),
        ("Application/JSON", ""),
        ("application/json; charset=utf-8", None),
        ('application/json;charset="UTF-8"', None),
        ("application/json ; charset=utf8; q=1", None),
        ("application/vnd.github+json", None),
        ("application/merge-patch+json; v=1", None),
    ],
)
def test_json_content_types_are_recognised(content_type: str, coding: str | None) -> None:
    assert is_json(content_type, coding)


@pytest.mark.parametrize(
    ("content_type", "coding"),
    [
        (None, None),
        ("", None),
        ("application/x-www-form-urlencoded", None),
        ("multipart/form-data; boundary=x", None),
        ("text/plain", None),
        ("application/xml", None),
        ("application/json", "gzip"),
        ("application/json", "identity, gzip"),
        ("application/json; charset=utf-7", None),
        ("application/json; charset=utf-16le", None),
        ("application/json; charset=utf-8; charset=utf-7", None),
        ("application/json; charset=utf-8, application/x-www-form-urlencoded", None),
        ("application/json, text/plain", None),
        ("application/json; x", None),
        ('application/json; x="a\\"; charset=utf-7"', None),
        ("application/jsonx", None),
        ("application/json5", None),
        ("xapplication/json", None),
        ("application/json;", None),
    ],
)
def test_ambiguous_content_types_are_not_json(content_type: str | None, coding: str | None) -> None:
    assert not is_json(content_type, coding)
