"""Base classes and field types of all messages, and `Topic`, which binds messages to a Kafka topic.

Permissions and scopes in messages. `ringfence.model.scope.scope` defines their meaning.

Public keys in messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import Annotated, Any, ClassVar, Final, Generic, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler

ServiceRole = Literal[
    "registry", "policy", "issuer", "revoker", "gateway", "audit", "scim", "signals", "runner", "console"
]
SERVICE_ROLES: Final[tuple[ServiceRole, ...]] = get_args(ServiceRole)
"""The services that sign messages, each under its role. A console signs nothing but tokens to read by."""

PasskeyUse = Literal["sign", "session"]
"""A use of an origin in the trust bundle: people sign messages there, or only open sessions of the console."""

_UUID = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"
UUID: Final = re.compile(_UUID)
"""The canonical text of a UUID (RFC 9562) in lower case. Use `fullmatch`."""
_NAME = r"^[a-z0-9][a-z0-9._-]{0,62}$"
_TARGET_ID = r"^[a-z0-9][a-z0-9-]{0,62}$"
_VERB = r"^[a-z][a-z0-9_.:-]{0,63}$"
_SPIFFE_ID = r"^spiffe://[a-z0-9._-]{1,255}/[A-Za-z0-9._/-]{1,255}$"

ISSUER_URL = r"^https?://[^\s?#]{1,500}$"
WORDS_FOR_PATTERNS = {
    _UUID: "must be an id as Ringfence prints it: a UUID in lower case",
    _NAME: "must be a name: up to 63 of a-z, 0-9, '.', '_', '-', the first a letter or digit; no wildcard",
    _TARGET_ID: "must be a target's name: up to 63 of a-z, 0-9, '-', the first a letter or digit; no wildcard",
    _VERB: "must be a verb: up to 64 of a-z, 0-9, '_', '.', ':', '-', the first a letter; no wildcard",
    _SPIFFE_ID: "must be a SPIFFE ID: spiffe://trust-domain/path",
    ISSUER_URL: "must be the URL of an issuer: https://HOST, with a path at most",
}
"""What a pattern wants, for people."""

NonEmpty = Annotated[str, Field(min_length=1, max_length=2048)]
"""Text that must say something."""
Sealed = Annotated[str, Field(min_length=1, max_length=1024 * 1024)]
"""Text that holds a message or a credential whole."""
Seconds = Annotated[int, Field(ge=0, lt=2**53)]
"""A moment: whole seconds since 1970-01-01 UTC (NumericDate of RFC 7519)."""
Millis = Annotated[int, Field(ge=0, lt=2**53)]
"""A moment: milliseconds since 1970-01-01 UTC, as Kafka stamps records."""
TtlSeconds = Annotated[int, Field(ge=1, le=86_400)]
"""A duration in whole seconds."""
Jws = Annotated[str, Field(pattern=r"^[\w-]+\.[\w-]+\.[\w-]+$")]
"""A JWS in compact serialisation (RFC 7515)."""
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256 in lower-case hexadecimal."""
Uuid = Annotated[str, Field(pattern=_UUID)]
"""A UUID in its canonical form, lower case."""
Name = Annotated[str, Field(pattern=_NAME)]
"""The id of a user or an agent: the last path segment of its SPIFFE ID."""
TargetId = Annotated[str, Field(pattern=_TARGET_ID)]
"""The id of a target."""
Verb = Annotated[str, Field(pattern=_VERB)]
"""What is done at a target."""
SpiffeId = Annotated[str, Field(pattern=_SPIFFE_ID)]
"""A SPIFFE ID."""


def _writable(value: Any) -> Any:
    """A JSON value that every reader can write out again. Raises ValueError if one of its numbers is none."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            left += one.values()
        elif isinstance(one, list | tuple):
            left += one
        elif (isinstance(one, int) and not -(2**63) <= one < 2**63) or (
            isinstance(one, float) and not isfinite(one)
        ):
            raise ValueError("a number that is not finite, or beyond 64 bits")
    return value


Json = Annotated[Any, AfterValidator(_writable)]
"""Whatever others write, with numbers that stay what they are (RFC 7493, 2.2)."""


def _take_lists_for_tuples(schema: Any) -> None:
    """Let a schema accept a list in the place of each of its tuples; what they contain stays strict."""
    if isinstance(schema, dict):
        if schema.get("type") == "tuple":
            schema["strict"] = False
        for part in schema.values():
            _take_lists_for_tuples(part)
    elif isinstance(schema, list):
        for part in schema:
            _take_lists_for_tuples(part)


class Message(BaseModel):
    """Immutable, strictly typed; unknown fields from newer writers are kept and written out again.

    In what limits something they are never ignored: see `ringfence.model.unknown_fields`.
    """

    __pydantic_extra__: dict[str, Json]

    # Deferred: a validator is built when a model is first used. Most programs use few of the models that they import.
    # pydantic builds it under a lock since 2.14. Before, another thread could validate by the parent's rules meanwhile.
    model_config = ConfigDict(frozen=True, extra="allow", strict=True, defer_build=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> Any:
        """Let tuples be lists, as `json.loads` gives them; strict validation of JSON takes them anyway."""
        schema = handler(source)
        _take_lists_for_tuples(schema)
        return schema


class Claims(Message):
    """The claims of a signed message. `typ` is the message's name, in the JWS header (RFC 8725, 3.11)."""

    typ: ClassVar[str]
    signed_by: ClassVar[tuple[ServiceRole, ...]] = ()
    """The roles of services that may sign it. This determines whose signature counts, who may halt a reader by
    malformed records, and who gets Write on its topic. None if only agents, people or the root sign it."""
    passkey_use: ClassVar[PasskeyUse | None] = None
    """The use of the origins on which a passkey may sign it. None: a passkey may not sign it, only a key file."""

    iss: SpiffeId
    aud: NonEmpty
    iat: Seconds
    jti: NonEmpty


class ExpiringClaims(Claims):
    """Claims that hold until `exp` only, judged against the broker's append time of the record."""

    exp: Seconds


M = TypeVar("M", bound=Message)
Encoding = Literal["jws", "json", "jwe"]


@dataclass(frozen=True, slots=True)
class Topic(Generic[M]):
    """One Kafka topic: which messages it carries and how it is kept. `name()` gives the name on the broker."""

    what: str
    models: tuple[type[M], ...]
    key: str
    encoding: Encoding
    written_by: tuple[str, ...]
    read_by: tuple[str, ...]
    retention_s: int | None = None
    """None: compacted, kept by key."""
    by_agent: bool = False
    """Keyed by agent id. All such topics have one partition count, so one consumer owns an agent in all of them."""
    min_compaction_lag_s: int = 0
    in_transactions: bool = False
    """Whether its writer writes in Kafka transactions: only what is committed counts."""
    in_the_clear: tuple[type[Claims], ...] = ()
    """Signed messages that are plain JSON there for any reader, with their signature in a header."""
    also_json: tuple[type[Message], ...] = ()
    """Payloads inside a sealed (JWE) message, and what else belongs to one, for the published schemas."""

    def name(self, prefix: str) -> str:
        """The topic's name under a prefix (`RINGFENCE_TOPIC_PREFIX`), e.g. `ringfence.lease.v1`."""
        return _topic_name(prefix, self.what)

    def signed_by(self, typ: str) -> tuple[ServiceRole, ...]:
        """The roles of services that may write a message with this `typ` here; none if it belongs to another topic."""
        return _signed_by(self.models).get(typ, ())

    @property
    def compacted(self) -> bool:
        return self.retention_s is None

    def configs(self) -> dict[str, str]:
        """The topic configuration that Kafka must have: expiry is judged by the append time.

        Kafka decompresses batches and checks their size, so readers need no codec, and cannot be made to decompress
        more than fits.
        """
        configs = {"message.timestamp.type": "LogAppendTime", "compression.type": "uncompressed"}
        if self.retention_s is None:
            configs["cleanup.policy"] = "compact"
            if self.min_compaction_lag_s:
                configs["min.compaction.lag.ms"] = str(self.min_compaction_lag_s * 1000)
        else:
            configs["cleanup.policy"] = "delete"
            configs["retention.ms"] = str(self.retention_s * 1000)
        return configs


@lru_cache(maxsize=4096)
def _topic_name(prefix: str, what: str) -> str:
    return f"{prefix}.{what}.v1"


@lru_cache(maxsize=256)
def typ_header(model: type[Claims]) -> str:
    """The `typ` header of a message: a media type without its `application/` (RFC 7515, 4.1.9)."""
    return f"ringfence.{model.typ}+jwt"


@lru_cache(maxsize=256)
def _signed_by(models: tuple[type[Message], ...]) -> dict[str, tuple[ServiceRole, ...]]:
    return {typ_header(model): model.signed_by for model in models if issubclass(model, Claims)}


class PublicJwk(Message):
    """A public key as a JWK (RFC 7517): EC P-256 (ES256, ECDH-ES), Ed25519 (EdDSA) or X25519 (ECDH-ES)."""

    kty: Literal["EC", "OKP"]
    crv: Literal["P-256", "Ed25519", "X25519"]
    x: NonEmpty
    y: str | None = None


class KeyRecord(Message):
    """A public key with its validity: it counts for what was appended in `[not_before, not_after)`."""

    kid: NonEmpty
    """Its RFC 7638 thumbprint (SHA-256, base64url)."""
    jwk: PublicJwk
    not_before: Seconds = 0
    not_after: Seconds
    use: Literal["webauthn"] | None = None
    """Set for a passkey. It signs WebAuthn assertions (ES256) and nothing else; every other key never signs one."""
    credential_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,1364}$")] | None = None
    """Of a passkey: how its authenticator knows it (base64url; 1,023 bytes at most)."""
    rp_id: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")] | None = None
    """Of a passkey: the domain that it was made for."""
    aaguid: Uuid | None = None
    """Of a passkey: the model of its authenticator. Without `attested`, only that authenticator's word."""
    backup_eligible: bool | None = None
    """Of a passkey: whether it may be synchronised to other devices. Without `attested`, only the authenticator's word.
    It never changes."""
    attested: Literal[True] | None = None
    """Of a passkey: set where who signed it in had verified its attestation against the given roots."""


PERMISSION_TYPE = "urn:ringfence:permission"
"""The `type` of a permission in `authorization_details` (RFC 9396)."""


Glob = Annotated[str, Field(min_length=1, max_length=512)]


class Permission(Message):
    """What may be done: verbs on resources (globs over the target's own names) at one target."""

    target: TargetId
    verbs: Annotated[tuple[Verb, ...], Field(min_length=1, max_length=64)]
    resources: Annotated[tuple[Glob, ...], Field(min_length=1, max_length=64)]


def permission_argument(target: str, verbs: Sequence[str], resources: Sequence[str]) -> str:
    """Return a permission as `--allow` takes it: `target:verbs:resources`, or JSON where a name has a separator."""
    if all(
        name.isascii() and name.isprintable() and not {":", ",", " "} & set(name)
        for name in (*verbs, *resources)
    ):
        return f"{target}:{','.join(verbs)}:{','.join(resources)}"
    document = {"target": target, "verbs": list(verbs), "resources": list(resources)}
    return json.dumps(document, separators=(",", ":"))


Scope = Annotated[tuple[Permission, ...], Field(max_length=64)]
"""A list of permissions. Together they allow what any of them allows."""
