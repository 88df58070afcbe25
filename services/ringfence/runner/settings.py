"""Settings of the runner: `RINGFENCE_RUNNER_*`, or the table `[runner]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from ringfence.kernel.base.settings import RingfenceSettings


class RunnerSettings(RingfenceSettings):
    """Settings that only the service `runner` reads."""

    model_config = SettingsConfigDict(env_prefix="RINGFENCE_RUNNER_", extra="ignore", frozen=True)

    pool_file: Path
    """The pool that this runner takes orders for, and what these may ask for (TOML, or JSON in a file `.json`)."""
    drain_s: Annotated[float, Field(ge=0, le=86_400)] = 0.0
    """How long runs may go on after SIGTERM, in seconds. Then they are ended."""
