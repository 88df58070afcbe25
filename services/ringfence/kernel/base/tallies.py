"""Metrics of what happens for each request of thousands a second: counted without a lock, and told when asked for.

Only one thread may count, that of the event loop.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from prometheus_client import Counter, Histogram
from prometheus_client.samples import Sample


class TalliedCounter(Counter):
    """A counter with `tally` besides `inc`."""

    tallied = 0

    def tally(self) -> None:
        """One more."""
        self.tallied += 1

    def _child_samples(self) -> Iterable[Sample]:
        count, self.tallied = self.tallied, 0
        self.inc(count)
        return super()._child_samples()


class TalliedHistogram(Histogram):
    """A histogram with `tally` besides `observe`."""

    def _metric_init(self) -> None:
        super()._metric_init()
        self._tallied = [0] * len(self._upper_bounds)
        self._tallied_sum = 0.0

    def tally(self, amount: float) -> None:
        """One more, of this much."""
        self._tallied[bisect_left(self._upper_bounds, amount)] += 1
        self._tallied_sum += amount

    def _child_samples(self) -> Iterable[Sample]:
        for bucket, count in zip(self._buckets, self._tallied, strict=True):
            bucket.inc(count)
        self._sum.inc(self._tallied_sum)
        self._tallied, self._tallied_sum = [0] * len(self._upper_bounds), 0.0
        return super()._child_samples()
