"""Validates a target's backend and its settings, as far as they are known where the SDK runs."""

from __future__ import annotations

from importlib.metadata import entry_points

from ringfence.kernel.base.text import did_you_mean, visible_name
from ringfence.messages.registry import BackendSettings
from ringfence.model.target_settings import CREDENTIAL_KINDS, ENTRY_POINTS, problems


def backend_problem(backend: BackendSettings, *, anyway: bool) -> str | None:
    """Why a target with this backend would not work; None where nothing is wrong.

    `anyway`: the issuer has a backend of another package. The settings of third-party backends are not checked.
    """
    if backend.kind not in _backend_kinds() and not anyway:
        return (
            f"{unknown_backend_message(backend.kind)}. Where only the issuer has it, by a package of its own, "
            "add --anyway"
        )
    return "; ".join(problems(backend)) or None


def unknown_backend_message(kind: str) -> str:
    """Says that there is no such backend, with the nearest name."""
    kinds, name = sorted(_backend_kinds()), visible_name(kind[:64]) or "without a name"
    return f"there is no backend {name}{did_you_mean(kind, kinds) or '.'} There are {', '.join(kinds)}"


def _backend_kinds() -> set[str]:
    return CREDENTIAL_KINDS.keys() | {point.name for point in entry_points(group=ENTRY_POINTS)}
