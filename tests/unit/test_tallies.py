"""What is tallied is what a scrape tells, once."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from ringfence.kernel.base.metrics import TalliedCounter, TalliedHistogram


def test_tallies_and_counts_add_up_in_a_scrape() -> None:
    registry = CollectorRegistry()
    counter = TalliedCounter("asked", "", ["how"], registry=registry)
    counter.labels("well").tally()
    counter.labels("well").inc(2)
    counter.labels("badly").tally()
    for _ in range(2):
        assert registry.get_sample_value("asked_total", {"how": "well"}) == 3
        assert registry.get_sample_value("asked_total", {"how": "badly"}) == 1
    counter.labels("well").tally()
    assert b'asked_total{how="well"} 4.0' in generate_latest(registry)


def test_a_tallied_histogram_is_one_that_observed() -> None:
    registry, other = CollectorRegistry(), CollectorRegistry()
    tallied = TalliedHistogram("took", "", buckets=(1, 2, 3), registry=registry)
    observed = TalliedHistogram("took", "", buckets=(1, 2, 3), registry=other)
    for amount in (0, 0.5, 1, 1.5, 3, 7):
        tallied.tally(amount)
        observed.observe(amount)
    for place in ({"le": "1.0"}, {"le": "2.0"}, {"le": "3.0"}, {"le": "+Inf"}):
        said = registry.get_sample_value("took_bucket", place)
        assert said == other.get_sample_value("took_bucket", place)
    for name in ("took_sum", "took_count"):
        assert registry.get_sample_value(name) == other.get_sample_value(name)
    assert registry.get_sample_value("took_count") == 6, "each once"
