"""A FastStream router whose subscribers receive Ringfence's messages: typed, verified, at least once.

Decodes Kafka records of one topic into messages, verifies their signatures, and follows the trust bundle in force.

`TrustReader` reads the bundle from Kafka at the first call of `store`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from aiokafka import ConsumerRecord
from faststream import AckPolicy, BaseMiddleware
from faststream.exceptions import IgnoredException, SetupError
from faststream.kafka import KafkaBroker, KafkaMessage, KafkaRouter
from faststream.kafka.schemas import Topic as KafkaTopic
from faststream.security import BaseSecurity, SASLOAuthBearer, SASLPlaintext, SASLScram256, SASLScram512
from pydantic import ValidationError

from ringfence.client.connection import READY_TIMEOUT_S
from ringfence.client.settings import ClientSettings, load_settings
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.errors import InvalidMessageError, SignatureError, UnavailableError
from ringfence.kernel.base.retry import backoff
from ringfence.kernel.base.settings import load
from ringfence.kernel.base.validation_problems import explain
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.connection import connection
from ringfence.kernel.kafka.fetch_control import fetch_options
from ringfence.kernel.kafka.record import Received, received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.kernel.service.trust_updates import apply_bundle
from ringfence.messages.audit import AuditEvent
from ringfence.messages.base import Claims, ExpiringClaims, Message, Topic, typ_header
from ringfence.messages.codes import Code
from ringfence.messages.topics import ACTION, APPROVAL_REQUEST, AUDIT, LEASE, TRUST


class TrustReader:
    """Follows the topic `trust`, from the first call of `store` until `close`."""

    def __init__(self, settings: ClientSettings) -> None:
        """Raises SettingsError if the trust root is not pinned, once `store` is called."""
        self._settings = settings
        self._clock = SystemClock()
        self._lock = asyncio.Lock()
        self._store: TrustStore | None = None
        self._follower: Follower | None = None

    async def store(self) -> TrustStore:
        """The trust store, with a bundle in force.

        Raises:
            UnavailableError: Kafka does not answer, or has no trust bundle that the pinned root signed.
            SettingsError: the trust root is not pinned.
        """
        async with self._lock:
            if self._store is None:
                self._store, self._follower = await self._started()
            return self._store

    async def moved(self) -> bool:
        """Read the topic to its end. True if that put another bundle in force."""
        if self._store is None or self._follower is None:
            return False
        version = self._store.version
        await self._follower.caught_up(READY_TIMEOUT_S)
        return self._store.version != version

    async def close(self) -> None:
        """Disconnect. `store` connects again."""
        async with self._lock:
            follower, self._follower, self._store = self._follower, None, None
            if follower is not None:
                await follower.stop()

    async def _started(self) -> tuple[TrustStore, Follower]:
        settings = load_settings(self._settings)
        store = TrustStore(settings.trust_domain, settings.trust_root)
        follower = Follower(settings, [TRUST], self._reader(store))
        await follower.start()
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await follower.complete.wait()
            if problem := store.unready():
                raise UnavailableError(problem)
        except TimeoutError:
            await follower.stop()
            raise UnavailableError(
                f"{TRUST.name(settings.topic_prefix)} was not read to its end within {READY_TIMEOUT_S:g} s"
            ) from None
        except BaseException:
            await follower.stop()
            raise
        return store, follower

    def _reader(self, store: TrustStore) -> Callable[[Sequence[Received]], None]:
        def on_records(records: Sequence[Received]) -> None:
            for record in records:
                apply_bundle(store, record, self._clock)

        return on_records


@dataclass(frozen=True, slots=True)
class UnknownMessage:
    """A record that this version does not know as a message, or whose signature does not verify: do not act on it.

    A newer Ringfence may have written it, or anybody else with Write on the topic.
    """

    topic: str
    partition: int
    offset: int
    appended_at_ms: int
    """When the broker appended the record, in milliseconds since 1970."""
    key: str | None
    value: bytes
    """The record's value as it stands on the topic; empty for a tombstone."""
    headers: Mapping[str, str]
    code: str
    """Why: `tombstone`, `typ_unexpected`, `claims_invalid`, `key_unknown`, `signature_invalid`, or another code of an
    invalid message."""
    reason: str
    """The same as a sentence, without values of the record."""


class RecordDecoder:
    """Turns records of one topic into messages. It never raises for what a record contains."""

    def __init__(self, topic: Topic[Any], trust: TrustReader) -> None:
        """`trust`: the keys of the services. It connects only if the topic's messages are signed."""
        self._topic = topic
        self._trust = trust
        self._signed = {typ_header(model): model for model in topic.models if issubclass(model, Claims)}

    async def decode(self, record: Received, value: bytes) -> Message | UnknownMessage:
        """The record's message.

        Args:
            record: the record, with its detached signature attached, if it has one.
            value: the value as it is on the topic.

        Raises UnavailableError if the trust bundle cannot be read: deliver the record again.
        """
        try:
            if not record.value:
                raise InvalidMessageError("the record deletes what its key names", code=Code.TOMBSTONE)
            return await self._verified(record) if self._signed else self._unsigned(record)
        except InvalidMessageError as error:
            return UnknownMessage(
                topic=record.topic_name,
                partition=record.partition,
                offset=record.offset,
                appended_at_ms=record.appended_at_ms,
                key=record.key,
                value=value,
                headers=record.headers,
                code=error.code,
                reason=str(error),
            )

    async def _verified(self, record: Received) -> Message:
        trust = await self._trust.store()
        try:
            return self._verify(record, trust)
        except SignatureError as error:
            # The bundle that has this key may have been published just before the record.
            if error.code != Code.KEY_UNKNOWN or not await self._trust.moved():
                raise
            return self._verify(record, trust)

    def _verify(self, record: Received, trust: TrustStore) -> Message:
        jws = parse(record.value)
        model = self._signed.get(jws.header.typ)
        if model is None:
            raise InvalidMessageError(
                f"the type {jws.header.typ[:80]!r} is not known here", code=Code.TYP_UNEXPECTED
            )
        return verify(
            jws,
            model,
            trust.finder(*model.signed_by, at_s=record.appended_at_ms / 1000),
            audience=trust.trust_domain,
            appended_at_ms=record.appended_at_ms if issubclass(model, ExpiringClaims) else None,
        ).claims

    def _unsigned(self, record: Received) -> Message:
        problem = ""
        for model in self._topic.models:
            try:
                message: Message = model.model_validate_json(record.value)
                return message
            except ValidationError as error:
                problem = problem or explain(error)
        raise InvalidMessageError(
            f"none of the messages of {self._topic.what}: {problem}", code=Code.CLAIMS_INVALID
        )


Kind = type[Message] | type[UnknownMessage] | str
"""A class of messages, or the code of audit events."""

_FIRST_RETRY_S = 0.2
_LONGEST_RETRY_S = 5.0


class RingfenceRouter(KafkaRouter):
    """Declares subscribers of Ringfence's topics.

    ```python
    router = RingfenceRouter()
    audit = router.audit_events(group="siem")

    @audit("credential.issued", "credential.revoked")
    async def on_credential(event: AuditEvent) -> None: ...

    app = FastStream(router.broker(), lifespan=router.lifespan)
    ```

    Each message is delivered at least once: if a handler raises, the same message comes again, after a pause that grows
    to five seconds, and nothing behind it in its partition is delivered before.
    """

    def __init__(
        self, settings: ClientSettings | None = None, *, middlewares: Sequence[Any] = (), **options: Any
    ) -> None:
        """Args:
            settings: topic prefix, trust root, and how this process reaches Kafka to read the trust bundle. None reads
                the environment and the settings file, as all of the SDK does.
            middlewares: FastStream's, around all handlers of this router.
            options: passed to FastStream's `KafkaRouter`.

        Raises SettingsError if the settings are invalid.
        """  # fmt: skip
        pause = functools.partial(_PauseAfterFailure, {})
        super().__init__(middlewares=(pause, *middlewares), **options)
        self._settings = settings or load(ClientSettings)
        self._trust = TrustReader(self._settings)

    def audit_events(self, *, group: str, **options: Any) -> Subscription:
        """Subscribe to audit events (OCSF): select by event code, such as `credential.issued` or `credential.*`.

        Handlers receive `AuditEvent`. Events are not signed: `ringfence audit verify` shows whether any is missing.

        Args:
            group: the Kafka consumer group; its members share the work.
            options: passed to FastStream's `subscriber`.
        """
        return self._subscription(AUDIT, group, options)

    def questions(self, *, group: str, **options: Any) -> Subscription:
        """Subscribe to the questions that sponsors are asked: select `ApprovalRequest` or `ActionRequest`.

        A question is delivered as such only if policy (`ApprovalRequest`) or a gateway (`ActionRequest`) signed it. It
        may be delivered once for each person who is asked. Answer with `ringfence.Sponsor`, which also verifies what
        the agent itself signed.

        Args: as for `audit_events`.
        """
        return self._subscription(APPROVAL_REQUEST, group, options)

    def leases(self, *, group: str, **options: Any) -> Subscription:
        """Subscribe to the states of leases: select `Lease` or `LeaseEpoch`. Only those that issuer or revoker signed.

        The highest `seq` of a lease counts; records of one lease arrive in order, and may repeat.

        Args: as for `audit_events`.
        """
        return self._subscription(LEASE, group, options)

    def actions(self, *, group: str, **options: Any) -> Subscription:
        """Subscribe to what agents did through gateways: select `ActionDecided`, `ActionAnswered` or
        `RelayEnded`. Not signed.

        Args: as for `audit_events`.
        """
        return self._subscription(ACTION, group, options)

    def broker(self, **options: Any) -> KafkaBroker:
        """A broker with this router, which connects as Ringfence's settings say (TLS and SASL included).

        Any other `KafkaBroker` will do as well: `KafkaBroker(...).include_router(router)`.

        Args:
            options: passed to FastStream's `KafkaBroker`.

        Raises SettingsError if a certificate or password is not where the settings say.
        """
        security = _security(self._settings)
        provider = connection(self._settings).get("sasl_oauth_token_provider")
        options = {
            "allow_auto_create_topics": False, "security": security, "sasl_oauth_token_provider": provider, **options
        }  # fmt: skip
        return KafkaBroker(self._settings.kafka, routers=[self], **options)

    @asynccontextmanager
    async def lifespan(self, *_: Any, **__: Any) -> AsyncIterator[None]:
        """Pass it as `FastStream(broker, lifespan=router.lifespan)`: it disconnects the reader of the trust bundle."""
        try:
            yield
        finally:
            await self._trust.close()

    def _subscription(self, topic: Topic[Any], group: str, options: dict[str, Any]) -> Subscription:
        if not group:
            raise SetupError("group is empty: name a consumer group, whose offsets say what was handled")
        if unfit := {"batch", "max_workers", "parser", "decoder", "codec"} & options.keys():
            raise SetupError(
                f"{', '.join(sorted(unfit))}: a subscription decodes one record at a time, in order"
            )
        name = topic.name(self._settings.topic_prefix)
        return Subscription(self, topic, name, group, options, RecordDecoder(topic, self._trust))


class Subscription:
    """One consumer of one topic in one group. Call it to declare a handler for some kinds of its messages.

    Declare all handlers of a group on one subscription. Two subscriptions with one group would share the partitions,
    and each handler would see only some of the messages.
    """

    def __init__(
        self,
        router: KafkaRouter,
        topic: Topic[Any],
        topic_name: str,
        group: str,
        options: dict[str, Any],
        decoder: RecordDecoder,
    ) -> None:
        """Use the methods of `RingfenceRouter`."""
        self._topic = topic
        self._topics = {topic_name: topic}
        self._decoder = decoder
        self._kinds: set[Kind] = set()
        self._takes_the_rest = False
        defaults = {
            "group_id": group,
            "ack_policy": AckPolicy.NACK_ON_ERROR,
            "auto_offset_reset": "earliest",
            "no_reply": True,  # whoever may write to the topic chooses a record's `reply_to`
            **fetch_options([topic]),
        }
        self._subscriber = router.subscriber(
            KafkaTopic(topic_name, declare=False),
            parser=self._parse,
            decoder=self._decode,
            **{**defaults, **options},
        )
        self._subscriber(filter=self._has_no_handler)(_ignore)

    def __call__(self, *kinds: Kind) -> Callable[[Callable[..., Any]], Any]:
        """Declare the handler of these kinds of messages; FastStream calls the first that takes a message.

        Args:
            kinds: for audit events, their codes; a `*` at the end matches any suffix. For other topics, message
                classes. `UnknownMessage` matches records that this version does not know, or that do not verify.
                Without kinds: everything that no other handler takes.

        Raises SetupError if the topic carries no such message, or another handler takes it already.
        """
        for kind in kinds:
            if not self._carries(kind):
                raise SetupError(
                    f"{self._topic.what} carries no {_kind_name(kind)}; select by {self._choice()} or UnknownMessage"
                )
            if kind in self._kinds:
                raise SetupError(f"another handler takes {_kind_name(kind)} already")
            self._kinds.add(kind)
        if not kinds and self._takes_the_rest:
            raise SetupError("another handler takes the rest already")
        self._takes_the_rest |= not kinds

        async def takes(message: KafkaMessage) -> bool:
            decoded = await message.decode()
            return any(_is_of(decoded, kind) for kind in kinds) if kinds else not self._is_selected(decoded)

        declare: Callable[[Callable[..., Any]], Any] = self._subscriber(filter=takes)
        return declare

    def _carries(self, kind: Kind) -> bool:
        if isinstance(kind, str):
            return self._topic is AUDIT
        return kind is UnknownMessage or (kind in self._topic.models and self._topic is not AUDIT)

    def _choice(self) -> str:
        if self._topic is AUDIT:
            return "event codes"
        return ", ".join(model.__name__ for model in self._topic.models)

    def _is_selected(self, decoded: Any) -> bool:
        return any(_is_of(decoded, kind) for kind in self._kinds)

    async def _has_no_handler(self, message: KafkaMessage) -> bool:
        return not self._takes_the_rest and not self._is_selected(await message.decode())

    async def _parse(self, record: ConsumerRecord[Any, Any], parse: Callable[[Any], Any]) -> Any:
        """FastStream's own parsing, which fails at headers that are not UTF-8 and follows those that name a reply."""
        headers = tuple(
            (name, value.decode("utf-8", "replace").encode())
            for name, value in record.headers
            if value is not None and name != "reply_to"
        )
        return await parse(dataclasses.replace(record, headers=headers))

    async def _decode(self, message: KafkaMessage) -> Message | UnknownMessage:
        record = message.raw_message
        assert not isinstance(record, tuple), "subscriptions take one record at a time"
        return await self._decoder.decode(received(record, self._topics), record.value or b"")


class _PauseAfterFailure(BaseMiddleware):
    """Waits before a message that failed is delivered again; FastStream would try it hundreds of times a second."""

    def __init__(self, delays: dict[tuple[str, int], Iterator[float]], msg: Any, *, context: Any) -> None:
        """`delays`: in seconds, by topic and partition, of those whose last message failed."""
        super().__init__(msg, context=context)
        self._delays = delays

    async def after_processed(
        self,
        exc_type: type[BaseException] | None = None,
        exc_val: BaseException | None = None,
        exc_tb: TracebackType | None = None,
    ) -> bool | None:
        record: ConsumerRecord[Any, Any] = self.msg
        at = (record.topic, record.partition)
        if exc_type is None:
            self._delays.pop(at, None)
        elif issubclass(exc_type, Exception) and not issubclass(exc_type, IgnoredException):
            await asyncio.sleep(next(self._delays.setdefault(at, backoff(_FIRST_RETRY_S, _LONGEST_RETRY_S))))
        return await super().after_processed(exc_type, exc_val, exc_tb)


def _security(settings: ClientSettings) -> BaseSecurity:
    options = connection(settings)
    tls: dict[str, Any] = {"ssl_context": options.get("ssl_context"), "use_ssl": "ssl_context" in options}
    if "sasl_mechanism" not in options:
        return BaseSecurity(**tls)
    if options["sasl_mechanism"] == "OAUTHBEARER":
        return SASLOAuthBearer(**tls)
    mechanism = {"PLAIN": SASLPlaintext, "SCRAM-SHA-256": SASLScram256, "SCRAM-SHA-512": SASLScram512}
    return mechanism[options["sasl_mechanism"]](
        username=options["sasl_plain_username"], password=options["sasl_plain_password"], **tls
    )


async def _ignore(message: Any) -> None:
    """The handler of what nobody selected: it is handled by that."""


def _is_of(decoded: Any, kind: Kind) -> bool:
    if not isinstance(kind, str):
        return isinstance(decoded, kind)
    if not isinstance(decoded, AuditEvent):
        return False
    code = str(decoded.metadata.get("event_code", ""))
    return code.startswith(kind[:-1]) if kind.endswith("*") else code == kind


def _kind_name(kind: Kind) -> str:
    return repr(kind) if isinstance(kind, str) else kind.__name__
