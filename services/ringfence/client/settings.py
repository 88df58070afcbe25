"""Settings of the SDK and the command line: `RINGFENCE_*` in the environment, or the settings file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from ringfence.kernel.base.config_file import unread_here
from ringfence.kernel.base.errors import SettingsError
from ringfence.kernel.base.settings import BusSettings, Url, load
from ringfence.messages.api import PORTS


def _path_of(value: Any) -> Any:
    """`identity = "FILE"`, or a table `[identity]` with `path = "FILE"`."""
    return value.get("path") if isinstance(value, dict) else value


class ClientSettings(BusSettings):
    """Settings of clients: where Kafka is, which identity to use, and the URLs of the services."""

    identity: Annotated[Path | None, BeforeValidator(_path_of)] = None
    """The key file (JSON, mode 0600) that says who is calling; `RINGFENCE_IDENTITY`."""
    user: Annotated[str | None, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")] = None
    """The user who signs with a passkey, for commands with `--passkey`; `RINGFENCE_USER`."""
    agent: str | None = None
    """The agent that this process is an instance of, where it enrols a key of its own; `RINGFENCE_AGENT`."""
    attest: str | None = None
    """Where its platform's identity token comes from: `file:PATH`, `github` or `gcp`; `RINGFENCE_ATTEST`."""
    attest_key_file: Path | None = None
    """Where the enrolled key is kept for a process that starts again; in memory alone where not set."""
    run_instance: Path | None = None
    """The folder with the key and the enrolment of a run's instance, `RINGFENCE_RUN_INSTANCE`. The runner sets it in
    the run's sandbox; `RINGFENCE_AGENT` says whose instance it is."""
    door: (
        Annotated[str, Field(pattern=r"^(unix:.*[^/]|https?://[A-Za-z0-9._\[\]:-]+/?)$", max_length=1024)]
        | None
    ) = None
    """Where agents reach a gateway's HTTP API instead of Kafka, `RINGFENCE_DOOR`: `http://ringfence` (by `HTTP_PROXY`),
    the URL of a gateway without a path, or `unix:PATH` of a task's socket."""
    entitlements_max_age_s: Annotated[int, Field(ge=1)] = 30 * 24 * 3600
    """As the services have it: past this age a user's entitlements count for nothing."""
    registry_url: Url = f"http://127.0.0.1:{PORTS['registry']}"
    """The URL of the HTTP API of the registry."""
    policy_url: Url = f"http://127.0.0.1:{PORTS['policy']}"
    """The URL of the HTTP API of policy."""
    issuer_url: Url = f"http://127.0.0.1:{PORTS['issuer']}"
    """The URL of the HTTP API of the issuer."""
    revoker_url: Url = f"http://127.0.0.1:{PORTS['revoker']}"
    """The URL of the HTTP API of the revoker."""
    audit_url: Url = f"http://127.0.0.1:{PORTS['audit']}"
    """The URL of the HTTP API of audit."""
    gateway_url: Url = f"http://127.0.0.1:{PORTS['gateway']}"
    """The URL of the HTTP API of a gateway."""
    gateway_sockets: Path | None = None
    """The folder with the gateway's socket for each task, for `ringfence gateway connect`."""
    gateway_ca_file: Path | None = None
    """The gateway's CA certificate (PEM), for the programs that `ringfence gateway connect` is for."""
    runner_key_file: Path | None = None
    """The key file of this machine's runner, for `ringfence run`; `ringfence init --add-runner` makes it."""
    runner_state: Path | None = None
    """The folder with the runner's records of started sandboxes; `~/.local/state/ringfence/runner` where not set."""
    runner_oci_socket: Path | None = None
    """The API socket of Podman or Docker, for runs in containers; the usual ones are looked for where not set."""
    runner_oci_runtime: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None
    """The container runtime, as the engine names it, such as `runsc`; the engine's default where not set."""


def load_settings(settings: ClientSettings | None = None) -> ClientSettings:
    """Return `settings`, or read them from the environment and the settings file.

    Raises SettingsError if the trust root is not pinned.
    """
    settings = settings or load(ClientSettings)
    if not settings.trust_root:
        raise SettingsError(
            "RINGFENCE_TRUST_ROOT is not set: without the fingerprint of the trust root nobody can be believed; "
            f"set it to what 'ringfence init' printed{unread_here()}"
        )
    return settings
