"""Settings of the gateway: `RINGFENCE_GATEWAY_*`, or the table `[gateway]` of `ringfence.toml`."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from ringfence.kernel.base.settings import RingfenceSettings
from ringfence.messages.base import TargetId
from ringfence.rego.embedded import TIMEOUT_MS


def _check_port(text: str) -> str:
    port = text.rpartition(":")[2]
    if int(port) > 65_535:
        raise ValueError(f"{port} is no port: they go to 65535")
    return text


Listen = Annotated[
    str, Field(pattern=r"^(([A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\]):)?\d{1,5}$"), AfterValidator(_check_port)
]
"""`port` of this machine's loopback alone, or `host:port`."""


LOOPBACK = "127.0.0.1"


def host_and_port(listen: str) -> tuple[str, int]:
    """The two parts of a `Listen`, IPv6 without brackets."""
    host, _, port = listen.rpartition(":")
    return host.strip("[]") or LOOPBACK, int(port)


def _split_list(value: Any) -> Any:
    """`a,b` of the environment; a list in `ringfence.toml` is one already."""
    return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value


class GatewaySettings(RingfenceSettings):
    """What the gateway needs besides what every service needs."""

    model_config = SettingsConfigDict(env_prefix="RINGFENCE_GATEWAY_", extra="ignore", frozen=True)

    listen: Listen | None = None
    """Where agents come in over TCP: `8707` is that port of the loopback interface; nowhere where not set. Elsewhere it
    takes TLS."""
    names: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_list)] = ()
    """The `host[:port]` by which agents know it there: `gateway.example:8443`. Its address where none is given."""
    tls_cert_file: Path | None = None
    """The certificate (PEM) that it shows agents at `listen`."""
    tls_key_file: Path | None = None
    """Its private key (PEM); in the file of the certificate where not set."""
    tls_client_ca_file: Path | None = None
    """The authority (PEM) of certificates that say who an agent is: their one URI is its SPIFFE ID."""
    sockets: Path | None = None
    """A folder in which each task with leases for gateways has a unix socket of its own, `TASK.sock`."""
    ca_file: Path | None = None
    """Where the certificate is written by which agents that use the gateway as a proxy trust it for its targets."""
    targets_ca_file: Path | None = None
    """Authorities (PEM) that targets are verified by, besides the machine's own."""
    connections: Annotated[int, Field(ge=1, le=1_000_000)] = 4096
    """How many connections of agents there may be."""
    authz: Listen | None = None
    """Where proxies ask (`/authz/`): `8716` is that port of the loopback interface; nowhere where not set. An agent
    that reaches it gets its credentials in clear: proxies alone may."""
    bundle: Path | None = None
    """The folder of the Rego bundle; the one that comes with Ringfence where not set."""
    evaluation_timeout_ms: Annotated[int, Field(ge=10, le=60_000)] = TIMEOUT_MS
    """What one evaluation of the bundle may take. Then the request is denied."""
    observe: Annotated[tuple[TargetId, ...], NoDecode, BeforeValidator(_split_list)] = ()
    """The targets at which this gateway blocks nothing that agents can do with credentials of their own, and only
    records what it would have blocked: `partner,hub`. There is no word for all of them."""
    seal_key_file: Path | None = None
    """The private key that credentials are sealed to; `<gateway>-seal.json` in `RINGFENCE_KEY_DIR` where not set."""
    issuer: Annotated[str | None, Field(pattern=r"^https?://[^/?#]+$")] = None
    """Where this gateway reaches the issuer, where that is not `RINGFENCE_ISSUER_URL`."""
    spool: Path | None = None
    """The folder where events wait for Kafka: on a disk that outlives the process. `spool/<gateway>` beside
    `RINGFENCE_KEY_DIR` where not set."""
    spool_max_bytes: Annotated[int, Field(ge=1024 * 1024)] = 256 * 1024 * 1024
    """How large that may become. Then everything is denied."""
    approval_wait_s: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """How long a request waits for the person whose word the bundle wants. Then it is denied, and may be sent again."""
    approval_life_s: Annotated[int, Field(ge=5, le=3600)] = 300
    """How long such a question stands, and its answer counts, once: for the very same request alone."""
    agent_pending_approvals: Annotated[int, Field(ge=1, le=1000)] = 5
    """So many questions of one agent may stand, and so many of its requests may wait. Beyond that they are denied."""
    pending_approvals: Annotated[int, Field(ge=1, le=10_000)] = 200
    """The same for all agents together."""

    @model_validator(mode="after")
    def _not_in_clear(self) -> Self:
        if self.listen is not None and self.tls_cert_file is None:
            host, _ = host_and_port(self.listen)
            if host != "localhost" and not _is_loopback(host):
                raise ValueError(
                    f"RINGFENCE_GATEWAY_LISTEN: {host} is not this machine's loopback, and takes TLS; set "
                    "RINGFENCE_GATEWAY_TLS_CERT_FILE"
                )
        if self.tls_cert_file is None and (self.tls_key_file or self.tls_client_ca_file):
            raise ValueError(
                "RINGFENCE_GATEWAY_TLS_CERT_FILE: needed with the key or the authority of clients"
            )
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
