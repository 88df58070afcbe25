"""A run and all that judges it: registry, policy, issuer, gateway and revoker, in memory."""

from __future__ import annotations

from typing import Any

from ringfence.gateway.domain import ChosenLease, Refusal, Sender, authorize
from ringfence.gateway.state.leases import LeaseTable
from ringfence.issuer import domain as issuer_domain
from ringfence.issuer.domain import Decision, Issue, Terms, weigh
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jwe import ReplyKey
from ringfence.kernel.crypto.jws import Signed, parse, sign, verify
from ringfence.messages.credential import Coordinates, CredentialDecision, CredentialRequest
from ringfence.messages.lease import Lease
from ringfence.model.http_targets import Action
from ringfence.model.lifecycle import subject_key
from ringfence.model.records.instances import keys_of_agents, open_enrolment, ref_of
from ringfence.model.requests.facts import load_context, violations
from ringfence.revoker.domain import StaleBasis, check_basis
from tests.support import leases
from tests.support.in_memory_registry import TD, InMemoryRegistry, permission
from tests.support.runs import OneRun, Runners

WIDE = permission("env/**", verbs=("read",))


MAX_AGE_S = 30 * 86_400


class Place:
    """sam sponsors bot; uma assigned it two tasks; a run of the first has started, by a runner that bot names."""

    def __init__(self) -> None:
        self.ledger = ledger = InMemoryRegistry()
        ledger.organisation()
        ledger.give(ledger.user_set("olga", "uma", entitlements=ledger.entitlements(WIDE)))
        ledger.give(ledger.target_set("olga", "staging"))
        for agent in ("bot", "other"):
            ledger.give(ledger.register("sam", agent, "sam", ceiling=(WIDE,)))
        self.task, self.second = self.assigned("bot"), self.assigned("bot")
        self.runners = Runners(ledger)
        self.selector = self.runners.admits("bot")
        self.run = OneRun(self.runners, "bot", self.task)
        self.table = LeaseTable(ledger.clock)

    def assigned(self, agent: str) -> str:
        change = self.ledger.give(
            self.ledger.assign("uma", agent, terms=self.ledger.terms(agent, scope=(WIDE,)))
        )
        assert change is not None
        return subject_key(change.state)[1]

    @property
    def now_s(self) -> int:
        return self.ledger.clock.ms // 1000

    def request(self, task: str | None = None, enrolment: str | None = None, **fields: Any) -> str:
        """A request by the run's instance, as it signs it."""
        claims = self.ledger.claims(
            CredentialRequest, "agent/bot", iss=self.run.key.id, task_id=task or self.task, scope=(WIDE,), ttl_s=60,
            reason="test", reply_key=ReplyKey().public, enrolment=enrolment or self.run.enrolment(self.selector),
            **fields,
        )  # fmt: skip
        return sign(claims, self.run.key)

    def policy(self, compact: str) -> list[str]:
        """The codes of what policy has against a request."""
        jws, directory, at_ms = parse(compact), self.ledger.directory, self.ledger.clock.ms
        find = keys_of_agents(directory, jws, CredentialRequest, at_ms / 1000)
        signed = verify(jws, CredentialRequest, find, audience=TD, appended_at_ms=at_ms)
        return [
            reason.code for reason in violations(load_context(directory, signed), at_ms / 1000, MAX_AGE_S)
        ]

    def issuer(self, compact: str) -> tuple[list[str], bool] | Lease:
        """What the issuer makes of it where policy says yes: the lease, or why not and whether that is a finding."""
        ledger, claims = self.ledger, parse(compact).unverified_claims(CredentialRequest)
        at = Coordinates(topic="t", partition=0, offset=1, appended_at_ms=ledger.clock.ms)
        id = message_id(claims.iss, claims.jti)
        facts = load_context(ledger.directory, Signed(claims, compact), id)
        decision = ledger.claims(
            CredentialDecision, "root", request_id=id, request=compact, source=at, outcome="allowed", ttl_s=60,
            delivery="agent", revisions=facts.revisions("0" * 64),
        )  # fmt: skip
        terms = Terms(f"spiffe://{TD}/service/issuer", TD, MAX_AGE_S, ("jwt",))
        found = weigh(Decision(Signed(decision, "x.y.z"), at), ledger.directory, terms)
        if isinstance(found, Issue):
            return found.lease
        assert isinstance(found, issuer_domain.Refusal)
        return [reason.code for reason in found.reasons], found.finding

    def leased(self, **fields: Any) -> Lease:
        """A lease of the run's instance, for gateways; only a lying issuer makes some that are asked for here."""
        enrolment = open_enrolment(self.run.enrolment(self.selector), self.ledger.trust, self.now_s)
        given: dict[str, Any] = {
            "agent_id": "bot", "act": ("bot",), "task_id": self.task, "target_id": "staging", "backend": "jwt",
            "delivery": "gateway", "deadline": self.now_s + 600, "iat": self.now_s, "scope": (WIDE,), "sponsor": "sam",
            "on_behalf_of": "uma", "requested_at_ms": self.ledger.clock.ms, "key_thumbprint": self.run.key.kid,
            "instance": ref_of(enrolment), **fields,
        }  # fmt: skip
        return leases.lease(**given).claims

    def gateway(self, lease: Lease, sender: Sender | None = None) -> list[str]:
        """The codes of what a gateway has against an action by this lease; with a proof by its key if not said else."""
        self.table.apply(lease)
        entry = self.ledger.directory.target("staging")
        assert entry is not None
        found = authorize(
            sender or Sender("bot", None, lease.lease_id, key_proved=True), entry.state, Action("read", "env/a"),
            self.table, self.ledger.directory, now_s=self.now_s, entitlements_max_age_s=MAX_AGE_S,
        )  # fmt: skip
        assert isinstance(found, ChosenLease | Refusal)
        return [reason.code for reason in found.reasons] if isinstance(found, Refusal) else []

    def chosen(self, sender: Sender) -> str:
        """The lease that a gateway chooses for an action."""
        entry = self.ledger.directory.target("staging")
        assert entry is not None
        found = authorize(
            sender, entry.state, Action("read", "env/a"), self.table, self.ledger.directory, now_s=self.now_s,
            entitlements_max_age_s=MAX_AGE_S,
        )  # fmt: skip
        assert isinstance(found, ChosenLease), found
        return found.lease.lease_id

    def revoker(self, lease: Lease) -> str | None:
        """The kind of end that the revoker has for a lease that was issued; None if it may stay."""
        basis = check_basis(lease, self.ledger.directory, MAX_AGE_S)
        return basis.kind if isinstance(basis, StaleBasis) else None
