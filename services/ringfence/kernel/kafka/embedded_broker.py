"""Adapters for consumers of the embedded broker, which consumers of Apache Kafka must not have.

Measured with noida-db 0.2.3 and aiokafka 0.14. The adapters wrap `AIOKafkaConsumer._client.send`, through which all
requests of a consumer go. Each changes only the answers of one kind of request. Fetches are repeated below it.

One difference has no adapter: the broker never removes a group member that died without leaving, so nobody takes over
from it. A member that returns under the same name continues with its partitions (`consumer.InstanceOrderedAssignor`).
"""

from __future__ import annotations

import asyncio
import io
import struct
from typing import Any

from aiokafka import AIOKafkaConsumer
from aiokafka.client import ConnectionGroup
from aiokafka.errors import KafkaConnectionError

from ringfence.kernel.kafka.fetch_control import FetchPauses

# Api keys and error codes of the Kafka protocol.
_FETCH, _OFFSET_COMMIT = 1, 8
_ILLEGAL_GENERATION, _REBALANCE_IN_PROGRESS = 22, 27


QUICK_MS = 2
"""From fetch to fetch where somebody waits for what comes of a record: one that brings nothing costs 0.1 ms of CPU."""
TABLE_MS = 25
"""The same where a table is kept up to date."""
CEILING_MS = 50
"""The longest that a record waits for the consumer of a topic on which nothing happens."""
HOLD_MS = 500
"""How long an empty fetch is kept from aiokafka at most, as long as by Apache Kafka. Much longer than a pause, for the
first of a row costs three times what those cost that are sent again."""
_SHARE_OF_SILENCE = 1 / 16


async def pause(seconds: float, client: Any, topics: Any, pauses: FetchPauses) -> None:
    """Wait before a fetch. Where producers share the process, as in tests, a replacement ends with their next record.

    `client` is the consumer's; `topics` are those of its fetch request.
    """
    await pauses.sleep(seconds)


def adapt_to_embedded_broker(
    consumer: AIOKafkaConsumer, *, linger_ms: int = QUICK_MS, ceiling_ms: int = CEILING_MS
) -> FetchPauses:
    """All adapters below. Call it once, before `consumer.start()`, and for the embedded broker only.

    `linger_ms` is the least time from fetch to fetch; `ceiling_ms` the longest while nothing comes. Returns the pauses
    between fetches.
    """
    pauses = hold_fetches(consumer, linger_ms=linger_ms, ceiling_ms=max(ceiling_ms, 2 * linger_ms))
    rejoin_on_refused_commit(consumer)
    pass_over_old_aborts(consumer)
    return pauses


def hold_fetches(
    consumer: AIOKafkaConsumer, *, linger_ms: int, ceiling_ms: int = CEILING_MS, hold_ms: int = HOLD_MS
) -> FetchPauses:
    """Let a fetch of `consumer` wait for records, as Apache Kafka does it for `fetch_max_wait_ms`.

    The embedded broker answers at once, and an idle consumer of it spins: 0.9 of a core. So the same fetch is sent
    again, after pauses, until it brings something or `hold_ms` are over: aiokafka, which takes more CPU for an empty
    answer than the broker, does not see it.

    The pause is a sixteenth of the time since the last record, within `linger_ms` and `ceiling_ms`: where records
    come now and then, the next one waits for a small part of what lay between them, and an idle consumer sees one at
    most `ceiling_ms` late. `linger_ms` also lie between the fetches that bring something, as with `fetch_min_bytes`:
    whoever is in no hurry reads many records at a time.

    Only fetches wait: heartbeats, commits, joins and metadata pass. Stopping the consumer or a rebalance cancels the
    wait; what is assigned, resumed or sought meanwhile is in the next fetch. An answer with an error, or with records,
    is given on at once.
    """
    client = consumer._client
    send = client.send
    due_s: dict[int, float] = {}
    heard_s: dict[int, float] = {}
    pauses = FetchPauses()

    async def delayed_send(node_id: int, request: Any, **options: Any) -> Any:
        if request.API_KEY != _FETCH:
            return await send(node_id, request, **options)
        loop = asyncio.get_running_loop()
        hold_until_s = loop.time() + hold_ms / 1000
        again: _Again | None = None
        while True:
            await pause(due_s.get(node_id, 0) - loop.time(), client, request.topics, pauses)
            due_s[node_id] = loop.time() + linger_ms / 1000
            response = await (send(node_id, request, **options) if again is None else again.send())
            now_s = loop.time()
            if not _brought_nothing(response):
                heard_s[node_id] = now_s
                return response
            again = again or _Again.on(client, node_id, request, response)
            silence_ms = (now_s - heard_s.setdefault(node_id, now_s)) * 1000
            pause_ms = min(max(linger_ms, silence_ms * _SHARE_OF_SILENCE), ceiling_ms)
            due_s[node_id] = now_s + pause_ms / 1000
            if due_s[node_id] > hold_until_s:
                return response

    client.send = delayed_send
    return pauses


class _Again:
    """One fetch that brought nothing, sent again: encoded once, its answers decoded only where they are not the same.

    By way of the client it takes half as much CPU again, and that is most of what an idle service takes.
    """

    def __init__(self, connection: Any, request: Any, nothing: Any) -> None:
        self._connection = connection
        self._request = request.prepare(connection._versions)
        header = self._request.build_request_header(correlation_id=0, client_id=connection._client_id)
        message = header.encode() + self._request.encode()
        self._frame = struct.pack(">i", len(message)) + message
        self._nothing = nothing
        self._raw = b""
        """How `_nothing` looks."""

    @classmethod
    def on(cls, client: Any, node_id: int, request: Any, nothing: Any) -> _Again | None:
        """None if there is no connection any more: the client makes another one."""
        connection = client._conns.get((node_id, ConnectionGroup.DEFAULT))
        return cls(connection, request, nothing) if connection and connection.connected() else None

    async def send(self) -> Any:
        """Raises KafkaError if the connection ended."""
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        if not self._connection.connected():
            raise KafkaConnectionError("the connection to the broker ended")
        self._connection._writer.write(self._frame)
        # Without a correlation id, as packets of SASL, it is handed on as it came.
        self._connection._requests.append((None, None, answer))
        raw = await answer
        if raw != self._raw:
            stream = io.BytesIO(raw)
            self._request.parse_response_header(stream)
            response = self._request.RESPONSE_TYPE.decode(stream)
            if not _brought_nothing(response):
                return response
            self._raw, self._nothing = raw, response
        return self._nothing


def rejoin_on_refused_commit(consumer: AIOKafkaConsumer) -> None:
    """Let a member of a group that commits while another joins take part in the rebalance under its own name.

    Apache Kafka accepts such a commit until the new generation stands. The embedded broker refuses it with
    ILLEGAL_GENERATION, upon which aiokafka forgets its member id and joins as a stranger, while the broker
    goes on waiting for the old member: the group stands still for more than forty seconds. Told
    REBALANCE_IN_PROGRESS instead, aiokafka joins again as who it is. The commit fails either way, with
    `CommitFailedError`.
    """
    client = consumer._client
    send = client.send

    async def translated_send(node_id: int, request: Any, **options: Any) -> Any:
        response = await send(node_id, request, **options)
        if request.API_KEY == _OFFSET_COMMIT:
            response.topics = [
                (topic, [(partition, _translated(code), *rest) for partition, code, *rest in partitions])
                for topic, partitions in response.topics
            ]
        return response

    client.send = translated_send


def pass_over_old_aborts(consumer: AIOKafkaConsumer) -> None:
    """Show `consumer` only aborted transactions that began at or after the offset from which it fetches.

    Apache Kafka lists those that overlap with the records of its answer. The embedded broker lists all that ever were,
    and aiokafka would skip everything that the same producer wrote later. One difference remains: if a fetch ends
    within a transaction that is aborted later, the rest of that transaction is read.
    """
    client = consumer._client
    send = client.send

    async def send_without_old_aborts(node_id: int, request: Any, **options: Any) -> Any:
        response = await send(node_id, request, **options)
        if request.API_KEY == _FETCH and _tells_of_aborts(response):
            starts = {(name, number): at for name, some in request.topics for number, at, _ in some}
            response.topics = [
                (name, [_without_old_aborts(one, starts.get((name, one[0]), 0)) for one in partitions])
                for name, partitions in response.topics
            ]
        return response

    client.send = send_without_old_aborts


def _tells_of_aborts(response: Any) -> bool:
    return any(partition[5] for _, partitions in response.topics for partition in partitions)


def _without_old_aborts(partition: tuple[Any, ...], start: int) -> tuple[Any, ...]:
    """The part of a fetch response (version 5 or newer) that is about one partition."""
    number, code, high, stable, log_start, aborted, *rest = partition
    recent = [(producer, first) for producer, first in aborted or () if first >= start]
    return (number, code, high, stable, log_start, recent, *rest)


def _brought_nothing(response: Any) -> bool:
    """Whether no partition of a fetch response has records, which come last in each, or an error."""
    return not any(
        error_code or records
        for _, partitions in response.topics
        for _, error_code, *_, records in partitions
    )


def _translated(error_code: int) -> int:
    return _REBALANCE_IN_PROGRESS if error_code == _ILLEGAL_GENERATION else error_code
