"""The wiring of policy."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from faststream import FastStream

from ringfence.backends import BackendContext, all_backends
from ringfence.backends.capabilities import BackendCapabilities
from ringfence.client.approvals.action_approvals import OpenActions
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.settings import ServiceSettings, load, of_setting
from ringfence.kernel.kafka.batch_handlers import concurrent, sequential
from ringfence.kernel.kafka.dead_letters import DeadLetters
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.kernel.service.runtime import Runtime
from ringfence.kernel.service.service_description import describe, placeholder
from ringfence.messages.base import Topic
from ringfence.messages.codes import Code
from ringfence.messages.credential import CredentialDecision, Reason
from ringfence.messages.operations import EventSubject
from ringfence.messages.topics import (
    APPROVAL_REQUEST,
    APPROVAL_RESPONSE,
    CREDENTIAL_DECISION,
    LEASE,
    SERVICE_EVENT,
)
from ringfence.model.records.agent_keys import KeyUses
from ringfence.model.records.alarms import report_alarms
from ringfence.model.records.api_access import Authenticator
from ringfence.model.records.directory import RUN_TABLES, Directory
from ringfence.model.records.signed_messages import SessionEvents
from ringfence.model.requests.grants import KEEP_MS as GRANTS_KEEP_MS
from ringfence.model.requests.grants import GrantTable, kind_of
from ringfence.policy.agents.agent_index import AgentIndex
from ringfence.policy.agents.ceilings import CeilingCombinations
from ringfence.policy.agents.holdings import LEASES_SINCE_MS, REFUSALS_SINCE_MS, Holdings
from ringfence.policy.agents.inventory import SharedKeyDetector
from ringfence.policy.agents.usage import KeyLastSeen
from ringfence.policy.api.authzen import AuthZen
from ringfence.policy.api.decisions import DecisionsApi
from ringfence.policy.api.grants import GrantApi, ReachApi
from ringfence.policy.api.inventory import InventoryApi
from ringfence.policy.api.usage import KEEP_MS as QUESTIONS_KEEP_MS
from ringfence.policy.api.usage import (
    ActionQuestions,
    ActionsApi,
    CeilingApi,
    CeilingReportApi,
    UsageApi,
)
from ringfence.policy.decision_log import HISTORY_MS, Approvers, DecisionLog
from ringfence.policy.decisions.evaluator import RequestEvaluator
from ringfence.policy.decisions.one_person import OnePersonDetector
from ringfence.policy.decisions.responder import DecisionPublisher
from ringfence.policy.grants import GrantBook
from ringfence.policy.incoming.admission import (
    AdmissionControl,
    AdmissionLimits,
    MessageVerifier,
    PendingApprovalLimit,
    PendingLimits,
)
from ringfence.policy.incoming.approvals import ApprovalHandler, register_pending_gauges
from ringfence.policy.incoming.credential_requests import (
    RequestChecks,
    RequestHandler,
    WithdrawalHandler,
    requests_then_withdrawals,
)
from ringfence.policy.incoming.grants import GrantHandler
from ringfence.policy.incoming.load_shedding import ShedRequests
from ringfence.policy.notifications.notices import (
    Notices,
    key_notice_sender,
    notice_sender,
    proposal_notice_sender,
)
from ringfence.policy.notifications.receipts import receipt_sender
from ringfence.policy.settings import PolicySettings
from ringfence.policy.subscribers import NoticeHandlers, router
from ringfence.rego.bundle import load_bundle
from ringfence.rego.bundle_watch import BundleWatch
from ringfence.rego.engine import CEILING, ISSUANCE, PolicyEngine
from ringfence.rego.settings import OpaSettings, engine_of

log = logging.getLogger(__name__)

_READ_BACK_MS = 100
"""What policy has decided it knows: reading it back is for what others decided, and for a crash."""


@dataclass(frozen=True, slots=True)
class PolicyParts:
    """What policy works with. A process and a test bring theirs; `wire` makes one service of either."""

    runtime: Runtime
    own: PolicySettings
    directory: Directory
    engine: PolicyEngine
    declared: BackendCapabilities
    ceilings: CeilingCombinations


def build(
    settings: ServiceSettings, own: PolicySettings | None = None, clock: Clock | None = None
) -> Runtime:
    """The service, ready to run. Raises BackendError, BundleError, KeyFileError, SettingsError."""
    own = own or load(PolicySettings)
    with of_setting("RINGFENCE_POLICY_BUNDLE"):
        bundle = load_bundle(own.bundle)
    opa, timeout_ms = load(OpaSettings), own.evaluation_timeout_ms
    engine = engine_of(opa, bundle, timeout_ms=timeout_ms, entry_point=ISSUANCE)
    runtime = Runtime("policy", settings, clock)
    directory = Directory(
        runtime.trust,
        runtime.clock,
        grace_ms=int(settings.grace_s * 1000),
        on_alarm=report_alarms(runtime),
    )
    declared = BackendCapabilities(all_backends(BackendContext(settings.trust_domain, settings.issuer_url)))

    async def bundle_refused(mark: str, why: str) -> None:
        reason = Reason(code=Code.BUNDLE_REFUSED, message=why[:2000])
        await runtime.event(
            "finding", EventSubject.POLICY_BUNDLE, about=("bundle_refused", mark), reasons=(reason,)
        )

    runtime.table(RUN_TABLES, directory.on_records)
    ceiling_engine = engine_of(opa, bundle, timeout_ms=timeout_ms, entry_point=CEILING)
    ceilings = CeilingCombinations(runtime, directory, ceiling_engine)
    watch = BundleWatch(own.bundle, engine, bundle_refused, then=ceilings.use)
    runtime.background("policy bundle", watch.run)
    runtime.denies_when(directory.stale)
    _, decisions = wire(PolicyParts(runtime, own, directory, engine, declared, ceilings))
    register_pending_gauges(decisions, runtime.clock)
    return runtime


def wire(parts: PolicyParts) -> tuple[ApprovalHandler, DecisionLog]:
    """Register all that policy reads, does and serves at its runtime.

    Returns the handler of what waits for people, and the decisions.
    """
    runtime, own, directory, engine = parts.runtime, parts.own, parts.directory, parts.engine
    settings = runtime.settings
    holdings = Holdings(runtime.trust, runtime.clock)
    grant_table = GrantTable(directory, settings.trust_domain)
    grants = GrantBook(grant_table, directory)

    def allowed(decision: CredentialDecision, agent_id: str, at_ms: int) -> None:
        holdings.decided(decision, agent_id, at_ms)
        grants.on_allowed(decision)

    key_last_seen = KeyLastSeen()
    agent_index = AgentIndex(directory, holdings, key_last_seen, runtime.clock)
    decisions = DecisionLog(runtime.trust, allowed, key_last_seen.on_decision)

    def read_back(topic: Topic[Any], reader: Callable[[Sequence[Received]], None], for_ms: int) -> Follower:
        since_ms = max(runtime.clock.now_ms() - for_ms, 1)
        return runtime.history(
            [topic], runtime.redeliver_after_rotation(reader), since_ms=since_ms, linger_ms=_READ_BACK_MS
        )

    read_back(LEASE, holdings.on_leases, LEASES_SINCE_MS)
    read_back(SERVICE_EVENT, holdings.on_events, REFUSALS_SINCE_MS)
    history = read_back(CREDENTIAL_DECISION, decisions.on_records, HISTORY_MS)
    questions = ActionQuestions(OpenActions(runtime, directory, ""))
    read_back(APPROVAL_REQUEST, questions.on_requests, QUESTIONS_KEEP_MS)

    def on_responses(records: Sequence[Received]) -> None:
        grant_table.on_records(records)
        questions.on_answers(records)

    read_back(APPROVAL_RESPONSE, on_responses, GRANTS_KEEP_MS)

    async def load_decisions() -> None:
        if not await history.caught_up(settings.grace_s):
            raise UnavailableError("what was decided before cannot be read from Kafka")
        await decisions.settle()

    async def load_before_assignment() -> None:
        """What another replica decided before partitions came here must be known before the first record of them."""
        while True:
            try:
                grant_table.settle()
                return await load_decisions()
            except UnavailableError as error:
                log.warning("no requests are taken yet: %s", error)
                await asyncio.sleep(0.5)

    notices = Notices(own.webhooks, directory, decisions, runtime.clock)
    one_person = OnePersonDetector(runtime, directory)
    publisher = DecisionPublisher(runtime, directory, decisions, Approvers(directory), notices, one_person)
    verifier = MessageVerifier(runtime, directory)
    judge = RequestEvaluator(runtime, directory, engine, holdings, (history,), grants, parts.declared)
    limits = AdmissionLimits(own.agent_requests_per_minute, own.sponsor_requests_per_minute, own.wait_s)
    pending = PendingLimits(own.agent_pending_approvals, own.sponsor_pending_approvals)
    admission, shed = AdmissionControl(directory, limits), ShedRequests(runtime, decisions)
    requests = RequestHandler(
        runtime,
        RequestChecks(
            verifier,
            admission,
            PendingApprovalLimit(directory, decisions, pending),
            SharedKeyDetector(runtime, KeyUses()),
            shed,
        ),
        judge,
        decisions,
        publisher,
        load_decisions,
        approval_timeout_s=own.approval_timeout_s,
    )
    approvals = ApprovalHandler(runtime, directory, verifier, judge, decisions, publisher, load_decisions)
    withdrawals = WithdrawalHandler(runtime, directory, verifier, admission, shed, decisions, approvals)
    granting = GrantHandler(
        runtime, directory, verifier, grant_table,
        lambda: judge.policy_revision, approvals.records.wait_until_known, approvals.reconsider,
    )  # fmt: skip

    approve, grant = (
        concurrent(approvals.handle, runtime.dead_letters),
        sequential(granting.handle, runtime.dead_letters),
    )

    async def respond(batch: Sequence[Received]) -> None:
        approvals.received(batch)
        for is_approval, records in groupby(batch, lambda record: kind_of(record) is None):
            await (approve if is_approval else grant)(list(records))

    notice_handlers = NoticeHandlers(
        notice_sender(runtime, directory, notices),
        key_notice_sender(runtime, directory, notices),
        receipt_sender(runtime, directory, notices),
        proposal_notice_sender(runtime, directory, notices),
        # A gateway that is taken over must not take policy out of use: hints are lost at most.
        DeadLetters(
            runtime.publisher,
            runtime.role,
            runtime.clock,
            runtime.trust,
            runtime.trust_moved,
            halts=False,
        ),
    )
    consumers = runtime.consume(
        router(
            requests=requests_then_withdrawals(
                requests.handle, withdrawals.handle, approvals.received, runtime.dead_letters
            ),
            responses=respond,
            notices=notice_handlers if own.webhooks else None,
            on_assigned=load_before_assignment,
            dead_letters=runtime.dead_letters,
        )
    )

    async def close_overdue() -> None:
        await decisions.settle()
        await approvals.close_overdue(consumers["policy"].owns)

    runtime.on_start(engine.start)
    runtime.on_stop(engine.close)
    runtime.on_start(notices.start)
    runtime.on_stop(notices.close)
    runtime.background("overdue approvals", close_overdue)
    runtime.background("inventory", agent_index.keep)
    runtime.background("combinations in ceilings", parts.ceilings.keep)
    runtime.on_stop(parts.ceilings.close)
    runtime.background("load shedding", shed.run)
    runtime.on_stop(shed.close)
    runtime.ready_when(decisions.unready)
    runtime.warns_when(lambda: admission.behind(runtime.clock.now_ms()))
    authenticator = Authenticator(directory, runtime.role, runtime.clock, SessionEvents(runtime))
    decisions_api = DecisionsApi(runtime, directory, authenticator, decisions, lambda: judge.policy_revision)

    async def keep_pending_index() -> None:
        await decisions.settle()
        await decisions_api.index.keep()

    runtime.background("what waits for approvals", keep_pending_index)
    runtime.routes += decisions_api.routes()
    runtime.routes += ActionsApi(questions, directory, authenticator).routes()
    runtime.routes += UsageApi(directory, authenticator, holdings, key_last_seen, runtime.clock).routes()
    runtime.routes += CeilingApi(authenticator, parts.ceilings).routes()
    runtime.routes += CeilingReportApi(runtime, directory, authenticator, parts.ceilings, holdings).routes()
    runtime.routes += InventoryApi(
        runtime, directory, authenticator, agent_index, directory.stale, parts.ceilings
    ).routes()
    runtime.routes += ReachApi(runtime, directory, authenticator, agent_index, directory.stale).routes()
    runtime.routes += GrantApi(
        runtime, directory, authenticator, grant_table, grants, lambda: judge.policy_revision
    ).routes()
    runtime.routes += AuthZen(runtime, authenticator, judge).routes()
    return approvals, decisions


def described() -> FastStream:
    """What the service consumes and publishes, for AsyncAPI. Needs no settings, keys or broker."""
    return describe(
        "policy",
        router(
            requests=placeholder,
            responses=placeholder,
            notices=NoticeHandlers(placeholder, placeholder, placeholder, placeholder, dead_letters=None),
            on_assigned=placeholder,
            dead_letters=None,
        ),
    )
