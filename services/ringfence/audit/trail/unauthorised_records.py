"""What stands on `audit` and audit's writer did not put there: known by its place alone.

Kafka names the places of what the writer sent when it acknowledges that. Whatever else comes, as long as nobody took
over, is nobody's, be it garbage, a forged event or a copy to the letter: so no event of audit's own is looked at anew,
and none, whatever is in it, is ever taken for a stray.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.kafka.record import Received
from ringfence.model.audit_log.chain import event_of, loaded


class Found(NamedTuple):
    """Where strays stand in one partition."""

    partition: int
    places: Sequence[range]

    @property
    def start(self) -> int:
        return self.places[0].start

    @property
    def stop(self) -> int:
        return self.places[-1].stop

    def has(self, offset: int) -> bool:
        return any(offset in some for some in self.places)


@dataclass(slots=True)
class _Partition:
    begin: int
    """Where the writer took over: what stands before was looked at then."""
    strays: list[range] = field(default_factory=list)
    """In their order."""
    own: deque[range] = field(default_factory=deque)
    """What the writer wrote and was not read yet."""

    def add(self, some: range) -> None:
        if self.strays and self.strays[-1].stop == some.start:
            some = range(self.strays.pop().start, some.stop)
        self.strays.append(some)

    def take_out(self, some: range) -> None:
        left = list[range]()
        for one in self.strays:
            parts = range(one.start, min(one.stop, some.start)), range(max(one.start, some.stop), one.stop)
            left += [part for part in parts if part]
        self.strays = left


class UnauthorisedRecords:
    """Those that wait to be dead-lettered, while this process writes the trail; nothing in one that stands by."""

    def __init__(self) -> None:
        self._partitions: dict[int, _Partition] = {}
        self._read_to: dict[int, int] = {}
        self.some = asyncio.Event()
        """Set while there are any."""

    # --- told by the writer ---

    def took_over(self, ends: Mapping[int, int], found: Mapping[int, Iterable[range]]) -> None:
        """By partition: where it ended when nobody else could write any more, and where strays are before that."""
        self._partitions = {}
        for partition, end in ends.items():
            here = self._partitions[partition] = _Partition(end)
            for places in found[partition]:
                here.add(places)
            # Read meanwhile, and nobody has written yet.
            if (read_to := self._read_to.get(partition, 0)) > end:
                here.add(range(end, read_to))
        self._tell()

    def let_go(self) -> None:
        """Somebody else may write now."""
        self._partitions = {}
        self._tell()

    def wrote(self, partition: int, places: range) -> None:
        """What stands there is the writer's."""
        here = self._partitions.get(partition)
        if here is None:
            return
        here.own.append(places)
        # The embedded broker shows it before it is committed.
        if places.start < self._read_to.get(partition, 0):
            here.take_out(places)
            self._tell()

    # --- told by the reader ---

    def read(self, records: Sequence[Received]) -> None:
        """What came of one partition of `audit`, in its order."""
        partition = records[0].partition
        before, self._read_to[partition] = self._read_to.get(partition, 0), records[-1].offset + 1
        here = self._partitions.get(partition)
        if here is None:
            return
        begin, own = max(here.begin, before), here.own
        for record in records:
            offset = record.offset
            while own and own[0].stop <= offset:
                own.popleft()
            if offset >= begin and not (own and offset in own[0]):
                here.add(range(offset, offset + 1))
        if here.strays:
            self.some.set()

    # --- asked by who dead-letters them ---

    def next(self, most: int) -> Found | None:
        """Some of one partition, at most so many offsets from the first to the last; of another one each time."""
        for partition, here in self._partitions.items():
            if here.strays:
                self._partitions[partition] = self._partitions.pop(partition)
                end = here.strays[0].start + most
                cut = [range(one.start, min(one.stop, end)) for one in here.strays if one.start < end]
                return Found(partition, cut)
        return None

    def left_of(self, found: Found) -> Found | None:
        """What of these is one still: some may have been acknowledged as the writer's since."""
        here = self._partitions.get(found.partition)
        near = [
            range(max(one.start, found.start), min(one.stop, found.stop))
            for one in (here.strays if here else ())
        ]
        places = [one for one in near if one]
        return Found(found.partition, places) if places else None

    def settled(self, found: Found) -> None:
        """These are dead-lettered."""
        here = self._partitions.get(found.partition)
        if here is not None:
            here.take_out(range(found.start, found.stop))
        self._tell()

    def marks(self) -> dict[int, int]:
        """By partition: the offset before which no stray is left."""
        return {
            partition: here.strays[0].start
            if here.strays
            else max(here.begin, self._read_to.get(partition, 0))
            for partition, here in self._partitions.items()
        }

    def _tell(self) -> None:
        if any(here.strays for here in self._partitions.values()):
            self.some.set()
        else:
            self.some.clear()


def why_not(record: Received) -> InvalidMessageError:
    """What to say of a stray; nothing of what is in it."""
    event = loaded(record.value)
    if event is None:
        return InvalidMessageError("not the JSON of an event", code="not_json")
    if event_of(record.value) is None:
        return InvalidMessageError("no audit event", code="claims_invalid")
    return InvalidMessageError("no audit service chained it: not what its writer wrote", code="not_chained")
