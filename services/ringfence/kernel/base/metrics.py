"""Every Prometheus metric, declared once. Labels never hold ids of agents or leases, which would grow without bound.

`TalliedCounter` and `TalliedHistogram` are for events that happen thousands of times a second. They count without a
lock, and pass their totals on when they are scraped. Only the event loop's thread may count with them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.samples import Sample


class TalliedCounter(Counter):
    """A Counter with a fast, lock-free `tally`."""

    tallied = 0

    def tally(self) -> None:
        self.tallied += 1

    def _child_samples(self) -> Iterable[Sample]:
        count, self.tallied = self.tallied, 0
        self.inc(count)
        return super()._child_samples()


class TalliedHistogram(Histogram):
    """A Histogram with a fast, lock-free `tally`."""

    def _metric_init(self) -> None:
        super()._metric_init()
        self._tallied = [0] * len(self._upper_bounds)
        self._tallied_sum = 0.0

    def tally(self, amount: float) -> None:
        """Count one observation of `amount`."""
        self._tallied[bisect_left(self._upper_bounds, amount)] += 1
        self._tallied_sum += amount

    def _child_samples(self) -> Iterable[Sample]:
        for bucket, count in zip(self._buckets, self._tallied, strict=True):
            bucket.inc(count)
        self._sum.inc(self._tallied_sum)
        self._tallied, self._tallied_sum = [0] * len(self._upper_bounds), 0.0
        return super()._child_samples()


RECORDS = Counter("ringfence_records_total", "Kafka records handled", ["topic", "outcome"])
"""`outcome`: done, dead_lettered."""
BATCH_RETRIES = Counter("ringfence_batch_retries_total", "Batches tried again after a failure", ["group"])
HALTED = Gauge(
    "ringfence_consumer_halted",
    "1 where a consumer stopped at too many malformed records of services that may write them; where it is a "
    "revoker's, issuers and gateways deny",
    ["group"],
)
HANDLING_LAG = Gauge(
    "ringfence_handling_lag_seconds",
    "From the append of the oldest record of the last batch until it was handled, or until now during retries; 0 if "
    "there is nothing to handle",
    ["group"],
)
RECORDS_GONE = Counter(
    "ringfence_records_gone_total",
    "Records that Kafka removed before they were read, or lost after that",
    ["topic", "group"],
)
"""`group`: the consumer group, or a service that follows the topic."""
CLOCK_AHEAD = Gauge(
    "ringfence_clock_ahead_seconds",
    "How far this process's clock is ahead of another one, at most; below 0 if it is behind",
    ["whose"],
)
"""`whose`: broker, redis."""
KEYS_ENDING = Gauge(
    "ringfence_keys_ending",
    "Keys of agents and users that end within two weeks without a successor, by the active registry",
)
DECISIONS = Counter("ringfence_decisions_total", "Decisions by outcome", ["outcome"])
"""`outcome`: allowed, denied, approval_required."""
REQUESTS_SHED = Counter(
    "ringfence_requests_shed_total",
    "Requests that policy did not answer (load shedding): they came too late, or their agent was refused too often",
)
APPROVALS_WAITING = Gauge(
    "ringfence_approvals_waiting", "Requests of agents that wait for approvals of people"
)
APPROVALS_OLDEST = Gauge(
    "ringfence_approvals_oldest_seconds", "Age of the oldest request that waits for approvals"
)
BREAK_GLASS = Counter("ringfence_break_glass_total", "Break glass decisions by outcome", ["outcome"])
BREAK_GLASS_UNREVIEWED = Gauge(
    "ringfence_break_glass_unreviewed", "Uses of break glass that nobody has reviewed, by audit's index"
)
POLICY_FAILURES = Counter(
    "ringfence_policy_failures_total", "Requests denied because the policy bundle gave no answer", ["code"]
)
"""`code`: policy_timeout, policy_unavailable, policy_invalid."""
POLICY_BUNDLE_REFUSED = Gauge(
    "ringfence_policy_bundle_refused",
    "1 if the bundle on disk was changed and is not used, because it does not compile or fails its tests",
)
NOTICES = Counter(
    "ringfence_notices_total", "Webhooks that notify people, for example of a waiting request", ["outcome"]
)
"""`outcome`: delivered, failed, dropped (too many in progress), skipped (answered meanwhile)."""
SIGNALS = Counter(
    "ringfence_signals_total", "Ends of leases reported to receivers of shared signals", ["outcome"]
)
"""`outcome`: delivered, failed (a push that is retried), refused (the receiver calls it invalid)."""
SIGNALS_STUCK = Gauge(
    "ringfence_signals_stuck_receivers",
    "Receivers of shared signals that have accepted nothing for a while, although events wait",
)
RUNS = Counter("ringfence_runs_total", "Ordered runs that ended at this runner", ["outcome"])
"""`outcome`: ended, remained (something of it could not be removed), failed (it could not be started)."""
RUNS_RUNNING = Gauge("ringfence_runs_running", "Ordered runs in progress at this runner")
RUN_ORDERS_WAITING = Gauge("ringfence_run_orders_waiting", "Orders of runs that wait for room at this runner")
RUN_ORDERS_REFUSED = Counter(
    "ringfence_run_orders_refused_total", "Orders of runs that this runner refused", ["code"]
)
RUNS_SILENCED = Counter(
    "ringfence_runs_silenced_total", "Runs whose leases the revoker ended because their runner was silent"
)
LEASES_ISSUED = Counter("ringfence_leases_issued_total", "Leases activated", ["backend"])
ISSUE_REFUSED = Counter("ringfence_issue_refused_total", "Allowed requests that the issuer refused", ["code"])
LEASES_ENDED = Counter("ringfence_leases_ended_total", "Terminal lease records written", ["status"])
"""`status`: released, revoked, expired, aborted."""
EXPIRY_LAG = Histogram(
    "ringfence_expiry_lag_seconds",
    "From a lease's deadline to its terminal record on Kafka",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60),
)
SPANS = Counter("ringfence_spans_total", "Spans that were made for traces", ["outcome"])
"""`outcome`: sent, failed (the receiver did not answer, or refused), dropped (too many waited)."""
AUDIT_EVENTS = Counter("ringfence_audit_events_total", "OCSF events written", ["class_uid"])
HTTP_REQUESTS = Counter("ringfence_http_requests_total", "HTTP requests answered", ["route", "status"])
REVOCATIONS_OVERDUE = Gauge(
    "ringfence_revocations_overdue",
    "Cut leases whose credential is still at the target after a while",
)
TIME_TO_CUT = Histogram(
    "ringfence_time_to_cut_seconds",
    "From a revocation's append to Kafka until Redis and every live gateway refuse what it covers",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
CUTS_UNCONFIRMED = Counter(
    "ringfence_cuts_unconfirmed_total", "Cuts that a live gateway did not confirm within the grace"
)
ORPHANS_UNDONE = Counter(
    "ringfence_orphans_undone_total",
    "Credentials without a lease that were found at targets and removed",
    ["backend"],
)
GATEWAY_REFUSED = Counter(
    "ringfence_gateway_refused_total",
    "Requests that the gateway's data plane refused by itself, before or after the decision",
    ["code"],
)
GATEWAY_CONNECTIONS = Gauge("ringfence_gateway_connections", "Connections of agents that are open")
TOMBSTONES = Counter(
    "ringfence_lease_tombstones_total", "Leases deleted from the lease topic, long after their end"
)
ACTIONS = TalliedCounter(
    "ringfence_actions_total", "Requests of agents decided by the gateway", ["outcome", "access"]
)
"""`outcome`: allowed, denied, observed. `access`: read, write, none (CONNECT)."""
MCP_ANSWERS = Counter(
    "ringfence_gateway_mcp_answers_total",
    "Outcomes of requests that were forwarded to MCP endpoints",
    ["outcome"],
)
"""`outcome`: result, tool_error, rpc_error, accepted, transport_error, none."""
MODEL_TOKENS = Counter(
    "ringfence_gateway_model_tokens_total",
    "Tokens of language models that were counted",
    ["counted"],
)
"""`counted`: usage, estimate, reservation, nothing."""
OBSERVED_TARGETS = Gauge(
    "ringfence_gateway_observed_targets",
    "Targets at which the gateway blocks nothing, and only records (observe mode)",
)
ACTIONS_SPOOLED = Gauge("ringfence_actions_spooled_bytes", "Events on disk that Kafka does not have yet")
ACTIONS_WAITING = Gauge("ringfence_actions_waiting", "Requests that the gateway holds until a person answers")
DECISION_TIME = TalliedHistogram(
    "ringfence_action_decision_seconds",
    "Time to decide on one request",
    buckets=(0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1),
)
CONSOLE_SIGN_INS = Counter("ringfence_console_sign_ins_total", "Sign-ins at a console", ["outcome"])
"""`outcome`: done, refused."""
CONSOLE_QUESTIONS = Counter(
    "ringfence_console_questions_total", "Questions that people were asked to sign", ["kind", "outcome"]
)
"""`outcome`: asked, signed, refused."""
CONSOLE_STREAMS = Gauge("ringfence_console_streams", "Live pages that are open")
CONSOLE_PAGES = Histogram(
    "ringfence_console_page_seconds",
    "How long a page took, with the services' answers",
    ["page"],
    buckets=(0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
)
