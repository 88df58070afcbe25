"""Settings of the SDK and the command line: `RINGFENCE_*` in the environment, or the settings file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from ringfence.kernel.base.settings import BusSettings, Url
from ringfence.messages.api import PORTS


def _path_of(value: Any) -> Any:
    """`identity = "FILE"`, or a table `[identity]` with `path = "FILE"`."""
    return value.get("path") if isinstance(value, dict) else value


class ClientSettings(BusSettings):
    """Settings of clients: where Kafka is, which identity to use, and the URLs of the services."""

    identity: Annotated[Path | None, BeforeValidator(_path_of)] = None
    """The key file (JSON, mode 0600) that says who is calling; `RINGFENCE_IDENTITY`."""
    agent: str | None = None
    """The agent that this process is an instance of, where it enrols a key of its own; `RINGFENCE_AGENT`."""
    attest: str | None = None
    """Where its platform's identity token comes from: `file:PATH`, `github` or `gcp`; `RINGFENCE_ATTEST`."""
    attest_key_file: Path | None = None
    """Where the enrolled key is kept for a process that starts again; in memory alone where not set."""
    door: (
        Annotated[str, Field(pattern=r"^(unix:.*[^/]|https?://[A-Za-z0-9._\[\]:-]+/?)$", max_length=1024)]
        | None
    ) = None
    """Where agents reach a gateway's HTTP API instead of Kafka, `RINGFENCE_DOOR`: `http://ringfence` (by `HTTP_PROXY`),
    the URL of a gateway without a path, or `unix:PATH` of a task's socket."""
    entitlements_max_age_s: Annotated[int, Field(ge=1)] = 30 * 24 * 3600
    """As the services have it: past this age a user's entitlements count for nothing."""
    registry_url: Url = f"http://127.0.0.1:{PORTS['registry']}"
    policy_url: Url = f"http://127.0.0.1:{PORTS['policy']}"
    issuer_url: Url = f"http://127.0.0.1:{PORTS['issuer']}"
    revoker_url: Url = f"http://127.0.0.1:{PORTS['revoker']}"
    audit_url: Url = f"http://127.0.0.1:{PORTS['audit']}"
    gateway_url: Url = f"http://127.0.0.1:{PORTS['gateway']}"
