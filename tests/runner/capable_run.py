"""`ringfence` whose runs have their command as root of its namespace, with every capability there.

As if the command had found a way to become that: what keeps it then is the filter of system calls alone.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from ringfence.cli.main import main
from ringfence.runner.lifecycle.execution import RunExecution
from ringfence.runner.sandbox import bubblewrap


def give_all_capabilities() -> None:
    arguments, spec = bubblewrap._Start._arguments, RunExecution._spec

    def with_capabilities(*given: Any) -> list[str]:
        made = arguments(*given)
        made[made.index("--cap-drop")] = "--cap-add"
        return made

    def as_root(*given: Any) -> Any:
        return dataclasses.replace(spec(*given), root_inside=True)

    bubblewrap._Start._arguments = with_capabilities  # type: ignore[assignment, method-assign]
    RunExecution._spec = as_root  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    give_all_capabilities()
    sys.exit(main())
