"""Looks for secrets everywhere that a run leaves something: topics, Redis, files."""

from __future__ import annotations

import base64
import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.messages.topics import ALL
from ringfence.model.lease_store import LeaseStore
from ringfence.model.lease_store.codec import unpack
from tests.support.stack import WITHIN_S

_BASE64 = re.compile(rb"[A-Za-z0-9_-]{24,}")
_PIECE = 8 * 1024 * 1024


async def on_topics(settings: ClientSettings, secrets: Sequence[str]) -> list[str]:
    """The topics that have one of them, on any record that there is, also inside of what is signed there."""
    found, count = set[str](), 0

    def look(records: Sequence[Received]) -> None:
        nonlocal count
        count += len(records)
        for record in records:
            if _holds((record.key or "").encode() + b"\0" + (record.value or b""), secrets):
                found.add(record.topic.what)

    follower = Follower(settings, ALL, look, since_ms=0)
    await follower.start()
    try:
        assert await follower.caught_up(WITHIN_S), "the topics could not be read up to their ends"
    finally:
        await follower.stop()
    assert count
    return sorted(found)


async def in_redis(url: str, secrets: Sequence[str]) -> list[str]:
    """The keys that have one of them, in their name or in what stands under them."""
    found, count = [], 0
    client: Any = Redis.from_url(url)
    try:
        async for key in client.scan_iter(count=1000):
            count += 1
            if any(_holds(piece, secrets) for piece in [key, *await _pieces(client, key)]):
                found.append(key.decode(errors="replace"))
    finally:
        await client.aclose()
    assert count
    return found


async def in_leases(settings: ServiceSettings, lease_ids: Sequence[str], secrets: Sequence[str]) -> list[str]:
    """Those of the leases in Redis of which the record has one of them: only the store puts it together again."""
    store = LeaseStore(settings)
    try:
        stored = await store.get(lease_ids)
    finally:
        await store.close()
    records = {id: lease.jws for id, lease in stored.items()}
    assert records
    return [id for id, jws in records.items() if _holds(jws, secrets)]


async def _pieces(client: Any, key: bytes) -> list[bytes]:
    """All that stands under a key; records also as the JWS that they are packed from, where they are whole."""
    match await client.type(key):
        case b"string":
            pieces = [await client.get(key) or b""]
        case b"hash":
            pieces = [piece for pair in (await client.hgetall(key)).items() for piece in pair]
        case b"zset":
            pieces = list(await client.zrange(key, 0, -1))
        case b"set":
            pieces = list(await client.smembers(key))
        case b"list":
            pieces = list(await client.lrange(key, 0, -1))
        case b"stream":
            entries = await client.xrange(key)
            pieces = [piece for _, fields in entries for pair in fields.items() for piece in pair]
        case kind:
            assert kind == b"none", kind
            pieces = []
    starts = [start for piece in pieces for start in (piece, piece.partition(b"\n")[2])]
    return pieces + [record for start in starts if (record := unpack(start)) is not start]


def in_files(folders: Iterable[Path], secrets: Sequence[str]) -> list[str]:
    """The files below these folders that have one of them."""
    found, count = [], 0
    for folder in folders:
        for path in folder.rglob("*"):
            if not path.is_file():
                continue
            count += 1
            before = b""
            with path.open("rb") as file:
                while piece := file.read(_PIECE):
                    if any(secret.encode() in before + piece for secret in secrets):
                        found.append(str(path))
                        break
                    before = piece[-1024:]
    assert count
    return found


def in_texts(texts: Iterable[str], secrets: Sequence[str]) -> list[str]:
    """Those of the texts, what somebody was told, that have one of them."""
    return [text for text in texts if _holds(text.encode(), secrets)]


def _holds(text: bytes, secrets: Sequence[str]) -> bool:
    return any(secret.encode() in layer for layer in _layers(text) for secret in secrets)


def _layers(text: bytes, depth: int = 4) -> Iterator[bytes]:
    """The text, and what is written in it in base64: a JWS, a JWS embedded in that, and so on."""
    yield text
    if depth:
        for run in _BASE64.findall(text):
            with contextlib.suppress(ValueError):
                yield from _layers(base64.urlsafe_b64decode(run + b"=" * (-len(run) % 4)), depth - 1)
