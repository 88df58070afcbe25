"""Why the registry refuses a command: an organisation, and for each code one command that does not fit into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest

from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.webauthn import MAX_AGE_S
from ringfence.messages.base import KeyRecord, PublicJwk
from ringfence.messages.codes import Code
from ringfence.messages.registry import (
    MAX_KEYS,
    AgentActivate,
    AgentDecommission,
    AgentRenewKey,
    AgentReportReuse,
    AgentResume,
    AgentRotateKey,
    AgentSuspend,
    Delegation,
    Entitlements,
    GroupDelegation,
    ModelLimits,
    ProvisionerSet,
    Provisioning,
    RequestRule,
    TargetRemove,
    TaskDelegate,
    TaskEnd,
    TaskState,
    UserDisable,
    UserReviewCompromise,
    UserSet,
    VerbFloor,
)
from ringfence.registry.domain import MAX_RECORD_BYTES, check_size
from tests.support.in_memory_registry import START_MS, InMemoryRegistry, permission
from tests.support.user_keys import add_key, end_key, invitation, new_key, new_passkey, possession, record_of
from tests.support.verdicts import refusal_code

WIDE: Final = (permission("env/**"),)
DIRECTORY: Final = "scim:acme"


class Organisation(InMemoryRegistry):
    """sam has bot, idle (which he suspended), halted (which olga suspended), waiting (not activated) and ended; suzy
    has the other agents. bot has a task of uma, and handed on a part of it, and so on. scim is a provisioner.
    """

    def __init__(self) -> None:
        super().__init__()
        self.organisation()
        self.give(self.target_set("olga", "staging"))
        for name in ("bot", "idle", "halted", "ended", "waiting"):
            self.give(
                self.register("sam", name, "sam", ceiling=WIDE, inactive=True if name == "waiting" else None)
            )
        for name in ("second", "third", "fourth", "fifth"):
            self.give(self.register("suzy", name, "suzy", ceiling=WIDE))
        self.give(self.register("sam", "limited", "sam", ceiling=WIDE, limits=ModelLimits(tokens=100)))
        self.give(self.claims(AgentSuspend, "sam", agent_id="idle", reason="x"))
        self.give(self.claims(AgentSuspend, "olga", agent_id="halted", reason="x"))
        self.give(self.claims(AgentDecommission, "sam", agent_id="ended", reason="x"))
        self.task = self.made(self.assign("uma", "bot"))
        self.over = self.made(self.assign("uma", "bot"))
        self.give(self.claims(TaskEnd, "uma", task_id=self.over, reason="done"))
        self.last_part = self.task
        for by, to in (("bot", "second"), ("second", "third"), ("third", "fourth")):
            self.last_part = self.made(self.part(by, to, self.last_part))
        self._directory()
        self._keys()
        self._renewals()

    def _directory(self) -> None:
        groups = (GroupDelegation(group="Leads", roles=("sponsor",)),)
        self.scim: dict[str, Any] = {
            "provisioner_id": "scim", "name": "Directory", "keys": (self.key_record(self.key("scim")),),
            "delegation": Delegation(source=DIRECTORY, groups=groups),
        }  # fmt: skip
        self.give(self.claims(ProvisionerSet, "olga", **self.scim))
        for user in ("maria", "blocked", "left"):
            self.give(self.synced(user))
        self.give(self.claims(UserDisable, "olga", user_id="blocked", reason="x"))
        self.give(self.claims(UserDisable, "scim", user_id="left", reason="x", gone=True))
        self.give(self.user_set("olga", "gone"))
        self.give(self.claims(UserDisable, "olga", user_id="gone", reason="x"))

    def _keys(self) -> None:
        """suzy has a passkey; a key file of hers was compromised. rich has as many keys as are allowed."""
        self.passkey, self.stolen = new_passkey("suzy"), new_key("suzy")
        self.invited = invitation(self, "suzy", "suzy")
        self.give(add_key(self, "suzy", "suzy", self.passkey, invitation=self.invited))
        self.give(add_key(self, "suzy", "suzy", self.stolen))
        self.give(end_key(self, "olga", "suzy", self.stolen.kid, compromised=True))
        self.give(
            self.user_set("olga", "rich", keys=tuple(record_of(new_key("rich")) for _ in range(MAX_KEYS)))
        )

    def _renewals(self) -> None:
        """renewer renewed its first key, which would have lived for an hour, just now."""
        self.first = self.key("renewer", "agent")
        self.given = self.first.record(self.clock.ms // 1000 + 3600)
        self.give(self.register("sam", "renewer", "sam", keys=(self.given,)))
        self.second = SigningKey.generate(self.first.id)
        self.give(self.renewal("renewer", key=self.second.public))

    def renewal(self, agent: str, **fields: Any) -> AgentRenewKey:
        """A renewal for a new key, as of `iat`."""
        id = self.key(agent, "agent").id
        given = {"iss": id, "agent_id": agent, "key": SigningKey.generate(id).public}
        claims = self.claims(AgentRenewKey, "sam", **{**given, **fields})
        return claims.model_copy(update={"exp": claims.iat + 300})

    def later(self, claims: Any, key: SigningKey, days: float) -> object:
        """Hand in a command after some days."""
        at_s = self.clock.ms // 1000 + round(days * 86_400)
        late = claims.model_copy(update={"iat": at_s, "exp": at_s + 300})
        return self.give(late, key, at_ms=at_s * 1000)

    def made(self, claims: Any) -> str:
        """The id of the task that a command made."""
        change = self.give(claims)
        assert change is not None
        assert isinstance(change.state, TaskState)
        return change.state.task_id

    def part(self, by: str, to: str, parent: str, **fields: Any) -> TaskDelegate:
        """A part of a task, which an agent hands on."""
        terms = self.terms(to, **{"not_after": START_MS // 1000 + 600, **fields})
        return self.claims(TaskDelegate, by, iss=self.key(by, "agent").id, parent=parent, terms=terms)

    def by_sponsor(self, model: type[Any], agent: str = "bot", by: str = "sam", **fields: Any) -> Any:
        return self.claims(model, by, agent_id=agent, **fields)

    def synced(self, user: str, **fields: Any) -> UserSet:
        """A user as the directory sets them."""
        given = {
            "user_id": user, "name": user.title(), "roles": (), "keys": (), "provisioned": Provisioning(groups=()),
            "entitlements": Entitlements(scope=(), source=DIRECTORY, as_of=self.clock.ms // 1000),
        }  # fmt: skip
        return self.claims(UserSet, "scim", **{**given, **fields})

    def with_key(self, key: KeyRecord, *more: KeyRecord) -> UserSet:
        return self.user_set("olga", "uma", keys=(key, *more))

    def new_record(self) -> KeyRecord:
        return record_of(new_key("uma"))


def leaked(key: KeyRecord) -> KeyRecord:
    jwk = PublicJwk(**key.jwk.model_dump(exclude_none=True), d="c2VjcmV0")  # type: ignore[call-arg]
    return key.model_copy(update={"jwk": jwk})


def another_kind(org: Organisation) -> UserSet:
    """suzy's passkey, as if it were a key file."""
    passkey = record_of(org.passkey)
    plain = {"use": None, "credential_id": None, "rp_id": None, "aaguid": None, "backup_eligible": None}
    return org.user_set("olga", "suzy", ["sponsor"], keys=(passkey.model_copy(update=plain),))


def attested_by_its_owner(org: Organisation) -> Any:
    new = new_passkey("sam")
    return add_key(org, "sam", "sam", new, key=record_of(new).model_copy(update={"attested": True}))


def without(org: Organisation, *names: str) -> Any:
    """suzy adds a passkey, without a part of the proof that she has it."""
    return add_key(org, "suzy", "suzy", new_passkey("suzy")).model_copy(update=dict.fromkeys(names))


def invited_again(org: Organisation) -> Any:
    new = new_passkey("suzy")
    given = {"invitation": org.invited, "possession": possession(org, new, "suzy", org.invited)}
    return add_key(org, "suzy", "suzy", new, **given)


REFUSALS: Final[dict[Code, Callable[[Organisation], Any]]] = {
    # Agents
    Code.NAME_TAKEN: lambda org: org.register("sam", "ended", "sam"),
    Code.REVISION_STALE: lambda org: org.user_set("olga", "uma", ["sponsor"], revision=7),
    Code.NOT_A_SPONSOR: lambda org: org.register("olga", "new", "uma"),
    Code.NOT_SPONSOR: lambda org: org.by_sponsor(AgentSuspend, by="suzy", reason="x"),
    Code.NO_VALID_KEY: lambda org: org.register("sam", "new", "sam", keys=()),
    Code.KEY_KNOWN: lambda org: org.by_sponsor(AgentRotateKey, key=org.key_record(org.key("bot", "agent"))),
    Code.DECOMMISSIONED: lambda org: org.by_sponsor(AgentSuspend, "ended", reason="x"),
    Code.NOT_ACTIVE: lambda org: org.by_sponsor(AgentSuspend, "waiting", reason="x"),
    Code.NOT_THE_AGENT: lambda org: org.by_sponsor(AgentRenewKey, key=new_key("bot").public),
    Code.NOT_REGISTERED: lambda org: org.by_sponsor(AgentActivate),
    Code.NOT_SUSPENDED: lambda org: org.by_sponsor(AgentResume, reason="x"),
    Code.NOT_OPERATOR: lambda org: org.by_sponsor(AgentResume, "halted", reason="x"),
    Code.CONSENT_CONTRADICTED: lambda org: org.transfer(
        "olga", "bot", "suzy", consent=org.transfer_consent("suzy", "bot"), without_consent=True
    ),
    # Targets
    Code.UNKNOWN_TARGET: lambda org: org.claims(TargetRemove, "olga", target_id="nowhere", reason="x"),
    Code.VERB_TWICE: lambda org: org.target_set("olga", "staging", verbs=(VerbFloor(verb="read"),) * 2),
    Code.UNKNOWN_VERB: lambda org: org.target_set(
        "olga", "staging", requests=(RequestRule(method="GET", path="/x", verb="write", resource="x"),)
    ),
    # Tasks
    Code.NOT_A_USER: lambda org: org.assign("root", "bot", iss=org.root.id, on_behalf_of="uma"),
    Code.ON_BEHALF_OF_UNSIGNED: lambda org: org.assign("sam", "bot", on_behalf_of="uma"),
    Code.AGENT_REGISTERED: lambda org: org.assign("uma", "waiting"),
    Code.TASK_OVER: lambda org: org.assign(
        "uma", "bot", terms=org.terms("bot", not_after=org.clock.ms // 1000)
    ),
    Code.UNKNOWN_TASK: lambda org: org.claims(
        TaskEnd, "uma", task_id="00000000-0000-5000-8000-000000000000", reason="x"
    ),
    Code.TASK_ENDED: lambda org: org.part("bot", "second", org.over),
    Code.UNKNOWN_PARENT: lambda org: org.part("bot", "second", "00000000-0000-5000-8000-000000000000"),
    Code.NOT_TASK_AGENT: lambda org: org.part("fifth", "second", org.task),
    Code.DELEGATION_LOOP: lambda org: org.part("fourth", "bot", org.last_part),
    Code.DELEGATION_TOO_DEEP: lambda org: org.part("fourth", "fifth", org.last_part),
    Code.BEYOND_PARENT: lambda org: org.part("bot", "second", org.task, scope=(permission("**"),)),
    Code.LIMIT_BEYOND_CEILING: lambda org: org.assign(
        "uma", "limited", terms=org.terms("limited", limits=ModelLimits(tokens=101))
    ),
    Code.LATER_THAN_PARENT: lambda org: org.part(
        "bot", "second", org.task, not_after=START_MS // 1000 + 7200
    ),
    # Users
    Code.UNKNOWN_USER: lambda org: org.claims(UserDisable, "olga", user_id="eve", reason="x"),
    Code.USER_DISABLED: lambda org: add_key(org, "olga", "gone", new_key("gone")),
    Code.SELF_WIDENING: lambda org: org.user_set("olga", "olga", ["operator", "sponsor"]),
    Code.KEY_TWICE: lambda org: org.with_key(*(org.new_record(),) * 2),
    Code.PRIVATE_KEY: lambda org: org.with_key(leaked(org.new_record())),
    Code.KEY_CHANGED: another_kind,
    Code.KEY_COMPROMISED: lambda org: org.user_set("olga", "suzy", keys=(record_of(org.stolen),)),
    Code.TOO_MANY_KEYS: lambda org: add_key(org, "olga", "rich", new_key("rich")),
    Code.UNKNOWN_KEY: lambda org: end_key(org, "suzy", "suzy", org.key("sam").kid),
    Code.ATTESTATION_NOT_VERIFIED: attested_by_its_owner,
    Code.POSSESSION_INVALID: lambda org: without(org, "invitation", "possession"),
    Code.INVITATION_USED: invited_again,
    Code.REPORT_UNKNOWN: lambda org: org.claims(
        UserReviewCompromise,
        "olga",
        user_id="suzy",
        report="00000000-0000-5000-8000-000000000000",
        report_digest="0" * 64,
        outcome="void",
        reason="x",
    ),
    # Provisioners
    Code.NOT_A_PROVISIONER: lambda org: org.claims(
        ProvisionerSet, "olga", **{**org.scim, "provisioner_id": "sam", "keys": (record_of(new_key("sam")),)}
    ),
    Code.IS_PROVISIONER: lambda org: org.user_set("olga", "scim"),
    Code.NOT_PROVISIONED: lambda org: org.user_set("olga", "uma", provisioned=Provisioning(groups=())),
    Code.PROVISIONER_ONLY: lambda org: org.register("scim", "new", "sam"),
    Code.KEYS_NOT_DELEGATED: lambda org: org.synced("maria", keys=(org.new_record(),)),
    Code.DISABLED_BY_OPERATOR: lambda org: org.synced("blocked"),
    Code.USER_GONE: lambda org: org.synced("left"),
    Code.NOT_ITS_USER: lambda org: org.synced("uma"),
}


BESIDES: Final[dict[Code, Callable[[Organisation], object]]] = {
    # What is not wrong with the command itself: its key, its time, the size of the record
    Code.PASSKEY_NOT_ALLOWED: lambda org: org.give(org.register("suzy", "new", "suzy"), org.passkey),
    Code.PASSKEY_TOO_LATE: lambda org: org.give(
        org.assign("suzy", "second", iat=org.clock.ms // 1000 - MAX_AGE_S - 1), org.passkey
    ),
    Code.RENEWAL_EARLY: lambda org: org.give(org.renewal("renewer"), org.second),
    Code.KEY_LINE_ENDED: lambda org: org.later(org.renewal("bot"), org.key("bot", "agent"), 401),
    Code.KEY_REUSED_LATE: lambda org: org.later(org.renewal("renewer"), org.first, 0.1),
    Code.REUSE_UNPROVEN: lambda org: org.give(
        org.claims(
            AgentReportReuse, "sam", iss=org.policy.id, agent_id="bot", message=org.signed(org.renewal("bot"))
        ),
        org.policy,
    ),
    Code.TOO_EARLY: lambda org: org.give(org.user_set("olga", "new"), at_ms=org.clock.ms - 1001),
    Code.RECORD_TOO_LARGE: lambda org: check_size(org.register("sam", "new", "sam"), MAX_RECORD_BYTES + 1),
}


@pytest.fixture(scope="module")
def org() -> Organisation:
    """A refused command changes nothing, so all rows share it."""
    return Organisation()


@pytest.mark.parametrize(("code", "command"), REFUSALS.items(), ids=REFUSALS)
def test_command_is_refused(code: Code, command: Callable[[Organisation], Any], org: Organisation) -> None:
    assert refusal_code(lambda: org.give(command(org))) == code


@pytest.mark.parametrize(("code", "ask"), BESIDES.items(), ids=BESIDES)
def test_valid_command_is_refused(
    code: Code, ask: Callable[[Organisation], object], org: Organisation
) -> None:
    assert refusal_code(lambda: ask(org)) == code
