"""Wiring of the registry."""

from __future__ import annotations

from functools import partial

from faststream import FastStream

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.settings import ServiceSettings, load
from ringfence.kernel.service.runtime import Runtime
from ringfence.kernel.service.service_description import describe, placeholder
from ringfence.messages.topics import PROPOSAL, REGISTRY_COMMAND, SERVICE_EVENT
from ringfence.model.records.alarms import report_alarms
from ringfence.model.records.api_access import Authenticator
from ringfence.model.records.directory import TABLES, Directory
from ringfence.model.records.signed_messages import SessionEvents
from ringfence.registry.commands import Registry
from ringfence.registry.enrolment import EnrolApi, Enroller
from ringfence.registry.http import ProposalApi, RegistryApi
from ringfence.registry.key_expiry_warnings import KeyWarnings
from ringfence.registry.oidc_discovery import Discovery
from ringfence.registry.proposals import ProposalTable
from ringfence.registry.settings import RegistrySettings
from ringfence.registry.store import REMEMBERED_MS, Memory
from ringfence.registry.subscribers import GROUP, router

RECALL_S = 5.0
"""How long an instance that enrols waits for the registry's memory."""
_HEARTBEAT_S = 1.0
"""The interval at which the tables are confirmed; well below `RINGFENCE_GRACE_S`."""
_SETTLE_S = 5.0
"""The interval at which proposals whose day is over are reported, and removed later."""


def build(
    settings: ServiceSettings, own: RegistrySettings | None = None, clock: Clock | None = None
) -> Runtime:
    """A registry, ready to run. Raises SettingsError, KeyFileError."""
    own = own or load(RegistrySettings)
    runtime = Runtime("registry", settings, clock)
    since_ms = max(1, runtime.clock.now_ms() - REMEMBERED_MS)
    on_alarm = report_alarms(runtime)
    # It is the one that says what is so: no heartbeat tells it that its table is old.
    directory = Directory(runtime.trust, runtime.clock, grace_ms=None, on_alarm=on_alarm)
    memory = Memory(directory, runtime.trust, since_ms)
    warnings = KeyWarnings(runtime, directory)
    proposals = ProposalTable(runtime.trust)
    registry = Registry(runtime, directory, memory, on_alarm, warnings.remember, proposals)
    runtime.table(TABLES, directory.on_records)
    runtime.table((PROPOSAL,), proposals.on_records)
    on_events = runtime.redeliver_after_rotation(registry.on_events)
    registry.history = runtime.history((SERVICE_EVENT,), on_events, since_ms=since_ms)
    consumers = runtime.consume(
        router(command=registry.on_command, on_assigned=registry.catch_up, dead_letters=runtime.dead_letters)
    )
    commands = consumers[GROUP]
    command_topic = REGISTRY_COMMAND.name(settings.topic_prefix)

    def mine() -> bool:
        return commands.owns(command_topic, 0)

    runtime.background("heartbeat", lambda: registry.beat_while(mine, _HEARTBEAT_S))
    runtime.background(
        "key warnings", lambda: warnings.run(lambda: mine() and registry.untrusted() is None, own.key_check_s)
    )
    runtime.background("proposals", lambda: registry.settle_while(mine, _SETTLE_S))
    runtime.warns_when(registry.second_person_warning)
    discovery = Discovery(runtime.clock, own.oidc_ca_file)
    runtime.on_stop(discovery.close)

    def not_accepting() -> str | None:
        if commands.owns(command_topic, 0):
            return registry.untrusted()
        return "another replica of the registry is at work; ask that one"

    recalled = partial(registry.history.caught_up, RECALL_S)
    enroller = Enroller(runtime, directory, memory, discovery, not_accepting, recalled)
    registry.on_own_event = enroller.on_event
    runtime.routes += EnrolApi(enroller).routes()
    runtime.ready_when(registry.untrusted)
    authenticator = Authenticator(directory, runtime.role, runtime.clock, SessionEvents(runtime))
    runtime.routes += ProposalApi(registry.proposals, directory, authenticator).routes()
    runtime.routes += RegistryApi(
        directory,
        authenticator,
        runtime.clock,
        passkeys=memory.passkeys,
        task_max_s=runtime.settings.task_max_s,
    ).routes()
    return runtime


def described() -> FastStream:
    """What the service consumes and publishes, for AsyncAPI. Needs no settings, keys or broker."""
    return describe(
        "registry",
        router(
            command=placeholder,
            on_assigned=placeholder,
            dead_letters=None,
        ),
    )
