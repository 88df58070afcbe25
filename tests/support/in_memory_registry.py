"""An honest registry without Kafka, for unit tests: commands in, verified records in a directory. And its key, for
tests that play a dishonest one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from types import MappingProxyType
from typing import Any, TypeVar

from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import Claims, ExpiringClaims, KeyRecord, Permission, Topic
from ringfence.messages.codes import Code
from ringfence.messages.registry import (
    AgentRecord,
    AgentRegister,
    AgentTransfer,
    AgentTransferConsent,
    AnyState,
    BackendSettings,
    EmbeddedCommand,
    Entitlements,
    TargetRecord,
    TargetSet,
    TaskAssign,
    TaskConsent,
    TaskRecord,
    TaskTerms,
    UserRecord,
    UserSet,
    UserState,
    VerbFloor,
)
from ringfence.messages.topics import AGENT, TARGET, TASK, USER
from ringfence.messages.trust import SecondPersonMode, ServiceIdentity, TrustBundle
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.lifecycle import CommandRefusedError, Context, apply, command_subject, subject_key
from ringfence.model.records.command_chain import Chains, subject_spiffe
from ringfence.model.records.directory import Alarm, Directory
from ringfence.model.verdict import Refused
from ringfence.registry.domain import TASK_MAX_S, Change, Current, Waits, changes_elsewhere, decide
from ringfence.registry.store import Memory
from tests.support.passkeys import ORIGINS, RP_ID

TD = "test.example"
START_MS = 1_790_000_000_000
TOPICS: dict[str, Topic[Any]] = {"user": USER, "agent": AGENT, "target": TARGET, "task": TASK}
RECORDS: dict[str, Any] = {
    "user": UserRecord,
    "agent": AgentRecord,
    "target": TargetRecord,
    "task": TaskRecord,
}
C = TypeVar("C", bound=Claims)


class FixedClock:
    """Stands still until it is set."""

    def __init__(self, now_ms: int = START_MS) -> None:
        self.ms = now_ms

    def now_ms(self) -> int:
        return self.ms


class InMemoryRegistry:
    """A registry's memory and rules. Time passes by a second with each command, unless the test says otherwise."""

    second_person: tuple[SecondPersonMode, ...] = ()
    """The modes in the trust bundle."""

    def __init__(self) -> None:
        self.clock = FixedClock()
        self.task_max_s = TASK_MAX_S
        self.root = SigningKey.generate(f"spiffe://{TD}/root")
        self.registry = SigningKey.generate(f"spiffe://{TD}/service/registry")
        self.policy = SigningKey.generate(f"spiffe://{TD}/service/policy")
        self.trust = self.fresh_trust()
        self.alarms: list[Alarm] = []
        self.directory = self.reader(self.alarms.append)
        self.memory = Memory(self.directory, self.trust, 0)
        self.keys: dict[str, SigningKey] = {"root": self.root, "service/policy": self.policy}
        self._jtis = count()
        self._offsets = count()

    # --- identities ---

    def fresh_trust(self) -> TrustStore:
        trust = TrustStore(TD, self.root.kid)
        validity_s = 3 * 365 * 86_400
        now_s = START_MS // 1000
        bundle = TrustBundle(
            iss=self.root.id, aud=TD, iat=now_s, exp=now_s + validity_s, jti="bundle", version=1,
            rp_id=RP_ID, origins=ORIGINS, second_person=self.second_person,
            services=(
                ServiceIdentity(
                    id=self.registry.id, roles=("registry",), keys=(self.registry.record(now_s + validity_s),)
                ),
                ServiceIdentity(
                    id=self.policy.id, roles=("policy",), keys=(self.policy.record(now_s + validity_s),)
                ),
            ),
        )  # fmt: skip
        trust.load(sign(bundle, self.root, header_jwk=True), now_s)
        return trust

    def reader(
        self, on_alarm: Callable[[Alarm], None] = lambda alarm: None, grace_ms: int | None = None
    ) -> Directory:
        """A directory with nothing in it yet."""
        return Directory(self.trust, self.clock, grace_ms=grace_ms, on_alarm=on_alarm)

    def key(self, who: str, kind: str = "user") -> SigningKey:
        """The key of a user (or agent, target), the same each time."""
        name = who if kind == "user" else f"{kind}/{who}"
        if name not in self.keys:
            self.keys[name] = SigningKey.generate(f"spiffe://{TD}/{kind}/{who}")
        return self.keys[name]

    def key_record(self, key: SigningKey) -> KeyRecord:
        return key.record(START_MS // 1000 + 10 * 365 * 86_400)

    # --- commands ---

    def claims(self, model: type[C], by: str, **fields: Any) -> C:
        now_s = self.clock.ms // 1000
        base: dict[str, Any] = {
            "iss": self.key(by).id,
            "aud": TD,
            "iat": now_s,
            "jti": f"j{next(self._jtis)}",
        }
        if issubclass(model, ExpiringClaims):
            base["exp"] = now_s + 300
        return model(**{**base, **fields})

    def user_set(self, by: str, user: str, roles: Sequence[str] = (), **fields: Any) -> UserSet:
        given = {
            "user_id": user,
            "name": user.title(),
            "roles": tuple(roles),
            "keys": (self.key_record(self.key(user)),),
            "entitlements": self.entitlements(),
        }
        return self.claims(UserSet, by, **{**given, **fields})

    def entitlements(self, *scope: Permission, as_of: int | None = None) -> Entitlements:
        as_of = START_MS // 1000 if as_of is None else as_of
        return Entitlements(scope=scope, source="test", as_of=as_of)

    def register(self, by: str, agent: str, sponsor: str, **fields: Any) -> AgentRegister:
        given = {
            "agent_id": agent,
            "sponsor": sponsor,
            "description": "made by a test",
            "keys": (self.key_record(self.key(agent, "agent")),),
            "ceiling": (),
        }
        return self.claims(AgentRegister, by, **{**given, **fields})

    def target_set(self, by: str, target: str, **fields: Any) -> TargetSet:
        given = {
            "target_id": target,
            "description": "made by a test",
            "backend": BackendSettings(kind="jwt"),
            "verbs": (VerbFloor(verb="read"),),
        }
        return self.claims(TargetSet, by, **{**given, **fields})

    def terms(self, agent: str, **fields: Any) -> TaskTerms:
        given = {
            "agent_id": agent,
            "purpose": "made by a test",
            "scope": (permission("env/**"),),
            "not_after": self.clock.ms // 1000 + 3600,
        }
        return TaskTerms(**{**given, **fields})

    def assign(self, by: str, agent: str, **fields: Any) -> TaskAssign:
        given = {"terms": self.terms(agent), "on_behalf_of": by}
        return self.claims(TaskAssign, by, **{**given, **fields})

    def consent(self, by: str, terms: TaskTerms, **fields: Any) -> str:
        return sign(self.claims(TaskConsent, by, terms=terms, **fields), self.key(by))

    def transfer(self, by: str, agent: str, to: str, **fields: Any) -> AgentTransfer:
        """With the new sponsor's consent to the record as it is, unless the fields say otherwise."""
        if not {"consent", "without_consent"} & fields.keys():
            fields["consent"] = self.transfer_consent(to, agent)
        return self.claims(AgentTransfer, by, agent_id=agent, sponsor=to, **fields)

    def transfer_consent(self, by: str, agent: str, key: SigningKey | None = None, **fields: Any) -> str:
        entry = self.directory.agent(agent)
        given = {"agent_id": agent, "from_sponsor": "nobody", "revision": 1}
        if entry is not None:
            given |= {"from_sponsor": entry.state.sponsor, "revision": entry.revision}
        return sign(self.claims(AgentTransferConsent, by, **{**given, **fields}), key or self.key(by))

    # --- an honest registry ---

    def give(
        self, claims: Any, key: SigningKey | None = None, *, at_ms: int | None = None, passing_ms: int = 1000
    ) -> Change | None:
        """Hand in a command, signed by its `iss` (or another key). Raises what the registry would answer.

        Its append time is the present, and `passing_ms` pass after it.
        """
        at_ms = self.clock.ms if at_ms is None else at_ms
        given = self.directory.chains.authorise(parse(self.signed(claims, key)), at_ms)
        kind, id = command_subject(given.claims, given.command_id)
        change = decide(self.current(kind, id), given, self.memory, task_max_s=self.task_max_s)
        if isinstance(change, Waits):
            raise CommandRefusedError("it waits for a second person", code=Code.SECOND_MISSING)
        if change is not None:
            self.admit(self.sign_record(change.state, change.commands, change.revision, minor=change.minor))
        if kind == "user" and (user := self.directory.user(id)):
            for _, other in changes_elsewhere(user.state, given, self.memory):
                problem = self.admit(
                    self.sign_record(other.state, other.commands, other.revision, minor=other.minor)
                )
                assert problem is None, problem
        self.clock.ms = max(self.clock.ms, at_ms) + passing_ms
        return change

    def signed(self, claims: Claims, key: SigningKey | None = None) -> str:
        kind, _, id = claims.iss.removeprefix(f"spiffe://{TD}/").partition("/")
        return sign(claims, key or (self.root if kind == "root" else self.key(id, kind)))

    def current(self, kind: SubjectKind, id: str) -> Current | None:
        return self.memory.current(kind, id)

    def admit(self, compact: str, reader: Directory | None = None) -> str | None:
        """Hand a record to a reader (its own directory where none is named). Returns why not, as `code: message`."""
        record = parse(compact)
        kind = record.header.typ.removeprefix("ringfence.").removesuffix("+jwt")
        verdict = (reader or self.directory).admit(
            kind,  # type: ignore[arg-type]
            TOPICS[kind].name("ringfence"),
            0,
            compact.encode(),
            self.clock.ms,
        )
        return f"{verdict.reason.code}: {verdict.reason.message}" if isinstance(verdict, Refused) else None

    def organisation(self) -> None:
        """The root makes olga and otto operators; olga makes sam and suzy sponsors, adam an auditor, uma a user."""
        self.give(self.user_set("root", "olga", ["operator"]), self.root)
        self.give(self.user_set("root", "otto", ["operator"]), self.root)
        self.give(self.user_set("olga", "sam", ["sponsor"]))
        self.give(self.user_set("olga", "suzy", ["sponsor"]))
        self.give(self.user_set("olga", "adam", ["auditor"]))
        self.give(self.user_set("olga", "uma"))

    # --- a dishonest one ---

    def sign_record(
        self,
        state: AnyState,
        commands: Sequence[EmbeddedCommand],
        revision: int = 1,
        key: SigningKey | None = None,
        sub: str | None = None,
        *,
        minor: int | None = None,
    ) -> str:
        """A record with whatever content, signed by the registry. `minor`: None for that of the known record."""
        record = self.record(state, commands, revision, sub)
        if minor is None:
            known = self.directory.unverified("user", state.user_id) if isinstance(state, UserState) else None
            minor = known.minor if isinstance(known, UserRecord) else 0
        counted = {"minor": minor} if isinstance(state, UserState) else {}
        return sign(record.model_copy(update=counted), key or self.registry)

    def record(
        self, state: AnyState, commands: Sequence[EmbeddedCommand], revision: int = 1, sub: str | None = None
    ) -> Any:
        kind, id = subject_key(state)
        return RECORDS[kind](
            iss=self.registry.id, aud=TD, iat=self.clock.ms // 1000, jti=f"{kind}-{id}-{revision}",
            sub=sub or subject_spiffe(TD, state), revision=revision, commands=tuple(commands), state=state,
        )  # fmt: skip

    def follow(self, commands: Sequence[EmbeddedCommand], revision: int) -> Any:
        """A record of these commands whose state is what they say."""
        chains = self.chains()
        state: AnyState | None = None
        signed_s = 0
        for embedded in commands:
            at_ms = embedded.appended_at_ms
            given = chains.authorise(parse(embedded.jws), at_ms)
            roles_of = partial(chains.roles_at, at_ms=at_ms)
            context = Context(
                given.actor, at_ms // 1000, given.command_id, roles_of, signed_s,
                transfer_consent=given.consent.transfer if given.consent else None,
                consent_problem=given.consent_problem, key_proof=given.key_proof,
                key_proof_problem=given.key_proof_problem,
            )  # fmt: skip
            state, signed_s = apply(state, given.claims, context), max(signed_s, given.claims.iat)
        assert state is not None
        return self.record(state, commands, revision)

    def give_as_before(self, claims: Any) -> None:
        """Admit a record as a registry wrote it that did not yet refuse this command of today's."""
        given = self.directory.chains.authorise(parse(self.signed(claims)), self.clock.ms)
        current = self.current(*command_subject(given.claims, given.command_id))
        kept = [one.embedded for one in current.commands] if current else []
        revision = current.revision + 1 if current else 1
        problem = self.admit(sign(self.follow([*kept, self.embed(claims)], revision), self.registry))
        assert problem is None, problem
        self.clock.ms += 1000

    def embed(
        self, claims: Claims, at_ms: int | None = None, key: SigningKey | None = None
    ) -> EmbeddedCommand:
        """A command as a record embeds it."""
        return EmbeddedCommand(
            jws=self.signed(claims, key), appended_at_ms=self.clock.ms if at_ms is None else at_ms
        )

    def chains(self, users: Mapping[str, UserRecord] = MappingProxyType({})) -> Chains:
        """Chains over this ledger's users, some of whose records are replaced (also later on, in the mapping)."""

        def find(user_id: str) -> UserRecord | None:
            return users.get(user_id) or self.directory.unverified("user", user_id)  # type: ignore[return-value]

        return Chains(self.trust, find)

    def received(self, topic: Topic[Any], key: str, value: str | bytes, at_ms: int | None = None) -> Received:
        """A record as a follower hands it on."""
        return Received(
            topic, topic.name("ringfence"), 0, next(self._offsets), self.clock.ms if at_ms is None else at_ms, key,
            value.encode() if isinstance(value, str) else value, (),
        )  # fmt: skip


def permission(*resources: str, target: str = "staging", verbs: Sequence[str] = ("deploy",)) -> Permission:
    return Permission(target=target, verbs=tuple(verbs), resources=resources)
