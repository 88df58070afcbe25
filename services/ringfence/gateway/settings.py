"""Settings of the gateway: `RINGFENCE_GATEWAY_*`, or the table `[gateway]` of `ringfence.toml`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from ringfence.kernel.base.http_client import is_loopback
from ringfence.kernel.base.settings import RingfenceSettings
from ringfence.messages.base import Name, TargetId
from ringfence.rego.embedded import TIMEOUT_MS


def _check_port(text: str) -> str:
    port = text.rpartition(":")[2]
    if int(port) > 65_535:
        raise ValueError(f"{port} is no port: they go to 65535")
    return text


Listen = Annotated[
    str, Field(pattern=r"^(([A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\]):)?\d{1,5}$"), AfterValidator(_check_port)
]
"""A port of the loopback interface, or `host:port`."""


LOOPBACK = "127.0.0.1"


def host_and_port(listen: str) -> tuple[str, int]:
    """Host and port of a `Listen`, IPv6 without brackets."""
    host, _, port = listen.rpartition(":")
    return host.strip("[]") or LOOPBACK, int(port)


def _split_list(value: Any) -> Any:
    """Split `a,b` of the environment. A list in `ringfence.toml` needs no splitting."""
    return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value


class GatewaySettings(RingfenceSettings):
    """Settings that only the gateway has."""

    model_config = SettingsConfigDict(env_prefix="RINGFENCE_GATEWAY_", extra="ignore", frozen=True)

    listen: Listen | None = None
    """The TCP address at which the gateway listens for agents; none if not set. `8707` is that port of the loopback
    interface. Other interfaces require TLS."""
    names: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_list)] = ()
    """The `host[:port]` by which agents reach that listener, such as `gateway.example:8443`; by default its address."""
    tls_cert_file: Path | None = None
    """The certificate (PEM) that the gateway presents to agents at `listen`."""
    tls_key_file: Path | None = None
    """The private key of that certificate (PEM); if not set, it is in the file of the certificate."""
    tls_client_ca_file: Path | None = None
    """The CA (PEM) of agents' client certificates. The only URI in such a certificate is the agent's SPIFFE ID."""
    sockets: Path | None = None
    """The folder in which each task with leases for gateways has a unix socket of its own, `TASK.sock`, and each run
    that goes on has one, `RUN.sock`."""
    runners: Annotated[tuple[Name, ...], NoDecode, BeforeValidator(_split_list)] = ()
    """The runners whose runs have sockets there: `runner-1,runner-2`; every runner's by default."""
    agent_api: bool = True
    """Whether agents reach the HTTP API for agents there: they post signed requests to `http://ringfence/v1/requests`,
    and fetch sealed replies. Needs write access to `credential.request` and `revocation.request` on Kafka."""
    ca_file: Path | None = None
    """The file to which the gateway writes its CA certificate, which agents that use it as a proxy must trust."""
    targets_ca_file: Path | None = None
    """CAs (PEM) by which targets are verified, besides those of the machine."""
    connections: Annotated[int, Field(ge=1, le=1_000_000)] = 4096
    """The most connections of agents."""
    authz: Listen | None = None
    """The address at which proxies ask for authorization (`/authz/`); none if not set. `8716` is that port of the
    loopback interface. Only proxies may reach it: an agent that does gets its credentials in clear."""
    bundle: Path | None = None
    """The folder of the Rego bundle; by default the one that comes with Ringfence."""
    evaluation_timeout_ms: Annotated[int, Field(ge=10, le=60_000)] = TIMEOUT_MS
    """The timeout of one evaluation of the bundle. After it the request is denied."""
    observe: Annotated[tuple[TargetId, ...], NoDecode, BeforeValidator(_split_list)] = ()
    """The targets at which this gateway blocks nothing that agents can do with credentials of their own, and only
    records what it would have blocked: `partner,hub`. No value stands for all targets."""
    seal_key_file: Path | None = None
    """The private key that credentials are sealed to; by default `<gateway>-seal.json` in `RINGFENCE_KEY_DIR`."""
    issuer: Annotated[str | None, Field(pattern=r"^https?://[^/?#]+$")] = None
    """The URL of the issuer, if this gateway does not reach it at `RINGFENCE_ISSUER_URL`."""
    spool: Path | None = None
    """The folder where events wait for Kafka, on a disk that outlives the process; by default `spool/<gateway>` beside
    `RINGFENCE_KEY_DIR`."""
    spool_max_bytes: Annotated[int, Field(ge=1024 * 1024)] = 256 * 1024 * 1024
    """The largest size of the spool. When it is reached, every request is denied."""
    approval_wait_s: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """The longest time for which a request waits for a required approval. Then it is denied, and may be sent again."""
    approval_life_s: Annotated[int, Field(ge=5, le=3600)] = 300
    """The time for which the question stays open and its answer counts: once, and only for exactly the same request."""
    agent_pending_approvals: Annotated[int, Field(ge=1, le=1000)] = 5
    """The most open questions of one agent, and its most waiting requests. Beyond that requests are denied."""
    pending_approvals: Annotated[int, Field(ge=1, le=10_000)] = 200
    """The same limit for all agents together."""

    @model_validator(mode="after")
    def _not_in_clear(self) -> Self:
        if self.listen is not None and self.tls_cert_file is None:
            host, _ = host_and_port(self.listen)
            if not is_loopback(host):
                raise ValueError(
                    f"RINGFENCE_GATEWAY_LISTEN: {host} is not this machine's loopback, and takes TLS; set "
                    "RINGFENCE_GATEWAY_TLS_CERT_FILE"
                )
        if self.tls_cert_file is None and (self.tls_key_file or self.tls_client_ca_file):
            raise ValueError(
                "RINGFENCE_GATEWAY_TLS_CERT_FILE: needed with the key or the authority of clients"
            )
        return self
