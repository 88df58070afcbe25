"""Numbers in the queries of HTTP APIs: a bound on what is looked at is one for whatever stands there."""

from __future__ import annotations

import pytest
from starlette.requests import Request

from ringfence.audit.index.filters import limit_of, number_of
from ringfence.audit.index.store import SqliteIndex
from ringfence.kernel.base.api_errors import CursorLostError, WrongQueryError
from ringfence.kernel.service.http import number_in

ODD = ["", "-1", "+1", "1.0", " 1", "1_0", "0x1", "²", "000000001999999999", "0" * 17 + "9" * 30, "9" * 5000]


def asked(**query: str) -> Request:
    text = "&".join(f"{name}={value}" for name, value in query.items())
    return Request({"type": "http", "query_string": text.encode(), "headers": []})


@pytest.mark.parametrize("text", ODD)
def test_number_out_of_bounds_is_refused(text: str) -> None:
    assert number_in(text, 0, 1000) is None
    with pytest.raises(WrongQueryError):
        limit_of(asked(limit=text), 100, 1000)
    with pytest.raises(WrongQueryError):
        number_of(asked(since_ms=text), "since_ms", 0, 2**53)


@pytest.mark.parametrize("number", [0, 1, 999, 1000])
def test_number_within_bounds_is_accepted(number: int) -> None:
    assert number_in(str(number), 0, 1000) == number
    assert number_in("1001", 0, 1000) is None


@pytest.mark.parametrize("number", ["9" * 19, "9" * 5000])
def test_a_cursor_beyond_all_numbers_is_none(number: str) -> None:
    index = SqliteIndex(None)
    own = str(index.page(None, None, 1).after).partition(".")[0]
    assert index.page(None, f"{own}.{number}.{number}", 1).events == []
    with pytest.raises(CursorLostError):
        index.actions(None, (0, 1), f"{own}.{number}.{number}", 1)
    with pytest.raises(CursorLostError):
        index.export(None, (0, 1), f"{number}.uid", 1)
    with pytest.raises(CursorLostError):
        index.older(None, f"{number}.uid", 1)
    with pytest.raises(CursorLostError):
        index.older(None, f"{number}.uid", 1)
