"""Tracing for an agent's or a person's program, by the tracer that its application has set up."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ringfence.kernel.tracing.api import NOT_TRACING, Tracing

if TYPE_CHECKING:
    pass


def of_application() -> Tracing:
    """What makes spans in an agent's or a person's program: by the tracer of the application, where it has set one."""
    if "opentelemetry.trace" not in sys.modules:  # nobody can have set one
        return NOT_TRACING
    from ringfence.kernel.tracing.otel import in_application

    return in_application() or NOT_TRACING
