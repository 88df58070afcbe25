"""The Rego bundle, evaluated in this process: a test brings its own bundle, and needs no worker that can be killed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import regorus

from ringfence.rego.bundle import Bundle, load_bundle
from ringfence.rego.engine import ISSUANCE, Answer, PolicyFailedError, read_result
from ringfence.rego.regorus_programs import compiled, first_line

_thread: Final = ThreadPoolExecutor(1, thread_name_prefix="ringfence-rego")
"""Objects of regorus belong to the thread that made them, also when they are freed."""
_machines: dict[tuple[str, str], Any] = {}
"""By revision and entry point; touched in that thread alone. Nothing of an evaluation is left in one."""
_MOST_MACHINES: Final = 16


def _machine(bundle: Bundle, entry_point: str) -> Any:
    key = bundle.revision, entry_point
    if key not in _machines:
        machine = regorus.Rvm()
        machine.load_program(compiled(bundle.modules, entry_point))
        if len(_machines) >= _MOST_MACHINES:
            del _machines[next(iter(_machines))]
        _machines[key] = machine
    return _machines[key]


def _execute(bundle: Bundle, entry_point: str, input_json: str) -> str:
    machine = _machine(bundle, entry_point)
    machine.set_input_json(input_json)
    answer: str = machine.execute()
    return answer


class InProcessEngine:
    """A `PolicyEngine` without a process of its own. An evaluation that does not end is not stopped."""

    def __init__(self, bundle: Bundle | None = None, *, entry_point: str = ISSUANCE) -> None:
        """Compile a bundle; None takes the one that comes with Ringfence. Raises BundleError."""
        self._entry_point = entry_point
        self._bundle = bundle or load_bundle()
        self._compile()

    def _compile(self) -> None:
        _thread.submit(_machine, self._bundle, self._entry_point).result()

    @property
    def revision(self) -> str:
        """The revision of the bundle in force."""
        return self._bundle.revision

    async def start(self) -> None:
        """There is nothing to start."""

    async def use(self, bundle: Bundle) -> None:
        """Put another bundle in force. Raises BundleError."""
        before, self._bundle = self._bundle, bundle
        try:
            self._compile()
        except BaseException:
            self._bundle = before
            raise

    async def evaluate(self, input_json: bytes) -> Answer:
        """Evaluate an input (JSON). Raises PolicyFailedError."""
        try:
            answer = _thread.submit(_execute, self._bundle, self._entry_point, input_json.decode()).result()
        except RuntimeError as error:
            raise PolicyFailedError(
                f"the policy bundle could not be evaluated: {first_line(error)}"
            ) from None
        return Answer(read_result(answer), self.revision)

    async def close(self) -> None:
        """There is nothing to close."""
