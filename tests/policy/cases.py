"""What the bundle must answer: one table, for every engine.

A case changes the good input (`GOOD`: deploy-bot, sponsored by sam, wants to read staging for maria at 1000 s;
`ACTION`: it uses what it was given) and names the answer: the codes of all denials, the approvals, the longest life.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ringfence.rego.engine import PolicyResult

TASK = "c1a5e6f0-1b2c-5d3e-8f40-e6f01b2c5d3e"
GOOD: dict[str, Any] = {
    "now_s": 1000,
    "request": {
        "id": "5b0a4d7e-6c0f-5d39-9b5e-0a4d7e6c0f5d",
        "agent_id": "deploy-bot",
        "task_id": TASK,
        "scope": [{"target": "platform", "verbs": ["read"], "resources": ["env/staging/web"]}],
        "ttl_s": 300,
        "delivery": "agent",
        "reason": "look at what is deployed",
        "requested_at_s": 1000,
    },
    "agent": {"agent_id": "deploy-bot", "sponsor": "sam", "status": "active", "registered_at_s": 500},
    "sponsor": {"user_id": "sam", "status": "active", "roles": ["sponsor"]},
    "task": {
        "task_id": TASK,
        "agent_id": "deploy-bot",
        "on_behalf_of": "maria",
        "status": "active",
        "not_after": 9000,
    },
    "user": {"user_id": "maria", "status": "active", "roles": []},
    "target": {
        "target_id": "platform",
        "status": "active",
        "max_ttl_s": 3600,
        "revocability": "instant",
        "enforced_by": "target",
    },
    "floors": [],
    "lacking": [],
    "approvals": [],
    "held": [],
    "history": {"since_s": 0, "used": {}, "never_used": {"platform": ["read"]}, "granted": 1, "unused": 1},
}
_NO_ACTIONS = ("request", "floors", "approvals", "held", "history")
ACTION: dict[str, Any] = {
    **{name: part for name, part in GOOD.items() if name not in _NO_ACTIONS},
    "action": {
        "id": "a-1",
        "target_id": "platform",
        "verb": "read",
        "resource": "env/staging/web",
        "reads": True,
    },
    "earlier": {"since_s": 900, "allowed": {"platform": {"read": 3}}, "denied": 1, "last_minute": 2},
    "lease": {"agent_id": "deploy-bot", "task_id": TASK, "status": "active", "deadline": 1300},
}
LACK = {
    "code": "beyond_scope",
    "message": "the task does not allow deploy on env/production/web at platform",
    "permission": {"target": "platform", "verbs": ["deploy"], "resources": ["env/production/web"]},
    "side": "task",
}
UNDECIDED = ("undecided",)


class _Gone:
    """Named alike in every run: it stands in the names of cases."""

    def __repr__(self) -> str:
        return "gone"


GONE = _Gone()
"""As a value: the field is taken out."""


@dataclass(frozen=True)
class Case:
    """`entry` is issuance, action or ceiling. Allowed where nothing is denied."""

    name: str
    entry: str
    input: Any
    deny: tuple[str, ...]
    approvals: tuple[str, ...]
    max_ttl_s: int
    says: str = ""
    """Stands in the messages of the denials and notes."""
    notes: tuple[str, ...] = ()
    """Their codes."""

    def agrees(self, found: PolicyResult) -> bool:
        """Whether an engine's answer is this."""
        told = "\n".join(reason.message for reason in (*found.deny, *found.notes))
        return (
            found.allow is (not self.deny)
            and tuple(sorted(reason.code for reason in found.deny)) == self.deny
            and (found.approvals, found.max_ttl_s) == (self.approvals, self.max_ttl_s)
            and tuple(sorted(reason.code for reason in found.notes)) == self.notes
            and self.says in told
        )

    @property
    def entry_point(self) -> str:
        return f"data.ringfence.{self.entry}.decision"


def changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The base with values replaced, added or taken out; `agent.status` names the field of a part."""
    document = copy.deepcopy(base)
    for path, value in changes.items():
        *parts, last = path.split(".")
        at = document
        for part in parts:
            at = at[part]
        if value is GONE:
            del at[last]
        else:
            at[last] = value
    return document


def _case(
    name: str,
    changes: dict[str, Any],
    *deny: str,
    approvals: tuple[str, ...] = (),
    max_ttl_s: int = 3600,
    says: str = "",
    notes: tuple[str, ...] = (),
) -> Case:
    ttl_s = 0 if deny == UNDECIDED else max_ttl_s
    denied = tuple(sorted(deny))
    return Case(name, "issuance", changed(GOOD, changes), denied, approvals, ttl_s, says, notes)


def _action(
    name: str,
    changes: dict[str, Any],
    *deny: str,
    approvals: tuple[str, ...] = (),
    max_ttl_s: int = 5,
    says: str = "",
) -> Case:
    ttl_s = 0 if deny == UNDECIDED else max_ttl_s
    denied = tuple(sorted(deny))
    return Case(f"action: {name}", "action", changed(ACTION, changes), denied, approvals, ttl_s, says)


def _wanting(verbs: list[str], resources: list[str], target: str = "platform") -> dict[str, Any]:
    return {"request.scope": [{"target": target, "verbs": verbs, "resources": resources}]}


def _identity() -> Iterator[Case]:
    yield _case("nothing stands against it", {})
    for status in ("suspended", "decommissioned", "orphaned", "ACTIVE", "unheard-of"):
        says = f"agent deploy-bot is {status}"
        yield _case(f"agent {status}", {"agent.status": status}, f"agent_{status}", says=says)
    yield _case("agent without a status", {"agent.status": GONE}, "agent_unknown")
    yield _case(
        "agent without a name or a status",
        {"agent.agent_id": GONE, "agent.status": GONE},
        "agent_unknown",
        "task_other_agent",
        says="agent unknown is unknown",
    )
    for roles in (["auditor"], ["operator"], [], ["Sponsor"], ["sponsors"]):
        yield _case(f"sponsor with the roles {roles}", {"sponsor.roles": roles}, "agent_orphaned")
    yield _case("sponsor with more roles", {"sponsor.roles": ["operator", "sponsor"]})
    yield _case("sponsor without roles", {"sponsor.roles": GONE}, "agent_orphaned")
    yield _case("sponsor whose roles are a word", {"sponsor.roles": "sponsor"}, "agent_orphaned")
    stopped: tuple[Any, ...] = ("disabled", "", None)
    for status in stopped:
        yield _case(f"sponsor {status!r}", {"sponsor.status": status}, "agent_orphaned")
        yield _case(f"user {status!r}", {"user.status": status}, "user_disabled")
        yield _case(f"task {status!r}", {"task.status": status}, "task_ended")
        yield _case(f"target {status!r}", {"target.status": status}, "target_removed")
    for part, code in (
        ("sponsor", "agent_orphaned"),
        ("user", "user_disabled"),
        ("target", "target_removed"),
    ):
        yield _case(f"{part} without a status", {f"{part}.status": GONE}, code)
    yield _case("task without a status", {"task.status": GONE}, "task_ended")
    yield _case("a sponsor who is somebody else's", {"sponsor.user_id": "petra"}, "agent_orphaned")
    yield _case("an agent that was transferred", {"agent.sponsor": "petra"}, "agent_orphaned")
    yield _case("an agent without a sponsor", {"agent.sponsor": GONE}, "agent_orphaned")
    yield _case("no sponsor's record", {"sponsor": GONE}, "agent_orphaned")
    yield _case("a task of another agent", {"task.agent_id": "review-bot"}, "task_other_agent")
    yield _case("another agent with the task", {"agent.agent_id": "review-bot"}, "task_other_agent")
    yield _case("another task than was named", {"request.task_id": "another"}, "task_other_agent")
    yield _case("a request that names no task", {"request.task_id": GONE}, "task_other_agent")
    yield _case("a lease has no say in a request", {"lease": {"task_id": "another"}})
    yield _case("a task without an id", {"task.task_id": GONE}, "task_other_agent")
    yield _case("another user than the task's", {"user.user_id": "mallory"}, "user_disabled")
    yield _case("a task on behalf of somebody else", {"task.on_behalf_of": "petra"}, "user_disabled")
    yield _case("a task on behalf of nobody", {"task.on_behalf_of": GONE}, "user_disabled")
    yield _case("the task ends now", {"now_s": 9000}, "task_ended")
    yield _case("a second before the end", {"now_s": 8999})
    asked: dict[str, Any] = {"approvals": ("sponsor",), "notes": ("first_use",)}
    yield _case("the task ended long ago", {"now_s": 10**9}, "task_ended", **asked)
    yield _case("no time", {"now_s": GONE}, "task_ended", **asked)
    yield _case(
        "all of it at once",
        {
            "agent.status": "suspended",
            "sponsor.status": "disabled",
            "task.status": "ended",
            "task.agent_id": "review-bot",
            "user.status": "disabled",
            "target.status": "removed",
        },
        "agent_suspended",
        "agent_orphaned",
        "task_ended",
        "task_other_agent",
        "user_disabled",
        "target_removed",
    )


def _scope() -> Iterator[Case]:
    yield _case("what the rule found", {"lacking": [LACK]}, "beyond_scope")
    other = {**LACK, "side": "ceiling:deploy-bot"}
    yield _case("what the rule found, twice", {"lacking": [LACK, other]}, "beyond_scope", "beyond_scope")
    yield _case("nobody looked", {"lacking": GONE}, "scope_unchecked")
    yield _case("nobody looked, and said so", {"lacking": None}, "scope_unchecked")
    yield _case("a word instead of what was found", {"lacking": "nothing"}, "scope_unchecked")
    yield _case("nothing is asked for", {"request.scope": []}, "scope_empty")
    yield _case("another target than the record's", {"target.target_id": "database"}, "several_targets")
    yield _case("a request for another target", _wanting(["read"], ["x"], "database"), "several_targets")
    one, two = (
        {"target": target, "verbs": ["read"], "resources": ["x"]} for target in ("platform", "database")
    )
    yield _case("two targets", {"request.scope": [one, two]}, "several_targets")
    yield _case("two permissions at one target", {"request.scope": [one, one]})
    no_target = {"verbs": ["read"], "resources": ["x"]}
    yield _case("a permission without a target", {"request.scope": [no_target]}, "several_targets")


_WORDS = ("read", "list", "get")
_READING = (*_WORDS, "contents:read", *(f"{word}{sign}x" for word in _WORDS for sign in "-_.:"))
_CHANGING = (
    "deploy", "restart", "delete", "readwrite", "listen", "getaway", "unread", "Read", "", "re-read", "r", "get/x",
    "contents:readwrite", "contents-read",
)  # fmt: skip
_PRODUCTION = (
    "env/production/web", "prod/web", "production", "eu/prod/web/1", "env/prod", "web/production", "**", "*",
    "*/web", "env/*/web", "env/**", "env/prod*/web", "environment/*", "e*/*", "environment/p*/x/y", "apps/*/web",
    "apps/prod*/web", "apps/*tion/web", "apps/p*d", "eu/**", "eu/*", "web/env/*", "environ/x/*",
    "env/eu/prod*", "dev/*rod/x",
)  # fmt: skip
_ELSEWHERE = (
    "env/staging/web", "staging/web", "env/staging/*", "env/staging/**", "products/web", "production2/web",
    "reproduction", "env/stage/prod-like", "web", "", "env", "env/dev/*/x", "Production", "e*/x", "apps/pre*/web",
    "apps/*x/web", "p", "eu/staging/*/web", "environment/x/**", "env/eu/*", "dev/*", "qa/*", "stage/*", "staging/*",
    "test/*",
)  # fmt: skip


def _approval() -> Iterator[Case]:
    for verb in _READING:
        for resource in ("env/production/web", "**"):
            yield _case(f"{verb} on {resource}", _wanting([verb], [resource]))
    for verb in _CHANGING:
        yield _case(f"{verb!r} in production", _wanting([verb], ["prod/web"]), approvals=("sponsor",))
        yield _case(f"{verb!r} in staging", _wanting([verb], ["env/staging/web"]))
    for resource in _PRODUCTION:
        yield _case(f"deploy on {resource!r}", _wanting(["deploy"], [resource]), approvals=("sponsor",))
        yield _case(f"read on {resource!r}", _wanting(["read"], [resource]))
    for resource in _ELSEWHERE:
        yield _case(f"deploy on {resource!r}", _wanting(["deploy"], [resource]))
    much = _wanting(["read", "list", "restart"], ["env/staging/web", "env/production/web"])
    yield _case("one change among much reading", much, approvals=("sponsor",))
    for target in ("production", "prod"):
        yield _case(
            f"the target {target}",
            {**_wanting(["deploy"], ["web"], target), "target.target_id": target},
            approvals=("sponsor",),
        )
        yield _case(
            f"reading at the target {target}",
            {**_wanting(["read"], ["web"], target), "target.target_id": target},
        )
    apart = [
        {"target": "platform", "verbs": ["deploy"], "resources": ["env/staging/web"]},
        {"target": "platform", "verbs": ["read"], "resources": ["env/production/web"]},
    ]
    yield _case("changing staging and reading production", {"request.scope": apart})
    yield _case("no verbs in production", _wanting([], ["prod/web"]))
    yield _case("no resources", _wanting(["deploy"], []))
    yield _case(
        "denied, and who would be asked all the same",
        {**_wanting(["deploy"], ["prod/web"]), "agent.status": "suspended"},
        "agent_suspended",
        approvals=("sponsor",),
    )
    for given in ([], [{"user_id": "sam", "roles": ["sponsor"]}]):
        changes = {**_wanting(["deploy"], ["prod/web"]), "approvals": given}
        yield _case(f"asked for whoever has approved: {len(given)}", changes, approvals=("sponsor",))


def _limits() -> Iterator[Case]:
    for short_s in (1, 60, 3599, 3600):
        yield _case(f"{short_s} s", {"request.ttl_s": short_s})
    too_long: tuple[Any, ...] = (3601, 7200, 86_400, 10**12, "300", None, [1])
    for ttl_s in too_long:
        said = ttl_s if isinstance(ttl_s, int) else ""
        yield _case(
            f"{ttl_s!r} s",
            {"request.ttl_s": ttl_s},
            "ttl_too_long",
            says=f"{said} s is longer than the 3600 s",
        )
    yield _case("no life named", {"request.ttl_s": GONE}, "ttl_too_long", says="unknown s is longer")
    for most_s in (1, 60, 3599):
        yield _case(f"the target allows {most_s}", {"target.max_ttl_s": most_s}, max_ttl_s=most_s)
    for most_s in (3600, 3601, 86_400):
        yield _case(f"the target allows {most_s}", {"target.max_ttl_s": most_s})
    for most_s in (0, -1):
        yield _case(
            f"the target allows {most_s}", {"target.max_ttl_s": most_s}, "ttl_beyond_task", max_ttl_s=most_s
        )
    for end_s in (1001, 1002, 1120, 4599):
        yield _case(f"the task ends at {end_s}", {"task.not_after": end_s}, max_ttl_s=end_s - 1000)
    for end_s in (4600, 4601):
        yield _case(f"the task ends at {end_s}", {"task.not_after": end_s})
    for end_s in (1000, 999):
        yield _case(
            f"the task ended at {end_s}",
            {"task.not_after": end_s},
            "task_ended",
            "ttl_beyond_task",
            max_ttl_s=end_s - 1000,
        )
    yield _case("somebody thought for long", {"now_s": 8000})
    yield _case("asked an hour ago", {"request.requested_at_s": 0})
    yield _case("asked shortly before the end", {"request.requested_at_s": 8990}, max_ttl_s=10)
    for path in ("task.not_after", "request.requested_at_s", "target.max_ttl_s"):
        yield _case(f"{path} is a word", {path: "later"}, *UNDECIDED)
    for path in ("task.not_after", "request.requested_at_s", "target.max_ttl_s", "request", "task", "target"):
        yield _case(f"without {path}", {path: GONE}, *UNDECIDED)


def _handed_out() -> Iterator[Case]:
    only, static = (
        "delivery_gateway_only",
        "what platform takes is never handed out: ask for delivery to the gateway",
    )
    for how in ("instant", "session"):
        for ttl_s in (1, 3600):
            secret = {**_lasting(how, ttl_s), "target.enforced_by": "gateway"}
            yield _case(f"a static secret, {how}, for {ttl_s} s", secret, only, says=static)
            yield _case(
                f"likewise to the gateway, {how}, {ttl_s} s", {**secret, "request.delivery": "gateway"}
            )
    both = {**_lasting("ttl", 3600), "target.enforced_by": "gateway"}
    yield _case("a static secret that cannot be recalled", both, only, "not_recallable", says=static)
    strange: tuple[Any, ...] = ("Target", "", None, GONE)
    for by in strange:
        yield _case(f"enforced by {by!r}", {"target.enforced_by": by}, only, says=static)
    for to in ("agent", "both", GONE):
        secret = {"target.enforced_by": "gateway", "request.delivery": to}
        yield _case(f"a static secret in the hands of {to!r}", secret, only, says=static)
    nameless = {"target.target_id": GONE, "target.enforced_by": "gateway"}
    yield _case("nobody's static secret", nameless, only, "several_targets", says="what unknown takes")


def _combinations() -> Iterator[Case]:
    for one in ("read-code", "clone", "pull", "contents:read"):
        for other in ("run-ci", "write-ci", "dispatch", "workflows:write", "actions:run"):
            yield _case(f"{one} with {other}", _wanting([one, other], ["web"]), "combination")
            for held, wanted in ((one, other), (other, one)):
                says = "CI's own secrets; give back lease 1 first"
                yield _case(
                    f"{wanted} while {held} is held", _holding(held, wanted), "combination", says=says
                )
    for one in ("push", "commit", "contents:write", "git:write"):
        for other in ("review", "approve-change", "merge", "pulls:approve", "pulls:merge"):
            says = "what writes a change must not be what approves it"
            yield _case(f"{one} with {other}", _wanting([one, other], ["web"]), "combination", says=says)
            says += "; give back lease 1 first"
            yield _case(f"{other} while {one} is held", _holding(one, other), "combination", says=says)
            yield _case(f"{one} while {other} is held", _holding(other, one), "combination", says=says)
    for verbs in (["clone", "push"], ["run-ci", "merge"], ["clone", "read"], ["Clone", "run-ci"]):
        yield _case(f"{' with '.join(verbs)}", _wanting(verbs, ["web"]))
    yield _case("the other half of another pair is held", _holding("clone", "merge"))
    yield _case("the same half is held", _holding("clone", "pull"))
    yield _case("both halves are held, and neither is asked for", _holding("clone,run-ci", "read"))
    yield _case("nothing is held", {**_wanting(["clone"], ["web"]), "held": []})
    nothing: tuple[Any, ...] = (GONE, {}, [{"lease_id": "1"}])
    for held in nothing:
        changes = {**_wanting(["clone"], ["web"]), "held": held}
        says = "what the agent holds already is not known"
        name = "missing" if held is GONE else repr(held)
        yield _case(f"what is held is {name}", changes, "held_unknown", says=says)
    two = _holding("read,clone", "run-ci")
    two["held"].insert(0, {**two["held"][0], "lease_id": "2"})
    yield _case(
        "two leases are in the way", two, "combination", "combination", says="give back lease 2 first"
    )
    nameless = _holding("clone", "run-ci")
    del nameless["held"][0]["lease_id"]
    yield _case("a lease without an id is in the way", nameless, "combination", says="lease unknown first")
    parts = [{"target": "platform", "verbs": [verb], "resources": ["web"]} for verb in ("clone", "run-ci")]
    yield _case("in two permissions", {"request.scope": parts}, "combination")
    both = _wanting(["clone", "run-ci", "push", "merge"], ["web"])
    yield _case("both pairs", both, "combination", "combination")


def _holding(held: str, wanted: str) -> dict[str, Any]:
    return {**_wanting([wanted], ["web"]), **_held_at("elsewhere", held)}


def _history() -> Iterator[Case]:
    first: dict[str, Any] = {"approvals": ("sponsor",), "notes": ("first_use",)}
    says = "deploy-bot has not used platform in the last 30 days"
    for age_s in (0, 604_799):
        yield _case(f"an agent {age_s} s old", {"agent.registered_at_s": 1000 - age_s})
    for age_s in (604_800, 604_801, 10**7):
        changes = {"agent.registered_at_s": 1000 - age_s}
        yield _case(f"a first use by an agent {age_s} s old", changes, says=says, **first)
    yield _case("the agent's age is not known", {"agent.registered_at_s": GONE}, says=says, **first)
    yield _case(
        "a first use, denied for another reason",
        _past(**{"target.status": "removed"}),
        "target_removed",
        **first,
    )
    yield _case("a target that was read is read", _past(used={"platform": {"read": {}}}))
    yield _case("it is listed", {**_past(used={"platform": {"read": {}}}), **_wanting(["list"], ["web"])})
    yield _case("another target was used", _past(used={"elsewhere": {"read": {}}}), says=says, **first)
    yield _case("it is held", {**_past(), **_held_at("platform", "list")})
    yield _case("another target is held", {**_past(), **_held_at("elsewhere", "read")}, says=says, **first)
    says = "deploy-bot has not done deploy at platform in the last 30 days"
    changing = {**_past(used={"platform": {"read": {}, "restart": {}}}), **_wanting(["deploy"], ["web"])}
    yield _case("a first change where it read", changing, says=says, **first)
    yield _case("the first change of a new agent", {**changing, "agent.registered_at_s": 500})
    yield _case(
        "a first change is a first use", {**changing, "history.used": {}}, says="has not used", **first
    )
    before = {**changing, "history.used": {"platform": {"deploy": {"days": 1}}}}
    yield _case("a change as before", before)
    yield _case("a change as is held", {**changing, **_held_at("platform", "read,deploy")})
    yield _case(
        "a change as is held elsewhere", {**changing, **_held_at("elsewhere", "deploy")}, says=says, **first
    )
    yield _case(
        "a change while reading is held", {**changing, **_held_at("platform", "read")}, says=says, **first
    )
    both = {**changing, **_wanting(["deploy", "restart", "wipe", "list"], ["web"])}
    twice = ("first_use", "first_use")
    yield _case("two first changes", both, says="wipe at platform", approvals=("sponsor",), notes=twice)
    for unused, used, asked in (
        (12, 2, True), (12, 3, False), (13, 3, True), (11, 2, False), (11, 0, False), (12, 0, True),
        (100, 24, True), (100, 25, False),
    ):  # fmt: skip
        wide = _wide(unused, used)
        name = f"used {used} of {unused + used} verbs"
        told: dict[str, Any] = {"approvals": ("sponsor",), "notes": ("ceiling_too_wide",)} if asked else {}
        says = f"deploy-bot used {used} of the {unused + used} verbs" if asked else ""
        yield _case(f"{name}, and changes", wide, says=says, **told)
        yield _case(f"{name}, and reads", {**wide, **_wanting(["list"], ["web"])})
    told = {"approvals": ("sponsor",), "notes": ("ceiling_too_wide",)}
    yield _case("a month old", {**_wide(20, 2), "agent.registered_at_s": 1000 - 2_592_000}, **told)
    yield _case("nearly a month old", {**_wide(20, 2), "agent.registered_at_s": 1000 - 2_591_999})
    for path in ("history", "history.used", "history.granted", "history.unused"):
        for value in (GONE, None, "all"):
            name = "missing" if value is GONE else repr(value)
            says = "what the agent used lately is not known"
            yield _case(f"{path} is {name}", {path: value}, "history_unknown", says=says)


def _delivery() -> Iterator[Case]:
    says = "nobody can take back a credential for platform before its end, so an agent holds one for 300 s at most"
    denied: dict[str, Any] = {"says": says}
    yield _case("instant for an hour", _lasting("instant", 3600))
    yield _case("session for an hour", _lasting("session", 3600))
    for kind in ("ttl", "at will", "", None, ["instant"], GONE):
        name = "nobody knows how" if kind is GONE else repr(kind)
        yield _case(f"recalled {name} for 300 s", _lasting(kind, 300))
        yield _case(f"recalled {name} for 301 s", _lasting(kind, 301), "not_recallable", **denied)
    unlasting = _lasting("ttl", 3600)
    nameless = {**unlasting, "target.target_id": GONE}
    yield _case(
        "recalled nobody knows where",
        nameless,
        "not_recallable",
        "several_targets",
        says="for unknown before",
    )
    yield _case("used by a gateway", {**unlasting, "request.delivery": "gateway"})
    for delivery in ("agent", "both", GONE):
        yield _case(
            f"in the hands of {'nobody' if delivery is GONE else delivery}",
            {**unlasting, "request.delivery": delivery},
            "not_recallable",
            **denied,
        )
    for max_s, codes in ((300, ()), (301, ("not_recallable",))):
        yield _case(
            f"the target allows {max_s} s", {**unlasting, "target.max_ttl_s": max_s}, *codes, max_ttl_s=max_s
        )
    for max_s, codes in ((300, ()), (301, ("not_recallable",))):
        changes = {**unlasting, "task.not_after": 1000 + max_s}
        yield _case(f"the task ends after {max_s} s", changes, *codes, max_ttl_s=max_s)
    for ttl_s in (None, "300", GONE):
        given = "missing" if ttl_s is GONE else repr(ttl_s)
        changes = {**unlasting, "request.ttl_s": ttl_s}
        yield _case(f"asked is for {given}", changes, "not_recallable", "ttl_too_long", **denied)


def _lasting(revocability: Any, ttl_s: int) -> dict[str, Any]:
    return {"target.revocability": revocability, "request.ttl_s": ttl_s}


def _past(used: Any = None, **changes: Any) -> dict[str, Any]:
    """An agent that has been there for long."""
    return {"agent.registered_at_s": 1000 - 10**7, "history.used": used or {}, **changes}


def _wide(unused: int, used: int) -> dict[str, Any]:
    """Long there, with a ceiling of so many verbs, doing what it has done before."""
    counts = {"history.granted": unused + used, "history.unused": unused}
    return {**_past(used={"platform": {"deploy": {}}}), **_wanting(["deploy"], ["web"]), **counts}


def _held_at(target: str, verbs: str) -> dict[str, Any]:
    scope = [{"target": target, "verbs": verbs.split(","), "resources": ["**"]}]
    return {"held": [{"lease_id": "1", "scope": scope}]}


def _actions() -> Iterator[Case]:
    yield _action("nothing stands against it", {})
    asks = {"verb": "read", "floor": "none", "ask": "sponsor"}
    yield _action("a verb that waits", {"target.verbs": [asks]}, approvals=("sponsor",))
    yield _action("another verb that waits", {"target.verbs": [{**asks, "verb": "merge"}, {"verb": "read"}]})
    yield _action(
        "several verbs, one of them waits",
        {"target.verbs": [{"verb": "merge", "ask": "sponsor"}, {**asks, "ask": "operator"}]},
        approvals=("operator",),
    )
    for status in ("ending", "expired", "revoked", "minting", None):
        yield _action(f"lease {status}", {"lease.status": status}, "lease_ended")
    yield _action("lease without a status", {"lease.status": GONE}, "lease_ended")
    yield _action("at the deadline", {"lease.deadline": 1000}, "lease_ended", max_ttl_s=0)
    yield _action("after it", {"now_s": 1301}, "lease_ended", max_ttl_s=-1)
    for left_s in (1, 4):
        yield _action(f"{left_s} s before it", {"lease.deadline": 1000 + left_s}, max_ttl_s=left_s)
    for left_s in (5, 6, 10**6):
        yield _action(f"{left_s} s before it", {"lease.deadline": 1000 + left_s})
    yield _action("another agent's lease", {"lease.agent_id": "review-bot"}, "lease_other_agent")
    yield _action("nobody's lease", {"lease.agent_id": GONE}, "lease_other_agent")
    yield _action("a lease for another task", {"lease.task_id": "another"}, "task_other_agent")
    yield _action("a lease for no task", {"lease.task_id": GONE}, "task_other_agent")
    yield _action("another target", {"action.target_id": "database"}, "other_target")
    yield _action("no target", {"action.target_id": GONE}, "other_target")
    yield _action("no action", {"action": GONE}, "other_target")
    for fits in (0, 5999):
        yield _action(f"{fits} in the last minute", {"earlier.last_minute": fits})
    for value in (6000, 10**6, None, "few", GONE):
        yield _action(f"{value} in the last minute", {"earlier.last_minute": value}, "rate_exceeded")
    says = "did 6000 things"
    yield _action("so many are named", {"earlier.last_minute": 6000}, "rate_exceeded", says=says)
    says = "did an unknown number of things"
    yield _action("nobody counted", {"earlier": GONE}, "rate_exceeded", says=says)
    yield _action("agent suspended", {"agent.status": "suspended"}, "agent_suspended")
    yield _action("sponsor disabled", {"sponsor.status": "disabled"}, "agent_orphaned")
    yield _action("task ended", {"task.status": "ended"}, "task_ended")
    yield _action("user disabled", {"user.status": "disabled"}, "user_disabled")
    yield _action("target removed", {"target.status": "removed"}, "target_removed")
    yield _action("what the rule found", {"lacking": [LACK]}, "beyond_scope")
    yield _action("nobody looked", {"lacking": GONE}, "scope_unchecked")
    yield _action("a change in production was approved before", {"action.verb": "deploy"})
    for part in ("now_s", "lease", "lease.deadline"):
        yield _action(f"without {part}", {part: GONE}, *UNDECIDED)


def _ceilings() -> Iterator[Case]:
    def ceiling(name: str, *permissions: tuple[str, str], says: str = "", combinations: int = 0) -> Case:
        held = [
            {"target": target, "verbs": verbs.split(), "resources": ["*"]} for target, verbs in permissions
        ]
        deny = ("ceiling_combination",) * combinations
        return Case(f"ceiling: {name}", "ceiling", {"ceiling": held}, deny, (), 0, says)

    yield ceiling("empty")
    yield ceiling("one half of each pair", ("web", "pull merge"))
    yield ceiling("only the first half", ("web", "clone pull push commit"))
    yield ceiling("only the second half", ("web", "run-ci dispatch review merge"))
    both = "with CI's own secrets; it allows clone, and run-ci"
    yield ceiling("both halves at one target", ("web", "clone run-ci read"), says=both, combinations=1)
    split = "must not be what approves it; it allows commit, push, and merge, review"
    yield ceiling(
        "halves at two targets",
        ("web", "push commit"),
        ("reviews", "review merge"),
        says=split,
        combinations=1,
    )
    yield ceiling("two pairs", ("web", "pull run-ci push merge"), combinations=2)


def _nothing() -> Iterator[Case]:
    yield _case("without user", {"user": GONE}, "user_disabled")
    nobody = ("agent_unknown", "agent_orphaned", "task_other_agent")
    says = "unknown has not used platform"
    asked: dict[str, Any] = {"approvals": ("sponsor",), "notes": ("first_use",)}
    yield _case("without agent", {"agent": GONE}, *nobody, says=says, **asked)
    nonsense: tuple[Any, ...] = (
        {},
        [],
        "allow",
        None,
        True,
        1,
        {"allow": True},
        {"decision": {"allow": True}},
    )
    for given in nonsense:
        for entry in ("issuance", "action", "ceiling"):
            yield Case(f"{entry} of {given!r}", entry, given, UNDECIDED, (), 0)


CASES: tuple[Case, ...] = (
    *_identity(),
    *_scope(),
    *_approval(),
    *_limits(),
    *_handed_out(),
    *_combinations(),
    *_history(),
    *_delivery(),
    *_actions(),
    *_ceilings(),
    *_nothing(),
)
