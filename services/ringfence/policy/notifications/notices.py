"""Webhook notices: inform people of questions that wait for them, and of keys that were added for them.

A notice is only a hint. Decisions need a signature, and the response of a webhook's receiver is not even read.

A person who is given a key by somebody else can end it before it becomes valid.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ringfence.kernel.base import metrics
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.ids import derived_id, message_id
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.base.secret_refs import PlaceError, read_secret
from ringfence.kernel.crypto.claims import ExpiredError
from ringfence.kernel.crypto.jws import Signed, parse, verify
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.approval import ActionRequest, ApprovalRequest
from ringfence.messages.base import typ_header
from ringfence.messages.codes import Code
from ringfence.messages.credential import CredentialRequest
from ringfence.messages.registry import Proposal
from ringfence.model.lifecycle import WAIT_S
from ringfence.model.records.command_chain import ChainError, unverified_command
from ringfence.model.records.directory import Directory
from ringfence.model.records.seconders import seconders
from ringfence.model.requests.facts import DeniedError, load_context, load_records
from ringfence.policy.decision_log import DecisionLog
from ringfence.policy.notifications.webhook import (
    Webhook,
    WebhookError,
    body_of,
    body_of_action,
    body_of_key,
    body_of_proposal,
    parse_webhook,
    signed_headers,
)

if TYPE_CHECKING:
    import httpx


log = logging.getLogger(__name__)
# It logs every request with its URL, and these URLs are secrets.
logging.getLogger("httpx").setLevel(logging.WARNING)

MOST_UNDER_WAY = 1000
"""The most notices being delivered. Further ones are dropped, because the question itself is on Kafka."""
MOST_OF_ONE = 100
"""The share of one person, so that an endpoint that is down affects nobody else."""
_AT_ONCE = 8
_TIMEOUT_S = 10.0
_ATTEMPTS = 10
_FIRST_DELAY_S, _LONGEST_DELAY_S = 1.0, 300.0
_REMEMBERED = 10_000


class GaveUpError(RingfenceError):
    """Raised when a webhook is not tried again."""

    code = Code.WEBHOOK_FAILED


@dataclass(frozen=True, slots=True)
class Notice:
    """A notice to one person."""

    id: str
    """The question's id. A repetition has the same one, so that its receiver can recognise it."""
    user_id: str
    about: str
    expires_at: int
    """Seconds since 1970. Afterwards the notice is of no use."""
    waits: Callable[[], bool]
    """Returns whether the question still waits for somebody, as far as this process knows."""
    body: Callable[[], bytes]
    """Returns the body to send. Raises DeniedError if the records do not say what it is about."""


class Notices:
    """Delivers notices in the background, at least once, each with its own id. `tell` never waits and never raises."""

    def __init__(
        self,
        places: Mapping[str, str],
        directory: Directory,
        decisions: DecisionLog,
        clock: Clock,
        *,
        first_delay_s: float = _FIRST_DELAY_S,
    ) -> None:
        """`places`: by user id, the secret reference of their webhook. It is read again for each notice."""
        self._places = dict(places)
        self._directory = directory
        self._decisions = decisions
        self._clock = clock
        self._first_delay_s = first_delay_s
        self._http: httpx.AsyncClient | None = None
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._of: Counter[str] = Counter()
        self._told: BoundedDict[str, None] = BoundedDict(_REMEMBERED)
        self._alike: BoundedDict[tuple[object, ...], str] = BoundedDict(_REMEMBERED)
        self._one_by_one: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._at_once = asyncio.Semaphore(_AT_ONCE)

    async def start(self) -> None:
        """Log which webhooks are unusable."""
        for user_id in self._places:
            try:
                self._webhook(user_id)
            except (PlaceError, WebhookError) as error:
                log.error("%s is not told of what waits: %s", user_id, error)

    async def close(self) -> None:
        """Drop the notices being delivered."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._http is not None:
            await self._http.aclose()

    def notify(self, message: ApprovalRequest, request: Signed[CredentialRequest]) -> None:
        """Notify a person who wants it, unless they were notified of this question or of an equivalent one that still
        waits.

        A repetition of the question has the same `jti`, so that the receiver can recognise it.
        """
        user_id, id = message.approver, message.jti
        if user_id not in self._places or id in self._told or self._is_known(message, request.claims):
            return
        self.deliver(
            Notice(
                id, user_id, f"request {message.request_id}", message.expires_at,
                lambda: self._waits(message.request_id),
                lambda: body_of(message, load_context(self._directory, request)),
            )
        )  # fmt: skip

    def wants(self, user_id: str, id: str) -> bool:
        """Return whether a person wants notices, and has not been notified of this one."""
        return user_id in self._places and id not in self._told

    def deliver(self, notice: Notice) -> None:
        """Deliver one notice in the background, unless too many are being delivered."""
        id, user_id = notice.id, notice.user_id
        if len(self._under_way) >= MOST_UNDER_WAY or self._of[user_id] >= MOST_OF_ONE:
            metrics.NOTICES.labels("dropped").inc()
            log.warning("%s is not told of %s: too many notices wait", user_id, notice.about)
            return
        self._told[id] = None
        self._of[user_id] += 1
        task = asyncio.create_task(self._deliver(notice), name="notice")
        self._under_way[id] = task
        task.add_done_callback(lambda _: self._ended(id, user_id))

    def _ended(self, id: str, user_id: str) -> None:
        self._under_way.pop(id, None)
        self._of[user_id] -= 1

    def _is_known(self, message: ApprovalRequest, request: CredentialRequest) -> bool:
        """Return whether the person was notified of an equivalent request that still waits."""
        scope = sorted((p.target, sorted(p.verbs), sorted(p.resources)) for p in request.scope)
        if request.break_glass:
            return False  # each of these is a notice of its own
        terms = (message.ttl_s, message.delivery, message.required, message.revisions.model_dump_json())
        key = (message.approver, request.iss, request.task_id, repr(scope), *terms)
        noticed = self._alike.get(key)
        if noticed is not None and noticed != message.request_id and self._waits(noticed):
            return True
        self._alike[key] = message.request_id
        return False

    def _waits(self, request_id: str) -> bool:
        state = self._decisions.get(request_id)
        return state is not None and state.pending is not None

    async def _deliver(self, notice: Notice) -> None:
        try:
            await self._tried(notice, notice.body())
        except (GaveUpError, DeniedError, PlaceError, WebhookError) as error:
            metrics.NOTICES.labels("failed").inc()
            log.warning("%s was not told of %s: %s", notice.user_id, notice.about, error)
        except Exception:
            metrics.NOTICES.labels("failed").inc()
            log.exception("%s was not told of %s", notice.user_id, notice.about)

    async def _tried(self, notice: Notice, body: bytes) -> None:
        delay_s = self._first_delay_s
        for left in reversed(range(_ATTEMPTS)):
            if not notice.waits() or self._clock.now_ms() >= notice.expires_at * 1000:
                metrics.NOTICES.labels("skipped").inc()  # it was answered meanwhile
                return
            async with self._one_by_one[notice.user_id], self._at_once:
                problem = await self._post(self._webhook(notice.user_id), notice.id, body)
            if problem is None:
                metrics.NOTICES.labels("delivered").inc()
                return
            if not left:
                raise GaveUpError(f"{problem}, {_ATTEMPTS} times")
            log.info("%s is told of %s later: %s", notice.user_id, notice.about, problem)
            await asyncio.sleep(delay_s * random.uniform(0.75, 1.25))  # noqa: S311 - so that not all come at once
            delay_s = min(delay_s * 2, _LONGEST_DELAY_S)

    async def _post(self, webhook: Webhook, id: str, body: bytes) -> str | None:
        """Make one attempt. Returns the failure, or None. Raises GaveUpError if another attempt is pointless."""
        import httpx

        if self._http is None:
            self._http = httpx.AsyncClient(timeout=_TIMEOUT_S, follow_redirects=False, trust_env=False)
        headers = signed_headers(webhook, id, self._clock.now_ms() // 1000, body)
        try:
            async with (
                asyncio.timeout(_TIMEOUT_S),
                self._http.stream("POST", webhook.url, content=body, headers=headers) as response,
            ):
                status = response.status_code  # nothing more of the response is read
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, OSError) as error:
            return type(error).__name__
        if status == httpx.codes.GONE:
            raise GaveUpError("the webhook is gone (410)")
        return None if httpx.codes.is_success(status) else f"it answered {status}"

    def _webhook(self, user_id: str) -> Webhook:
        return parse_webhook(read_secret(self._places[user_id], f"the webhook of {user_id}"))


# Notices to sponsors about single actions that wait, from what a gateway signed and from verified records. Only hints.


def notice_sender(
    runtime: Runtime, directory: Directory, notices: Notices
) -> Callable[[Received], Awaitable[None]]:
    """Return a handler of `approval.request` for questions of gateways.

    Policy sends notices of its own questions itself, so they are skipped here.
    """

    async def tell(record: Received) -> None:
        """Raises InvalidMessageError if no gateway signed it."""
        jws = parse(record.value)
        if jws.header.typ == typ_header(ApprovalRequest):
            return
        find = runtime.trust.finder(*ActionRequest.signed_by, at_s=record.appended_at_ms / 1000)
        audience = runtime.settings.trust_domain
        try:
            claims = verify(
                jws, ActionRequest, find,
                audience=audience, appended_at_ms=record.appended_at_ms,
            ).claims  # fmt: skip
            ground = load_records(directory, claims.agent_id, claims.task_id, claims.target_id)
        except (ExpiredError, DeniedError):
            return  # nobody could answer it
        id, sponsor = message_id(claims.iss, claims.jti), ground.agent.state.sponsor
        over = claims.exp * 1000 <= runtime.clock.now_ms()
        if over or not notices.wants(sponsor, id):
            return
        notices.deliver(
            Notice(
                id,
                sponsor,
                f"action {id}",
                claims.exp,
                lambda: True,
                lambda: body_of_action(id, claims, ground),
            )
        )

    return tell


def key_notice_sender(
    runtime: Runtime, directory: Directory, notices: Notices
) -> Callable[[Received], Awaitable[None]]:
    """Return a handler of `user` records, which sends a notice of each key that was added in the last 24 hours, first
    keys too.
    """

    async def tell(record: Received) -> None:
        user_id = record.key or ""
        await runtime.tables_caught_up(runtime.settings.grace_s)
        try:
            history = directory.key_history(user_id)
        except ChainError:
            return  # a record that counts for nothing adds no key
        now_ms = runtime.clock.now_ms()
        for origin in history.origins.values():
            id = derived_id("key.added", user_id, origin.kid, origin.added_ms)
            ends_ms = origin.added_ms + WAIT_S * 1000
            if ends_ms <= now_ms or not notices.wants(user_id, id):
                continue
            notices.deliver(
                Notice(
                    id,
                    user_id,
                    f"key {origin.kid}",
                    ends_ms // 1000,
                    lambda: True,
                    partial(body_of_key, user_id, origin),
                )
            )

    return tell


def proposal_notice_sender(
    runtime: Runtime, directory: Directory, notices: Notices
) -> Callable[[Received], Awaitable[None]]:
    """Return a handler of `proposal` records, which sends a notice to everybody who may second an open one."""

    async def tell(record: Received) -> None:
        """Raises InvalidMessageError if no registry signed it."""
        if not record.value:
            return
        find = runtime.trust.finder(*Proposal.signed_by, at_s=record.appended_at_ms / 1000)
        audience = runtime.settings.trust_domain
        proposal = verify(parse(record.value), Proposal, find, audience=audience).claims
        now_ms = runtime.clock.now_ms()
        if proposal.status != "open" or proposal.ends_at_ms <= now_ms:
            return
        await runtime.tables_caught_up(runtime.settings.grace_s)
        command = unverified_command(proposal.command)
        subject = " ".join(proposal.sub.split("/")[-2:])
        for user_id in seconders(directory, proposal.command, now_ms):
            id = derived_id("proposal", proposal.digest, user_id)
            if notices.wants(user_id, id):
                ends_s = proposal.ends_at_ms // 1000
                body = partial(
                    body_of_proposal,
                    proposal.digest,
                    command.typ,
                    subject,
                    command.iss.rpartition("/")[2],
                    ends_s,
                )
                notices.deliver(
                    Notice(id, user_id, f"proposal {proposal.digest}", ends_s, lambda: True, body)
                )

    return tell
