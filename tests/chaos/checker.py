"""What must hold over a whole run, whatever failed in it. Pure: a history in, everything that is wrong with it out.

Moments on Kafka are the broker's append times, those of probes the prober's clock; both are of one machine. A deadline
is in whole seconds. No other tolerance is granted, but to gateways: their grace, and the second that their clocks, by
which they refuse, may be off.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from ringfence.kernel.base.clock import MAX_SKEW_MS
from ringfence.kernel.base.ids import derived_id
from ringfence.messages.lease import TERMINAL, Lease
from ringfence.model.leases.lifecycle import (
    ALL_LEASES,
    FOLLOWING,
    end_status,
    is_covered,
    selector_key_of,
    selector_keys,
)
from tests.chaos.entitled import Offices
from tests.chaos.history import History, LeaseRecord, Order

Kind = Literal[
    "lost",
    "double",
    "early",
    "leaked",
    "worked",
    "escaped",
    "forwarded",
    "uncaused",
    "unentitled",
    "resting",
    "revived",
    "broken",
    "unanswered",
    "unaudited",
    "tampered",
]
KINDS: dict[Kind, str] = {
    "lost": "a lease without an end, or one that an agent holds and Kafka does not know of",
    "double": "two different ends of a lease, or two issues",
    "early": "ended, or refused at its target, before its time and unasked",
    "leaked": "something is left at a target",
    "worked": "a credential was accepted after its cut",
    "escaped": "a lease ran on that an order covers which was followed",
    "forwarded": "a gateway forwarded what it had said that it would not, or must have known to be over",
    "uncaused": "an end that has neither a deadline nor a signed request as its cause, or not such a one",
    "unentitled": "an order was followed whose signer had no say in it",
    "resting": "a lease was issued that rests on a key reported as compromised",
    "revived": "the last record of a lease on the topic is not its end: compaction would bring it back",
    "broken": "records of a lease that do not follow each other",
    "unanswered": "a request to which nobody ever replied",
    "unaudited": "a step that audit does not tell",
    "tampered": "the chain of audit events is not whole, though nobody touched it",
}

GRACE_MS = 5000
"""How old what a gateway knows may be (`RINGFENCE_GRACE_S`)."""

_SAME = (
    "request_id", "decision_digest", "agent_id", "act", "sponsor", "on_behalf_of", "task_id", "target_id", "backend",
    "delivery", "scope", "requested_at_ms", "deadline",
)  # fmt: skip
"""What no record of a lease says otherwise than its first."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that should not be."""

    kind: Kind
    lease_id: str | None
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {f'lease {self.lease_id}: ' if self.lease_id else ''}{self.what}"


def check(history: History) -> list[Problem]:
    """Everything that is wrong with a run that has settled."""
    lives = lives_of(history)
    orders = _Orders(history)
    return [
        *_ends(history, lives),
        *_issues(lives),
        *_records(history, lives),
        *_causes(lives, orders),
        *_unentitled(history, lives, orders),
        *_resting(history, lives),
        *_early_records(lives),
        *_early_refusals(history, lives, orders),
        *_worked(history, lives),
        *_escaped(history, lives, orders),
        *_forwarded(history, lives, orders),
        *(Problem("leaked", left.lease_id, f"{left.target_id}: {left.what}") for left in history.leftovers),
        *_unanswered(history),
        *_unaudited(history),
        *(Problem("tampered", None, f"{fault.kind}: {fault.message}") for fault in history.trail),
    ]


def tally(problems: Sequence[Problem]) -> dict[Kind, int]:
    """How many leases have each kind of problem; what is about no lease counts by itself."""
    found: Counter[Kind] = Counter()
    for kind, _ in {(p.kind, p.lease_id or p.what) for p in problems}:
        found[kind] += 1
    return {kind: found[kind] for kind in KINDS}


def lives_of(history: History) -> dict[str, list[LeaseRecord]]:
    """The records of each lease that count, in the order of the topic."""
    lives: dict[str, list[LeaseRecord]] = defaultdict(list)
    for record in history.leases:
        if not record.void:
            lives[record.claims.lease_id].append(record)
    return dict(lives)


# --- records against each other ---------------------------------------------------------------------------------------


def _ends(history: History, lives: dict[str, list[LeaseRecord]]) -> Iterator[Problem]:
    """Every lease has exactly one distinct terminal record, and whoever holds a credential holds a known lease."""
    for lease_id, life in lives.items():
        ends = {record.digest: record for record in life if record.claims.status in TERMINAL}
        if not ends:
            yield Problem("lost", lease_id, f"no end; its records: {_told(life)}")
        elif len(ends) > 1:
            yield Problem("double", lease_id, f"{len(ends)} different ends: {_told(list(ends.values()))}")
    for lease_id in sorted(history.received):
        if not any(record.claims.status == "active" for record in lives.get(lease_id, ())):
            yield Problem("lost", lease_id, "an agent was given its credential, and Kafka has no issue of it")


def _issues(lives: dict[str, list[LeaseRecord]]) -> Iterator[Problem]:
    by_request: dict[str, set[str]] = defaultdict(set)
    for lease_id, life in lives.items():
        issues = {record.digest: record for record in life if record.claims.status == "active"}
        if len(issues) > 1:
            yield Problem("double", lease_id, f"issued {len(issues)} times: {_told(list(issues.values()))}")
        by_request[life[0].claims.request_id].add(lease_id)
    for request_id, ids in by_request.items():
        for lease_id in sorted(ids)[1:]:
            yield Problem("double", lease_id, f"another lease of request {request_id}")


def _records(history: History, lives: dict[str, list[LeaseRecord]]) -> Iterator[Problem]:
    for where in history.forged:
        yield Problem("broken", None, where)
    last = {record.claims.lease_id: record for record in history.leases}
    for lease_id, life in lives.items():
        by_seq = {record.claims.seq: record for record in reversed(life)}
        digests = {(record.claims.seq, record.digest) for record in life}
        if len(digests) > len(by_seq):
            yield Problem("broken", lease_id, f"different records with one seq: {_told(life)}")
        if sorted(by_seq) != list(range(1, len(by_seq) + 1)):
            yield Problem("broken", lease_id, f"a seq is missing: {_told(life)}")
        folded = [by_seq[seq] for seq in sorted(by_seq)]
        for before, after in pairwise(folded):
            if after.claims.status not in FOLLOWING[before.claims.status]:
                yield Problem("broken", lease_id, f"{after.claims.status} after {before.claims.status}")
            changed = [name for name in _SAME if getattr(before.claims, name) != getattr(after.claims, name)]
            if changed:
                yield Problem("broken", lease_id, f"seq {after.claims.seq} changes {', '.join(changed)}")
            if before.claims.status == "ending" and after.claims.cause != before.claims.cause:
                yield Problem("broken", lease_id, "it was cut for another reason than it ended for")
            uncut = before.claims.status == "active" and after.claims.status in TERMINAL
            if uncut and history.revocability.get(after.claims.backend) == "session":
                yield Problem("broken", lease_id, f"{after.claims.status} without a cut, and so never undone")
        if last[lease_id].void or last[lease_id].claims.seq != max(by_seq):
            every = [record for record in history.leases if record.claims.lease_id == lease_id]
            yield Problem(
                "revived", lease_id, f"the last record on the topic is not the latest: {_told(every)}"
            )


# --- records against what caused them ---------------------------------------------------------------------------------


class _Orders:
    """Orders by what they are about. Said again, an order covers what it covered the first time."""

    def __init__(self, history: History) -> None:
        self._first: dict[tuple[str, str], Order] = {}
        self._said_at_ms: dict[tuple[str, str], set[int]] = defaultdict(set)
        for order in sorted(history.orders, key=lambda order: order.at.appended_at_ms):
            self._first.setdefault(_name(order), order)
            self._said_at_ms[_name(order)].add(order.at.appended_at_ms)
        self._by_lease: dict[str, list[Order]] = defaultdict(list)
        self._by_mark: dict[str, list[Order]] = defaultdict(list)
        for order in self._first.values():
            if order.claims.lease_id is not None:
                self._by_lease[order.claims.lease_id].append(order)
            elif order.claims.selector is not None:
                self._by_mark[selector_key_of(order.claims.selector)].append(order)
        self._offices = Offices(history.states, GRACE_MS)
        self._objections: dict[tuple[str, str, str | None], str | None] = {}
        self._until_ms = {name: order.at.appended_at_ms for name, order in self._first.items()}
        """Until when each was carried out: by its first effect, or the word that it was."""
        effects = [((one.actor, one.ref), one.at_ms) for one in history.followed]
        for record in history.leases:
            if record.claims.cause is not None:
                cause = record.claims.cause
                effects.append(((cause.by or "", cause.ref or ""), record.at.appended_at_ms))
        named = {derived_id("revocation", *name): name for name in self._first}
        effects += [(named[ack.order_id], ack.at_ms) for ack in history.acks if ack.order_id in named]
        first_ms: dict[tuple[str, str], int] = {}
        for name, at_ms in effects:
            first_ms[name] = min(at_ms, first_ms.get(name, at_ms))
        for name in self._until_ms.keys() & first_ms.keys():
            self._until_ms[name] = max(self._until_ms[name], first_ms[name])

    def __iter__(self) -> Iterator[Order]:
        return iter(self._first.values())

    def objection(self, order: Order, lease: Lease | None) -> str | None:
        """Why its signer had no say in this, or None."""
        name = _name(order)
        # What a selector covers depends on nothing but itself.
        about = (*name, lease.lease_id if lease is not None and order.claims.lease_id is not None else None)
        if about not in self._objections:
            self._objections[about] = self._offices.objection(order, lease, self._until_ms[name])
        return self._objections[about]

    def find(self, by: str | None, ref: str | None) -> Order | None:
        return self._first.get((by or "", ref or ""))

    def said_at(self, order: Order, ms: int) -> bool:
        """Whether an order stands on its topic since then, for the first time or once more."""
        return ms in self._said_at_ms[order.claims.iss, order.claims.jti]

    def covering(self, lease: Lease) -> list[Order]:
        """All that somebody entitled could have meant this lease with, the first first."""
        return [order for order in self.about(lease) if self.objection(order, lease) is None]

    def about(self, lease: Lease) -> list[Order]:
        """All that is about this lease, by whomever, the first first."""
        found = list(self._by_lease.get(lease.lease_id, ()))
        for mark in (*selector_keys(lease), ALL_LEASES):
            found += [
                order for order in self._by_mark.get(mark, ()) if is_covered(lease, order.at.appended_at_ms)
            ]
        return sorted(found, key=lambda order: order.at.appended_at_ms)


def _name(order: Order) -> tuple[str, str]:
    return order.claims.iss, order.claims.jti


def _unentitled(history: History, lives: dict[str, list[LeaseRecord]], orders: _Orders) -> Iterator[Problem]:
    """Nothing ends, and nobody gives their word, on the order of somebody who has no say in it."""
    for lease_id, life in lives.items():
        refs = {(r.claims.cause.by, r.claims.cause.ref) for r in life if r.claims.cause is not None}
        for by, ref in sorted(refs, key=str):
            order = orders.find(by, ref)
            if order is not None and (why := orders.objection(order, life[0].claims)) is not None:
                yield Problem("unentitled", lease_id, f"ended by {ref}: {why}")
    words = {(one.actor, one.ref) for one in history.followed}
    cut = {ack.order_id for ack in history.acks}
    for order in orders:
        named = lives.get(order.claims.lease_id or "")
        lease = named[0].claims if named else None
        if order.claims.lease_id is not None and lease is None:
            continue  # of a lease that is unknown: told elsewhere
        followed = _name(order) in words or derived_id("revocation", *_name(order)) in cut
        if followed and (why := orders.objection(order, lease)) is not None:
            yield Problem("unentitled", order.claims.lease_id, f"{order.claims.jti} was followed: {why}")


def _resting(history: History, lives: dict[str, list[LeaseRecord]]) -> Iterator[Problem]:
    """Nothing is issued on what was held for longer than an issuer may not know of it."""
    offices = Offices(history.states, GRACE_MS + MAX_SKEW_MS)
    for lease_id, life in lives.items():
        issued = next((one for one in life if one.claims.status == "active"), None)
        if issued and (held := offices.held(issued.claims, issued.at.appended_at_ms)):
            yield Problem("resting", lease_id, f"issued at {issued.at.appended_at_ms} while {held} was held")


def _causes(lives: dict[str, list[LeaseRecord]], orders: _Orders) -> Iterator[Problem]:
    """Every end has a deadline or a signed request as its cause."""
    for lease_id, life in lives.items():
        for record in life:
            lease = record.claims
            if lease.status in ("minting", "active"):
                continue
            if (why := _uncaused(record, orders)) is not None:
                yield Problem("uncaused", lease_id, f"{lease.status} at {record.at.appended_at_ms}: {why}")


def _uncaused(record: LeaseRecord, orders: _Orders) -> str | None:
    lease, cause = record.claims, record.claims.cause
    if cause is None:
        return "no cause"
    # What was never issued is aborted whatever is asked for, and by no deadline: nobody may wait for that.
    fitting = "aborted" if lease.status == "aborted" and cause.kind != "deadline" else end_status(cause.kind)
    if lease.status not in ("ending", fitting):
        return f"{cause.kind} does not lead to that"
    if cause.kind == "mint_failed":
        return None if lease.status == "aborted" else "its minting failed, and yet it was issued"
    if cause.kind == "deadline":
        return None if cause.at_ms >= lease.deadline * 1000 else "the cause is older than the deadline"
    order = orders.find(cause.by, cause.ref)
    if order is None:
        return f"nobody signed the {cause.kind} {cause.ref} by {cause.by}"
    if order.claims.kind != cause.kind:
        return f"{cause.ref} asks for {order.claims.kind}, not for {cause.kind}"
    if order.at.appended_at_ms > record.at.appended_at_ms:
        return f"{cause.ref} was asked for later, at {order.at.appended_at_ms}"
    if order not in orders.about(lease):
        return f"{cause.ref} does not cover it"
    if not orders.said_at(order, cause.at_ms) or cause.reason != order.claims.reason:
        return f"{cause.ref} was not asked for at {cause.at_ms}, or not for that reason"
    return None


def _early_records(lives: dict[str, list[LeaseRecord]]) -> Iterator[Problem]:
    for lease_id, life in lives.items():
        for record in life:
            lease = record.claims
            of_time = lease.cause is not None and lease.cause.kind == "deadline"
            if of_time and lease.status != "aborted" and record.at.appended_at_ms < lease.deadline * 1000:
                early_ms = lease.deadline * 1000 - record.at.appended_at_ms
                yield Problem("early", lease_id, f"{lease.status} {early_ms} ms before its deadline")


# --- records against what was seen at targets -------------------------------------------------------------------------


def _early_refusals(
    history: History, lives: dict[str, list[LeaseRecord]], orders: _Orders
) -> Iterator[Problem]:
    """A credential is good until its deadline, or until somebody asks for its end."""
    good_until: dict[str, int] = {}
    for lease_id, life in lives.items():
        lease = life[0].claims
        asked = [order.at.appended_at_ms for order in orders.covering(lease)[:1]]
        off_ms = MAX_SKEW_MS if lease.delivery == "gateway" else 0
        good_until[lease_id] = min([lease.deadline * 1000 - off_ms, *asked])
    for probe in history.probes:
        until_ms = good_until.get(probe.lease_id)
        if until_ms is not None and not probe.worked and probe.ended_ms < until_ms:
            yield Problem(
                "early", probe.lease_id, f"refused at {probe.ended_ms}, {until_ms - probe.ended_ms} ms early"
            )


def cut_at_ms(life: Sequence[LeaseRecord], history: History) -> int | None:
    """From when on a credential must not work. None while nothing has ended it.

    `instant`: its cut is on Kafka. `session`: its end is. `ttl`: its deadline, which holds for all.
    """
    lease = life[0].claims
    if lease.delivery == "gateway":
        return _cut_at_gateways_ms(life)
    kind = history.revocability.get(lease.backend, "instant")
    ends = {
        "instant": TERMINAL | {"ending"},
        "session": TERMINAL,
        "ttl": frozenset[str](),
    }[kind]
    cuts = [record.at.appended_at_ms for record in life if record.claims.status in ends]
    if kind != "session":
        cuts.append(lease.deadline * 1000)
    return min(cuts, default=None)


def _cut_at_gateways_ms(life: Sequence[LeaseRecord]) -> int:
    """The moment from which no gateway forwards, whatever it hears or does not hear: with an older view it denies.

    That each keeps its word, and that a revoker's is kept, is looked at elsewhere.
    """
    ended = [r.at.appended_at_ms for r in life if r.claims.status not in ("minting", "active")]
    return min([life[0].claims.deadline * 1000, *ended]) + GRACE_MS


def _worked(history: History, lives: dict[str, list[LeaseRecord]]) -> Iterator[Problem]:
    cuts = {lease_id: cut_at_ms(life, history) for lease_id, life in lives.items()}
    for probe in history.probes:
        cut_ms = cuts.get(probe.lease_id)
        if probe.worked and cut_ms is not None and probe.began_ms > cut_ms:
            late_ms = probe.began_ms - cut_ms
            yield Problem("worked", probe.lease_id, f"worked at {probe.began_ms}, {late_ms} ms after its cut")


def _escaped(history: History, lives: dict[str, list[LeaseRecord]], orders: _Orders) -> Iterator[Problem]:
    """Once a revoker says that an order was followed, nothing that it covers works any more or runs to its deadline."""
    followed_ms: dict[tuple[str, str], int] = {}
    for one in history.followed:
        name = (one.actor, one.ref)
        followed_ms[name] = min(one.at_ms, followed_ms.get(name, one.at_ms))
    worked = defaultdict(list)
    for probe in history.probes:
        if probe.worked:
            worked[probe.lease_id].append(probe.began_ms)
    for lease_id, life in lives.items():
        lease = life[0].claims
        session = history.revocability.get(lease.backend) == "session"  # it works on until its target answers
        for order in orders.covering(lease):
            over_ms = followed_ms.get((order.claims.iss, order.claims.jti))
            if over_ms is None:
                continue
            if lease.delivery == "gateway":  # the word of gateways, or their grace, completes this cut
                over_ms = max(over_ms, order.at.appended_at_ms + GRACE_MS)
            late = [began_ms for began_ms in worked[lease_id] if began_ms > over_ms]
            if late and not session:
                what = f"worked at {late[0]}, after {order.claims.jti} was followed at {over_ms}"
                yield Problem("escaped", lease_id, what)
            ran_out = any(r.claims.cause is not None and r.claims.cause.kind == "deadline" for r in life)
            if ran_out and over_ms < lease.deadline * 1000:
                what = f"ran to its deadline, though {order.claims.jti} was followed at {over_ms}"
                yield Problem("escaped", lease_id, what)


def _forwarded(history: History, lives: dict[str, list[LeaseRecord]], orders: _Orders) -> Iterator[Problem]:
    """Once a gateway has given its word on an order, it forwards nothing more of what that covers.

    Nor does it, word or not, what is over for longer than its grace.
    """
    given_ms: dict[tuple[str, str], int] = {}
    for ack in history.acks:
        word = (ack.gateway, ack.order_id)
        given_ms[word] = min(ack.at_ms, given_ms.get(word, ack.at_ms))
    for gateway, probes in history.forwarded.items():
        last_ms: dict[str, int] = {}
        for probe in probes:
            if probe.worked:
                last_ms[probe.lease_id] = max(probe.began_ms, last_ms.get(probe.lease_id, 0))
        for lease_id, at_ms in last_ms.items():
            life = lives.get(lease_id)
            if life and at_ms > _cut_at_gateways_ms(life):
                what = (
                    f"{gateway} forwarded at {at_ms}, and its grace was over at {_cut_at_gateways_ms(life)}"
                )
                yield Problem("forwarded", lease_id, what)
            for order in orders.covering(life[0].claims) if life else ():
                id = derived_id("revocation", order.claims.iss, order.claims.jti)
                word_ms = given_ms.get((gateway, id))
                if word_ms is not None and at_ms > word_ms:
                    what = f"{gateway} forwarded at {at_ms}, its word on {order.claims.jti} is of {word_ms}"
                    yield Problem("forwarded", lease_id, what)


def _unanswered(history: History) -> Iterator[Problem]:
    for request_id, at_ms in history.requests.items():
        if request_id not in history.answered:
            yield Problem("unanswered", None, f"request {request_id}, appended at {at_ms}")


def _unaudited(history: History) -> Iterator[Problem]:
    for at in history.steps:
        if (at.topic, at.partition, at.offset) not in history.audited:
            what = f"{at.topic}/{at.partition}@{at.offset}, appended at {at.appended_at_ms}, has no event"
            yield Problem("unaudited", None, what)


def _told(records: Sequence[LeaseRecord]) -> str:
    return ", ".join(
        f"{r.claims.seq} {r.claims.status} by {r.claims.iss.rpartition('/')[2]} in {r.claims.epoch}"
        f"{' (void)' if r.void else ''} "
        f"@{r.at.partition}:{r.at.offset} at {r.at.appended_at_ms}"
        for r in records
    )
