"""Authentication for requests, from a source of credentials."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Final

import httpx

from ringfence.client.agent.dpop import NONCE_HEADER
from ringfence.integrations.blocking_agent import BlockingCredentialSource
from ringfence.integrations.source import PresentedAuth

try:
    import requests
    from requests.auth import AuthBase
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "ringfence.integrations.requests needs the extra 'requests': pip install 'ringfence[requests]'",
        name=error.name,
    ) from None

__all__ = ["LeaseAuth"]

_HEADERS: Final = ("Authorization", "DPoP")
_ANSWERED: Final = ("WWW-Authenticate", NONCE_HEADER)
_Flow = Generator[httpx.Request, httpx.Response, None]


class LeaseAuth(AuthBase):
    """Presents the current credential of a source with each request, with a DPoP proof if it is bound to a key.

    The credential is requested with the first request. A request is sent once more if the server demands a nonce; any
    other 401 is passed to the caller.

    ```python
    with BlockingCredentialSource(agent, ...) as source, requests.Session() as session:
        session.auth = LeaseAuth(source, origin="https://shop.example")
        session.get("https://shop.example/orders/1")
    ```
    """

    def __init__(self, source: BlockingCredentialSource, *, origin: str | None = None) -> None:
        """`origin`: the only origin that credentials go to; None sets no limit.

        Raises InvalidCallError if it is no origin.
        """
        self._source = source
        self._presented = PresentedAuth(origin)

    def __call__(self, prepared: requests.PreparedRequest) -> requests.PreparedRequest:
        """See requests.auth.AuthBase. Raises as `Agent.request`, and CredentialUseError."""
        url = prepared.url or ""
        self._presented.check(url)
        auth = self._presented.auth_of(self._source.current())
        flow = auth.sync_auth_flow(httpx.Request(prepared.method or "GET", url))
        _present(prepared, next(flow))
        position = _position(prepared.body)

        def on_response(response: requests.Response, **kwargs: Any) -> requests.Response:
            return _answered(response, flow, url, position, kwargs)

        prepared.register_hook("response", on_response)  # type: ignore[no-untyped-call]
        return prepared


def _present(prepared: requests.PreparedRequest, shown: httpx.Request) -> None:
    for name in _HEADERS:
        if name in shown.headers:
            prepared.headers[name] = shown.headers[name]


def _answered(
    response: requests.Response, flow: _Flow, url: str, position: int | None, kwargs: dict[str, Any]
) -> requests.Response:
    """The response, or that to the request sent once more with a proof that has the server's nonce."""
    if response.request.url != url:
        return response  # of where a redirect led: the proof was not for it
    headers = [(name, response.headers[name]) for name in _ANSWERED if name in response.headers]
    try:
        again = flow.send(httpx.Response(response.status_code, headers=headers))
    except StopIteration:
        return response
    if position is None:
        return response  # the body cannot be sent twice
    response.content  # noqa: B018 - read to its end, so that the connection can be used again
    response.close()
    prepared = response.request.copy()
    body: Any = prepared.body
    if hasattr(body, "seek"):
        body.seek(position)
    _present(prepared, again)
    answer: requests.Response = response.connection.send(prepared, **kwargs)
    answer.history.append(response)
    answer.request = prepared
    return answer


def _position(body: Any) -> int | None:
    """Where a body begins, as it may have to be sent twice; None if it can be read once alone."""
    if body is None or isinstance(body, str | bytes):
        return 0
    try:
        return int(body.tell())
    except (AttributeError, OSError):
        return None
