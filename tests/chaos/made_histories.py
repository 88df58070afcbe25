"""Histories of a run made by hand: a clean one, and what tests plant in it."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ringfence.kernel.base.clock import MAX_SKEW_MS
from ringfence.kernel.base.ids import derived_id, digest
from ringfence.messages.base import Permission
from ringfence.messages.credential import Coordinates, Delivery
from ringfence.messages.lease import EndCause, EndKind, Lease, LeaseStatus, RevocationRequest, Selector
from ringfence.messages.registry import AgentState, Entitlements, Hold, TaskState, UserState
from ringfence.model.leases.lifecycle import end_status, record_id, restated, statement
from tests.chaos.checker import GRACE_MS
from tests.chaos.history import Ack, Followed, History, LeaseRecord, Order, Probe, State

TD = "acme.example"


T0_S = 1_800_000_000


T0 = T0_S * 1000


TTL_S = 20


DEADLINE = (T0_S + TTL_S) * 1000


SAM, REVOKER = f"spiffe://{TD}/user/sam", f"spiffe://{TD}/service/revoker"


GATEWAY = f"spiffe://{TD}/service/gateway-1"


ISSUER = f"spiffe://{TD}/service/issuer"


SCOPE = Permission(target="shop", verbs=("read",), resources=("env/a",))


HOLD = Hold(
    report="3f2c1a60-0000-4000-8000-000000000001", report_digest="0" * 64, by="olga", by_kid="olga-1", user_id="otto",
    kid="otto-1", parts=("ceiling",), at_ms=T0 - 20_000, status="held", since_ms=T0 - 60_000,
)  # fmt: skip
"""What a report of a compromised key holds of an agent's record."""


def user(user_id: str) -> str:
    return f"spiffe://{TD}/user/{user_id}"


Plant = Callable[["Past"], object]


class Past:
    """Writes a history as the parts would: one lease after another, each on its way to its end.

    Every lease has an agent, a task and a sponsor of its own, unless `like` another.
    """

    def __init__(self) -> None:
        self.history = History(revocability={"jwt": "instant", "redis": "session", "ssh": "ttl"})
        self._offset = 0
        self._number = 0
        self.user("sam", "operator")
        self.user("maria")

    # --- who holds which office ---

    def user(self, user_id: str, *roles: str, ms: int = T0 - 60_000, status: str = "active") -> State:
        entitlements = Entitlements.model_construct(scope=(SCOPE,), source="a test", as_of=T0_S)
        return self._state(
            UserState, f"user/{user_id}", ms, user_id=user_id, roles=roles, status=status, entitlements=entitlements
        )  # fmt: skip

    def agent(
        self,
        agent_id: str,
        sponsor: str,
        ms: int = T0 - 60_000,
        *,
        status: str = "active",
        verb: str = "read",
        holds: tuple[Hold, ...] = (),
    ) -> State:
        ceiling = (SCOPE.model_copy(update={"verbs": (verb,)}),)
        return self._state(
            AgentState, f"agent/{agent_id}", ms, agent_id=agent_id, sponsor=sponsor, status=status, ceiling=ceiling,
            holds=holds,
        )  # fmt: skip

    def task(
        self, lease: Lease, ms: int = T0 - 60_000, *, status: str = "active", by: str = "maria"
    ) -> State:
        return self._state(
            TaskState, f"task/{lease.task_id}", ms, task_id=lease.task_id, agent_id=lease.agent_id,
            on_behalf_of="maria", assigned_by=by, status=status,
        )  # fmt: skip

    def _state(self, kind: Any, subject: str, ms: int, **fields: Any) -> State:
        revision = 1 + sum(one.subject == f"spiffe://{TD}/{subject}" for one in self.history.states)
        state = State(f"spiffe://{TD}/{subject}", revision, ms, kind.model_construct(**fields))
        self.history.states.append(state)
        return state

    def derived(
        self, ms: int, kind: EndKind, record: State, lease: Lease | None = None, **selector: Any
    ) -> EndCause:
        """What a revoker orders because of a record."""
        what = lease.lease_id if lease else Selector(**selector).model_dump_json(exclude_defaults=True)
        jti = derived_id("revocation.request", record.subject, record.revision, what)
        return self.order(ms, lease, kind=kind, by=REVOKER, jti=jti, **selector)

    # --- what happens ---

    def at(self, topic: str, ms: int) -> Coordinates:
        self._offset += 1
        at = Coordinates(topic=topic, partition=0, offset=self._offset, appended_at_ms=ms)
        self.history.steps.append(at)
        self.history.audited.add((topic, 0, self._offset))
        return at

    def issue(
        self,
        ms: int = T0 + 100,
        backend: str = "jwt",
        status: LeaseStatus = "active",
        like: Lease | None = None,
        delivery: Delivery = "agent",
    ) -> Lease:
        """A lease, active, received by its agent and used at once."""
        self._number += 1
        id, n = str(uuid.uuid4()), like.agent_id.partition("-")[2] if like else str(self._number)
        lease = Lease(
            iss=ISSUER, aud=TD, iat=ms // 1000, jti=record_id(id, 1), lease_id=id, seq=1, status=status,
            request_id=str(uuid.uuid4()), decision_id="d", decision_digest="0" * 64, agent_id=f"bot-{n}",
            act=(f"bot-{n}",), sponsor=f"sam-{n}", on_behalf_of="maria",
            task_id=f"00000000-0000-0000-0000-{n:0>12}", target_id="shop", backend=backend, delivery=delivery,
            scope=(SCOPE,),
            requested_at_ms=T0, deadline=T0_S + TTL_S,
        )  # fmt: skip
        if like is None:
            self.user(lease.sponsor, "sponsor")
            self.agent(lease.agent_id, lease.sponsor)
            self.task(lease)
        self.history.requests[lease.request_id] = T0
        self.history.answered[lease.request_id] = ms
        self.record(lease, ms)
        if status == "active":
            self.received(lease, ms)
        return lease

    def received(self, lease: Lease, ms: int) -> None:
        self.history.received.add(lease.lease_id)
        self.probe(lease, ms + 1, worked=True)

    def record(self, lease: Lease, ms: int, *, void: bool = False) -> None:
        self.history.leases.append(LeaseRecord(lease, digest(statement(lease)), self.at("lease", ms), void))

    def next(
        self,
        lease: Lease,
        status: LeaseStatus,
        ms: int,
        cause: EndCause | None = None,
        *,
        void: bool = False,
        epoch: str = "1.aaaaaaaa",
    ) -> Lease:
        following = lease.model_copy(
            update={
                "iss": REVOKER, "iat": ms // 1000, "seq": lease.seq + 1, "status": status,
                "jti": record_id(lease.lease_id, lease.seq + 1), "cause": cause or lease.cause, "epoch": epoch,
            }
        )  # fmt: skip
        self.record(following, ms, void=void)
        return following

    def order(
        self,
        ms: int,
        lease: Lease | None = None,
        *,
        kind: EndKind = "revocation",
        by: str = SAM,
        jti: str | None = None,
        **selector: Any,
    ) -> EndCause:
        claims = RevocationRequest(
            iss=by, aud=TD, iat=ms // 1000, jti=jti or str(uuid.uuid4()), kind=kind, reason="x",
            lease_id=lease.lease_id if lease else None, selector=Selector(**selector) if selector else None,
        )  # fmt: skip
        self.history.orders.append(Order(claims, self.at("revocation.request", ms)))
        return EndCause(kind=kind, at_ms=ms, by=by, ref=claims.jti, reason="x")

    def release(self, ms: int, lease: Lease) -> EndCause:
        return self.order(ms, lease, kind="release", by=f"spiffe://{TD}/agent/{lease.agent_id}")

    def follow(self, cause: EndCause, ms: int) -> None:
        self.history.followed.append(Followed(cause.by or "", cause.ref or "", ms))

    def give_word(self, cause: EndCause, ms: int) -> None:
        """The gateway says that it forwards nothing more of what an order covers."""
        id = derived_id("revocation", cause.by or "", cause.ref or "")
        self.history.acks.append(Ack(GATEWAY, id, ms))

    def at_gateway(self, lease: Lease, ms: int, *, forwards: bool) -> None:
        probes = self.history.forwarded.setdefault(GATEWAY, [])
        probes.append(Probe(lease.lease_id, ms, ms + 3, forwards))

    def end(self, lease: Lease, cause: EndCause, ms: int) -> Lease:
        """Cut, undone, over: and refused from then on."""
        ending = self.next(lease, "ending", ms, cause)
        self.probe(lease, ms + 1, worked=False)
        return self.next(ending, end_status(cause.kind), ms + 2)

    def expire(self, lease: Lease, ms: int = DEADLINE + 30) -> Lease:
        cause = EndCause(kind="deadline", at_ms=DEADLINE)
        self.probe(lease, DEADLINE + 1, worked=False)
        return self.next(lease, "expired", ms, cause)

    def probe(self, lease: Lease, ms: int, *, worked: bool) -> None:
        self.history.probes.append(Probe(lease.lease_id, ms, ms + 3, worked))


def clean() -> Past:
    """A run in which every kind of end is there, and nothing is wrong."""
    past = Past()
    past.expire(past.issue())
    released = past.issue()
    past.end(released, past.release(T0 + 500, released), T0 + 510)
    revoked = past.issue()
    past.probe(revoked, T0 + 690, worked=True)
    past.end(revoked, past.order(T0 + 700, revoked), T0 + 720)
    switched = past.issue()
    cause = past.order(T0 + 900, agent_id=switched.agent_id)
    for lease in (switched, past.issue(like=switched)):
        past.end(lease, cause, T0 + 930)
    past.follow(cause, T0 + 940)
    # A gateway forwards until it has given its word, also what is cut elsewhere already.
    past.give_word(cause, T0 + 960)
    past.at_gateway(switched, T0 + 950, forwards=True)
    past.at_gateway(switched, T0 + 961, forwards=False)
    past.give_word(past.order(T0 + 901, task_id="00000000-0000-0000-0000-000000000099"), T0 + 902)
    aborted = past.issue(backend="redis", status="minting")
    past.next(aborted, "aborted", T0 + 400, EndCause(kind="mint_failed", at_ms=T0 + 400))
    # A session works until its target has let go of it.
    session = past.issue(backend="redis", status="minting", like=switched)
    active = past.next(session, "active", T0 + 300)
    past.received(session, T0 + 300)
    ending = past.next(active, "ending", T0 + 931, cause)
    past.probe(session, T0 + 1_500, worked=True)
    past.next(ending, "revoked", T0 + 2_000)
    past.probe(session, T0 + 2_001, worked=False)
    # An order that is said again, as derived ones are by each revoker, is the same; so is what comes of it.
    again = past.issue()
    cause = past.order(T0 + 700, again)
    first = past.history.orders[-1]
    past.history.orders.append(replace(first, at=past.at("revocation.request", T0 + 710)))
    past.end(again, cause.model_copy(update={"at_ms": T0 + 710}), T0 + 720)
    # What is revoked before it was made is aborted.
    unmade = past.issue(backend="redis", status="minting")
    past.next(unmade, "aborted", T0 + 400, past.order(T0 + 350, agent_id=unmade.agent_id))
    # By a gateway's clock, which may be a second off, a deadline comes sooner.
    soon = past.issue(delivery="gateway")
    past.probe(soon, DEADLINE - MAX_SKEW_MS, worked=False)
    past.expire(soon)
    # A gateway that hears nothing forwards until what it knows is too old.
    delivered = past.issue(delivery="gateway")
    cause = past.order(T0 + 700, delivered)
    past.end(delivered, cause, T0 + 720)
    past.follow(cause, T0 + 730)
    past.probe(delivered, T0 + 700 + GRACE_MS, worked=True)
    # What is delivered twice is the same, and the last word stands.
    twice = past.issue()
    past.record(twice, T0 + 150)
    past.expire(twice)
    # An end that came after the marker of a newer epoch is none, and the one that counts is said once more after it.
    late = past.issue()
    order = past.order(DEADLINE - 20, late)
    end = past.expire(late)
    past.next(late, "ending", DEADLINE + 50, order, void=True)
    past.record(restated(end, by=REVOKER, epoch="2.bbbbbbbb"), DEADLINE + 60)
    return past
