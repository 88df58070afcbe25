"""From a form of the console to the message that the person is asked to sign, with the evidence for the sign page."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from pydantic import ValidationError

from ringfence.client.errors import ApiError
from ringfence.client.passkeys.questions import LIFE_S
from ringfence.client.signed_messages import APPROVED_TERMS, C, compose, key_of, subjects_of
from ringfence.console.offers import Offers
from ringfence.console.questions import Draft, Question, Questions, WrongFormError, new_question
from ringfence.console.reads import SessionReads
from ringfence.console.security import Session
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.claims import MAX_LIFE_S
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.approval import (
    MAX_GRANT_LIFE_S,
    ActionApproval,
    Approval,
    BreakGlassReview,
    Grant,
    GrantWithdraw,
)
from ringfence.messages.base import Claims, typ_header
from ringfence.messages.credential import CredentialRequest
from ringfence.messages.lease import RevocationRequest, Selector
from ringfence.messages.registry import (
    AgentRecord,
    AgentRegister,
    AgentResume,
    AgentSetCeiling,
    AgentSuspend,
    AgentTransfer,
    AgentTransferConsent,
    Command,
    CommandSecond,
    CommandWithdraw,
    EmbeddedCommand,
    SecondedCommand,
    TaskEnd,
)
from ringfence.messages.topics import CREDENTIAL_DECISION
from ringfence.model.records.command_chain import unverified_command

Form = Mapping[str, str]
MAX_TEXT_CHARS: Final = 1000
"""Of what a person writes: a reason, a comment, a note. All of it is in the address of the question."""
_FIELDS: Final = {
    "id", "digest", "comment", "reason", "note", "count", "hours", "by", "sponsor", "consent", "without_consent",
    "offer",
}  # fmt: skip
_TEXTS: Final = ("comment", "reason", "note")
_MAX_FIELD_CHARS: Final = 8 * 1024
_CONSENT_LIFE_S: Final = 3600
SECONDED_TOGETHER: Final = 20
"""Proposals that one touch seconds. The command line takes up to 100; a question's address has less room."""


@dataclass(frozen=True, slots=True)
class Asking:
    """Who asks for a question, by which form, and when."""

    reads: SessionReads
    user_id: str
    form: Form
    asked_at: int
    """Seconds since 1970. The same form at the same time makes the same message, while services say the same."""

    def required(self, name: str) -> str:
        """A field of the form. Raises WrongFormError."""
        value = self.form.get(name, "").strip()
        if not value:
            raise WrongFormError(f"the form lacks its {name}")
        return value

    def number(self, name: str, least: int, most: int) -> int:
        """A number of the form. Raises WrongFormError."""
        text = self.form.get(name, "")
        if not (text.isascii() and text.isdecimal() and len(text) < 6 and least <= int(text) <= most):
            raise WrongFormError(f"{name} is a number from {least} to {most}")
        return int(text)

    @property
    def comment(self) -> str | None:
        return self.form.get("comment", "").strip() or None


@dataclass(slots=True, eq=False)
class Commands:
    """Composes questions. Whether the person may, the services decide when they have signed."""

    questions: Questions
    trust: TrustStore
    offers: Offers

    async def ask(self, kind: str, reads: SessionReads, session: Session, form: Form, back: str) -> Question:
        """The question of a form.

        Raises WrongFormError; ApiError if what it is about is not there, or not for this person to see.
        """
        if kind not in KINDS:
            raise WrongFormError(f"there is nothing to sign that is called {kind[:40]}")
        kept = {name: value for name, value in form.items() if name in _FIELDS}
        for name, value in kept.items():
            most = MAX_TEXT_CHARS if name in _TEXTS else _MAX_FIELD_CHARS
            if len(value) > most:
                raise WrongFormError(f"{name} is too long: {most:,} characters at most")
        asked_at = self.questions.now_s()
        draft = await self._draft(kind, Asking(reads, session.user_id, kept, asked_at))
        return new_question(kind, kept, session, draft, asked_at=asked_at, back=back)

    async def draft(self, question: Question, reads: SessionReads) -> Draft:
        """What a question asks to sign, composed anew from what services say now. Raises as `ask` does."""
        return await self._draft(
            question.kind, Asking(reads, question.user_id, question.form, question.asked_at)
        )

    async def _draft(self, kind: str, asking: Asking) -> Draft:
        try:
            return await KINDS[kind].compose(self, asking)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the form"
            raise WrongFormError(f"{where}: {first['msg']}") from None

    def _compose(self, asking: Asking, model: type[C], *, life_s: int = LIFE_S, **fields: Any) -> C:
        return compose(model, self.questions.stamp(asking.user_id, asking.asked_at, life_s), **fields)

    async def _draft_with_records(
        self, asking: Asking, title: str, claims: Claims, *, key: str | None = None, **evidence: str
    ) -> Draft:
        """The draft of a message that the sign page shows by the records of its subjects, and by `evidence`."""
        records = []
        for kind, id in dict.fromkeys([("user", asking.user_id), *subjects_of(claims)]):
            try:
                records.append((await asking.reads.signed_record(kind, id))["record"])
            except ApiError as error:
                if not (error.status == 404 and kind == "task" and isinstance(claims, RevocationRequest)):
                    raise
        shown_by = {"trust": self._compact_trust(), "records": records, **evidence}
        return Draft(title, claims, key or key_of(claims), shown_by)

    # --- approvals ---

    async def answer(self, asking: Asking, *, verdict: str) -> Draft:
        """Yes or no to one request, on the terms that it was shown with."""
        view = await self._pending(asking)
        claims = self._compose(
            asking,
            Approval,
            life_s=MAX_LIFE_S,
            until=view["expires_at"],
            verdict=verdict,
            request_digest=digest(view["request"]),
            comment=asking.comment,
            **{name: view[name] for name in APPROVED_TERMS},
        )
        evidence = await asking.reads.evidence(view["request_id"])
        title = f"{_VERBS[verdict]} request {view['request_id'][:8]} of {view['agent_id']}"
        return Draft(title, claims, view["agent_id"], evidence)

    async def grant(self, asking: Asking) -> Draft:
        """Yes ahead, to so many credentials like the one that is asked for."""
        view = await self._pending(asking)
        request = parse(view["request"]).unverified_claims(CredentialRequest)
        claims = self._compose(
            asking,
            Grant,
            life_s=asking.number("hours", 1, MAX_GRANT_LIFE_S // 3600) * 3600,
            until=view.get("about", {}).get("task_ends_at"),
            agent_id=view["agent_id"],
            task_id=request.task_id,
            scope=request.scope,
            count=asking.number("count", 1, 1000),
            ttl_s=view["ttl_s"],
            delivery=view["delivery"],
            revisions=view["revisions"],
            comment=asking.comment,
        )
        evidence = await asking.reads.evidence(view["request_id"])
        title = f"approve ahead {claims.count} like request {view['request_id'][:8]} of {view['agent_id']}"
        return Draft(title, claims, view["agent_id"], evidence)

    async def withdraw_grant(self, asking: Asking) -> Draft:
        """Take back what was approved ahead."""
        grant = await asking.reads.get("policy", "grants", asking.required("id"))
        claims = self._compose(
            asking, GrantWithdraw, grant_id=grant["grant_id"], reason=asking.required("reason")
        )
        title = f"take back what was approved ahead for {grant['agent_id']}"
        return await self._draft_with_records(asking, title, claims, key=grant["agent_id"])

    async def answer_action(self, asking: Asking, *, verdict: str) -> Draft:
        """Yes or no to one action, once."""
        id = asking.required("id")
        action = await asking.reads.get("policy", "action-approvals", id)
        claims = self._compose(
            asking,
            ActionApproval,
            until=action["expires_at"],
            verdict=verdict,
            agent_id=action["agent"],
            request=action["request"],
            request_digest=digest(action["request"]),
            comment=asking.comment,
        )
        evidence = await asking.reads.get("policy", "action-approvals", id, "evidence")
        title = f"{_VERBS[verdict]} one action of {action['agent']}"
        return Draft(title, claims, action["agent"], evidence)

    async def _pending(self, asking: Asking) -> dict[str, Any]:
        view = await asking.reads.approval(asking.required("id"))
        if (shown := asking.form.get("digest")) and shown != shown_digest(view):
            raise WrongFormError("this request changed since it was shown; look at it again")
        return view

    # --- break glass ---

    async def review(self, asking: Asking) -> Draft:
        """What somebody found who had no part in a use of break glass."""
        use = await asking.reads.break_glass_use(asking.required("id"))
        if use["review"] is not None:
            raise WrongFormError(f"this use was reviewed already, by {use['review']['by']}")
        decision = await self._decision(asking.reads, use["request_id"])
        claims = self._compose(
            asking,
            BreakGlassReview,
            request_id=use["request_id"],
            decision_digest=digest(decision),
            agent_id=use["agent"],
            note=asking.required("note"),
        )
        title = f"review the use of break glass by {use['agent']}"
        return await self._draft_with_records(asking, title, claims, key=use["agent"], decision=decision)

    async def _decision(self, reads: SessionReads, request_id: str) -> str:
        """The decision on a request, as policy signed it: what policy remembers, or what audit has the place of."""
        try:
            return str((await reads.get("policy", "decisions", request_id, "explanation"))["decision"])
        except ApiError as error:
            if error.status != 404:
                raise
            missing = error
        events = (await reads.events({"code": "break_glass.used"}, request=request_id))["events"]
        places = [
            one["unmapped"]["source"]
            for one in events
            if one["metadata"].get("log_name") == CREDENTIAL_DECISION.what
        ]
        if not places:
            raise missing
        at = {name: int(places[-1][name]) for name in ("partition", "offset")}
        found = await reads.get("policy", "decisions", request_id, "explanation", **at)
        return str(found["decision"])

    # --- agents and tasks ---

    async def change_agent(self, asking: Asking, *, model: type[AgentSuspend | AgentResume]) -> Draft:
        """Stop an agent, or let a suspended one go on."""
        claims = self._compose(
            asking, model, agent_id=asking.required("id"), reason=asking.required("reason")
        )
        verb = claims.typ.rpartition(".")[2]
        return await self._draft_with_records(asking, f"{verb} agent {claims.agent_id}", claims)

    async def narrow(self, asking: Asking) -> Draft:
        """Take from an agent's ceiling what it did not use in 30 days."""
        agent_id = asking.required("id")
        ceiling = (await asking.reads.usage(agent_id))["narrower"]
        if ceiling is None:
            raise WrongFormError(
                f"agent {agent_id} used all of its ceiling in 30 days: there is nothing to take"
            )
        limits = (await asking.reads.record("agent", agent_id))["state"].get("limits")
        claims = self._compose(asking, AgentSetCeiling, agent_id=agent_id, ceiling=ceiling, limits=limits)
        return await self._draft_with_records(asking, f"narrow the ceiling of agent {agent_id}", claims)

    async def transfer(self, asking: Asking) -> Draft:
        """Make another user the agent's sponsor: with their consent, or as an operator without."""
        agent_id = asking.required("id")
        consent = asking.form.get("consent", "").strip() or None
        sponsor = asking.form.get("sponsor", "").strip() or (self._signer_of(consent) if consent else "")
        if not sponsor:
            raise WrongFormError("the form lacks the new sponsor")
        claims = self._compose(
            asking,
            AgentTransfer,
            agent_id=agent_id,
            sponsor=sponsor,
            consent=consent,
            without_consent=asking.form.get("without_consent") == "1" or None,
        )
        return await self._draft_with_records(asking, f"transfer agent {agent_id} to {sponsor}", claims)

    def _signer_of(self, consent: str) -> str:
        """The user whom a consent names as its signer. The registry verifies it. Raises WrongFormError."""
        try:
            return parse(consent).unverified_claims(AgentTransferConsent).iss.rpartition("/")[2]
        except InvalidMessageError:
            raise WrongFormError("that is no consent; the new sponsor makes one") from None

    async def take_over(self, asking: Asking) -> Draft:
        """Consent to answer for an agent that its sponsor offers. The sponsor embeds it in the transfer."""
        offer = self.offers.opened(asking.required("offer"))
        agent = await self.offers.reads(offer).signed_record("agent", offer.agent_id)
        mine = await asking.reads.signed_record("user", asking.user_id)
        claims = self._compose(
            asking,
            AgentTransferConsent,
            life_s=_CONSENT_LIFE_S,
            agent_id=offer.agent_id,
            from_sponsor=agent["state"]["sponsor"],
            revision=agent["revision"],
        )
        evidence = {"trust": self._compact_trust(), "records": [mine["record"], agent["record"]]}
        return Draft(f"take over agent {offer.agent_id}", claims, offer.agent_id, evidence)

    async def end_task(self, asking: Asking) -> Draft:
        task_id = asking.required("id")
        claims = self._compose(asking, TaskEnd, task_id=task_id, reason=asking.required("reason"))
        return await self._draft_with_records(asking, f"end task {task_id[:8]}", claims)

    # --- proposals ---

    async def second(self, asking: Asking) -> Draft:
        """Second widening commands of others: one, or several users and keys, whose ids `id` lists by spaces."""
        listed = await self._proposals(asking)
        named = []
        for one in listed:
            command = _proposed(one)
            named.append(
                SecondedCommand(
                    author=command.iss,
                    command=command.jti,
                    proposal=one["id"],
                    revision=one["revision"],
                )
            )
        claims = self._compose(asking, CommandSecond, commands=tuple(named))
        evidence = await self._evidence_of_proposals(asking, listed)
        what = f"{listed[0]['typ']} of {listed[0]['subject']}"
        title = f"second {what}" if len(listed) == 1 else f"second {len(listed)} changes of users and keys"
        return Draft(title, claims, claims.proposal, evidence)

    async def withdraw(self, asking: Asking) -> Draft:
        """Withdraw an own widening command that waits."""
        (listed,) = await self._proposals(asking, most=1)
        claims = self._compose(asking, CommandWithdraw, proposal=listed["id"])
        evidence = await self._evidence_of_proposals(asking, [listed])
        return Draft(f"withdraw {listed['typ']} of {listed['subject']}", claims, claims.proposal, evidence)

    async def _proposals(self, asking: Asking, most: int = SECONDED_TOGETHER) -> list[dict[str, Any]]:
        """Return the proposals that a form names, in its order. Raises WrongFormError; ApiError if one is not open."""
        ids = asking.required("id").split()
        if len(ids) > most:
            raise WrongFormError(f"at most {most} of these can be signed with one touch")
        open_ones = {one["id"]: one for one in await asking.reads.proposals()}
        try:
            return [dict(open_ones[id]) for id in ids]
        except KeyError:
            raise ApiError(
                "there is no such change that waits and that you may see; it may be over", status=404
            ) from None

    async def _evidence_of_proposals(
        self, asking: Asking, listed: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The evidence by which the sign page shows proposals; of a ceiling also policy's report, if it comes."""
        each = [await asking.reads.proposal_evidence(one["id"]) for one in listed]
        evidence = {
            "trust": each[0]["trust"],
            "records": list(dict.fromkeys(record for one in each for record in one["records"])),
            "commands": [command for one in each for command in one["commands"]],
        }
        command = _proposed(listed[0])
        if len(listed) > 1 or not isinstance(command, AgentRegister | AgentSetCeiling):
            return evidence
        people = {listed[0]["author"]}
        if isinstance(command, AgentRegister):
            people.add(command.sponsor)
        for record in evidence["records"]:
            claims = parse(record)
            if claims.header.typ == typ_header(AgentRecord):
                people.add(claims.unverified_claims(AgentRecord).state.sponsor)
        try:
            report = await asking.reads.ceiling_report(command.agent_id, command.ceiling, people)
        except ApiError:
            return evidence  # the page says that use and combinations are not known
        return {**evidence, "report": report}

    # --- leases ---

    async def revoke_lease(self, asking: Asking) -> Draft:
        lease = await asking.reads.get("revoker", "leases", asking.required("id"), records=1)
        claims = self._compose(
            asking,
            RevocationRequest,
            kind="revocation",
            lease_id=lease["id"],
            reason=asking.required("reason"),
        )
        title = f"revoke lease {lease['id'][:8]}"
        return await self._draft_with_records(
            asking, title, claims, key=lease["agent_id"], lease=lease["record"]
        )

    async def revoke_all(self, asking: Asking) -> Draft:
        """The kill switch: end all that one condition covers."""
        by = asking.required("by")
        if by not in _CONDITIONS:
            raise WrongFormError(f"leases are revoked by one of: {', '.join(_CONDITIONS)}")
        value = True if by == "all" else asking.required("id")
        claims = self._compose(
            asking,
            RevocationRequest,
            kind="revocation",
            selector=Selector.model_validate({_CONDITIONS[by]: value}),
            reason=asking.required("reason"),
        )
        title = "revoke every lease" if by == "all" else f"revoke all leases of {by} {value}"
        return await self._draft_with_records(asking, title, claims)

    def _compact_trust(self) -> str:
        return self.trust.compact.decode().strip()


def _proposed(listed: Mapping[str, Any]) -> Command:
    """The claims of a listed command. The sign page verifies it."""
    return unverified_command(EmbeddedCommand(jws=listed["command"], appended_at_ms=listed["at_ms"]))


@dataclass(frozen=True, slots=True)
class Kind:
    """One form that leads to the sign page."""

    compose: Callable[[Commands, Asking], Awaitable[Draft]]
    model: type[Claims]
    """What is signed."""


_VERBS: Final = {"approved": "approve", "denied": "deny"}
_CONDITIONS: Final = {
    "agent": "agent_id",
    "task": "task_id",
    "sponsor": "sponsor",
    "target": "target_id",
    "user": "user_id",
    "all": "all",
}
KINDS: Final[Mapping[str, Kind]] = {
    "approve": Kind(partial(Commands.answer, verdict="approved"), Approval),
    "deny": Kind(partial(Commands.answer, verdict="denied"), Approval),
    "grant": Kind(Commands.grant, Grant),
    "withdraw-grant": Kind(Commands.withdraw_grant, GrantWithdraw),
    "approve-action": Kind(partial(Commands.answer_action, verdict="approved"), ActionApproval),
    "deny-action": Kind(partial(Commands.answer_action, verdict="denied"), ActionApproval),
    "review": Kind(Commands.review, BreakGlassReview),
    "suspend": Kind(partial(Commands.change_agent, model=AgentSuspend), AgentSuspend),
    "resume": Kind(partial(Commands.change_agent, model=AgentResume), AgentResume),
    "narrow": Kind(Commands.narrow, AgentSetCeiling),
    "transfer": Kind(Commands.transfer, AgentTransfer),
    "take-over": Kind(Commands.take_over, AgentTransferConsent),
    "second": Kind(Commands.second, CommandSecond),
    "withdraw-proposal": Kind(Commands.withdraw, CommandWithdraw),
    "end-task": Kind(Commands.end_task, TaskEnd),
    "revoke-lease": Kind(Commands.revoke_lease, RevocationRequest),
    "revoke-all": Kind(Commands.revoke_all, RevocationRequest),
}
"""The forms by the last part of their path, below `/sign/`."""


def shown_digest(view: Mapping[str, Any]) -> str:
    """What a pending request was shown with: another one needs another look."""
    terms = [view["request"], view["revisions"], view["ttl_s"], view["delivery"], view["required"]]
    return digest(json.dumps(terms, sort_keys=True))
