"""Tracing in an agent's or a person's program, with the tracer that its application has set up.

The client imports it, so it imports nothing that only the server installs.
"""

from __future__ import annotations

import sys

from ringfence.kernel.tracing.api import NOT_TRACING, Tracing


def of_application() -> Tracing:
    """Return the application's tracing, or one that records nothing if the application has set up no tracer."""
    if "opentelemetry.trace" not in sys.modules:  # then no tracer can be set
        return NOT_TRACING
    from ringfence.kernel.tracing.otel import in_application

    return in_application()
