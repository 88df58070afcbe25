"""Verifies the records of topics that no service consumes.

The handler dead-letters them; such topics yield no events themselves. A message that an audit service signed for
`audit.checkpoint` is never dead-lettered. Each dead letter makes an event, each event extends the hash chain, and
each longer chain gets a checkpoint: two versions that could not read each other's checkpoints would never stop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ringfence.audit.verification import require_trust
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.crypto.jws import UnverifiedJws, parse, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.audit import AuditCheckpoint, AuditWitness
from ringfence.messages.base import Claims, typ_header
from ringfence.messages.codes import Code
from ringfence.messages.operations import Heartbeat, SignalStream
from ringfence.messages.topics import ALL, AUDIT_CHECKPOINT
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory

_CAUGHT_UP_S = 2.0
_ELSEWHERE = frozenset(
    typ_header(model)
    for topic in ALL
    for model in topic.models
    if topic is not AUDIT_CHECKPOINT and issubclass(model, Claims)
)
"""The typs of messages that belong on other topics. Here they are invalid, whatever key signed them."""


@dataclass(slots=True, eq=False)
class MalformedRecordHandler:
    """Verifies heartbeats, checkpoints, witness statements and signal streams. Those that fail are dead-lettered.

    One consumer group reads each record once, whichever replica does it. Valid records have no effect here.
    """

    trust: TrustStore
    directory: Directory
    clock: Clock
    caught_up: Callable[[float], Awaitable[bool]]
    """`Runtime.tables_caught_up` for the tables in `directory`."""

    async def heartbeat(self, record: Received) -> None:
        """Verify a record of `heartbeat`. Raises InvalidMessageError if it fails, UnavailableError without trust."""
        self._require_trust(record)
        find = self.trust.finder(*Heartbeat.signed_by, at_s=record.appended_at_ms / 1000)
        verify(parse(record.value), Heartbeat, find, audience=self.trust.trust_domain)

    async def signal_stream(self, record: Received) -> None:
        """Likewise for `signal.stream`."""
        self._require_trust(record)
        find = self.trust.finder(*SignalStream.signed_by, at_s=record.appended_at_ms / 1000)
        claims = verify(parse(record.value), SignalStream, find, audience=self.trust.trust_domain).claims
        _check_place(record, claims.receiver)

    async def checkpoint(self, record: Received) -> None:
        """Likewise for `audit.checkpoint`."""
        self._require_trust(record)
        jws, at_s = parse(record.value), record.appended_at_ms / 1000
        if jws.header.typ == typ_header(AuditWitness):
            await self._witness(record, jws)
        elif jws.header.typ in _ELSEWHERE or not self.trust.signed_by_service(
            jws, at_s, AuditCheckpoint.signed_by
        ):
            find = self.trust.finder(*AuditCheckpoint.signed_by, at_s=at_s)
            verify(jws, AuditCheckpoint, find, audience=self.trust.trust_domain)

    async def _witness(self, record: Received, jws: UnverifiedJws) -> None:
        try:
            self._verify_witness(record, jws)
        except (InvalidMessageError, ChainError):
            if not await self.caught_up(_CAUGHT_UP_S):
                raise UnavailableError("the local tables may be behind a witness's word") from None
            try:
                self._verify_witness(record, jws)
            except ChainError as error:
                raise InvalidMessageError(str(error), code=error.code) from None

    def _verify_witness(self, record: Received, jws: UnverifiedJws) -> None:
        at_ms, chains = record.appended_at_ms, self.directory.chains
        claims = verify(
            jws, AuditWitness, lambda iss, kid: chains.user_key(iss, kid, at_ms), audience=self.trust.trust_domain
        ).claims  # fmt: skip
        auditor = subject_of(self.trust.trust_domain, claims.iss, "user") or ""
        if "auditor" not in chains.roles_at(auditor, at_ms):
            raise InvalidMessageError("the signer is no auditor", code=Code.NOT_AUDITOR)
        _check_place(record, f"{claims.tree}/{auditor}")

    def _require_trust(self, record: Received) -> None:
        require_trust(self.trust, [record], self.clock.now_ms())


def _check_place(record: Received, key: str) -> None:
    """Require the record's own key. Compaction keeps the last record of a key, so a wrong key would erase another's."""
    if record.key != key:
        raise InvalidMessageError("it stands under another key than its own", code=Code.WRONG_KEY)
