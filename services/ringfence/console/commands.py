"""From a form of the console to the message that the person is asked to sign, with the evidence for the sign page."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from ringfence.client.errors import ApiError
from ringfence.client.passkeys.user import LIFE_S
from ringfence.console.offers import Offers
from ringfence.console.questions import Draft, Question, Questions, WrongFormError, new_question
from ringfence.console.reads import SessionReads
from ringfence.console.session import Session
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
from ringfence.messages.base import Claims, Topic
from ringfence.messages.credential import CredentialRequest
from ringfence.messages.lease import RevocationRequest, Selector
from ringfence.messages.registry import (
    AgentResume,
    AgentSetCeiling,
    AgentSuspend,
    AgentTransfer,
    AgentTransferConsent,
    TaskEnd,
)
from ringfence.messages.topics import (
    APPROVAL_RESPONSE,
    CREDENTIAL_DECISION,
    REGISTRY_COMMAND,
    REVOCATION_REQUEST,
)

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


class Commands:
    """Composes questions. Whether the person may, the services decide when they have signed."""

    def __init__(self, questions: Questions, trust: TrustStore, offers: Offers) -> None:
        self._questions = questions
        self._trust = trust
        self._offers = offers

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
        asked_at = self._questions.now_s()
        draft = await self._draft(kind, Asking(reads, session.user_id, kept, asked_at))
        return new_question(
            kind=kind, form=kept, user_id=session.user_id, statement=session.statement,
            cookie_digest=session.cookie_digest, draft=draft, asked_at=asked_at, back=back,
        )  # fmt: skip

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

    def _stamp(self, asking: Asking, life_s: int = LIFE_S) -> dict[str, Any]:
        return self._questions.stamp(asking.user_id, asking.asked_at, life_s)

    # --- approvals ---

    async def _answer(self, asking: Asking, verdict: str) -> Draft:
        view = await self._pending(asking)
        stamp = self._stamp(asking, MAX_LIFE_S)
        claims = Approval.model_validate(
            {
                **stamp,
                "exp": min(stamp["exp"], view["expires_at"]),
                "verdict": verdict,
                "request": view["request"],
                "request_id": view["request_id"],
                "request_digest": digest(view["request"]),
                "ttl_s": view["ttl_s"],
                "delivery": view["delivery"],
                "revisions": view["revisions"],
                "comment": asking.comment,
            }
        )
        evidence = await asking.reads.evidence(view["request_id"])
        word = "approve" if verdict == "approved" else "deny"
        title = f"{word} request {view['request_id'][:8]} of {view['agent_id']}"
        return Draft(title, claims, view["agent_id"], evidence)

    async def approve(self, asking: Asking) -> Draft:
        """Yes to one request, on the terms that it was shown with."""
        return await self._answer(asking, "approved")

    async def deny(self, asking: Asking) -> Draft:
        """No to one request."""
        return await self._answer(asking, "denied")

    async def grant(self, asking: Asking) -> Draft:
        """Yes ahead, to so many credentials like the one that is asked for."""
        view = await self._pending(asking)
        request = parse(view["request"]).unverified_claims(CredentialRequest)
        hours = asking.number("hours", 1, MAX_GRANT_LIFE_S // 3600)
        stamp = self._stamp(asking, hours * 3600)
        ends_at = view.get("about", {}).get("task_ends_at", stamp["exp"])
        claims = Grant.model_validate(
            {
                **stamp,
                "exp": min(stamp["exp"], ends_at),
                "agent_id": view["agent_id"],
                "task_id": request.task_id,
                "scope": [one.model_dump(mode="json", exclude_none=True) for one in request.scope],
                "count": asking.number("count", 1, 1000),
                "ttl_s": view["ttl_s"],
                "delivery": view["delivery"],
                "revisions": view["revisions"],
                "comment": asking.comment,
            }
        )
        evidence = await asking.reads.evidence(view["request_id"])
        title = f"approve ahead {claims.count} like request {view['request_id'][:8]} of {view['agent_id']}"
        return Draft(title, claims, view["agent_id"], evidence)

    async def withdraw_grant(self, asking: Asking) -> Draft:
        """Take back what was approved ahead."""
        grant = await asking.reads.get("policy", "grants", asking.required("id"))
        claims = GrantWithdraw(
            **self._stamp(asking), grant_id=grant["grant_id"], reason=asking.required("reason")
        )
        title = f"take back what was approved ahead for {grant['agent_id']}"
        return Draft(title, claims, grant["agent_id"], await self._evidence(asking, []))

    async def _answer_action(self, asking: Asking, verdict: str) -> Draft:
        id = asking.required("id")
        action = await asking.reads.get("policy", "action-approvals", id)
        stamp = self._stamp(asking)
        claims = ActionApproval.model_validate(
            {
                **stamp,
                "exp": min(stamp["exp"], action["expires_at"]),
                "verdict": verdict,
                "agent_id": action["agent"],
                "request": action["request"],
                "request_digest": digest(action["request"]),
                "comment": asking.comment,
            }
        )
        evidence = await asking.reads.get("policy", "action-approvals", id, "evidence")
        title = f"{'approve' if verdict == 'approved' else 'deny'} one action of {action['agent']}"
        return Draft(title, claims, action["agent"], evidence)

    async def approve_action(self, asking: Asking) -> Draft:
        """Yes to one action, once."""
        return await self._answer_action(asking, "approved")

    async def deny_action(self, asking: Asking) -> Draft:
        """No to one action."""
        return await self._answer_action(asking, "denied")

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
        claims = BreakGlassReview(
            **self._stamp(asking, 0),
            request_id=use["request_id"],
            decision_digest=digest(decision),
            agent_id=use["agent"],
            note=asking.required("note"),
        )
        evidence = {**await self._evidence(asking, []), "decision": decision}
        title = f"review the use of break glass by {use['agent']}"
        return Draft(title, claims, use["agent"], evidence)

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

    async def suspend(self, asking: Asking) -> Draft:
        """Stop an agent: nothing is issued, its leases end."""
        return await self._change_agent(asking, "suspend", AgentSuspend)

    async def resume(self, asking: Asking) -> Draft:
        """Let a suspended agent go on."""
        return await self._change_agent(asking, "resume", AgentResume)

    async def _change_agent(
        self, asking: Asking, verb: str, command: type[AgentSuspend] | type[AgentResume]
    ) -> Draft:
        agent_id = asking.required("id")
        claims = command(**self._stamp(asking), agent_id=agent_id, reason=asking.required("reason"))
        return Draft(f"{verb} agent {agent_id}", claims, agent_id, await self._about_agent(asking, agent_id))

    async def narrow(self, asking: Asking) -> Draft:
        """Take from an agent's ceiling what it did not use in 30 days."""
        agent_id = asking.required("id")
        ceiling = (await asking.reads.usage(agent_id))["narrower"]
        if ceiling is None:
            raise WrongFormError(
                f"agent {agent_id} used all of its ceiling in 30 days: there is nothing to take"
            )
        claims = AgentSetCeiling.model_validate(
            {**self._stamp(asking), "agent_id": agent_id, "ceiling": ceiling}
        )
        evidence = await self._about_agent(asking, agent_id)
        return Draft(f"narrow the ceiling of agent {agent_id}", claims, agent_id, evidence)

    async def transfer(self, asking: Asking) -> Draft:
        """Make another user the agent's sponsor: with their consent, or as an operator without."""
        agent_id = asking.required("id")
        consent = asking.form.get("consent", "").strip() or None
        sponsor = asking.form.get("sponsor", "").strip() or (self._signer_of(consent) if consent else "")
        if not sponsor:
            raise WrongFormError("the form lacks the new sponsor")
        claims = AgentTransfer(
            **self._stamp(asking),
            agent_id=agent_id,
            sponsor=sponsor,
            consent=consent,
            without_consent=True if asking.form.get("without_consent") == "1" else None,
        )
        evidence = await self._about_agent(asking, agent_id)
        return Draft(f"transfer agent {agent_id} to {sponsor}", claims, agent_id, evidence)

    def _signer_of(self, consent: str) -> str:
        """The user whom a consent names as its signer. The registry verifies it. Raises WrongFormError."""
        try:
            return parse(consent).unverified_claims(AgentTransferConsent).iss.rpartition("/")[2]
        except InvalidMessageError:
            raise WrongFormError("that is no consent; the new sponsor makes one") from None

    async def take_over(self, asking: Asking) -> Draft:
        """Consent to answer for an agent that its sponsor offers. The sponsor embeds it in the transfer."""
        offer = self._offers.opened(asking.required("offer"))
        agent = await self._offers.reads(offer).signed_record("agent", offer.agent_id)
        mine = await asking.reads.signed_record("user", asking.user_id)
        claims = AgentTransferConsent(
            **self._stamp(asking, _CONSENT_LIFE_S),
            agent_id=offer.agent_id,
            from_sponsor=agent["state"]["sponsor"],
            revision=agent["revision"],
        )
        evidence = {"trust": self._compact_trust(), "records": [mine["record"], agent["record"]]}
        return Draft(f"take over agent {offer.agent_id}", claims, offer.agent_id, evidence)

    async def end_task(self, asking: Asking) -> Draft:
        """End a task, and the leases of it."""
        task_id = asking.required("id")
        claims = TaskEnd(**self._stamp(asking), task_id=task_id, reason=asking.required("reason"))
        evidence = await self._evidence(asking, [("task", task_id)])
        return Draft(f"end task {task_id[:8]}", claims, task_id, evidence)

    # --- leases ---

    async def revoke_lease(self, asking: Asking) -> Draft:
        """End one lease."""
        lease = await asking.reads.get("revoker", "leases", asking.required("id"), records=1)
        claims = RevocationRequest(
            **self._stamp(asking, 0),
            kind="revocation",
            lease_id=lease["id"],
            reason=asking.required("reason"),
        )
        evidence = {**await self._evidence(asking, []), "lease": lease["record"]}
        return Draft(f"revoke lease {lease['id'][:8]}", claims, lease["agent_id"], evidence)

    async def revoke_all(self, asking: Asking) -> Draft:
        """The kill switch: end all that one condition covers."""
        by = asking.required("by")
        if by not in _CONDITIONS:
            raise WrongFormError(f"leases are revoked by one of: {', '.join(_CONDITIONS)}")
        value = True if by == "all" else asking.required("id")
        claims = RevocationRequest(
            **self._stamp(asking, 0),
            kind="revocation",
            selector=Selector.model_validate({_CONDITIONS[by]: value}),
            reason=asking.required("reason"),
        )
        title = "revoke every lease" if by == "all" else f"revoke all leases of {by} {value}"
        key = "all" if by == "all" else str(value)
        return Draft(title, claims, key, await self._evidence(asking, []))

    # --- evidence ---

    async def _about_agent(self, asking: Asking, agent_id: str) -> dict[str, Any]:
        return await self._evidence(asking, [("agent", agent_id)])

    async def _evidence(self, asking: Asking, subjects: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """The trust bundle, and the records of the person who signs and of `subjects`."""
        wanted = dict.fromkeys([("user", asking.user_id), *subjects])
        records = [(await asking.reads.signed_record(kind, id))["record"] for kind, id in wanted]
        return {"trust": self._compact_trust(), "records": records}

    def _compact_trust(self) -> str:
        return self._trust.compact.decode().strip()


@dataclass(frozen=True, slots=True)
class Kind:
    """One form that leads to the sign page."""

    compose: Callable[[Commands, Asking], Awaitable[Draft]]
    model: type[Claims]
    """What is signed."""
    topic: Topic[Any] | None
    """Where it goes; None: nowhere, it is embedded in another message."""


_CONDITIONS: Final = {
    "agent": "agent_id",
    "task": "task_id",
    "sponsor": "sponsor",
    "target": "target_id",
    "user": "user_id",
    "all": "all",
}
KINDS: Final[Mapping[str, Kind]] = {
    "approve": Kind(Commands.approve, Approval, APPROVAL_RESPONSE),
    "deny": Kind(Commands.deny, Approval, APPROVAL_RESPONSE),
    "grant": Kind(Commands.grant, Grant, APPROVAL_RESPONSE),
    "withdraw-grant": Kind(Commands.withdraw_grant, GrantWithdraw, APPROVAL_RESPONSE),
    "approve-action": Kind(Commands.approve_action, ActionApproval, APPROVAL_RESPONSE),
    "deny-action": Kind(Commands.deny_action, ActionApproval, APPROVAL_RESPONSE),
    "review": Kind(Commands.review, BreakGlassReview, APPROVAL_RESPONSE),
    "suspend": Kind(Commands.suspend, AgentSuspend, REGISTRY_COMMAND),
    "resume": Kind(Commands.resume, AgentResume, REGISTRY_COMMAND),
    "narrow": Kind(Commands.narrow, AgentSetCeiling, REGISTRY_COMMAND),
    "transfer": Kind(Commands.transfer, AgentTransfer, REGISTRY_COMMAND),
    "take-over": Kind(Commands.take_over, AgentTransferConsent, None),
    "end-task": Kind(Commands.end_task, TaskEnd, REGISTRY_COMMAND),
    "revoke-lease": Kind(Commands.revoke_lease, RevocationRequest, REVOCATION_REQUEST),
    "revoke-all": Kind(Commands.revoke_all, RevocationRequest, REVOCATION_REQUEST),
}
"""The forms by the last part of their path, below `/sign/`."""


def shown_digest(view: Mapping[str, Any]) -> str:
    """What a pending request was shown with: another one needs another look."""
    terms = [view["request"], view["revisions"], view["ttl_s"], view["delivery"], view["required"]]
    return digest(json.dumps(terms, sort_keys=True))
