"""Which backends and settings a target can name, as far as that is known where the SDK runs."""

from __future__ import annotations

from importlib.metadata import entry_points

from ringfence.kernel.base.text import did_you_mean, visible_name
from ringfence.messages.registry import BackendSettings
from ringfence.model.target_settings import CREDENTIAL_KINDS, ENTRY_POINTS, problems


def backend_problem(backend: BackendSettings, *, anyway: bool) -> str | None:
    """Why a target with this backend would not work, or None.

    `anyway`: the issuer has a backend of another package that is not installed here. Of such a backend, and of one that
    is installed here, the settings are not known and not checked.
    """
    if backend.kind not in _known() and not anyway:
        return (
            f"{no_backend(backend.kind)}. Where only the issuer has it, by a package of its own, add --anyway"
        )
    return "; ".join(problems(backend)) or None


def no_backend(kind: str) -> str:
    """That there is no such backend, with the nearest that there is."""
    known, name = sorted(_known()), visible_name(kind[:64]) or "without a name"
    return f"there is no backend {name}{did_you_mean(kind, known) or '.'} There are {', '.join(known)}"


def _known() -> set[str]:
    return CREDENTIAL_KINDS.keys() | {point.name for point in entry_points(group=ENTRY_POINTS)}
