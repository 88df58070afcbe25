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
    if backend.kind not in _backend_kinds() and not anyway:
        return (
            f"{unknown_backend_message(backend.kind)}. Where only the issuer has it, by a package of its own, "
            "add --anyway"
        )
    return "; ".join(problems(backend)) or None


def unknown_backend_message(kind: str) -> str:
    """That there is no such backend, with the nearest that there is."""
    kinds, name = sorted(_backend_kinds()), visible_name(kind[:64]) or "without a name"
    return f"there is no backend {name}{did_you_mean(kind, kinds) or '.'} There are {', '.join(kinds)}"


def _backend_kinds() -> set[str]:
    return CREDENTIAL_KINDS.keys() | {point.name for point in entry_points(group=ENTRY_POINTS)}
