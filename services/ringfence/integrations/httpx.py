"""Authentication for httpx, from a source of credentials."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator

import httpx

from ringfence.client.errors import InvalidCallError
from ringfence.integrations.blocking_agent import BlockingCredentialSource
from ringfence.integrations.source import CredentialSource, PresentedAuth

__all__ = ["LeaseAuth"]


class LeaseAuth(httpx.Auth):
    """Presents the present credential of a source with each request, with a DPoP proof where it is bound to a key.

    The credential is requested with the first request. A 401 is passed to the caller.

    ```python
    async with CredentialSource(agent, ...) as source:
        async with httpx.AsyncClient(auth=LeaseAuth(source, origin="https://shop.example")) as http:
            await http.get("https://shop.example/orders/1")
    ```
    """

    def __init__(
        self, source: CredentialSource | BlockingCredentialSource, *, origin: str | None = None
    ) -> None:
        """Args:
            source: a `BlockingCredentialSource` for `httpx.Client`.
            origin: the only origin that credentials go to, such as `https://shop.example`; None sets no limit.

        Raises InvalidCallError if `origin` is no origin.
        """  # fmt: skip
        self._source = source
        self._presented = PresentedAuth(origin)

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """See httpx.Auth. Raises as `Agent.request`, and CredentialUseError."""
        if not isinstance(self._source, CredentialSource):
            raise InvalidCallError("httpx.AsyncClient takes a CredentialSource, httpx.Client a blocking one")
        self._presented.check(str(request.url))
        auth = self._presented.auth_of(await self._source.current())
        flow = auth.async_auth_flow(request)
        try:
            outgoing = await anext(flow)
            while True:
                response = yield outgoing
                try:
                    outgoing = await flow.asend(response)
                except StopAsyncIteration:
                    return
        finally:
            await flow.aclose()

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """See httpx.Auth. Raises as `Agent.request`, and CredentialUseError."""
        if not isinstance(self._source, BlockingCredentialSource):
            raise InvalidCallError(
                "httpx.Client takes a BlockingCredentialSource, httpx.AsyncClient the other"
            )
        self._presented.check(str(request.url))
        yield from self._presented.auth_of(self._source.current()).sync_auth_flow(request)
