"""Which backends and settings a target can name, as far as that is known where the SDK runs."""

from __future__ import annotations

from importlib.metadata import entry_points

from ringfence.kernel.text import did_you_mean
from ringfence.messages.registry import BackendSettings
from ringfence.model.target_settings import DECLARED, ENTRY_POINTS, problems


def backend_problem(backend: BackendSettings, *, anyway: bool) -> str | None:
    """Why a target with this backend would not work, or None.

    `anyway`: the issuer has a backend of another package that is not installed here. Of such a backend, and of one that
    is installed here, the settings are not known and not checked.
    """
    installed = {point.name for point in entry_points(group=ENTRY_POINTS)}
    known = DECLARED.keys() | installed
    if backend.kind not in known and not anyway:
        near = did_you_mean(backend.kind, known) or "."
        return (
            f"there is no backend {backend.kind}{near} There are {', '.join(sorted(known))}. Where only the issuer has "
            "it, by a package of its own, add --anyway"
        )
    return "; ".join(problems(backend)) or None
