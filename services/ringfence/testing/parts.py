"""In-memory parts for tests: credential backends, a connection of the SDK, a service runtime, and a Rego engine.

Backends: tokens are real; credentials of other kinds are what the test gives.
Connection: `ringfence.Agent`, `Sponsor` and `Administrator` all work on it, over an in-memory bus.
Runtime: what the handlers of a service need (identity, trust, a publisher, dead letters). Nothing is started.
Rego engine: evaluates in this process; a test brings its own bundle, and needs no worker that can be killed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, cast

import regorus
from starlette.routing import BaseRoute

from ringfence.backends import AccessError, Backend, TargetAccess
from ringfence.client.connection import Connection, Coordinate
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.crypto.jwe import EncryptionKey
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.service_keys import EncryptionKeys
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.consumer import Consumer
from ringfence.kernel.kafka.dead_letters import DeadLetters
from ringfence.kernel.kafka.faststream_adapter import GroupRouter
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.kafka.table_reader import Follower, Reader
from ringfence.kernel.service.http import ReadyCheck
from ringfence.kernel.service.runtime import Runtime
from ringfence.kernel.tracing.api import NOT_TRACING
from ringfence.messages.base import Claims, ServiceRole, Topic
from ringfence.messages.credential import Credential
from ringfence.messages.lease import Lease
from ringfence.messages.registry import TargetState
from ringfence.rego.bundle import Bundle, load_bundle
from ringfence.rego.engine import ISSUANCE, Answer, PolicyFailedError, read_result
from ringfence.rego.regorus_programs import compiled, first_line
from ringfence.testing.bus import InMemoryBus, InMemoryPublisher
from ringfence.testing.clock import MovableClock

CredentialOf = Callable[[str], str | None]
"""By target id, the credential that a test gave."""


class NoRightsNeeded(TargetAccess):
    """Nobody connects to a target here, so that no rights at any have to be named."""

    def __init__(self) -> None:
        super().__init__({})

    def check(self, target_id: str) -> None:
        """Nothing is missing."""


class GivenSecrets(NoRightsNeeded):
    """The static secrets that a test gave, for the gateway to inject."""

    def __init__(self, credential_of: CredentialOf) -> None:
        super().__init__()
        self._credential_of = credential_of

    async def read(self, target_id: str) -> str:
        """The secret. Raises AccessError if the test gave none."""
        return self.at_hand(target_id)

    def at_hand(self, target_id: str) -> str:
        secret = self._credential_of(target_id)
        if secret is None:
            raise AccessError(f"the test gave no credential for target {target_id}")
        return secret


class InMemoryEncryptionKeys(EncryptionKeys):
    """The encryption key of a service, without a file."""

    def __init__(self, key: EncryptionKey) -> None:
        # Not that of the base class: it reads key files.
        self._held = {key.kid: key}


class GivenCredentials:
    """Hands out what the test gave for a target. It declares of itself what the real backend declares."""

    def __init__(self, real: Backend, credential_of: CredentialOf) -> None:
        self.kind: str = real.kind
        self.enforced_by = real.enforced_by
        self.own_expiry = real.own_expiry
        self.stateless = True
        """Nothing is made anywhere, so that nothing has to be removed."""
        self._real = real
        self._credential_of = credential_of

    def revocability(self, target: TargetState) -> Literal["instant", "session", "ttl"]:
        """As the real backend has it."""
        return self._real.revocability(target)

    def problem(self, lease: Lease, target: TargetState) -> str | None:
        """The same reasons as those of the real backend; and that the test gave no credential."""
        if (found := self._real.problem(lease, target)) is not None:
            return found
        if self._credential_of(target.target_id) is None:
            return (
                f"the test gave no credential for target {target.target_id}: "
                f'target("{target.target_id}", kind="{self.kind}", credential=...)'
            )
        return None

    async def mint(self, lease: Lease, target: TargetState) -> Credential:
        """What the test gave."""
        return Credential(
            kind=self.kind,
            value=self._credential_of(target.target_id) or "",
            token_type=None,
            expires_at=lease.deadline,
        )

    async def undo(self, lease_id: str, *, target_id: str) -> None:
        """Nothing is there."""

    async def existing(self, target_id: str) -> frozenset[str]:
        """Nothing is there."""
        return frozenset()

    standing = existing

    async def close(self) -> None:
        """There is nothing to close."""


T = TypeVar("T")


class InMemoryConnection(Connection):
    """Starting it twice is the same as starting it once, so that code under test may enter an agent or not."""

    def __init__(
        self, bus: InMemoryBus, key: SigningKey | Path, settings: ClientSettings, clock: MovableClock
    ) -> None:
        super().__init__(key, settings, clock)
        self._bus = bus
        self._publisher = InMemoryPublisher(bus, settings, self.key.id, clock)
        self._read: list[tuple[frozenset[Topic[Any]], Callable[[Sequence[Received]], None]]] = []

    async def follow(
        self,
        topics: Sequence[Topic[Any]],
        on_records: Callable[[Sequence[Received]], None],
        *,
        since_ms: int | None = 0,
        key: str | None = None,
    ) -> None:
        """See `Connection.follow`. All records of a topic have one partition here, whatever `key` is."""
        following = (frozenset(topics), on_records)
        if following not in self._read:
            self._read.append(following)
            self._bus.read(topics, on_records, since_ms=since_ms)

    async def publish(
        self,
        topic: Topic[Any],
        key: str,
        claims: Claims,
        *,
        compact: str | None = None,
        traceparent: str | None = None,
    ) -> Coordinate:
        """See `Connection.publish`. When it returns, the services have done all that follows from it."""
        at = await super().publish(topic, key, claims, compact=compact, traceparent=traceparent)
        await self._bus.settle()
        return at

    async def close(self) -> None:
        """Read nothing more. It may be started again."""
        for _, reader in self._read:
            self._bus.forget(reader)
        self._read.clear()
        await super().close()


def run_at_once(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that waits for nothing, without an event loop. Raises RuntimeError if it waits."""
    try:
        work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    work.close()
    raise RuntimeError("it waits for something, and so it needs an event loop")


class InMemoryRuntime(Runtime):
    """A runtime whose tables are always complete, since readers of the bus have each record at once."""

    def __init__(
        self,
        role: ServiceRole,
        settings: ServiceSettings,
        clock: MovableClock,
        key: SigningKey,
        trust: TrustStore,
        bus: InMemoryBus,
    ) -> None:
        # Not that of the base class: it reads key files and prepares connections.
        self.role = role
        self.settings = settings
        self.clock = clock
        self.trust = trust
        self.tracing = NOT_TRACING
        self.publisher: InMemoryPublisher = InMemoryPublisher(bus, settings, key.id, clock)
        self.dead_letters = DeadLetters(self.publisher, role, clock, trust, self.trust_moved)
        self.routes: list[BaseRoute] = []
        self.bundle_overwritten = False
        self._key = key
        self._bus = bus

    # Readers have each record at once, and a group has its partitions from the beginning. Work in the background is for
    # what only a process has, and a test moves the clock by itself; so it is left out, as are the checks of `/readyz`.

    def table(self, topics: Sequence[Topic[Any]], reader: Reader) -> None:
        self._bus.read(topics, reader)

    def history(
        self, topics: Sequence[Topic[Any]], reader: Reader, *, since_ms: int, linger_ms: int = 0
    ) -> Follower:
        self._bus.read(topics, reader, since_ms=since_ms)
        return CaughtUpFollower(self.settings, topics)

    def redeliver_after_rotation(self, reader: Reader) -> Reader:
        return reader

    def consume(self, router: GroupRouter) -> dict[str, Consumer]:
        groups = {}
        for group in router.groups:
            if group.on_assigned is not None:
                run_at_once(cast("Coroutine[Any, Any, None]", group.on_assigned()))
            for subscriber in group.subscribers:
                self._bus.consume(dict.fromkeys(subscriber.reads, subscriber.batch_handler))
            groups[group.name] = cast("Consumer", _AllPartitions())
        return groups

    def background(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """See above."""

    def ready_when(self, check: ReadyCheck) -> None:
        """See above."""

    denies_when = warns_when = ready_when

    def on_start(self, opening: Callable[[], Awaitable[None]]) -> None:
        """See above."""

    def on_stop(self, closing: Callable[[], Awaitable[None]]) -> None:
        """See above."""

    @property
    def key(self) -> SigningKey:
        return self._key

    def broker_now_ms(self) -> int:
        return self.clock.now_ms()

    def broker_past_ms(self) -> int | None:
        return self.clock.now_ms()

    async def tables_caught_up(self, timeout_s: float) -> bool:
        return True

    async def trust_moved(self) -> bool:
        return False


class _AllPartitions:
    """In place of a consumer: the only member of its group."""

    def owns(self, topic_name: str, partition: int) -> bool:
        return True


class CaughtUpFollower(Follower):
    """Stands for what reads a topic that has been read to its end."""

    def __init__(self, settings: ServiceSettings, topics: Sequence[Topic[Any]]) -> None:
        super().__init__(settings, topics, lambda records: None)
        self.complete.set()

    async def caught_up(self, timeout_s: float) -> bool:
        return True


_thread: Final = ThreadPoolExecutor(1, thread_name_prefix="ringfence-rego")
"""Objects of regorus belong to the thread that made them, also when they are freed."""
_machines: dict[tuple[str, str], Any] = {}
"""By revision and entry point; touched in that thread alone. Nothing of an evaluation is left in one."""
_MOST_MACHINES: Final = 16


def _machine(bundle: Bundle, entry_point: str) -> Any:
    key = bundle.revision, entry_point
    if key not in _machines:
        program = compiled(bundle.modules, entry_point)  # an error of it must hold no machine: see `_thread`
        machine = regorus.Rvm()
        machine.load_program(program)
        if len(_machines) >= _MOST_MACHINES:
            del _machines[next(iter(_machines))]
        _machines[key] = machine
    return _machines[key]


def _execute(bundle: Bundle, entry_point: str, input_json: str) -> str:
    machine = _machine(bundle, entry_point)
    machine.set_input_json(input_json)
    answer: str = machine.execute()
    return answer


class InProcessEngine:
    """A `PolicyEngine` without a process of its own. An evaluation that does not end is not stopped."""

    def __init__(self, bundle: Bundle | None = None, *, entry_point: str = ISSUANCE) -> None:
        """Compile a bundle; None takes the one that comes with Ringfence. Raises BundleError."""
        self._entry_point = entry_point
        self._bundle = bundle or load_bundle()
        self._compile()

    def _compile(self) -> None:
        _thread.submit(_machine, self._bundle, self._entry_point).result()

    @property
    def revision(self) -> str:
        """The revision of the bundle in force."""
        return self._bundle.revision

    async def start(self) -> None:
        """There is nothing to start."""

    async def use(self, bundle: Bundle) -> None:
        """Put another bundle in force. Raises BundleError."""
        before, self._bundle = self._bundle, bundle
        try:
            self._compile()
        except BaseException:
            self._bundle = before
            raise

    async def evaluate(self, input_json: bytes) -> Answer:
        """Evaluate an input (JSON). Raises PolicyFailedError."""
        try:
            answer = _thread.submit(_execute, self._bundle, self._entry_point, input_json.decode()).result()
        except RuntimeError as error:
            raise PolicyFailedError(
                f"the policy bundle could not be evaluated: {first_line(error)}"
            ) from None
        return Answer(read_result(answer), self.revision)

    async def close(self) -> None:
        """There is nothing to close."""
