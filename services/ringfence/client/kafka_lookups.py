"""Look-ups on Kafka for people with a passkey, who read no HTTP API before they sign.

The services' HTTP APIs want a token by a key file. What is found here is signed by policy or by people, and verified.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from ringfence.client.arguments import find_by_prefix
from ringfence.client.connection import Connection
from ringfence.client.errors import InvalidCallError
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jws import Signed, parse, verify
from ringfence.kernel.kafka.record import Received
from ringfence.messages.approval import MAX_GRANT_LIFE_S, Grant
from ringfence.messages.base import Topic, typ_header
from ringfence.messages.credential import CredentialRequest, DecidedTerms
from ringfence.messages.lease import TERMINAL, Lease
from ringfence.messages.registry import TaskState
from ringfence.messages.topics import APPROVAL_RESPONSE, CREDENTIAL_DECISION, LEASE
from ringfence.model.records.command_chain import ChainError

_DAY_MS = 86_400_000
_DECISIONS_KEPT_MS = 30 * _DAY_MS


async def policy_revision(connection: Connection) -> str:
    """The revision of the policy bundle in force, by policy's last decision of the last day.

    Raises InvalidCallError if there is none.
    """
    decisions = [one.claims for one in await _decisions(connection, _DAY_MS) if one.claims.revisions]
    if not decisions:
        raise InvalidCallError(
            "policy has decided nothing for a day, so its revision is not known here; grant what a request asks for "
            "(--like REQUEST), or sign with a key file"
        )
    newest = max(decisions, key=lambda one: one.iat)
    assert newest.revisions is not None
    return newest.revisions.policy


async def find_grant(connection: Connection, grant_id: str) -> Grant:
    """The grant with this id or unique id prefix, as a person signed it. Raises InvalidCallError."""
    directory = await connection.directory()
    found: dict[str, Grant] = {}

    def read(records: Sequence[Received]) -> None:
        for record in records:
            try:
                jws = parse(record.value)
                if jws.header.typ != typ_header(Grant):
                    continue
                at_s = record.appended_at_ms / 1000
                grant = verify(
                    jws,
                    Grant,
                    lambda iss, kid, at_s=at_s: directory.user_key(iss, kid, at_s),  # type: ignore[misc]
                    audience=connection.settings.trust_domain,
                ).claims
            except (InvalidMessageError, ChainError):
                continue
            found[message_id(grant.iss, grant.jti)] = grant

    await _read(connection, APPROVAL_RESPONSE, read, (MAX_GRANT_LIFE_S + 3600) * 1000)
    one = find_by_prefix(grant_id, found.items(), lambda item: item[0])
    if one is None:
        raise InvalidCallError(f"no single grant {grant_id} of the last {MAX_GRANT_LIFE_S // 3600} h")
    return one[1]


async def find_break_glass_use(connection: Connection, request_id: str) -> Signed[DecidedTerms]:
    """The decision by which break glass allowed the request with this id or unique id prefix.

    Raises InvalidCallError.
    """
    uses = {
        one.claims.request_id: one
        for one in await _decisions(connection, _DECISIONS_KEPT_MS)
        if one.claims.outcome == "allowed" and request_of(one.claims).break_glass
    }
    use = find_by_prefix(request_id, uses.values(), lambda one: one.claims.request_id)
    if use is None:
        raise InvalidCallError(f"no single use of break glass {request_id} in the last 30 days")
    return use


async def tasks_by_prefix(connection: Connection, prefix: str) -> dict[str, str]:
    """The ids of tasks that begin so, each with a few words that tell it from the others."""
    directory = await connection.directory()
    tasks = (cast(TaskState, entry.state) for entry in directory.entries("task", prefix))
    return {one.task_id: f"task of {one.agent_id}: {one.purpose}" for one in tasks}


async def leases_by_prefix(connection: Connection, prefix: str) -> dict[str, str]:
    """As `tasks_by_prefix`: the leases that have not ended."""
    latest: dict[str, Lease] = {}

    def read(records: Sequence[Received]) -> None:
        for record in records:
            if not record.value or not (record.key or "").startswith(prefix):
                continue
            lease = _verified_lease(connection, record)
            if lease is None:
                continue
            known = latest.get(lease.claims.lease_id)
            if known is None or known.seq < lease.claims.seq:
                latest[lease.claims.lease_id] = lease.claims

    await connection.follow([LEASE], read)
    return {
        id: f"lease of {lease.agent_id}, {lease.status}"
        for id, lease in latest.items()
        if lease.status not in TERMINAL
    }


async def find_lease(connection: Connection, lease_id: str) -> str | None:
    """The latest record of a lease, as the issuer or a revoker signed it; None if there is none."""
    found: list[Signed[Lease]] = []

    def read(records: Sequence[Received]) -> None:
        for record in records:
            lease = _verified_lease(connection, record) if record.key == lease_id and record.value else None
            if lease is not None:
                found.append(lease)

    await connection.follow([LEASE], read, since_ms=0, key=lease_id)
    return max(found, key=lambda one: one.claims.seq).compact if found else None


def _verified_lease(connection: Connection, record: Received) -> Signed[Lease] | None:
    find = connection.trust.finder(*Lease.signed_by, at_s=record.appended_at_ms / 1000)
    try:
        lease = verify(parse(record.value), Lease, find, audience=connection.settings.trust_domain)
    except InvalidMessageError:
        return None
    return lease if lease.claims.lease_id == record.key else None


def request_of(decision: DecidedTerms) -> CredentialRequest:
    """The request in a verified decision. Policy verified its signature."""
    return parse(decision.request).unverified_claims(CredentialRequest)


async def _decisions(connection: Connection, back_ms: int) -> list[Signed[DecidedTerms]]:
    found: list[Signed[DecidedTerms]] = []

    def read(records: Sequence[Received]) -> None:
        for record in records:
            find = connection.trust.finder("policy", at_s=record.appended_at_ms / 1000)
            try:
                found.append(
                    verify(parse(record.value), DecidedTerms, find, audience=connection.settings.trust_domain)
                )
            except InvalidMessageError:
                continue

    await _read(connection, CREDENTIAL_DECISION, read, back_ms)
    return found


async def _read(
    connection: Connection, topic: Topic[Any], read: Callable[[Sequence[Received]], None], back_ms: int
) -> None:
    await connection.follow([topic], read, since_ms=max(connection.clock.now_ms() - back_ms, 1))
