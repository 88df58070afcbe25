"""Removed commands, each with what to use instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

COMMANDS: Final[Mapping[str, str]] = {
    "ringfence config trust": "name the settings file with RINGFENCE_CONFIG, or move it to "
    "~/.config/ringfence/ringfence.toml",
}
"""By the command line's words."""
