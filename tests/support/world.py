"""A small organisation for tests: a root, a trust bundle with keys for every service, an operator, topics of its own.

    async def test_something(world: World):            # the fixture is in tests/conftest.py
        async with world.running("registry", "policy"):
            sam = await world.user("sam", roles=("sponsor",))
            bot = await world.agent("deploy-bot", sponsor=sam, ceiling=scope("staging", ("deploy",), ("env/**",)))
            task = await world.task(bot, by=sam, scope=...)
            event = await world.command(world.claims(AgentSuspend, sam, agent_id="deploy-bot", reason="x"), sam)
            assert event.kind == "refused" and event.reasons[0].code == "..."

Everything is awaited by condition: `command` by its `service.event`, `consume_until` by a predicate. Every world has a
topic prefix and a Redis prefix of its own; services run in this process, on the loop of the test, on free ports.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

import httpx

from ringfence.dev.processes import free_port
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.crypto.jwe import EncryptionKey
from ringfence.kernel.crypto.jws import parse, sign, verify
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.kernel.kafka.topics_admin import TopicsAdmin
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.api import ApiToken, api_audience
from ringfence.messages.base import Claims, ExpiringClaims, KeyRecord, Permission, ServiceRole, Topic
from ringfence.messages.credential import Coordinates
from ringfence.messages.operations import DeadLetter, ServiceEvent
from ringfence.messages.registry import (
    AgentRegister,
    AgentTransfer,
    BackendSettings,
    Entitlements,
    RequestRule,
    Role,
    TargetSet,
    TaskAssign,
    TaskTerms,
    UserSet,
    VerbFloor,
)
from ringfence.messages.topics import DEAD_LETTER, REGISTRY_COMMAND, SERVICE_EVENT, TRUST
from ringfence.messages.trust import ServiceIdentity, TrustBundle
from tests.support.http_client import plain_client
from tests.support.lost_redis import declare_complete
from tests.support.openapi import document
from tests.support.passkeys import ORIGINS, RP_ID
from tests.support.switches import build_options
from tests.support.topics import delete_topics
from tests.support.trail import Trail

WITHIN_S = 60.0
"""How long anything is waited for before the test fails. Generous: no test asserts a time."""
DAY_S = 86_400

Scope = tuple[Permission, ...]
C = TypeVar("C", bound=Claims)


def scope(target: str, verbs: Sequence[str], resources: Sequence[str]) -> Scope:
    """A scope of one permission."""
    return (Permission(target=target, verbs=tuple(verbs), resources=tuple(resources)),)


@dataclass(frozen=True)
class Party:
    """Somebody with a key: a user, an agent, the root. `id` is the SPIFFE ID, `name` its last part."""

    name: str
    key: SigningKey = field(repr=False)

    @property
    def id(self) -> str:
        return self.key.id

    def key_record(self, days: int = 365) -> KeyRecord:
        """The public half as it stands in commands."""
        return self.key.record(int(time.time()) + days * DAY_S)


class RefusedError(AssertionError):
    """A command that the test took for good was refused or dead-lettered."""


class DeadLetteredError(RefusedError):
    """The record was sent to the dead letters."""

    def __init__(self, letter: DeadLetter) -> None:
        super().__init__(f"dead-lettered by {letter.service}: {letter.code}: {letter.reason}")
        self.letter = letter


class World:
    """See the module. Make one with `World.open`."""

    def __init__(self, bootstrap: str, redis_url: str, folder: Path, *, paced: bool) -> None:
        mark = uuid.uuid4().hex[:10]
        self.td = "test.example"
        self.prefix = f"t{mark}"
        self.redis_prefix = f"r{mark}"
        self.redis_url = redis_url
        self.bootstrap = bootstrap
        self.folder = folder
        self._paced = paced
        self.root = Party("root", SigningKey.generate(f"spiffe://{self.td}/root"))
        self.fingerprint = self.root.key.kid
        self._keys: dict[str, SigningKey] = {}
        for role in get_args(ServiceRole):
            key = SigningKey.generate(f"spiffe://{self.td}/service/{role}")
            key.save(folder / "keys" / f"{role}.json")
            self._keys[role] = key
        token_key = SigningKey.generate(f"spiffe://{self.td}/service/issuer")
        token_key.save(folder / "keys" / "issuer-token.json")
        self.seals = {
            role: EncryptionKey.generate(self._keys[role].id) for role in ("issuer", "gateway")
        }  # fmt: skip
        self.seals["issuer"].save(folder / "keys" / "issuer-seal.json")
        self.bundle = self.make_bundle(1)
        self.trust = TrustStore(self.td, self.fingerprint)
        self.trust.load(sign(self.bundle, self.root.key, header_jwk=True), time.time())
        self.operator = self.party("user", "olga")
        self.publisher = Publisher(self.settings("registry"), f"spiffe://{self.td}/test")
        self.ports: dict[str, int] = {}
        """The HTTP port of each service that runs or ran last."""
        self.runtimes: dict[str, Runtime] = {}
        self._watched: dict[Topic[Any], _Watch] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._news = asyncio.Event()
        self._opened: dict[tuple[bytes, int, type[Claims], tuple[ServiceRole, ...], bytes], Any] = {}
        """What was verified once: the same record under the same trust bundle is as good the second time."""
        self.trail = Trail(self)

    @classmethod
    @asynccontextmanager
    async def open(
        cls, bootstrap: str, redis_url: str = "redis://127.0.0.1:1/0", *, paced: bool = True
    ) -> AsyncIterator[World]:
        """A world with its topics made and its trust published; `paced` for the embedded broker."""
        with tempfile.TemporaryDirectory(prefix="ringfence-world-") as folder:
            world = cls(bootstrap, redis_url, Path(folder), paced=paced)
            async with TopicsAdmin(world.settings("registry")) as admin:
                await admin.apply()
            try:
                async with world.publisher:
                    try:
                        await world.publish_trust()
                        yield world
                        await world.trail.check()
                    finally:
                        for watch in world._watched.values():
                            await watch.follower.stop()
                        await world.trail.stop()
            finally:
                await delete_topics(world.bootstrap, world.prefix)

    # --- identities ---

    def settings(self, role: ServiceRole, **overrides: Any) -> ServiceSettings:
        """The settings of a service in this world, on a free port."""
        fields: dict[str, Any] = {
            "kafka": self.bootstrap,
            "topic_prefix": self.prefix,
            "trust_domain": self.td,
            "trust_root": self.fingerprint,
            "embedded_broker": self._paced,
            "redis_url": self.redis_url,
            "redis_prefix": self.redis_prefix,
            "redis_shards": 2,
            "key_dir": self.folder / "keys",
            "http": f"127.0.0.1:{free_port()}",
            "partitions": 2,
            "replication": 1,
            # Runners that tests play send no heartbeats.
            "run_grace_s": 3600,
        }
        return ServiceSettings(**{**fields, **overrides})

    def key(self, role: ServiceRole) -> SigningKey:
        """The private key of a service: for tests that play a compromised one."""
        return self._keys[role]

    def party(self, kind: str, name: str, alg: str = "ES256") -> Party:
        """A key for `spiffe://<td>/<kind>/<name>` that nobody has heard of yet."""
        return Party(name, SigningKey.generate(f"spiffe://{self.td}/{kind}/{name}", alg))

    def make_bundle(self, version: int, **replaced: SigningKey) -> TrustBundle:
        """A trust bundle with all services; `replaced` gives a role another key."""
        now = int(time.time())
        keys = {**self._keys, **replaced}
        return TrustBundle(
            iss=self.root.id,
            aud=self.td,
            iat=now,
            exp=now + 30 * DAY_S,
            jti=f"bundle-{version}",
            version=version,
            services=tuple(
                ServiceIdentity(
                    id=keys[role].id,
                    roles=(role,),
                    keys=(keys[role].record(now + 30 * DAY_S),),
                    encryption_keys=tuple(
                        seal.record(now + 30 * DAY_S) for name, seal in self.seals.items() if name == role
                    ),
                )
                for role in get_args(ServiceRole)
            ),
            rp_id=RP_ID,
            origins=ORIGINS,
        )

    async def publish_trust(self, bundle: TrustBundle | None = None) -> None:
        """Publish the trust bundle; the first time also send the root's command that makes `operator` one."""
        first = bundle is None
        bundle = bundle or self.bundle
        compact = sign(bundle, self.root.key, header_jwk=True)
        await (
            await self.publisher.send(
                TRUST, "trust.bundle", Outbound(str(bundle.version), compact, id=bundle.jti)
            )
        )
        if first:
            claims = self.user_set(self.root, self.operator, roles=("operator",))
            await self.send_command(claims, self.root)

    # --- commands ---

    def claims(self, model: type[C], by: Party, **fields: Any) -> C:
        """Claims of `model` by somebody, with fresh `iat`, `jti` and `exp` where they are not given."""
        now = int(time.time())
        base: dict[str, Any] = {"iss": by.id, "aud": self.td, "iat": now, "jti": str(uuid.uuid4())}
        if issubclass(model, ExpiringClaims):
            base["exp"] = now + 300
        return model(**{**base, **fields})

    def user_set(
        self,
        by: Party,
        user: Party,
        roles: tuple[Role, ...] = (),
        entitlements: Scope = (),
        **fields: Any,
    ) -> UserSet:
        """The command that makes `user` one."""
        given = {
            "user_id": user.name,
            "name": user.name.title(),
            "roles": roles,
            "keys": (user.key_record(),),
            "entitlements": Entitlements(scope=entitlements, source="test", as_of=int(time.time())),
        }
        return self.claims(UserSet, by, **{**given, **fields})

    async def send(
        self,
        topic: Topic[Any],
        key: str,
        value: str | bytes,
        type: str = "test",
        *,
        partition: int | None = None,
        signature: bytes | None = None,
    ) -> Coordinates:
        """Append one record as it is; where it came to stand. `partition`: where to, whatever the key says."""
        id = derived_id("test", uuid.uuid4().hex)
        sending = await self.publisher.send(
            topic, type, Outbound(key, value, id=id), partition=partition, signature=signature
        )
        metadata = await sending
        return Coordinates(
            topic=metadata.topic,
            partition=metadata.partition,
            offset=metadata.offset,
            appended_at_ms=metadata.timestamp,
        )

    async def send_command(self, claims: Claims, by: Party) -> Coordinates:
        """Sign and send a command without waiting for what comes of it."""
        return await self.send(REGISTRY_COMMAND, _subject(claims), sign(claims, by.key), claims.typ)

    async def command(self, claims: ExpiringClaims, by: Party) -> ServiceEvent:
        """Sign and send a command; the registry's `accepted`, `refused` or `replayed`. Raises DeadLetteredError."""
        return await self.outcome(claims, await self.send_command(claims, by))

    async def outcome(self, claims: ExpiringClaims, sent: Coordinates) -> ServiceEvent:
        """What came of the command that was sent to there. Raises DeadLetteredError."""
        answers, letters = await self._watch(SERVICE_EVENT), await self._watch(DEAD_LETTER)

        def find() -> ServiceEvent | DeadLetter | None:
            for letter in map(_dead_letter, letters.fresh(sent.appended_at_ms)):
                if _place(letter.source) == _place(sent):
                    return letter
            for record in answers.fresh(sent.appended_at_ms):
                event = self._event_or_none(record)
                if event is None or (event.actor, event.ref) != (claims.iss, claims.jti):
                    continue
                if event.source is not None and _place(event.source) == _place(sent):
                    return event
            return None

        found = await self.until(find, f"an answer to {claims.typ} {claims.jti}")
        if isinstance(found, DeadLetter):
            raise DeadLetteredError(found)
        return found

    async def transfer(self, agent_id: str, to: str) -> None:
        """An operator makes another sponsor accountable, who is not asked."""
        fields = {"agent_id": agent_id, "sponsor": to, "without_consent": True}
        await self.accepted(self.claims(AgentTransfer, self.operator, **fields), self.operator)

    async def accepted(self, claims: ExpiringClaims, by: Party) -> ServiceEvent:
        """`command`, which must be accepted. Raises RefusedError."""
        event = await self.command(claims, by)
        if event.kind != "accepted":
            raise RefusedError(f"{claims.typ} was {event.kind}: {event.reasons}")
        return event

    async def user(
        self,
        name: str,
        roles: tuple[Role, ...] = (),
        entitlements: Scope = (),
        *,
        by: Party | None = None,
        **fields: Any,
    ) -> Party:
        """A new user, accepted by the registry."""
        user, by = self.party("user", name), by or self.operator
        await self.accepted(self.user_set(by, user, roles, entitlements, **fields), by)
        return user

    async def agent(self, name: str, sponsor: Party, ceiling: Scope = (), **fields: Any) -> Party:
        """A new agent, registered by its sponsor."""
        agent = self.party("agent", name)
        given = {
            "agent_id": name,
            "sponsor": sponsor.name,
            "description": "made by a test",
            "keys": (agent.key_record(),),
            "ceiling": ceiling,
        }
        await self.accepted(self.claims(AgentRegister, sponsor, **{**given, **fields}), sponsor)
        return agent

    async def target(
        self,
        name: str,
        verbs: Sequence[VerbFloor] = (VerbFloor(verb="read"), VerbFloor(verb="deploy")),
        requests: Sequence[RequestRule] = (),
        **fields: Any,
    ) -> Party:
        """A new target with the backend `jwt`, whose credentials agents may get; the party returned is its resource
        server.
        """
        target = self.party("target", name)
        backend = fields.pop("backend", BackendSettings(kind="jwt"))
        given = {
            "target_id": name,
            "description": "made by a test",
            "backend": backend,
            "verbs": tuple(verbs),
            "requests": tuple(requests),
            "delivery": "gateway" if backend.kind == "http" else "agent",
            "keys": (target.key_record(),),
        }
        await self.accepted(self.claims(TargetSet, self.operator, **{**given, **fields}), self.operator)
        return target

    async def task(self, agent: Party, by: Party, scope: Scope, *, life_s: int = 3600, **fields: Any) -> str:
        """The id of a new task, on behalf of who assigns it."""
        terms = TaskTerms(
            agent_id=agent.name, purpose="made by a test", scope=scope, not_after=int(time.time()) + life_s
        )
        given = {"terms": terms, "on_behalf_of": by.name}
        event = await self.accepted(self.claims(TaskAssign, by, **{**given, **fields}), by)
        assert event.result is not None
        return event.result

    # --- reading ---

    async def records(self, topic: Topic[Any]) -> Sequence[Received]:
        """What stands on a topic, in the order of each partition. It goes on growing."""
        watch = await self._watch(topic)
        assert await watch.follower.caught_up(WITHIN_S), f"{topic.what} could not be read to its end"
        return watch.records

    async def consume_until(
        self, topic: Topic[Any], predicate: Callable[[Received], Any], within_s: float = WITHIN_S
    ) -> Received:
        """The first record on the topic, from its beginning, that satisfies the predicate.

        A predicate that raises InvalidMessageError is not satisfied.
        """
        watch = await self._watch(topic)

        def find() -> Received | None:
            return next((record for record in watch.records if _holds(predicate, record)), None)

        return await self.until(find, f"a record on {topic.what}", within_s)

    async def record_at(self, topic: Topic[Any], at: Coordinates) -> Received:
        """The record that stands there, once it has been read."""
        return await self.consume_until(topic, lambda r: (r.partition, r.offset) == (at.partition, at.offset))

    def event(self, record: Received) -> ServiceEvent:
        """The verified `service.event` in a record, whoever's it is. Raises InvalidMessageError."""
        return self.opened(record, ServiceEvent, *get_args(ServiceRole))

    def _event_or_none(self, record: Received) -> ServiceEvent | None:
        try:
            return self.event(record)
        except InvalidMessageError:
            return None

    def opened(self, record: Received, model: type[C], *roles: ServiceRole) -> C:
        """The claims in a record, signed by a service with one of the roles. Raises InvalidMessageError."""
        # Whoever waits for a record asks for all before it again, with each that comes.
        key = (record.value, record.appended_at_ms, model, roles, self.trust.compact)
        if (claims := self._opened.get(key)) is None:
            find = self.trust.finder(*roles, at_s=record.appended_at_ms / 1000)
            claims = self._opened[key] = verify(parse(record.value), model, find, audience=self.td).claims
        return claims

    async def event_where(self, predicate: Callable[[ServiceEvent], Any]) -> ServiceEvent:
        """The first `service.event` that satisfies the predicate."""
        record = await self.consume_until(SERVICE_EVENT, lambda r: predicate(self.event(r)))
        return self.event(record)

    async def _watch(self, topic: Topic[Any]) -> _Watch:
        watch = self._watched.get(topic)
        if watch is None:
            watch = self._watched[topic] = _Watch(self.settings("registry"), topic, self._tell)
            await watch.follower.start()
        await asyncio.wait_for(watch.follower.complete.wait(), WITHIN_S)
        return watch

    async def until(self, find: Callable[[], Any], what: str, within_s: float = WITHIN_S) -> Any:
        """What `find` returns once that is not None: asked again with all that is read, and every 20 ms."""
        try:
            async with asyncio.timeout(within_s):
                while True:
                    news = self._news
                    if (found := find()) is not None:
                        return found
                    self._fail_of_dead_services()
                    # Look again now and then: a service may be ready, or have ended.
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(news.wait(), 0.02)
        except TimeoutError:
            raise AssertionError(f"{what} did not come within {within_s:.0f} s") from None

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    # --- services ---

    @asynccontextmanager
    async def running(
        self,
        *roles: ServiceRole,
        own: dict[ServiceRole, Any] | None = None,
        clock: Any = None,
        **overrides: Any,
    ) -> AsyncIterator[World]:
        """Run services in this process until the block ends; entered once all are ready.

        `own` gives a role its own settings object; `overrides` change fields of `ServiceSettings` for all of them.
        """
        stop = asyncio.Event()
        tasks: list[asyncio.Task[None]] = []
        runtimes: list[Runtime] = []
        try:
            if "issuer" in roles and "revoker" not in roles and not self._uses_redis():
                await declare_complete(self.settings("issuer", **overrides))
            for role in roles:
                settings = self.settings(role, **overrides)
                self.ports[role] = int(settings.http.rpartition(":")[2])
                build = importlib.import_module(f"ringfence.{role}.app").build
                self.runtimes[role] = build(settings, (own or {}).get(role), clock, **build_options(role))
                runtimes.append(self.runtimes[role])
                tasks.append(asyncio.create_task(runtimes[-1].run(stop), name=f"{role} of {self.prefix}"))
            self._tasks += tasks
            await self.until(
                lambda: None if any(runtime.unready() for runtime in runtimes) else True,
                f"readiness of {', '.join(roles)}",
            )
            yield self
        finally:
            self._tasks = [task for task in self._tasks if task not in tasks]
            stop.set()
            await asyncio.gather(*tasks)

    def _uses_redis(self) -> bool:
        """Whether a service runs that would be told that its Redis is another now."""
        names = {task.get_name() for task in self._tasks}
        return bool(names & {f"{role} of {self.prefix}" for role in ("issuer", "revoker")})

    def _fail_of_dead_services(self) -> None:
        for task in self._tasks:
            if task.done():
                task.result()
                raise AssertionError(f"{task.get_name()} ended while it was needed")

    def bearer(self, who: Party, service: ServiceRole, **fields: Any) -> dict[str, str]:
        """The Authorization header of one call of a service by a user, or a target's resource server."""
        now = int(time.time())
        token = self.claims(
            ApiToken, who, **{"aud": api_audience(self.td, service), "exp": now + 60, **fields}
        )
        return {"Authorization": f"Bearer {sign(token, who.key)}"}

    async def known(self, who: Party, *roles: ServiceRole) -> None:
        """Once these services (audit, policy) have heard of a user, whom they turn away until then."""
        async with asyncio.timeout(WITHIN_S):
            for role in roles:
                path = "/v1/events" if role == "audit" else "/v1/inventory"
                while (await self.get(role, path, who)).status_code == 401:
                    await asyncio.sleep(0.05)

    async def get(
        self, role: ServiceRole, path: str, who: Party | None = None, **params: str
    ) -> httpx.Response:
        """GET from the HTTP API of a running service. The answer must be as its document says."""
        headers = self.bearer(who, role) if who else {}
        async with plain_client(base_url=f"http://127.0.0.1:{self.ports[role]}", timeout=WITHIN_S) as client:
            document(role).watch(client)
            return await client.get(path, headers=headers, params=params)


class _Watch:
    def __init__(self, settings: ServiceSettings, topic: Topic[Any], tell: Callable[[], None]) -> None:
        self.records: list[Received] = []
        self._tell = tell
        self.follower = Follower(settings, [topic], self._on_records)

    def _on_records(self, records: Sequence[Received]) -> None:
        self.records += records
        self._tell()

    def fresh(self, since_ms: int) -> list[Received]:
        return [record for record in self.records if record.appended_at_ms >= since_ms]


def _subject(claims: Any) -> str:
    for name in ("user_id", "agent_id", "target_id", "task_id"):
        if value := getattr(claims, name, None):
            return str(value)
    return str(claims.jti)


def _place(source: Coordinates) -> tuple[str, int, int]:
    return source.topic, source.partition, source.offset


def _dead_letter(record: Received) -> DeadLetter:
    return DeadLetter.model_validate_json(record.value)


def _holds(predicate: Callable[[Received], Any], record: Received) -> bool:
    try:
        return bool(predicate(record))
    except InvalidMessageError:
        return False
