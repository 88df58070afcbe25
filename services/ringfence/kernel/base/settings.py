"""Settings of services and clients, from `RINGFENCE_*` environment variables and from the settings file.

The environment wins over the file. `config_file` says which file that is.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from ringfence.kernel.base.config_file import ConfigFile, read_config
from ringfence.kernel.base.errors import RingfenceError, SettingsError
from ringfence.kernel.base.secret_refs import SecretRef
from ringfence.kernel.base.text import Lines

S = TypeVar("S", bound=BaseSettings)


_FINGERPRINT = re.compile(r"[A-Za-z0-9_-]{43}")
"""A SHA-256 in base64url without padding (RFC 7638)."""


def _bootstrap(servers: str) -> str:
    """Validate `host:port[,host:port]`, so that a mistake is reported here and not by the Kafka client."""
    for server in servers.split(","):
        host, colon, port = server.strip().rpartition(":")
        if not (host if colon else port) or (colon and not _is_port(port)) or "/" in server:
            raise ValueError(f"{server!r} is not host:port")
        try:
            (host if colon else port).encode("idna")
        except UnicodeError:
            raise ValueError(
                f"{server!r} names no host: each part of a name has 1 to 63 characters"
            ) from None
    return servers


def _fingerprint(text: str) -> str:
    if text and not _FINGERPRINT.fullmatch(text):
        raise ValueError(
            f"{text!r} is no fingerprint, which has 43 letters, digits, - or _, as ringfence init prints it"
        )
    return text


def _check_command(source: str) -> None:
    """Validate the quotes of `exec:PROGRAM ARGUMENT ...`, as a shell would read them."""
    try:
        shlex.split(source)
    except ValueError as error:
        raise ValueError(f"RINGFENCE_KAFKA_SASL_TOKEN_SOURCE: {error}; correct the quotes") from None


def _is_port(text: str) -> bool:
    return text.isdecimal() and 0 < int(text) < 65_536


def _address(text: str) -> str:
    _, colon, port = text.partition(":")
    if colon and not _is_port(port):
        raise ValueError(f"{port} is no port: they go from 1 to 65535")
    return text


Url = Annotated[str, Field(pattern=r"^https?://[^\s/]\S*$")]
"""`http://host:port` or `https://...`."""


class RingfenceSettings(BaseSettings):
    """Base of all settings classes: reads the environment first, then the settings file."""

    # Deferred: a process imports more settings classes than it reads.
    model_config = SettingsConfigDict(env_prefix="RINGFENCE_", extra="ignore", frozen=True, defer_build=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _Environment(settings_cls), _TomlTable(settings_cls)


class _NotJson:
    """The value of a variable that has to be JSON and is not. It has no valid type, so validation reports it too."""


class _Environment(EnvSettingsSource):
    """The environment, without an error of its own at the first value that is no JSON."""

    def prepare_field_value(
        self, field_name: str, field: FieldInfo, value: Any, value_is_complex: bool
    ) -> Any:
        try:
            return super().prepare_field_value(field_name, field, value, value_is_complex)
        except ValueError:
            return _NotJson()


class _TomlTable(InitSettingsSource):
    """The part of the settings file that a settings class owns: the top level, or the table of its prefix.

    `RINGFENCE_POLICY_BUNDLE` in the environment is `bundle` in the table `[policy]`.
    """

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        super().__init__(settings_cls, table_of(settings_cls, read_config()))


def table_of(settings_cls: type[BaseSettings], file: ConfigFile | None) -> dict[str, Any]:
    """The table of the settings file that belongs to a settings class. Raises SettingsError."""
    table: Any = file.content if file else {}
    prefix = str(settings_cls.model_config.get("env_prefix") or "")
    for part in prefix.lower().removeprefix("ringfence_").strip("_").split("_"):
        table = table.get(part, {}) if part else table
        if file and not isinstance(table, dict):
            raise SettingsError(f"{file.path}: {part} is the table [{part}], and no value; correct it")
    return dict(table)


class BusSettings(RingfenceSettings):
    """Settings of everyone who connects to Kafka: services, agents and sponsors."""

    kafka: Annotated[str, AfterValidator(_bootstrap)] = "127.0.0.1:9092"
    """Bootstrap servers, `host:port[,host:port]`."""
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """`security.protocol`, in Kafka's own words."""
    kafka_ssl_ca_file: Path | None = None
    """The authority (PEM) that the brokers' certificates are verified by; the machine's own where not set."""
    kafka_ssl_cert_file: Path | None = None
    """The certificate (PEM) that this client shows the brokers (mutual TLS)."""
    kafka_ssl_key_file: Path | None = None
    """Its private key (PEM); in the file of the certificate where not set."""
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] = "SCRAM-SHA-512"
    """How the user proves who they are; `PLAIN` and `OAUTHBEARER` only with `SASL_SSL`."""
    kafka_sasl_username: str = ""
    """The user by which this process is known to the brokers; for a token endpoint, the client id."""
    kafka_sasl_password: SecretRef | None = None
    """The place of the password, or of the client secret: `env:NAME`, or `file:PATH` of mode 0600."""
    kafka_sasl_token_source: Annotated[
        str, Field(pattern=r"^(https://[^\s/@]+(/\S*)?|(file|exec):\S.*)?$")
    ] = ""
    """The source of the tokens of `OAUTHBEARER`: the `https://` URL of a token endpoint, `file:PATH` of mode 0600, or
    `exec:PROGRAM ARGUMENT ...`, which prints a token. A file is read for each sign-in. No shell runs the program."""
    kafka_sasl_scope: str = ""
    """The `scope` that the token endpoint is asked for."""
    kafka_sasl_ca_file: Path | None = None
    """The authority (PEM) that the token endpoint's certificate is verified by; the machine's own where not set."""
    http_ca_file: Path | None = None
    """The authorities (PEM) that the services' HTTP is verified by; the machine's own where not set."""
    http_client_cert_file: Path | None = None
    """The certificate and key (PEM, in one file) that this process shows to services that demand one."""
    topic_prefix: Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]*$")] = "ringfence"
    """The beginning of the names of all topics and consumer groups; one for each trust domain."""
    trust_domain: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")] = "ringfence.local"
    """The SPIFFE trust domain, and the `aud` of every message."""
    trust_root: Annotated[str, AfterValidator(_fingerprint)] = ""
    """The root key's fingerprint (RFC 7638 thumbprint); `ringfence init` prints it."""
    run_grace_s: Annotated[float, Field(ge=2, le=3600)] = 60.0
    """How long a runner may be silent, in seconds; the same for runners and revokers. At half of it a runner freezes
    its sandboxes, at its end it destroys them, and revokers end the leases of its runs."""
    embedded_broker: bool = False
    """Set for the embedded broker alone, whose manners differ (`ringfence.kernel.kafka.embedded_broker`)."""

    @property
    def signs_in_with_tokens(self) -> bool:
        """True if this process shows the brokers OAuth tokens."""
        return self.kafka_security_protocol.startswith("SASL") and self.kafka_sasl_mechanism == "OAUTHBEARER"

    @model_validator(mode="after")
    def _names_itself_to_kafka(self) -> Self:
        if self.signs_in_with_tokens:
            if self.kafka_security_protocol != "SASL_SSL":
                raise ValueError(
                    "RINGFENCE_KAFKA_SASL_MECHANISM: OAUTHBEARER sends the token as it is; use it with SASL_SSL alone"
                )
            if not self.kafka_sasl_token_source:
                raise ValueError(
                    "RINGFENCE_KAFKA_SASL_MECHANISM: OAUTHBEARER needs RINGFENCE_KAFKA_SASL_TOKEN_SOURCE: the https:// "
                    "URL of a token endpoint, file:PATH or exec:PROGRAM"
                )
            _check_command(self.kafka_sasl_token_source)
        if self.kafka_security_protocol.startswith("SASL") and (
            not self.signs_in_with_tokens or self.kafka_sasl_token_source.startswith("https:")
        ):
            if not (self.kafka_sasl_username and self.kafka_sasl_password):
                raise ValueError(
                    f"RINGFENCE_KAFKA_SECURITY_PROTOCOL: {self.kafka_security_protocol} needs "
                    "RINGFENCE_KAFKA_SASL_USERNAME and RINGFENCE_KAFKA_SASL_PASSWORD (env:NAME or file:PATH)"
                )
            if self.kafka_sasl_mechanism == "PLAIN" and self.kafka_security_protocol != "SASL_SSL":
                raise ValueError(
                    "RINGFENCE_KAFKA_SASL_MECHANISM: PLAIN sends the password as it is; use it with SASL_SSL alone"
                )
        if self.kafka_ssl_key_file is not None and self.kafka_ssl_cert_file is None:
            raise ValueError(
                "RINGFENCE_KAFKA_SSL_KEY_FILE: a key without its certificate; set RINGFENCE_KAFKA_SSL_CERT_FILE"
            )
        return self


class ServiceSettings(BusSettings):
    """Settings that all services share."""

    redis_url: Annotated[str, Field(repr=False)] = "redis://127.0.0.1:6379/0"
    """Valkey or Redis with the live leases; sentinels are `redis+sentinel://host:port,host:port/NAME`, a cluster is
    `redis+cluster://host:port,host:port`."""
    redis_prefix: Annotated[str, Field(pattern=r"^[a-zA-Z0-9._-]+$")] = "rf"
    """The beginning of all keys in Redis."""
    redis_shards: Annotated[int, Field(ge=1, le=1024)] = 16
    """The number of hash slots over which leases are spread; the same for all services. After a change, Redis is
    emptied and rebuilt from Kafka."""
    key_file: Path | None = None
    """The service's private key (JSON, mode 0600); `ringfence init` makes one for each service."""
    key_dir: Path = Path(".ringfence/keys")
    """Where `<service>.json` is looked for when `key_file` is not set."""
    http: Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]+(:\d{1,5})?$"), AfterValidator(_address)] = (
        "127.0.0.1"
    )
    """`host` or `host:port` of the service's HTTP (health, metrics, API); each service has a port of its own."""
    http_tls_cert_file: Path | None = None
    """The certificate (PEM) of the service's HTTP, which then takes TLS alone. All three files are read again when
    they change."""
    http_tls_key_file: Path | None = None
    """The private key of that certificate (PEM); if not set, it is in the file of the certificate."""
    http_tls_client_ca_file: Path | None = None
    """The authorities (PEM) of clients: a client without a certificate of theirs is refused, a health check too."""
    http_connections: Annotated[int, Field(ge=8, le=65_535)] = 512
    """So many connections to it are open at once, half as many of one address. Those that bring nothing make room."""
    issuer_url: Url = "http://127.0.0.1:8703"
    """The `iss` of tokens: the URL at which the issuer is reached from outside."""
    policy_url: Url = "http://127.0.0.1:8702"
    """Where policy's HTTP is reached from outside: what AuthZEN calls the policy decision point."""
    partitions: Annotated[int, Field(ge=1, le=1024)] = 6
    """Partitions of the topics keyed by agent id."""
    replication: Annotated[int, Field(ge=1, le=9)] = 1
    """The replication factor of topics that are created; 3 on a cluster."""
    instance: str | None = None
    """A name for this replica that outlives its process (static group membership, KIP-345): after a crash it takes its
    partitions up again at once, instead of after the session timeout. No two live replicas may share one."""
    grace_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5.0
    """How old a view (of records, of revocations) may be before it denies."""
    entitlements_max_age_s: Annotated[int, Field(ge=1)] = 30 * 24 * 3600
    """Past this age a user's entitlements count for nothing."""
    task_max_s: Annotated[int, Field(ge=60)] = 30 * 24 * 3600
    """How long a new task may last, in seconds. Tasks that were assigned before stay valid to their own end."""
    state_dir: Path | None = None
    """Where indexes that can be rebuilt are kept; in memory where not set."""
    otlp_endpoint: Annotated[str, Field(pattern=r"^(https?://\S+)?$")] = ""
    """The endpoint for spans (OTLP over HTTP), such as `http://host:4318`; by default `OTEL_EXPORTER_OTLP_ENDPOINT`.
    Without both, no spans are made."""
    log_format: Annotated[str, Field(pattern=r"^(json|console)$")] = "json"
    """`json` writes one object a line to stderr, `console` text for people."""
    log_level: Annotated[str, Field(pattern=r"^(debug|info|warning|error)$")] = "info"
    """Less important log lines are left out."""

    @model_validator(mode="after")
    def _has_a_certificate(self) -> Self:
        if self.http_tls_cert_file is None and (self.http_tls_key_file or self.http_tls_client_ca_file):
            raise ValueError("RINGFENCE_HTTP_TLS_CERT_FILE: needed with the key or the authority of clients")
        return self


def load(cls: type[S], **overrides: Any) -> S:
    """Read the settings of a class. Raises SettingsError, which lists every mistake."""
    try:
        return cls(**overrides)
    except ValidationError as error:
        raise wrong(_mistakes(cls, error, overrides)) from None


def problems(cls: type[BaseSettings]) -> list[str]:
    """Every mistake in the settings of a class, one line each, with the expected value; empty if there is none."""
    try:
        cls()
    except ValidationError as error:
        return _mistakes(cls, error, {})
    except SettingsError as error:
        return [error.message]
    return []


@contextlib.contextmanager
def of_setting(name: str) -> Iterator[None]:
    """Context manager: errors raised inside become SettingsErrors that name this setting."""
    try:
        yield
    except RingfenceError as error:
        raise SettingsError(f"{name}: {error.message}") from None
    except OSError as error:
        raise SettingsError(f"{name}: {error.filename}: {error.strerror}") from None


def wrong(lines: Sequence[str]) -> SettingsError:
    """The SettingsError for a list of mistakes."""
    return SettingsError(
        Lines(
            [
                "settings are wrong; correct them in the environment or in ringfence.toml:",
                *(f"  {line}" for line in lines),
            ]
        )
    )


def _mistakes(cls: type[BaseSettings], error: ValidationError, overrides: Mapping[str, Any]) -> list[str]:
    """Every mistake, a line each. Those that concern several settings are only found once each setting is valid."""
    prefix = cls.model_config.get("env_prefix") or ""
    invalid = {str(item["loc"][0]) for item in error.errors(include_url=False) if item["loc"]}
    lines = _lines(cls, error)
    fields = {
        name: field for name, field in cls.model_fields.items() if name in invalid and not field.is_required()
    }
    if len(fields) == len(invalid):
        defaults = {name: field.get_default(call_default_factory=True) for name, field in fields.items()}
        names = [f"{prefix}{name}".upper() for name in invalid]
        try:
            cls(**{**overrides, **defaults})
        except ValidationError as remaining:
            # What names a setting that is invalid may be due to its default.
            lines += [line for line in _lines(cls, remaining) if not any(name in line for name in names)]
    return list(dict.fromkeys(lines))


def _lines(cls: type[BaseSettings], error: ValidationError) -> list[str]:
    from ringfence.kernel.base.validation_problems import problem_of

    prefix = cls.model_config.get("env_prefix") or ""
    lines = []
    for item in error.errors(include_url=False):
        if not item["loc"]:  # it concerns several settings, and names them
            lines.append(item["msg"].removeprefix("Value error, "))
            continue
        description = description_of(cls, str(item["loc"][0]))
        name = f"{prefix}{item['loc'][0]}".upper() + "".join(f" ({part})" for part in item["loc"][1:])
        message = "not JSON, which it has to be" if isinstance(item["input"], _NotJson) else problem_of(item)
        lines.append(f"{name}: {message}" + (f". It is: {description}" if description else ""))
    return lines


def description_of(cls: type[BaseSettings], field: str) -> str:
    """What stands below a setting in its class; empty where nothing does.

    Read only for an error. pydantic would parse the source of every class at import (`use_attribute_docstrings`).
    """
    for owner in cls.__mro__:
        if field not in inspect.get_annotations(owner):
            continue
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        except OSError:  # installed without sources
            return ""
        assert isinstance(tree, ast.ClassDef)
        for statement, following in pairwise(tree.body):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    if name == field:
                        return " ".join(text.split())
    return ""


def settings_classes(cls: type[RingfenceSettings]) -> Iterator[type[RingfenceSettings]]:
    """Yield a class of settings, and all its subclasses that are imported."""
    yield cls
    for narrower in cls.__subclasses__():
        yield from settings_classes(narrower)
