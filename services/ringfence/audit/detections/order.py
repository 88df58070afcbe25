"""Rules about what must follow what, and how soon: approvals, reviews, leases and their use. Pure.

The topics are read side by side, so what should come first may be seen later: either order is taken, and what did not
come counts as missing only when audit has been up to date for a while.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from ringfence.audit.detections.rule import About, Finding, Seen, TrailQueries

V = TypeVar("V")

REMEMBERED = 20_000
"""Of each kind of thing that a rule waits with."""
_ASKED = {"approval.requested": "request", "action.approval_requested": "question"}
_GIVEN = {"approval.given": "request", "action.approved": "question"}
_ENDS = frozenset({"lease.ending", "credential.released", "credential.revoked", "lease.expired"})
_ALLOWED = ("request.allowed", "break_glass.used")
_ISSUED = ("credential.issued",)
_AHEAD_MS = 60_000
"""The question follows the decision that waits: who answers from that has not read the question. What lies further
apart is an answer to a question of before."""


class QuickApproval:
    """A person approves faster than anybody reads: a script answers, or they no longer look."""

    def __init__(self, least_s: float) -> None:
        self._least_ms = int(least_s * 1000)
        self._asked: OrderedDict[str, About] = OrderedDict()
        self._given: OrderedDict[str, list[About]] = OrderedDict()

    def wants(self, code: str, log_name: str) -> bool:
        return code in _ASKED or code in _GIVEN

    def take(self, seen: Seen, now_ms: int) -> Iterator[Finding]:
        word = _ASKED.get(seen.code) or _GIVEN.get(seen.code)
        id = seen.word(word) if word else None
        if not isinstance(id, str):
            return
        if seen.code in _ASKED:
            if id in self._asked:  # several are asked; each could read from the first question on
                return
            _keep(self._asked, id, seen.about)
            for given in self._given.pop(id, ()):
                yield from self._judged(id, seen.about, given)
            return
        given = seen.about._replace(
            words={**seen.about.words, "approver": seen.event.get("actor", {}).get("user", {}).get("name")}
        )
        asked = self._asked.get(id)
        if asked is not None:
            yield from self._judged(id, asked, given)
        else:
            _keep(self._given, id, [*self._given.get(id, ()), given][:8])

    def _judged(self, id: str, asked: About, given: About) -> Iterator[Finding]:
        took_ms = given.time_ms - asked.time_ms
        if not -_AHEAD_MS <= took_ms < self._least_ms:
            return
        who = given.word("approver") or "somebody"
        when = f"{took_ms} ms after" if took_ms >= 0 else f"{-took_ms} ms before"
        yield Finding(
            "quick_approval",
            (id, given.uid),
            given.time_ms,
            f"{who} approved what agent {given.word('agent')} asked for {when} being asked; nobody reads "
            f"in less than {self._least_ms / 1000:g} s",
            given,
            (asked.uid, given.uid),
            words={"waited_ms": took_ms, "approvers": [who]},
        )

    def due(self, now_ms: int) -> Iterable[Finding]:
        return ()


class Unreviewed:
    """Break glass that nobody has looked at since."""

    def __init__(self, after_s: int) -> None:
        self._after_ms = after_s * 1000
        self._open: OrderedDict[str, About] = OrderedDict()
        self._reviewed: OrderedDict[str, bool] = OrderedDict()

    def wants(self, code: str, log_name: str) -> bool:
        return code in ("break_glass.used", "break_glass.reviewed")

    def take(self, seen: Seen, now_ms: int) -> Iterator[Finding]:
        request = seen.about.word("request")
        if request is not None and seen.code == "break_glass.used" and request not in self._reviewed:
            _keep(self._open, request, seen.about)
        elif request is not None and seen.code == "break_glass.reviewed":
            self._open.pop(request, None)
            _keep(self._reviewed, request, True)
        yield from ()

    def due(self, now_ms: int) -> Iterator[Finding]:
        for request, used in list(self._open.items()):
            if used.time_ms + self._after_ms <= now_ms:
                del self._open[request]
                yield Finding(
                    "unreviewed",
                    (request,),
                    used.time_ms + self._after_ms,
                    f"nobody reviewed the break glass of agent {used.word('agent')} (request {request}) within "
                    f"{self._after_ms / 3_600_000:g} h",
                    used,
                    (used.uid,),
                    standing=True,
                )


@dataclass(slots=True)
class _Life:
    """What is known of one lease by which something was done."""

    acted: About
    """The last action by it that was let pass."""
    over: str | None = None
    """The uid of the event by which it was over."""
    over_ms: int | None = None


@dataclass(slots=True)
class _Unpreceded:
    """Something that lacks what should have come before it."""

    came_ms: int
    about: About


class Sequences:
    """What cannot be where every part does its work: a credential that no decision allowed, an action by a lease that
    was never issued, or one that was over.
    """

    def __init__(self, trail: TrailQueries, *, settle_s: int, late_s: int, back_s: int) -> None:
        """Args:
            trail: what has been told of so far, whenever that was.
            settle_s: how long something may be missing while audit is up to date.
            late_s: how much later than the end of its lease an action may be told of.
            back_s: what happened longer ago is not judged.
        """  # fmt: skip
        self._trail = trail
        self._settle_ms = settle_s * 1000
        self._late_ms = late_s * 1000
        self._back_ms = back_s * 1000
        self._behind_ms = 0
        self._lives: OrderedDict[str, _Life] = OrderedDict()
        self._allowed: OrderedDict[str, bool] = OrderedDict()
        """Requests that were allowed lately: the trail need not be asked for them."""
        self._undecided: OrderedDict[str, _Unpreceded] = OrderedDict()
        self._unissued: OrderedDict[str, _Unpreceded] = OrderedDict()

    def wants(self, code: str, log_name: str) -> bool:
        return True  # also how old they are

    def take(self, seen: Seen, now_ms: int) -> Iterator[Finding]:
        about = seen.about
        if now_ms - about.time_ms > self._settle_ms:
            self._behind_ms = now_ms  # audit works off what is old: what is missing may come yet
        if now_ms - about.time_ms > self._back_ms:
            return
        lease, request = about.word("lease"), about.word("request")
        if seen.code in _ALLOWED and request is not None:
            _keep(self._allowed, request, True)
        if lease is None:
            return
        if seen.code == "credential.issued" and request is not None:
            if request not in self._allowed and not self._trail.tells("request", request, _ALLOWED):
                _keep(self._undecided, request, _Unpreceded(now_ms, about))
            deadline = seen.word("deadline")
            if isinstance(deadline, int):
                yield from self._over(lease, about, deadline * 1000)
        elif seen.code in _ENDS:
            yield from self._over(lease, about, about.time_ms)
        elif seen.code == "action.allowed":
            yield from self._acted(lease, about)
            if not self._trail.tells("lease", lease, _ISSUED) and lease not in self._unissued:
                _keep(self._unissued, lease, _Unpreceded(now_ms, about))

    def due(self, now_ms: int) -> Iterator[Finding]:
        yield from self._missing(now_ms, self._undecided, "request", _ALLOWED, "issued_undecided")
        yield from self._missing(now_ms, self._unissued, "lease", _ISSUED, "used_unissued")

    def _missing(
        self,
        now_ms: int,
        waiting: OrderedDict[str, _Unpreceded],
        kind: Literal["request", "lease"],
        codes: tuple[str, ...],
        what: str,
    ) -> Iterator[Finding]:
        for id, one in list(waiting.items()):
            if max(one.came_ms, self._behind_ms) + self._settle_ms > now_ms:
                continue
            del waiting[id]
            if not self._trail.tells(kind, id, codes):
                yield _impossible(what, id, one.about, (one.about.uid,))

    def _over(self, lease: str, about: About, over_ms: int) -> Iterator[Finding]:
        life = self._lives.get(lease)
        if life is None:
            return  # the trail tells it to whoever asks when something is done by the lease
        if life.over_ms is None or over_ms < life.over_ms:
            life.over, life.over_ms = about.uid, over_ms
        yield from self._after_end(lease, life)

    def _acted(self, lease: str, about: About) -> Iterator[Finding]:
        life = self._lives.get(lease)
        if life is None:
            life = _Life(about, *(self._trail.over(lease, _ENDS) or ()))
        if about.time_ms > life.acted.time_ms:
            life.acted = about
        _keep(self._lives, lease, life)
        yield from self._after_end(lease, life)

    def _after_end(self, lease: str, life: _Life) -> Iterator[Finding]:
        if life.over is None or life.over_ms is None:
            return
        if life.acted.time_ms - life.over_ms > self._late_ms:
            yield _impossible("used_ended", lease, life.acted, (life.over, life.acted.uid))


_WHAT = {
    "issued_undecided": "a credential was issued to agent {agent} that no decision on the trail allowed (request {id})",
    "used_unissued": "an action of agent {agent} was let pass by lease {id}, which was never issued",
    "used_ended": "an action of agent {agent} was let pass by lease {id} after its end",
}


def _impossible(what: str, id: str, about: About, evidence: tuple[str, ...]) -> Finding:
    return Finding(
        "impossible",
        (what, id),
        about.time_ms,
        _WHAT[what].format(agent=about.word("agent") or "unknown", id=id),
        about,
        evidence,
        words={"sequence": what},
    )


def _keep(kept: OrderedDict[str, V], id: str, value: V) -> None:
    kept[id] = value
    kept.move_to_end(id)
    if len(kept) > REMEMBERED:
        kept.popitem(last=False)
