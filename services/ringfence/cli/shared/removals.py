"""Removed commands and settings, each with what to use instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

COMMANDS: Final[Mapping[str, str]] = {
    "ringfence config trust": "name the settings file with RINGFENCE_CONFIG, or move it to "
    "~/.config/ringfence/ringfence.toml",
}
"""By the command line's words."""

_CONSTANT = "it is {} now; unset it"
SETTINGS: Final[Mapping[str, str]] = {
    "RINGFENCE_AUDIT_DETECT_BACK_S": _CONSTANT.format("1 day"),
    "RINGFENCE_AUDIT_DETECT_DENIALS_S": _CONSTANT.format("60 s")
    + ", and set the number with RINGFENCE_AUDIT_DETECT_DENIALS",
    "RINGFENCE_AUDIT_DETECT_LATE_S": _CONSTANT.format("60 s"),
    "RINGFENCE_AUDIT_REMEMBERED_REQUESTS": _CONSTANT.format("20000"),
    "RINGFENCE_ISSUER_JWKS_MAX_AGE_S": _CONSTANT.format("300 s"),
    "RINGFENCE_REGISTRY_HEARTBEAT_S": _CONSTANT.format("1 s"),
    "RINGFENCE_REVOKER_PATIENCE_S": _CONSTANT.format("5 s"),
    "RINGFENCE_RUNNER_PATIENCE_S": _CONSTANT.format("5 s"),
    "RINGFENCE_SIGNALS_PUSH_TIMEOUT_S": _CONSTANT.format("10 s"),
}
"""By the name in the environment."""
