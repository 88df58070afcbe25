"""The other engine: a real OPA server over HTTP, with the same bundle (`ringfence policy build`)."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from ringfence.kernel.base.errors import UnavailableError
from ringfence.rego.bundle import Bundle
from ringfence.rego.embedded import TIMEOUT_MS
from ringfence.rego.engine import (
    ISSUANCE,
    Answer,
    PolicyFailedError,
    PolicyTimeoutError,
    PolicyUnavailableError,
    result_of,
)
from ringfence.rego.opa_http import HttpPool

CONNECTIONS = 32


class OpaEngine:
    """A `PolicyEngine` that asks OPA. What it does not answer in time, by the very bundle that is known here, denies.

    OPA names the revision of the bundle that an answer comes from beside the answer (`provenance`).
    """

    def __init__(
        self,
        url: str,
        bundle: Bundle,
        *,
        timeout_ms: int = TIMEOUT_MS,
        connections: int = CONNECTIONS,
        entry_point: str = ISSUANCE,
    ) -> None:
        """Args:
            url: of the OPA server, like `http://127.0.0.1:8181`.
            bundle: what OPA is expected to evaluate.
            timeout_ms: what one answer may take, all in all.
            connections: so many requests are under way at once; others wait, and their time runs.
        """  # fmt: skip
        self._url = url.rstrip("/")
        self._bundle = bundle
        self._timeout_s = timeout_ms / 1000
        self._path = f"/v1/{entry_point.replace('.', '/')}?provenance=true"
        self._http = HttpPool(self._url, connections)

    @property
    def revision(self) -> str:
        return self._bundle.revision

    async def start(self) -> None:
        await self.use(self._bundle)

    async def use(self, bundle: Bundle) -> None:
        # Nothing is evaluated here, not even its tests: `ringfence policy build` ran them, and the engine that it runs
        # in is no part of a service that has chosen OPA (ADR 0086).
        self._bundle = bundle

    async def evaluate(self, input_json: bytes) -> Answer:
        expected = self._bundle.revision
        try:
            async with asyncio.timeout(self._timeout_s):
                status, body = await self._http.post(self._path, b'{"input":' + input_json + b"}")
        except TimeoutError:
            raise PolicyTimeoutError(
                f"OPA at {self._url} did not answer within {self._timeout_s * 1000:.0f} ms"
            ) from None
        except UnavailableError as error:
            raise PolicyUnavailableError(f"OPA at {self._url} cannot be asked: {error}") from None
        document = _document(status, body, self._url)
        revision = _revision(document)
        if revision != expected:
            raise PolicyUnavailableError(
                f"OPA at {self._url} answers by the bundle {revision or 'of no revision'}, and the one in force here "
                f"is {expected}: give it what `ringfence policy build` makes"
            )
        return Answer(result_of(document.get("result")), revision)

    async def close(self) -> None:
        self._http.close()


def _document(status: int, body: bytes, url: str) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except ValueError:
        document = None
    if status != 200:
        # 500 is how OPA tells that the evaluation failed; anything else is about the way there.
        said = document.get("message") if isinstance(document, dict) else None
        kind = PolicyFailedError if status == 500 and said else PolicyUnavailableError
        raise kind(f"OPA at {url} answered {status}: {str(said)[:300]}")
    if not isinstance(document, dict):
        raise PolicyFailedError(f"OPA at {url} did not answer with a JSON object")
    return document


def _revision(document: dict[str, Any]) -> str | None:
    """The revision of the one bundle that OPA has; None if it has none, several, or does not say."""
    provenance = document.get("provenance")
    bundles = provenance.get("bundles") if isinstance(provenance, dict) else None
    if not isinstance(bundles, dict) or len(bundles) != 1:
        return None
    (bundle,) = bundles.values()
    revision = bundle.get("revision") if isinstance(bundle, dict) else None
    return revision if isinstance(revision, str) and revision else None
