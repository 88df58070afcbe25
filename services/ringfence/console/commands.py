"""From a form of the console to the message that the person is asked to sign, with the evidence for the sign page."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from ringfence.client.passkeys.user import LIFE_S
from ringfence.console.questions import Question, Questions
from ringfence.console.reads import SessionReads
from ringfence.console.session import Session
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.claims import MAX_LIFE_S
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.approval import MAX_GRANT_LIFE_S, ActionApproval, Approval, Grant
from ringfence.messages.base import Claims, Topic
from ringfence.messages.credential import CredentialRequest
from ringfence.messages.lease import RevocationRequest, Selector
from ringfence.messages.registry import AgentResume, AgentSetCeiling, AgentSuspend, TaskEnd
from ringfence.messages.topics import APPROVAL_RESPONSE, REGISTRY_COMMAND, REVOCATION_REQUEST

Form = Mapping[str, str]


class WrongFormError(RingfenceError):
    """Raised when a form of the console lacks something."""

    code = "wrong_form"


@dataclass(frozen=True, slots=True)
class _Draft:
    title: str
    claims: Claims
    topic: Topic[Any]
    key: str
    evidence: dict[str, Any]


class Commands:
    """Composes questions. Whether the person may, the services decide when they have signed."""

    def __init__(self, questions: Questions, trust: TrustStore) -> None:
        self._questions = questions
        self._trust = trust

    async def ask(self, kind: str, reads: SessionReads, session: Session, form: Form) -> Question:
        """Compose the question of a form, and let it wait for the sign page.

        Raises WrongFormError; ApiError where what it is about is not there, or not for this person to see.
        """
        compose = _KINDS.get(kind)
        if compose is None:
            raise WrongFormError(f"there is nothing to sign that is called {kind[:40]}")
        try:
            draft = await compose(self, reads, session, form)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the form"
            raise WrongFormError(f"{where}: {first['msg']}") from None
        return self._questions.add(
            title=draft.title,
            user_id=session.user_id,
            cookie_digest=session.cookie_digest,
            claims=draft.claims,
            topic=draft.topic,
            key=draft.key,
            evidence=draft.evidence,
        )

    # --- approvals ---

    async def _answer(self, reads: SessionReads, session: Session, form: Form, verdict: str) -> _Draft:
        view = await self._pending(reads, form)
        life_s = LIFE_S if len(view["required"]) == 1 else MAX_LIFE_S
        stamp = self._questions.stamp(session.user_id, life_s)
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
                "comment": form.get("comment", "").strip() or None,
            }
        )
        evidence = await reads.evidence(view["request_id"])
        word = "approve" if verdict == "approved" else "deny"
        title = f"{word} request {view['request_id'][:8]} of {view['agent_id']}"
        return _Draft(title, claims, APPROVAL_RESPONSE, view["agent_id"], evidence)

    async def approve(self, reads: SessionReads, session: Session, form: Form) -> _Draft:
        """Yes to one request, on the terms that it was shown with."""
        return await self._answer(reads, session, form, "approved")

    async def deny(self, reads: SessionReads, session: Session, form: Form) -> _Draft:
        """No to one request."""
        return await self._answer(reads, session, form, "denied")

    async def grant(self, reads: SessionReads, session: Session, form: Form) -> _Draft:
        """Yes ahead, to so many credentials like the one that is asked for."""
        view = await self._pending(reads, form)
        request = parse(view["request"]).unverified_claims(CredentialRequest)
        hours = _number(form, "hours", 1, MAX_GRANT_LIFE_S // 3600)
        stamp = self._questions.stamp(session.user_id, hours * 3600)
        ends_at = view.get("about", {}).get("task_ends_at", stamp["exp"])
        claims = Grant.model_validate(
            {
                **stamp,
                "exp": min(stamp["exp"], ends_at),
                "agent_id": view["agent_id"],
                "task_id": request.task_id,
                "scope": [one.model_dump(mode="json", exclude_none=True) for one in request.scope],
                "count": _number(form, "count", 1, 1000),
                "ttl_s": view["ttl_s"],
                "delivery": view["delivery"],
                "revisions": view["revisions"],
                "comment": form.get("comment", "").strip() or None,
            }
        )
        evidence = await reads.evidence(view["request_id"])
        title = f"approve ahead {claims.count} like request {view['request_id'][:8]} of {view['agent_id']}"
        return _Draft(title, claims, APPROVAL_RESPONSE, view["agent_id"], evidence)

    async def _answer_action(self, reads: SessionReads, session: Session, form: Form, verdict: str) -> _Draft:
        id = _required(form, "id")
        action = await reads.get("policy", "action-approvals", id)
        stamp = self._questions.stamp(session.user_id)
        claims = ActionApproval.model_validate(
            {
                **stamp,
                "exp": min(stamp["exp"], action["expires_at"]),
                "verdict": verdict,
                "agent_id": action["agent"],
                "request": action["request"],
                "request_digest": digest(action["request"]),
                "comment": form.get("comment", "").strip() or None,
            }
        )
        evidence = await reads.get("policy", "action-approvals", id, "evidence")
        title = f"{'approve' if verdict == 'approved' else 'deny'} one action of {action['agent']}"
        return _Draft(title, claims, APPROVAL_RESPONSE, action["agent"], evidence)

    async def approve_action(self, reads: SessionReads, session: Session, form: Form) -> _Draft:
        """Yes to one action, once."""
        return await self._answer_action(reads, session, form, "approved")

    async def deny_action(self, reads: SessionReads, session: Session, form: Form) -> _Draft:
        """No to one action."""
        return await self._answer_action(reads, session, form, "denied")

    async def _pending(self, reads: SessionReads, form: Form) -> dict[str, Any]:
        view = await reads.approval(_required(form, "id"))
        if form.get("digest") and form["digest"] != shown_digest(view):
            raise WrongFormError("this request changed since it was shown; look at it again")
        return view

    # --- agents and tasks ---

    async def suspend(self, reads: SessionReads, session: Session, form: Form) -> _Draft:
        """Stop an agent: nothing is issued, its leases end."""
        return await self._change_agent(reads, session, form, "suspend", AgentSuspend)

    async def resume(self, reads: SessionReads, session: Session, form: Form) -> _Draft:
        """Let a suspended agent go on."""
        return await self._change_agent(reads, session, form, "resume", AgentResume)

    async def _change_agent(
        self,
        reads: SessionReads,
        session: Session,
        form: Form,
        verb: str,
        command: type[AgentSuspend] | type[AgentResume],
    ) -> _Draft:
        agent_id = _required(form, "id")
        stamp = self._questions.stamp(session.user_id)
        claims = command(**stamp, agent_id=agent_id, reason=_required(form, "reason"))
        evidence = await self._evidence(reads, session, [("agent", agent_id)])
        return _Draft(f"{verb} agent {agent_id}", claims, REGISTRY_COMMAND, agent_id, evidence)

    async def narrow(self, reads: SessionReads, session: Session, form: Form) -> _Draft:
        """Take from an agent's ceiling what it did not use in 30 days."""
        agent_id = _required(form, "id")
        ceiling = (await reads.usage(agent_id))["narrower"]
        if ceiling is None:
            raise WrongFormError(
                f"agent {agent_id} used all of its ceiling in 30 days: there is nothing to take"
            )
        claims = AgentSetCeiling.model_validate(
            {**self._questions.stamp(session.user_id), "agent_id": agent_id, "ceiling": ceiling}
        )
        evidence = await self._evidence(reads, session, [("agent", agent_id)])
        return _Draft(f"narrow the ceiling of agent {agent_id}", claims, REGISTRY_COMMAND, agent_id, evidence)

    async def end_task(self, reads: SessionReads, session: Session, form: Form) -> _Draft:
        """End a task, and the leases of it."""
        task_id = _required(form, "id")
        stamp = self._questions.stamp(session.user_id)
        claims = TaskEnd(**stamp, task_id=task_id, reason=_required(form, "reason"))
        evidence = await self._evidence(reads, session, [("task", task_id)])
        return _Draft(f"end task {task_id[:8]}", claims, REGISTRY_COMMAND, task_id, evidence)

    # --- leases ---

    async def revoke_lease(self, reads: SessionReads, session: Session, form: Form) -> _Draft:
        """End one lease."""
        lease = await reads.get("revoker", "leases", _required(form, "id"), records=1)
        claims = RevocationRequest(
            **self._questions.stamp(session.user_id, 0),
            kind="revocation",
            lease_id=lease["id"],
            reason=_required(form, "reason"),
        )
        evidence = {**await self._evidence(reads, session, []), "lease": lease["record"]}
        title = f"revoke lease {lease['id'][:8]}"
        return _Draft(title, claims, REVOCATION_REQUEST, lease["agent_id"], evidence)

    async def revoke_all(self, reads: SessionReads, session: Session, form: Form) -> _Draft:
        """The kill switch: end all that one condition covers."""
        by = _required(form, "by")
        if by not in _CONDITIONS:
            raise WrongFormError(f"leases are revoked by one of: {', '.join(_CONDITIONS)}")
        value = True if by == "all" else _required(form, "id")
        claims = RevocationRequest(
            **self._questions.stamp(session.user_id, 0),
            kind="revocation",
            selector=Selector.model_validate({_CONDITIONS[by]: value}),
            reason=_required(form, "reason"),
        )
        evidence = await self._evidence(reads, session, [])
        title = "revoke every lease" if by == "all" else f"revoke all leases of {by} {value}"
        return _Draft(title, claims, REVOCATION_REQUEST, "all" if by == "all" else str(value), evidence)

    async def _evidence(
        self, reads: SessionReads, session: Session, subjects: Sequence[tuple[str, str]]
    ) -> dict[str, Any]:
        """The trust bundle, and the records of the person who signs and of `subjects`."""
        wanted = dict.fromkeys([("user", session.user_id), *subjects])
        records = [(await reads.signed_record(kind, id))["record"] for kind, id in wanted]
        return {"trust": self._trust.compact.decode().strip(), "records": records}


_CONDITIONS: Final = {
    "agent": "agent_id",
    "task": "task_id",
    "sponsor": "sponsor",
    "target": "target_id",
    "user": "user_id",
    "all": "all",
}
_KINDS: Final[Mapping[str, Callable[[Commands, SessionReads, Session, Form], Awaitable[_Draft]]]] = {
    "approve": Commands.approve,
    "deny": Commands.deny,
    "grant": Commands.grant,
    "approve-action": Commands.approve_action,
    "deny-action": Commands.deny_action,
    "suspend": Commands.suspend,
    "resume": Commands.resume,
    "narrow": Commands.narrow,
    "end-task": Commands.end_task,
    "revoke-lease": Commands.revoke_lease,
    "revoke-all": Commands.revoke_all,
}


def shown_digest(view: Mapping[str, Any]) -> str:
    """What a pending request was shown with: another one needs another look."""
    terms = [view["request"], view["revisions"], view["ttl_s"], view["delivery"], view["required"]]
    return digest(json.dumps(terms, sort_keys=True))


def _required(form: Form, name: str) -> str:
    value = form.get(name, "").strip()
    if not value:
        raise WrongFormError(f"the form lacks its {name}")
    return value


def _number(form: Form, name: str, least: int, most: int) -> int:
    text = form.get(name, "")
    if not (text.isascii() and text.isdecimal() and len(text) < 6 and least <= int(text) <= most):
        raise WrongFormError(f"{name} is a number from {least} to {most}")
    return int(text)
