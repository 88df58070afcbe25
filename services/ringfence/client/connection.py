"""The Kafka connection of one SDK identity: its key, publisher, topic followers, trust bundle and local tables.

Agents, sponsors and administrators are built on it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pydantic import ValidationError

from ringfence.client.arguments import Lifetime
from ringfence.client.errors import IdentityError, InvalidCallError, RefusedError, checked, require_understood
from ringfence.client.key_file import key_file, load_key, successor_key
from ringfence.client.passkeys.questions import LIFE_S, PasskeyUser
from ringfence.client.settings import ClientSettings, load_settings
from ringfence.client.signed_messages import compose, stamp
from ringfence.kernel.base.clock import Clock, SystemClock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.crypto.jws import Signed, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.kernel.service.trust_updates import apply_bundle
from ringfence.kernel.tracing.application import of_application
from ringfence.messages.base import Claims, Topic
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.messages.lease import RevocationRequest
from ringfence.messages.operations import DeadLetter
from ringfence.messages.topics import (
    AGENT,
    CREDENTIAL_REPLY,
    DEAD_LETTER,
    REGISTRY_COMMAND,
    TARGET,
    TASK,
    TRUST,
    USER,
)
from ringfence.model.identity.spiffe_ids import Kind, spiffe_id, subject_of
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory

if TYPE_CHECKING:
    from ringfence.client.instance_enrolment import EnrolledInstanceKey
    from ringfence.client.task_view import TaskView
    from ringfence.kernel.kafka.table_reader import Follower

C = TypeVar("C", bound=Claims)

COMMAND_LIFE_S = 120
"""`exp` of a command: how long it may take to reach the broker, clocks that differ included."""
NO_EVIDENCE: Final[Mapping[str, str]] = MappingProxyType({})
READY_TIMEOUT_S = 30.0
"""How long a topic may take to be read up to its present end."""
STOP_TIMEOUT_S = 15.0
"""How long the producer may take to send what is buffered when a connection is closed."""
_REMEMBERED_LETTERS = 1000

Coordinate = tuple[str, int, int]
"""Topic name, partition, offset."""


def subject(key: SigningKey, kind: Kind, settings: ClientSettings) -> str:
    """The id of the user or agent in the key's SPIFFE ID. Raises IdentityError if the key is of another kind."""
    id = subject_of(settings.trust_domain, key.id, kind)
    if id is None:
        raise IdentityError(
            f"the key speaks for {key.id}; this needs a key of spiffe://{settings.trust_domain}/{kind}/..."
        )
    return id


class DeadLetterLog:
    """The dead letters since the connection was made, by the coordinates of the rejected record.

    Dead letters are not signed: show them to a person, and decide nothing by them.
    """

    def __init__(self) -> None:
        self._reasons: BoundedDict[Coordinate, str] = BoundedDict(_REMEMBERED_LETTERS)
        self._waiting: dict[Coordinate, asyncio.Event] = {}

    def on_records(self, records: Sequence[Received]) -> None:
        for record in records:
            try:
                letter = DeadLetter.model_validate_json(record.value)
            except ValidationError:
                continue
            at = (letter.source.topic, letter.source.partition, letter.source.offset)
            self._reasons[at] = f"the {letter.service} could not accept it ({letter.code}: {letter.reason})"
            if event := self._waiting.get(at):
                event.set()

    def reason(self, at: Coordinate | None) -> str | None:
        return self._reasons.get(at) if at else None

    async def wait_for(self, at: Coordinate) -> str:
        """Wait until the record at these coordinates is dead-lettered, and return the reason."""
        if at not in self._reasons:
            event = self._waiting.setdefault(at, asyncio.Event())
            try:
                await event.wait()
            finally:
                self._waiting.pop(at, None)
        return self._reasons[at]


class Connection(Lifetime):
    """One identity's connection to Ringfence: an async context manager, or `start` and `close`."""

    def __init__(
        self,
        key: SigningKey | Path | str | PasskeyUser | None = None,
        settings: ClientSettings | None = None,
        clock: Clock | None = None,
        *,
        attested: EnrolledInstanceKey | None = None,
    ) -> None:
        """Args:
            key: the identity, as a key or the path of its file; None takes the one in the settings. A person who signs
                with a passkey has neither.
            settings: where to connect to; None reads the environment and the settings file.
            attested: a running instance that enrols a key of its own, instead of `key`.

        Raises:
            SettingsError, IdentityError, KeyFileError
        """  # fmt: skip
        # The client of Kafka is imported by who connects: commands and services that import the SDK may not.
        from ringfence.kernel.kafka.producer import Publisher

        self.settings = load_settings(settings)
        self._attested = attested
        self.passkey_user = key if isinstance(key, PasskeyUser) else None
        if isinstance(key, PasskeyUser):
            # It says who this is, and signs nothing.
            identity = spiffe_id(self.settings.trust_domain, "user", key.user_id)
            self._key_file, self.key = None, SigningKey.generate(identity)
        else:
            self._key_file = None if attested else key_file(key, self.settings)
            # Enrolled before it is first used.
            self.key = SigningKey.generate(attested.id) if attested else load_key(key, self.settings)
        self.enrolment: str | None = None
        """The enrolment of a running instance, which every message signed for its agent carries."""
        self.clock: Clock = clock or SystemClock()
        self.trust = TrustStore(self.settings.trust_domain, self.settings.trust_root)
        self.dead_letters = DeadLetterLog()
        self.tracing = of_application()
        self._publisher = Publisher(self.settings, self.key.id, self.clock, self.tracing)
        self._followers: list[Follower] = []
        self._directory: Directory | None = None
        self._directory_lock = asyncio.Lock()

    # --- life ---

    async def start(self) -> None:
        """Connect and read the trust bundle. Raises UnavailableError if Kafka or the bundle is missing."""
        try:
            await self.renew()
            await self._publisher.start()
            await self.follow([TRUST], self._on_trust)
            self.trust.require(self.clock.now_ms() / 1000)
        except BaseException:
            await self.close()
            raise

    async def renew(self) -> None:
        """Renew the enrolled key of a running instance where it ends soon. Raises as its `current`."""
        if self._attested is not None:
            enrolled = await self._attested.current()
            self.key, self.enrolment = enrolled.key, enrolled.enrolment

    async def close(self) -> None:
        """Send what is buffered and disconnect. Idempotent."""
        followers, self._followers = self._followers, []
        self._directory = None
        await asyncio.gather(*(follower.stop() for follower in followers))
        # What is still buffered was given up by its caller. A producer whose broker is gone would wait for ever.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._publisher.stop(), STOP_TIMEOUT_S)

    # --- reading ---

    async def follow(
        self,
        topics: Sequence[Topic[Any]],
        on_records: Callable[[Sequence[Received]], None],
        *,
        since_ms: int | None = 0,
        key: str | None = None,
    ) -> None:
        """Read topics until `close`. Returns once all records that exist now have been read.

        Args:
            on_records: called with each batch of records.
            since_ms: start at this append time (milliseconds since 1970); 0 starts at the first record, None after the
                last.
            key: read only the partition that holds the records with this key.

        Raises UnavailableError if a topic is missing, or is not read to its end within `READY_TIMEOUT_S`.
        """
        from ringfence.kernel.kafka.table_reader import Follower

        follower = Follower(self.settings, topics, on_records, since_ms=since_ms, key=key)
        await follower.start()
        self._followers.append(follower)
        names = ", ".join(topic.name(self.settings.topic_prefix) for topic in topics)
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await follower.complete.wait()
        except TimeoutError:
            reason = follower.failed or f"not read to the end within {READY_TIMEOUT_S:g} s"
            raise UnavailableError(f"{names}: {reason}") from None

    async def caught_up(self, timeout_s: float) -> bool:
        """Wait until everything is read that is on the followed topics now. See `Follower.caught_up`."""
        return all(await asyncio.gather(*(follower.caught_up(timeout_s) for follower in self._followers)))

    async def directory(self) -> Directory:
        """The local table of users, agents, targets and tasks, each record verified up to the root.

        Read on first use, then kept up to date.
        """
        async with self._directory_lock:
            if self._directory is None:
                directory = Directory(self.trust, self.clock, grace_ms=None)
                await self.follow([USER, AGENT, TARGET, TASK], directory.on_records)
                self._directory = directory
        return self._directory

    async def current_directory(self) -> Directory:
        """The directory, with every record that is on its topics now: for checks after a person has answered.

        Raises UnavailableError if the topics cannot be read to their end.
        """
        directory = await self.directory()
        if not await self.caught_up(READY_TIMEOUT_S):
            raise UnavailableError("the records could not be read to their end; run: ringfence doctor")
        return directory

    async def task(self, agent_id: str, task_id: str) -> TaskView:
        """One of an agent's own tasks. Raises RefusedError if it has no such task, and as `current_directory` does."""
        from ringfence.client.task_view import TaskView

        directory = await self.current_directory()
        try:
            entry = directory.task(task_id)
        except ChainError:
            entry = None
        if entry is None or entry.state.agent_id != agent_id:
            reason = Reason(
                code=Code.TASK_UNKNOWN, message=f"there is no task {task_id[:64]} of agent {agent_id}"
            )
            raise RefusedError("the look at a task", (reason,), "registry")
        return TaskView.of_state(entry.state, self.clock.now_ms() / 1000)

    async def targets(self) -> Directory:
        """A table of targets and of the users who signed them, without agents and tasks, of which there may be many.

        Returns the full directory where it is loaded already.
        """
        if self._directory is not None:
            return self._directory
        directory = Directory(self.trust, self.clock, grace_ms=None)
        await self.follow([USER, TARGET], directory.on_records)
        return directory

    # --- replies to an agent: the only reading that an agent needs ---

    async def listen_for_replies(
        self, agent_id: str, on_replies: Callable[[Sequence[Received]], None]
    ) -> None:
        """Hand over the replies to an agent's requests from now on. Raises as `follow` does."""
        # Read from the end, before the first request: every later reply is seen, and no earlier one.
        await self.follow([CREDENTIAL_REPLY], on_replies, since_ms=None, key=agent_id)
        await self.follow([DEAD_LETTER], self.dead_letters.on_records, since_ms=None)

    def expect_replies(self, request_id: str, key: SigningKey) -> None:
        """Called before a request is published that `key` signed."""

    def forget_replies(self, request_id: str) -> None:
        """Called when nobody is interested in replies to a request any more."""

    # --- identity ---

    @property
    def key_path(self) -> Path | None:
        return self._key_file.path if self._key_file is not None else None

    def renew_key(self) -> None:
        """Sign with the key that the key file holds now, where the identity came from a file."""
        if self._key_file is not None:
            self.key = self._key_file.changed(self.key)

    def use_key(self, key: SigningKey | Path | str) -> None:
        """Sign with another key of the same identity from now on. Raises IdentityError, KeyFileError."""
        self.key = successor_key(self.key, key)
        self._key_file = key_file(key, self.settings)

    # --- writing ---

    @property
    def command_life_s(self) -> int:
        """How long a command counts from now, in seconds: longer where a person takes the time to sign it first."""
        return LIFE_S if self.passkey_user else COMMAND_LIFE_S

    async def sign(self, claims: C, evidence: Mapping[str, str] = NO_EVIDENCE) -> Signed[C]:
        """Sign a message as this identity. With a passkey `iat` and `jti` differ from those of `claims`.

        `evidence`: signed messages by which the sign page shows it, besides records.

        Raises NotSignedError if the person did not sign, InvalidCallError if passkeys do not sign such a message.
        """
        if self.passkey_user is not None:
            self._require_understood(claims)
            from ringfence.client.passkeys.questions import sign_with_passkey

            directory = await self.directory()
            return await sign_with_passkey(self.passkey_user, claims, evidence, directory, self.clock)
        return Signed(claims, sign(claims, self.key))

    def stamp(self, life_s: int) -> dict[str, Any]:
        """The claims that every message of this identity has. See `signed_messages.stamp`."""
        return stamp(self.key.id, self.settings.trust_domain, self.clock.now_ms() // 1000, life_s)

    def compose(self, model: type[C], *, life_s: int | None = None, **fields: Any) -> C:
        """Compose a message of this identity; `fields` as `signed_messages.compose` takes them.

        `life_s`: how long it counts, in seconds; None: `command_life_s`. Raises InvalidCallError if a field is invalid.
        """
        claims = self.stamp(self.command_life_s if life_s is None else life_s)
        with checked(f"the {model.typ}"):
            return compose(model, claims, **fields)

    async def publish(
        self,
        topic: Topic[Any],
        key: str,
        claims: Claims,
        *,
        compact: str | None = None,
        traceparent: str | None = None,
    ) -> Coordinate:
        """Sign a message and publish it. Returns its coordinates once all in-sync replicas have it.

        Args:
            compact: the message as a compact JWS, where the caller has signed it already.

        Raises:
            UnavailableError: Kafka did not take it.
            InvalidCallError: the message has an unknown field, which may be a limit, or a passkey does not sign it like
                this; nothing was sent.
        """
        from aiokafka.errors import KafkaError

        self._require_understood(claims, key if topic is REGISTRY_COMMAND else None)
        if compact is None and self.passkey_user is not None:
            raise InvalidCallError(
                f"no passkey signs this {claims.typ}: it needs a key file (--identity FILE)"
            )
        compact = compact or sign(claims, self.key)
        try:
            delivery: Awaitable[Any] = await self._publisher.send(
                topic, claims.typ, Outbound(key, compact, id=claims.jti, traceparent=traceparent)
            )
            at = await delivery
        except KafkaError as error:
            raise UnavailableError(
                f"Kafka at {self.settings.kafka} did not take the {claims.typ} ({type(error).__name__}); "
                f"is the broker up, and does the topic {topic.name(self.settings.topic_prefix)} exist?"
            ) from None
        return at.topic, at.partition, at.offset

    def _require_understood(self, claims: Claims, subject_id: str | None = None) -> None:
        if not isinstance(claims, RevocationRequest):  # a revocation stops what it can, whatever else it says
            kind = claims.typ.partition(".")[0]
            require_understood(claims, f"{kind} {subject_id}" if subject_id else f"the {claims.typ}")

    def _on_trust(self, records: Sequence[Received]) -> None:
        for record in records:
            apply_bundle(self.trust, record, self.clock)
