"""The Rego bundle, evaluated in this process: a test brings its own bundle, and needs no worker that can be killed."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import regorus

from ringfence.rego.bundle import Bundle, load_bundle
from ringfence.rego.engine import ISSUANCE, Answer, PolicyFailedError, read_result
from ringfence.rego.regorus_programs import compiled, first_line


@lru_cache(maxsize=8)
def _program(revision: str, modules: tuple[tuple[str, str], ...], entry_point: str) -> Any:
    return compiled(modules, entry_point)


class InProcessEngine:
    """A `PolicyEngine` without a process of its own. An evaluation that does not end is not stopped."""

    def __init__(self, bundle: Bundle | None = None, *, entry_point: str = ISSUANCE) -> None:
        """Compile a bundle; None takes the one that comes with Ringfence. Raises BundleError."""
        self._entry_point = entry_point
        self._put_in_force(bundle or load_bundle())

    def _put_in_force(self, bundle: Bundle) -> None:
        self._machine = regorus.Rvm()
        self._machine.load_program(_program(bundle.revision, bundle.modules, self._entry_point))
        self._revision = bundle.revision

    @property
    def revision(self) -> str:
        """The revision of the bundle in force."""
        return self._revision

    async def start(self) -> None:
        """There is nothing to start."""

    async def use(self, bundle: Bundle) -> None:
        """Put another bundle in force. Raises BundleError."""
        self._put_in_force(bundle)

    async def evaluate(self, input_json: bytes) -> Answer:
        """Evaluate an input (JSON). Raises PolicyFailedError."""
        try:
            self._machine.set_input_json(input_json.decode())
            answer: str = self._machine.execute()
        except RuntimeError as error:
            raise PolicyFailedError(
                f"the policy bundle could not be evaluated: {first_line(error)}"
            ) from None
        return Answer(read_result(answer), self._revision)

    async def close(self) -> None:
        """There is nothing to close."""
