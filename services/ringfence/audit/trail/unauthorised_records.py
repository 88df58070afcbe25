"""Unauthorised records: those on `audit` that the chain writer did not write, found by their offsets alone.

Kafka returns the offsets of what the writer sent when it acknowledges it. As long as no other process takes over, every
other record is unauthorised: garbage, a forged event, or an exact copy. So the writer need not parse its own events
again, and no event of its own counts as unauthorised, whatever it contains.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.kafka.record import Received
from ringfence.messages.codes import Code
from ringfence.model.audit_log.chain import event_of, loaded


class UnauthorisedOffsets(NamedTuple):
    """Offsets of unauthorised records in one partition."""

    partition: int
    ranges: Sequence[range]
    """Not empty, in ascending order."""

    @property
    def start(self) -> int:
        return self.ranges[0].start

    @property
    def stop(self) -> int:
        return self.ranges[-1].stop

    def has(self, offset: int) -> bool:
        return any(offset in offsets for offsets in self.ranges)


@dataclass(slots=True)
class _Partition:
    begin: int
    """The end of the partition when the writer took over. Chain recovery judged everything before it."""
    unauthorised: list[range] = field(default_factory=list)
    """In ascending order."""
    written: deque[range] = field(default_factory=deque)
    """Offsets that the writer wrote and that were not read yet."""

    def add(self, offsets: range) -> None:
        if self.unauthorised and self.unauthorised[-1].stop == offsets.start:
            offsets = range(self.unauthorised.pop().start, offsets.stop)
        self.unauthorised.append(offsets)

    def remove(self, offsets: range) -> None:
        remaining = list[range]()
        for one in self.unauthorised:
            before = range(one.start, min(one.stop, offsets.start))
            after = range(max(one.start, offsets.stop), one.stop)
            remaining += [part for part in (before, after) if part]
        self.unauthorised = remaining


class UnauthorisedRecords:
    """The unauthorised records that wait to be dead-lettered. Empty while this process does not write the trail."""

    def __init__(self) -> None:
        self._partitions: dict[int, _Partition] = {}
        self._read_to: dict[int, int] = {}
        self.waiting = asyncio.Event()
        """Set while there are any."""

    # --- called by the chain writer ---

    def start_writing(self, ends: Mapping[int, int], unauthorised: Mapping[int, Iterable[range]]) -> None:
        """Note a take-over by this process.

        Args:
            ends: by partition, its end after all other writers were fenced.
            unauthorised: by partition, the unauthorised offsets before that end.
        """
        self._partitions = {}
        for partition, end in ends.items():
            state = self._partitions[partition] = _Partition(end)
            for offsets in unauthorised[partition]:
                state.add(offsets)
            # What was read meanwhile is unauthorised: this process has not written yet, and no other can.
            if (read_to := self._read_to.get(partition, 0)) > end:
                state.add(range(end, read_to))
        self._update_waiting()

    def stop_writing(self) -> None:
        """Forget everything, because another process may write from now on."""
        self._partitions = {}
        self._update_waiting()

    def add_written(self, partition: int, offsets: range) -> None:
        state = self._partitions.get(partition)
        if state is None:
            return
        state.written.append(offsets)
        # The embedded broker shows records before they are committed, so they may have been read already.
        if offsets.start < self._read_to.get(partition, 0):
            state.remove(offsets)
            self._update_waiting()

    # --- called by the reader of the trail ---

    def read(self, records: Sequence[Received]) -> None:
        """Judge records of one partition of `audit`, in ascending order of their offsets."""
        partition = records[0].partition
        before, self._read_to[partition] = self._read_to.get(partition, 0), records[-1].offset + 1
        state = self._partitions.get(partition)
        if state is None:
            return
        begin, written = max(state.begin, before), state.written
        for record in records:
            offset = record.offset
            while written and written[0].stop <= offset:
                written.popleft()
            if offset >= begin and not (written and offset in written[0]):
                state.add(range(offset, offset + 1))
        if state.unauthorised:
            self.waiting.set()

    # --- called to dead-letter them ---

    def next(self, max_span: int) -> UnauthorisedOffsets | None:
        """Unauthorised offsets of one partition, within `max_span` offsets of the first. Partitions take turns."""
        for partition, state in self._partitions.items():
            if state.unauthorised:
                self._partitions[partition] = self._partitions.pop(partition)
                end = state.unauthorised[0].start + max_span
                ranges = [
                    range(one.start, min(one.stop, end)) for one in state.unauthorised if one.start < end
                ]
                return UnauthorisedOffsets(partition, ranges)
        return None

    def still_unauthorised(self, offsets: UnauthorisedOffsets) -> UnauthorisedOffsets | None:
        """The offsets that Kafka has not acknowledged to the writer since; None if nothing is left."""
        state = self._partitions.get(offsets.partition)
        clipped = [
            range(max(one.start, offsets.start), min(one.stop, offsets.stop))
            for one in (state.unauthorised if state else ())
        ]
        ranges = [one for one in clipped if one]
        return UnauthorisedOffsets(offsets.partition, ranges) if ranges else None

    def dead_lettered(self, offsets: UnauthorisedOffsets) -> None:
        state = self._partitions.get(offsets.partition)
        if state is not None:
            state.remove(range(offsets.start, offsets.stop))
        self._update_waiting()

    def checked_offsets(self) -> dict[int, int]:
        """By partition: the offset before which no unauthorised record waits."""
        return {
            partition: state.unauthorised[0].start
            if state.unauthorised
            else max(state.begin, self._read_to.get(partition, 0))
            for partition, state in self._partitions.items()
        }

    def _update_waiting(self) -> None:
        if any(state.unauthorised for state in self._partitions.values()):
            self.waiting.set()
        else:
            self.waiting.clear()


def rejection_of(record: Received) -> InvalidMessageError:
    """The error of the dead letter of an unauthorised record. It repeats nothing of the record's contents."""
    event = loaded(record.value)
    if event is None:
        return InvalidMessageError("not the JSON of an event", code=Code.NOT_JSON)
    if event_of(record.value) is None:
        return InvalidMessageError("no audit event", code=Code.CLAIMS_INVALID)
    return InvalidMessageError(
        "no audit service chained it: not what its writer wrote", code=Code.NOT_CHAINED
    )
