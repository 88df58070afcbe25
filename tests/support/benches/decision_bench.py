"""An organisation, and decisions on requests of its agent `bot`, for tests of `ringfence.issuer.domain.weigh`."""

from __future__ import annotations

from typing import Any

from ringfence.issuer.domain import Decision, Issue, Refusal, StaleView, Terms, weigh
from ringfence.kernel.base.ids import digest, message_id
from ringfence.kernel.crypto.jwe import ReplyKey
from ringfence.kernel.crypto.jws import Signed, parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.approval import Approval, Grant
from ringfence.messages.credential import Coordinates, CredentialDecision, CredentialRequest, Revisions
from ringfence.messages.enrolment import AttestationSelector, InstanceEnrolment
from ringfence.messages.registry import AgentRotateKey, AgentSetAttestation, TaskDelegate, VerbFloor
from ringfence.messages.trust import OidcIssuer
from ringfence.model.identity.attestation import selector_id
from ringfence.model.lifecycle import subject_key
from ringfence.model.records.directory import Directory
from ringfence.model.records.instances import instance_id
from tests.support.in_memory_registry import TD, InMemoryRegistry, permission
from tests.support.passkeys import SoftwarePasskey
from tests.support.user_keys import add_key, new_passkey

POLICY = SigningKey.generate(f"spiffe://{TD}/service/policy")
ISSUER = f"spiffe://{TD}/service/issuer"
VERBS = ("read", "deploy", "wipe")
EVERYTHING = permission("**", verbs=VERBS)
READ = permission("env/staging/web", verbs=("read",))
DEPLOY = permission("env/staging/web", verbs=("deploy",))
WIPE = permission("env/staging/web", verbs=("wipe",))
MAX_TTL_S = 1800


class DecisionBench:
    """sam sponsors bot and other; uma assigned bot a task. `staging` has read, deploy (sponsor) and wipe (operator)."""

    def __init__(self) -> None:
        self.ledger = ledger = InMemoryRegistry()
        ledger.organisation()
        ledger.give(ledger.user_set("olga", "uma", entitlements=ledger.entitlements(EVERYTHING)))
        self.set_target()
        for agent in ("bot", "other"):
            ledger.give(ledger.register("sam", agent, "sam", ceiling=(EVERYTHING,)))
        terms = ledger.terms("bot", scope=(EVERYTHING,), not_after=ledger.clock.ms // 1000 + 7200)
        self.task = self.made(ledger.assign("uma", "bot", terms=terms))
        self.terms = Terms(ISSUER, TD, 30 * 86_400, ("jwt", "static"), ("static",))
        self.reply_key = ReplyKey()
        self.requests = 0

    def set_target(self, **fields: Any) -> None:
        verbs = (
            VerbFloor(verb="read"),
            VerbFloor(verb="deploy", floor="sponsor"),
            VerbFloor(verb="wipe", floor="operator"),
        )
        given = {"verbs": verbs, "max_ttl_s": MAX_TTL_S, **fields}
        self.ledger.give(self.ledger.target_set("olga", "staging", **given))

    def made(self, claims: Any) -> str:
        """The id of a task that the registry takes."""
        change = self.ledger.give(claims)
        assert change is not None
        return subject_key(change.state)[1]

    @property
    def now_ms(self) -> int:
        return self.ledger.clock.ms

    def revisions(self, **fields: Any) -> Revisions:
        """What an honest policy saw: all that there is."""
        directory = self.ledger.directory
        task = directory.task(self.task)
        entries = (directory.agent("bot"), directory.user("uma"), task, directory.target("staging"))
        agent, user, task_, target = (entry.revision if entry else 0 for entry in entries)
        return Revisions(
            **{"agent": agent, "user": user, "task": task_, "target": target, "policy": "p" * 64, **fields}
        )

    def set_floor(self) -> None:
        """From now on credentials of `staging` go to gateways only."""
        self.set_target(delivery="gateway")

    def request(self, key: SigningKey | None = None, agent: str = "bot", **fields: Any) -> str:
        ledger = self.ledger
        given = {
            "iss": ledger.key(agent, "agent").id,
            "task_id": self.task,
            "scope": (READ,),
            "ttl_s": 600,
            "reason": "a test",
            "reply_key": self.reply_key.public,
        }
        return sign(
            ledger.claims(CredentialRequest, agent, **{**given, **fields}), key or ledger.key(agent, "agent")
        )

    def decision(
        self,
        request: str | None = None,
        *,
        source_ms: int | None = None,
        at_ms: int | None = None,
        traceparent: str | None = None,
        **fields: Any,
    ) -> Decision:
        """An honest `allowed`, but for what is named."""
        request = self.request() if request is None else request
        claims = parse(request).unverified_claims(CredentialRequest)
        self.requests += 1
        source_ms = self.now_ms if source_ms is None else source_ms
        given = {
            "request_id": message_id(claims.iss, claims.jti),
            "request": request,
            "source": Coordinates(
                topic="credential.request", partition=0, offset=self.requests, appended_at_ms=source_ms
            ),
            "outcome": "allowed",
            "ttl_s": claims.ttl_s,
            "delivery": claims.delivery or "agent",
            "revisions": self.revisions(),
        }
        decided = CredentialDecision(
            iss=POLICY.id, aud=TD, jti=f"d{self.requests}", **{"iat": source_ms // 1000, **given, **fields}
        )
        at = Coordinates(
            topic="credential.decision", partition=3, offset=self.requests,
            appended_at_ms=source_ms + 5 if at_ms is None else at_ms,
        )  # fmt: skip
        return Decision(Signed(decided, sign(decided, POLICY)), at, traceparent)

    def weigh(
        self, decision: Decision | None = None, directory: Directory | None = None, **how: Any
    ) -> Issue | Refusal | StaleView:
        return weigh(decision or self.decision(**how), directory or self.ledger.directory, self.terms)

    def issued(self, decision: Decision | None = None, **how: Any) -> Issue:
        found = self.weigh(decision, **how)
        assert isinstance(found, Issue), found
        return found

    def refused(self, decision: Decision | None = None, **how: Any) -> tuple[list[str], bool]:
        """Why, and whether no honest policy decides so."""
        found = self.weigh(decision, **how)
        assert isinstance(found, Refusal), found
        return [reason.code for reason in found.reasons], found.finding

    def approval(self, request: str, by: str = "sam", key: SigningKey | None = None, **fields: Any) -> str:
        claims = parse(request).unverified_claims(CredentialRequest)
        given = {
            "verdict": "approved",
            "request": request,
            "request_id": message_id(claims.iss, claims.jti),
            "request_digest": digest(request),
            "ttl_s": claims.ttl_s,
            "delivery": claims.delivery or "agent",
            "revisions": self.revisions(),
        }
        ledger = self.ledger
        return sign(ledger.claims(Approval, by, **{**given, **fields}), key or ledger.key(by))

    def grant(self, by: str = "sam", **fields: Any) -> str:
        given = {
            "agent_id": "bot", "task_id": self.task, "scope": (DEPLOY,), "count": 3, "ttl_s": 600,
            "delivery": "agent", "revisions": self.revisions(),
        }  # fmt: skip
        return sign(self.ledger.claims(Grant, by, **{**given, **fields}), self.ledger.key(by))

    def handed_on(self) -> str:
        """The id of a part of the task, which bot hands to other."""
        ledger = self.ledger
        terms = ledger.terms("other", scope=(EVERYTHING,))
        return self.made(
            ledger.claims(
                TaskDelegate, "bot", iss=ledger.key("bot", "agent").id, parent=self.task, terms=terms
            )
        )

    def without(self, *names: str, grace_ms: int | None = None) -> Directory:
        """A reader that has not seen some of the records yet."""
        reader = self.ledger.reader(grace_ms=grace_ms)
        for kind in ("user", "target", "agent", "task"):
            for entry in self.ledger.directory.entries(kind):
                if entry.record.sub.rpartition("/")[2] not in names:
                    record = self.ledger.sign_record(
                        entry.record.state, entry.record.commands, entry.record.revision
                    )
                    assert self.ledger.admit(record, reader) is None
        return reader


def enrolled(bench: DecisionBench, key: SigningKey, end_s: int) -> str:
    """The registry's word that `key` is that of an instance of bot, which bot's sponsor lets in."""
    ledger, issuer = bench.ledger, "https://platform.example"
    bundle = ledger.trust.require()
    following = bundle.model_copy(
        update={
            "version": bundle.version + 1,
            "oidc_issuers": (OidcIssuer(issuer=issuer, uses=("instances",), discovery=True),),
        }
    )
    ledger.trust.load(sign(following, ledger.root, header_jwk=True), bench.now_ms / 1000)
    let_in = AttestationSelector(issuer=issuer, claims={"sub": "pod-1"})
    ledger.give(ledger.claims(AgentSetAttestation, "sam", agent_id="bot", attestation=(let_in,)))
    claims = InstanceEnrolment(
        iss=ledger.registry.id, aud=TD, iat=bench.now_ms // 1000, jti="e1", sub=key.id,
        instance_id=instance_id("0" * 64, key.kid), key=key.record(end_s), issuer=issuer, subject="pod-1",
        selector=selector_id(let_in), claims={"sub": "pod-1"}, token_digest="0" * 64, agent_revision=1,
    )  # fmt: skip
    return sign(claims, ledger.registry)


def rotated(bench: DecisionBench) -> tuple[SigningKey, int]:
    """bot's key, replaced, and the second in which it ended."""
    ledger = bench.ledger
    old, new = ledger.key("bot", "agent"), SigningKey.generate(ledger.key("bot", "agent").id)
    ledger.keys["agent/bot"] = new
    ledger.give(ledger.claims(AgentRotateKey, "sam", agent_id="bot", key=ledger.key_record(new)))
    agent = ledger.directory.agent("bot")
    assert agent is not None
    return old, next(key.not_after for key in agent.state.keys if key.kid == old.kid)


def passkey_of_sam(bench: DecisionBench) -> SoftwarePasskey:
    """A passkey that sam has added by their key file."""
    made = new_passkey("sam")
    bench.ledger.give(add_key(bench.ledger, "sam", "sam", made))
    return made
