"""Messages that agents post: verifies each, publishes it once (idempotent producer), and keeps a journal for replies.

Exactly the messages that agents may sign are accepted, by the rules of the services that act on them. The memory of
who may ask for which replies is bounded and of this gateway; the journal, a file of JSON lines without anything
secret, keeps it over a restart. A line is written once Kafka has acknowledged the request. What the journal lacks, an
agent proves by posting the same bytes again. A message that is posted again at another gateway, or once it is
forgotten, is a replay on Kafka: policy and revoker report it, and it changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson
from aiokafka.errors import KafkaError

from ringfence.kernel.base.errors import InvalidMessageError, SignatureError, UnavailableError
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.base.private_files import NotPrivateError, open_private, write_private
from ringfence.kernel.crypto.jwe import check_reply_key
from ringfence.kernel.crypto.jws import KeyFinder, Signed, parse
from ringfence.kernel.crypto.webauthn import VerificationKey
from ringfence.kernel.http1.head import RequestRefusedError
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.record import Outbound
from ringfence.messages.base import Topic, typ_header
from ringfence.messages.codes import Code
from ringfence.messages.credential import MAX_REQUEST_BYTES, CredentialRequest, RequestWithdraw
from ringfence.messages.lease import RevocationRequest
from ringfence.messages.registry import AgentRenewKey
from ringfence.messages.topics import CREDENTIAL_REQUEST, REGISTRY_COMMAND, REVOCATION_REQUEST
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.leases.revocations import BY_AGENTS
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.records.key_reuse import ReuseReporter
from ringfence.model.records.signed_messages import SignedMessageVerifier, key_of_agent

Message = CredentialRequest | RequestWithdraw | RevocationRequest | AgentRenewKey
MAX_BYTES: Final = MAX_REQUEST_BYTES

_MODELS: Final[Mapping[str, type[Message]]] = {
    typ_header(model): model
    for model in (CredentialRequest, RequestWithdraw, RevocationRequest, AgentRenewKey)
}
_TOPICS: Final[Mapping[type[Message], Topic[Any]]] = {
    CredentialRequest: CREDENTIAL_REQUEST,
    RequestWithdraw: CREDENTIAL_REQUEST,
    RevocationRequest: REVOCATION_REQUEST,
    AgentRenewKey: REGISTRY_COMMAND,
}


@dataclass(frozen=True, slots=True)
class PostedMessage:
    """A message whose signature by an agent was verified."""

    signed: Signed[Message]
    id: str
    """The UUIDv5 of (`iss`, `jti`): of a request, its id."""
    agent_id: str
    kid: str
    """The thumbprint of the key that signed it."""
    late: InvalidMessageError | None = None
    """Set if its time is over: it may only be a repeat."""

    @property
    def claims(self) -> Message:
        return self.signed.claims

    @property
    def topic(self) -> Topic[Any]:
        return _TOPICS[type(self.claims)]


class PostedMessageVerifier:
    """Verifies posted messages against the gateway's records. It decides nothing: policy and revoker do."""

    def __init__(
        self,
        directory: Directory,
        *,
        audience: str,
        now_ms: Callable[[], int],
        catch_up: Callable[[], Awaitable[object]],
        report_reuse: ReuseReporter | None = None,
    ) -> None:
        """`now_ms`: the broker's time as far as it is known; for the others see `SignedMessageVerifier`."""
        self._verifier = SignedMessageVerifier(directory, audience, catch_up, report_reuse)
        self._directory = directory
        self._now_ms = now_ms

    async def verify(self, body: bytes) -> PostedMessage:
        """Verify a message. One that is only too late is returned as such.

        Raises RequestRefusedError with the code of what is wrong.
        """
        try:
            jws = parse(body)
            model = _MODELS.get(jws.header.typ)
            if model is None:
                raise InvalidMessageError(
                    "post a credential.request, a request.withdraw, a release (revocation.request) or an "
                    "agent.renew-key",
                    code=Code.TYP_UNEXPECTED,
                )
            at_ms = self._now_ms()
            find_key = self._renewing_key if model is AgentRenewKey else key_of_agent
            signed, late = await self._verifier.verify(
                body, model, find_key, at_ms=at_ms, max_bytes=MAX_BYTES
            )
            _check_claims(signed.claims)
        except SignatureError as error:
            raise RequestRefusedError(error.code, error.message, status=403) from None
        except InvalidMessageError as error:
            raise RequestRefusedError(error.code, error.message, status=400) from None
        claims = signed.claims
        agent_id = subject_of(self._verifier.audience, claims.iss, "agent")
        if agent_id is None:
            raise RequestRefusedError(Code.KEY_UNKNOWN, "only agents post messages")
        if isinstance(claims, AgentRenewKey) and claims.agent_id != agent_id:
            raise RequestRefusedError(Code.NOT_THE_AGENT, "an agent renews its own key alone", status=403)
        return PostedMessage(signed, message_id(claims.iss, claims.jti), agent_id, jws.header.kid, late)

    def _renewing_key(self, iss: str, kid: str, at_s: float, of_agents: KeyFinder) -> VerificationKey | None:
        try:
            return self._directory.chains.signer_key(AgentRenewKey, iss, kid, round(at_s * 1000))
        except ChainError:
            return None


def _check_claims(claims: Message) -> None:
    """Check the claims whose violation would be dead-lettered, and so never answered. Raises InvalidMessageError."""
    if isinstance(claims, CredentialRequest):
        check_reply_key(claims.reply_key)
    if isinstance(claims, RevocationRequest) and (claims.kind not in BY_AGENTS or claims.lease_id is None):
        raise InvalidMessageError(
            "an agent gives back one lease: kind release, and its lease_id", code=Code.KIND_UNEXPECTED
        )


log = logging.getLogger(__name__)

KEPT_S: Final = 24 * 3600
"""As long as replies are on Kafka."""
MAX_LINES: Final = 100_000
"""Beyond it the file is written anew, with what is still remembered."""


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One request that was published."""

    id: str
    digest: str
    agent_id: str
    kid: str
    task_id: str | None
    at_s: int


@dataclass(slots=True, eq=False)
class PublicationJournal:
    """An append-only file. An error is logged only: agents then post again after a restart."""

    path: Path
    """In a folder that this process alone uses. `now_s`: seconds since 1970."""
    _: KW_ONLY
    now_s: Callable[[], int]
    max_lines: int = MAX_LINES
    _file: int | None = field(default=None, init=False)
    _lines: int = field(default=0, init=False)

    def open(self) -> list[JournalEntry]:
        """Open the file, and return the entries of the last day, oldest first. Malformed lines are dropped."""
        since_s, entries = self.now_s() - KEPT_S, dict[str, JournalEntry]()
        with contextlib.suppress(OSError):
            for line in self.path.read_bytes().splitlines():
                with contextlib.suppress(ValueError, TypeError):
                    entry = JournalEntry(**orjson.loads(line))
                    if entry.at_s >= since_s:
                        entries[entry.id] = entry
        self.rewrite(entries.values())
        return list(entries.values())

    def add(self, entry: JournalEntry) -> bool:
        """Append an entry. Returns whether the file has so many lines that it is time to `rewrite` it."""
        if self._file is None:
            return False
        try:
            os.write(self._file, orjson.dumps(entry) + b"\n")
        except OSError as error:
            self._failed(error)
        self._lines += 1
        return self._lines > self.max_lines

    def rewrite(self, entries: Iterable[JournalEntry]) -> None:
        self.close()
        lines = [orjson.dumps(entry) + b"\n" for entry in entries]
        try:
            write_private(self.path, b"".join(lines))
            self._file = open_private(self.path, os.O_WRONLY | os.O_APPEND)
            self._lines = len(lines)
        except (OSError, NotPrivateError) as error:
            self._failed(error)

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _failed(self, error: Exception) -> None:
        log.warning(
            "after a restart agents have to post their requests again: %s cannot be written: %s",
            self.path,
            error,
            extra=rate_limited("journal", type(error).__name__),
        )


PER_AGENT: Final = 1000
IN_TOTAL: Final = 50_000
TIMEOUT_S: Final = 10.0
"""How long a post waits for the acknowledgement of Kafka. The publication goes on; the same post joins it."""
RETRY_AFTER_S: Final = 1


@dataclass(slots=True, eq=False)
class Publication:
    """One message that was posted."""

    digest: str
    agent_id: str
    kid: str
    """The thumbprint of the key that signed it."""
    task_id: str | None
    """The task of a credential request; None for other messages."""
    acknowledged: bool = False
    at_s: int = 0
    """When it was posted, in seconds since 1970."""
    sending: asyncio.Task[None] | None = None


class Publications:
    """The messages that this process published, the last ones of each agent."""

    def __init__(
        self,
        publisher: Publisher,
        *,
        is_answered: Callable[[str, str], bool] = lambda _agent_id, _request_id: False,
        journal: PublicationJournal | None = None,
        timeout_s: float = TIMEOUT_S,
        per_agent: int = PER_AGENT,
        in_total: int = IN_TOTAL,
    ) -> None:
        """`is_answered`: whether there is a reply to an agent's request. It was published then, before a restart.
        `journal`: what this gateway published before.
        """
        self._publisher = publisher
        self._is_answered = is_answered
        self._timeout_s = timeout_s
        self._per_agent = per_agent
        self._in_total = in_total
        self._by_id: OrderedDict[str, Publication] = OrderedDict()
        self._of_agent: dict[str, OrderedDict[str, None]] = {}
        self._journal = journal
        for entry in journal.open() if journal is not None else ():
            publication = Publication(
                entry.digest, entry.agent_id, entry.kid, entry.task_id, acknowledged=True, at_s=entry.at_s
            )
            self._keep(entry.id, publication)

    async def close(self) -> None:
        if self._journal is not None:
            self._journal.close()

    def is_published(self, message: PostedMessage) -> bool:
        """Whether Kafka has a message with this id, as far as that is known: published here, or answered already."""
        publication = self._by_id.get(message.id)
        if publication is not None and publication.acknowledged:
            return True
        return isinstance(message.claims, CredentialRequest) and self._is_answered(
            message.agent_id, message.id
        )

    def find(self, id: str) -> Publication | None:
        return self._by_id.get(id)

    async def publish(self, message: PostedMessage, traceparent: str | None) -> None:
        """Publish a message, unless it was published. Returns once Kafka acknowledged it.

        Raises RequestRefusedError: 409 if another message has its id; 503 if Kafka does not acknowledge it in time.
        """
        publication = self._by_id.get(message.id)
        if publication is None:
            publication = self._remember(message)
        elif publication.digest != message.signed.digest:
            raise RequestRefusedError(
                Code.ID_TAKEN,
                "another message with this iss and jti was posted; post the same bytes, or a new jti",
            )
        if publication.acknowledged:
            return
        if publication.sending is None:
            publication.sending = asyncio.create_task(self._send(publication, message, traceparent))
            publication.sending.add_done_callback(_retrieve)
        try:
            async with asyncio.timeout(self._timeout_s):
                await asyncio.shield(publication.sending)
        except (KafkaError, UnavailableError, TimeoutError):
            raise RequestRefusedError(
                Code.KAFKA_UNAVAILABLE, "Kafka did not take the message; post the same bytes again",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            ) from None  # fmt: skip

    async def _send(self, publication: Publication, message: PostedMessage, traceparent: str | None) -> None:
        claims = message.claims
        try:
            acknowledgement = await self._publisher.send(
                message.topic,
                claims.typ,
                Outbound(message.agent_id, message.signed.compact, id=claims.jti, traceparent=traceparent),
            )
            await acknowledgement
            publication.acknowledged = True
            self._write(message.id, publication)
        except KafkaError as error:
            # Without the right to write there, say, nobody else would tell the operator.
            log.warning(
                "Kafka did not take a %s on %s: %s",
                claims.typ,
                message.topic.what,
                type(error).__name__,
                extra=rate_limited(message.topic.what, type(error).__name__),
            )
            raise
        finally:
            publication.sending = None

    def _remember(self, message: PostedMessage) -> Publication:
        claims, agent_id = message.claims, message.agent_id
        is_request = isinstance(claims, CredentialRequest)
        publication = Publication(
            message.signed.digest,
            agent_id,
            message.kid,
            claims.task_id if isinstance(claims, CredentialRequest) else None,
            acknowledged=is_request and self._is_answered(agent_id, message.id),
            at_s=int(time.time()),
        )
        self._keep(message.id, publication)
        if publication.acknowledged:
            self._write(message.id, publication)
        return publication

    def _keep(self, id: str, publication: Publication) -> None:
        agent_id = publication.agent_id
        ids = self._of_agent.setdefault(agent_id, OrderedDict())
        if len(ids) >= self._per_agent:
            self._forget(next(iter(ids)))
        elif len(self._by_id) >= self._in_total:
            self._forget(next(iter(self._by_id)))
        self._of_agent.setdefault(agent_id, ids)[id] = None
        self._by_id[id] = publication

    def _write(self, id: str, publication: Publication) -> None:
        """Write a published request to the journal. Other messages have no replies of their own."""
        if self._journal is None or publication.task_id is None:
            return
        if self._journal.add(_entry(id, publication)):
            kept = self._by_id.items()
            self._journal.rewrite(
                _entry(id, one) for id, one in kept if one.acknowledged and one.task_id is not None
            )

    def _forget(self, id: str) -> None:
        agent_id = self._by_id.pop(id).agent_id
        ids = self._of_agent[agent_id]
        del ids[id]
        if not ids:
            del self._of_agent[agent_id]


def _entry(id: str, publication: Publication) -> JournalEntry:
    return JournalEntry(
        id, publication.digest, publication.agent_id, publication.kid, publication.task_id, publication.at_s
    )


def _retrieve(sending: asyncio.Task[None]) -> None:
    """Retrieve the error of a send, so that asyncio does not report it if no caller waits any more."""
    if not sending.cancelled():
        sending.exception()
