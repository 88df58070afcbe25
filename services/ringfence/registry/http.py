"""HTTP API to read users, agents, targets and tasks.

Operators and auditors see everything. Sponsors see their own agents, the tasks of those agents, and the parts that
those handed on. Every user sees themself, the targets, and the tasks that they assigned or that are on their behalf. An
entry that the caller may not see is answered like a missing one. `?records=1` adds the signed records for verification.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from ringfence.client.signed_messages import Subject, evidence_of
from ringfence.kernel.base.api_errors import NotFoundError, WrongQueryError
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.crypto.keys import b64decode
from ringfence.kernel.crypto.webauthn import PasskeyKey
from ringfence.kernel.service.http import number_in, position_in, position_text
from ringfence.messages.base import KeyRecord
from ringfence.messages.registry import AgentState, AnyState, Proposal, TaskState, UserState
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.lifecycle import agents_of, subject_key
from ringfence.model.records.api_access import Authenticator, Caller
from ringfence.model.records.command_chain import ChainError, unverified_command
from ringfence.model.records.directory import Directory, VerifiedRecord
from ringfence.registry.domain import TASK_MAX_S, task_is_longer
from ringfence.registry.proposals import Proposals, may_see

_PAUSE_EVERY = 50
"""After so many entries the loop yields to the rest of the process: the first look verifies each chain."""

MAX_SIGN_INS_PER_S: Final = 50
"""First touches of sign-ins that this replica verifies in a second, for all consoles together."""
FIRST_TOUCH: Final = re.compile(r"[A-Za-z0-9_-]{43}")
"""What a passkey signs in a browser that does not know yet whose it is. No JWS Signing Input, which has a period."""
MAX_PAGE: Final = 1000
"""Tasks on one page."""
_NOT_OPEN: Final = "no proposal with this id waits that you could second or withdraw; it may be over"
Filter = Callable[[VerifiedRecord[AnyState], Request], bool]


class RegistryApi:
    """HTTP routes over one directory."""

    def __init__(
        self,
        directory: Directory,
        authenticator: Authenticator,
        clock: Clock,
        *,
        passkeys: Callable[[str, float], Sequence[tuple[UserState, KeyRecord]]] = lambda *_: (),
        task_max_s: int = TASK_MAX_S,
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        """`passkeys` returns those with a credential id that have not ended at a time (s), with their users.

        `task_max_s`: how long a new task may last; `?beyond_limit=1` asks for tasks that last longer. `seconds`: a
        monotonic clock.
        """
        self._passkeys = passkeys
        self._sign_ins: deque[float] = deque(maxlen=MAX_SIGN_INS_PER_S)
        """When the last first touches of sign-ins were verified, by `seconds`."""
        self._seconds = seconds
        self._directory = directory
        self._authenticator = authenticator
        self._clock = clock
        self._task_max_s = task_max_s

    def routes(self) -> list[BaseRoute]:
        """Return the routes to add to those of the runtime."""
        return [
            Route("/v1/trust", self._trust),
            Route("/v1/passkeys/{credential_id}", self._passkey),
            *self._routes_of("user"),
            *self._routes_of("agent"),
            *self._routes_of("target"),
            *self._routes_of("task", self._is_wanted_task),
        ]

    async def _trust(self, request: Request) -> Response:
        """Serve the trust bundle in force to a console: `{trust}`. It is public, and the console verifies it."""
        self._authenticator.console(request.headers.get("authorization"))
        return JSONResponse({"trust": self._directory.trust.compact.decode().strip()})

    async def _passkey(self, request: Request) -> Response:
        """Serve whose passkey made an assertion, to a console at which its holder signs in: `{user_id, kid}`.

        A credential id is the adder's word, so the passkey signs `nonce` (`FIRST_TOUCH`), and its own key has to verify
        that. Strangers can have this asked, so the number of verifications is limited. An id that no active user has
        costs none.
        """
        self._authenticator.console(request.headers.get("authorization"))
        now_s = self._clock.now_ms() / 1000
        nonce = request.query_params.get("nonce", "")
        if not FIRST_TOUCH.fullmatch(nonce):
            raise WrongQueryError("nonce is base64url of 32 bytes")
        try:
            assertion = b64decode(request.query_params.get("assertion", ""))
        except ValueError:
            raise WrongQueryError("assertion is no base64url") from None
        found = self._passkeys(request.path_params["credential_id"], now_s)
        found = [(user, record) for user, record in found if user.status == "active"]
        if found:
            self._count_sign_in()
        for user, record in found:
            key = PasskeyKey.of(record, self._directory.trust.origins(now_s), now_s)
            if key is not None and key.problem(assertion, nonce.encode(), "session") is None:
                return JSONResponse({"user_id": user.user_id, "kid": record.kid})
        raise NotFoundError("nobody who is active has this passkey")

    def _count_sign_in(self) -> None:
        """Count one verification. Raises UnavailableError beyond the limit."""
        now_s = self._seconds()
        if len(self._sign_ins) == MAX_SIGN_INS_PER_S and now_s - self._sign_ins[0] < 1:
            raise UnavailableError("too many people begin to sign in; try again")
        self._sign_ins.append(now_s)

    def _routes_of(self, kind: SubjectKind, wanted: Filter = lambda entry, request: True) -> list[BaseRoute]:
        async def all_of_them(request: Request) -> Response:
            caller = self._authenticator.authenticate(request)
            if kind == "task" and "limit" in request.query_params:
                return JSONResponse(await self._page_of_tasks(caller, request))
            entries = [
                _json(entry, request) async for entry in self._visible(kind, caller) if wanted(entry, request)
            ]
            return JSONResponse({f"{kind}s": entries})

        async def one(request: Request) -> Response:
            caller, id = self._authenticator.authenticate(request), request.path_params["id"]
            try:
                entry = self._directory.entry(kind, id)
            except ChainError as error:
                if caller.sees_all:
                    raise NotFoundError(f"the record of {kind} {id} counts for nothing: {error}") from None
                entry = None
            # A caller who may not see it learns nothing, not even whether it exists.
            if entry is None or not self._may_see(caller, entry.state):
                raise NotFoundError(f"there is no {kind} {id} that {caller.user.user_id} may see")
            return JSONResponse(_json(entry, request))

        return [Route(f"/v1/{kind}s", all_of_them), Route(f"/v1/{kind}s/{{id}}", one)]

    async def _page_of_tasks(self, caller: Caller, request: Request) -> dict[str, Any]:
        """A page of tasks: `{tasks, after, count}`; `count` is of all pages.

        Query: `limit`, `after` (of the page before), and the filters. Running tasks come in the order of their ends;
        with others among them, those that end last come first.
        """
        query = request.query_params
        limit, after = number_in(query["limit"], 1, MAX_PAGE), position_in(query)
        if limit is None:
            raise WrongQueryError(f"limit is a number from 1 to {MAX_PAGE}")
        last_first = query.get("status") != "active"
        positions = sorted(
            [
                ((entry.state.not_after, entry.state.task_id), entry)
                async for entry in self._visible("task", caller)
                if isinstance(entry.state, TaskState) and self._is_wanted_task(entry, request)
            ],
            key=lambda one: one[0],
            reverse=last_first,
        )
        rest = [
            one for one in positions if after is None or (one[0] < after if last_first else one[0] > after)
        ]
        page = rest[:limit]
        return {
            "tasks": [_json(entry, request) for _, entry in page],
            "after": position_text(page[-1][0] if len(rest) > limit else None),
            "count": len(positions),
        }

    # --- access rules ---

    async def _visible(self, kind: SubjectKind, caller: Caller) -> AsyncIterator[VerifiedRecord[AnyState]]:
        for seen, entry in enumerate(self._directory.entries(kind), start=1):
            if self._may_see(caller, entry.state):
                yield entry
            if seen % _PAUSE_EVERY == 0:
                await asyncio.sleep(0)

    def _may_see(self, caller: Caller, state: AnyState) -> bool:
        me = caller.user.user_id
        if caller.sees_all:
            return True
        match state:
            case UserState():
                return state.user_id == me
            case AgentState():
                return caller.may_see_agent_of(state.sponsor)
            case TaskState():
                if me in (state.assigned_by, state.on_behalf_of):
                    return True
                agents = (self._state("agent", id) for id in agents_of(state))
                return any(isinstance(a, AgentState) and caller.may_see_agent_of(a.sponsor) for a in agents)
            case _:
                return True

    def _is_wanted_task(self, entry: VerifiedRecord[AnyState], request: Request) -> bool:
        """Apply the filters `?agent=`, `?parent=`, `?status=` and `?beyond_limit=1`.

        A task past its end counts as ended, and so do its parts, even if nobody published that.
        """
        task = entry.state
        if not isinstance(task, TaskState):
            return False
        if request.query_params.get("beyond_limit") == "1" and not self._is_beyond_limit(entry, task):
            return False
        agent, parent, status = (request.query_params.get(name) for name in ("agent", "parent", "status"))
        return (
            agent in (None, task.agent_id)
            and parent in (None, task.parent)
            and status in (None, "ended" if self._is_over(task) else "active")
        )

    def _is_beyond_limit(self, entry: VerifiedRecord[AnyState], task: TaskState) -> bool:
        """Return whether a task lasts longer than a new one may: it was assigned under another limit."""
        assigned_ms = entry.record.commands[0].appended_at_ms
        return task_is_longer(task.not_after, assigned_ms, self._task_max_s)

    def _is_over(self, task: TaskState) -> bool:
        now_s = self._clock.now_ms() / 1000
        above: AnyState | None = task
        while isinstance(above, TaskState):
            if above.status == "ended" or above.not_after <= now_s:
                return True
            if above.parent is None:
                return False
            above = self._state("task", above.parent)
        return True

    # --- look-up ---

    def _state(self, kind: SubjectKind, id: str) -> AnyState | None:
        try:
            entry = self._directory.entry(kind, id)
        except ChainError:
            return None
        return entry.state if entry else None


@dataclass(slots=True, eq=False)
class ProposalApi:
    """HTTP routes over the proposals. Operators and auditors see all, others their own and those that they may second:
    sponsors those about agents.
    """

    proposals: Proposals
    directory: Directory
    authenticator: Authenticator

    def routes(self) -> list[BaseRoute]:
        """Return the routes to add to those of the runtime."""
        return [
            Route("/v1/proposals", self._all),
            Route("/v1/proposals/{proposal_id}/evidence", self._evidence),
        ]

    async def _all(self, request: Request) -> Response:
        """Serve widening commands that wait, oldest first; with `?all=1`, also those of the last day that no longer do:
        `{proposals}`.
        """
        caller = self.authenticator.authenticate(request)
        wanted = [
            one
            for one in self.proposals.table.all()
            if (one.status == "open" or request.query_params.get("all") == "1") and may_see(one, caller)
        ]
        listed = []
        for one in wanted:
            listed.append(self._json(one))
            await asyncio.sleep(0)  # who may second each is looked up among all people
        return JSONResponse({"proposals": listed})

    async def _evidence(self, request: Request) -> Response:
        """Serve the signed messages by which the sign page shows a proposal: `{trust, records, commands}`.

        `commands` is the proposed command alone. `records` are the caller's, the author's, and the subject's if there
        is one. Only its author and who may second it get them.
        """
        caller = self.authenticator.authenticate(request)
        me, proposal = caller.user.user_id, self.proposals.table.get(request.path_params["proposal_id"])
        if proposal is None or proposal.status != "open" or not may_see(proposal, caller):
            raise NotFoundError(_NOT_OPEN)
        author = unverified_command(proposal.command).iss.rpartition("/")[2]  # the registry verified it
        if me != author and me not in self.proposals.seconders(proposal.command):
            raise NotFoundError(_NOT_OPEN)
        subjects: list[Subject] = [("user", me), ("user", author)]
        if proposal.revision:
            kind, id = proposal.sub.split("/")[-2:]
            subjects.append((cast(SubjectKind, kind), id))
        evidence = evidence_of(self.directory, self.directory.trust, subjects)
        return JSONResponse({**evidence, "commands": [proposal.command.jws]})

    def _json(self, proposal: Proposal) -> dict[str, Any]:
        command = unverified_command(proposal.command)  # the registry verified it
        kind, id = proposal.sub.split("/")[-2:]
        return {
            "id": proposal.digest,
            "status": proposal.status,
            "typ": command.typ,
            "subject": f"{kind} {id}",
            "author": command.iss.rpartition("/")[2],
            "at_ms": proposal.command.appended_at_ms,
            "ends_at_ms": proposal.ends_at_ms,
            "revision": proposal.revision,
            "by": proposal.by.rpartition("/")[2] if proposal.by else None,
            "code": proposal.code,
            "may_second": self.proposals.seconders(proposal.command) if proposal.status == "open" else [],
            "command": proposal.command.jws,
        }


def _json(entry: VerifiedRecord[Any], request: Request) -> dict[str, Any]:
    _, id = subject_key(entry.state)
    answer = {"id": id, "revision": entry.revision, "state": entry.state.model_dump(mode="json")}
    if request.query_params.get("records") == "1":
        answer["record"] = entry.compact.decode()
    return answer
