"""A bundle that is changed on disk comes into force without a restart, if it is fit; else the one in force stays."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from ringfence.kernel.base import metrics
from ringfence.kernel.base.ids import digest
from ringfence.rego.bundle import OWN_BUNDLE, Bundle, BundleError, bundle_files, load_bundle
from ringfence.rego.engine import PolicyEngine, PolicyUnavailableError

log = logging.getLogger(__name__)

LOOK_S = 1.0

_Signature = tuple[tuple[str, int, int, int], ...]


class BundleWatch:
    """Looks at the files of a bundle and puts what has changed into force."""

    def __init__(
        self,
        folder: Path | None,
        engine: PolicyEngine,
        refused: Callable[[str, str], Awaitable[None]],
        *,
        look_s: float = LOOK_S,
        then: Callable[[Bundle], Awaitable[None]] | None = None,
    ) -> None:
        """Args:
            refused: is told of each bundle that did not come into force: a digest that names it, and why.
            look_s: the time between two looks.
            then: is given each bundle that came into force.
        """  # fmt: skip
        self._folder = folder or OWN_BUNDLE
        self._engine = engine
        self._refused = refused
        self._look_s = look_s
        self._then = then
        self._tried: _Signature | None = None

    async def run(self) -> None:
        """For ever."""
        seen: _Signature | None = None
        while True:
            await asyncio.sleep(self._look_s)
            before, seen = seen, _signature(self._folder)
            # Tried once the files have come to rest: half of an edit is another bundle than was meant.
            if seen == before != self._tried:
                await self._try(seen)

    async def _try(self, signature: _Signature) -> None:
        try:
            bundle = load_bundle(self._folder)
            if bundle.revision != self._engine.revision:
                await self._engine.use(bundle)
                log.warning("policy bundle %s is in force", bundle.revision)
                if self._then is not None:
                    await self._then(bundle)
        except BundleError as error:
            self._tried = signature
            metrics.POLICY_BUNDLE_REFUSED.set(1)
            log.error(
                "the policy bundle that was changed is not used, %s stays: %s", self._engine.revision, error
            )
            try:
                await self._refused(digest(repr(signature).encode()), str(error))
            except Exception:
                log.exception("that a policy bundle is not used could not be published")
        except PolicyUnavailableError as error:
            log.error("the policy bundle that was changed cannot be tried yet: %s", error)
        else:
            self._tried = signature
            metrics.POLICY_BUNDLE_REFUSED.set(0)


def _signature(folder: Path) -> _Signature:
    """What changes when a file is written, comes, or goes."""
    found = []
    for path in bundle_files(folder):
        try:
            about = path.stat()
        except OSError:
            continue
        found.append((str(path), about.st_ino, about.st_mtime_ns, about.st_size))
    return tuple(found)
