"""Executes the plan of a run: claim, sandbox, key, enrolment, gateway, command, destruction, end.

    claimed (Kafka) → sandbox with our init → key made inside → started (Kafka) → enrolment → RUN-ID.sock → command
    → destroy → ended (Kafka) → the revoker ends the leases

A run is on Kafka before anything of it exists, so that whoever finds it unfinished knows that it may have started.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Final

from ringfence.client.connection import Connection
from ringfence.client.instance_enrolment import post_enrolment
from ringfence.kernel.base.errors import RingfenceError, UnavailableError
from ringfence.kernel.base.retry import backoff
from ringfence.kernel.crypto.keys import thumbprint
from ringfence.messages.codes import Code
from ringfence.messages.enrolment import RunRef
from ringfence.messages.run import Run, RunExit, RunStatus
from ringfence.messages.topics import RUN
from ringfence.model.identity.runners import enrolment_token
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.runner.control.channel import CommandStartError, ControlChannel, ControlLostError
from ringfence.runner.control.messages import (
    InitReport,
    Relay,
    RelayError,
    StartCommand,
    addresses_of,
    hosts_of,
    needs_low_ports,
    relays_of,
)
from ringfence.runner.init.command import init_command
from ringfence.runner.lifecycle.activity import RunActivity
from ringfence.runner.lifecycle.gateway_relay import GatewayRelay, has_loopback_target, raw_addresses
from ringfence.runner.lifecycle.mount_changes import MountChanges, changes_of
from ringfence.runner.lifecycle.plan import RunPlan, RunRefusedError, check_owners, check_plan
from ringfence.runner.lifecycle.private_paths import PrivatePath, check_private_paths, private_paths
from ringfence.runner.lifecycle.report import RunReport, make_run_folder, remove_run_folder
from ringfence.runner.sandbox.backend import (
    NO_STREAMS,
    Destruction,
    ExitReason,
    ResourceLimits,
    Sandbox,
    SandboxBackend,
    SandboxExit,
    SandboxSpec,
    Streams,
    survey_mount,
)
from ringfence.runner.sandbox.mount_points import Survey

log = logging.getLogger(__name__)

_INIT_WITHIN_S: Final = 20.0
_GATEWAY_WITHIN_S: Final = 15.0
_PUBLISH_WITHIN_S: Final = 30.0
_LEASES_END_WITHIN_S: Final = 15.0
_EVENTS_WITHIN_S: Final = 5.0
"""How long the report waits for what the gateway recorded last, from the end of the leases on."""
_SURVEYS_WITHIN_S: Final = 10.0
"""How long the end waits for what the run changed in its mounts: until then its leases live."""
_UNSURVEYED: Final = MountChanges((". (unknown: it was not surveyed before the end was published)",))
_LOOK_EVERY_S: Final = 0.5
_OUTLIVES_INIT_S: Final = 5.0
"""How long a sandbox may go on after its init."""
_REMAINED: Final = 64
"""Entries of `remained` in the record of a run."""
_KILLED: Final = 137
_SIGNALLED: Final = 128


@dataclass(frozen=True)
class RunnerHost:
    """What a runner has for all of its runs."""

    connection: Connection
    """Connected with the runner's key; its `id` is that of the runner's service."""
    backend: SandboxBackend
    gateway_sockets: Path
    """The folder in which the gateway of this machine opens `RUN-ID.sock`."""
    gateway_ca_file: Path | None = None
    """The gateway's CA certificate (PEM)."""
    key_file: Path | None = None
    """The runner's key, where the connection's settings do not name it."""

    @property
    def private_paths(self) -> list[PrivatePath]:
        """What no mount of a run may show, or let it write."""
        own = [PrivatePath("the gateway's sockets", self.gateway_sockets)]
        if self.key_file is not None:
            own.append(PrivatePath("the key of the runner", self.key_file))
        return [*own, *private_paths(self.connection.settings)]

    @property
    def name(self) -> str:
        return self.connection.key.id.rpartition("/")[2]


@dataclass
class _Progress:
    """How far a run has come, for its end."""

    status: RunStatus | None = None
    kid: str | None = None
    sandbox: Sandbox | None = None
    command_runs: bool = False
    stop_reason: str | None = None
    exit: SandboxExit | None = None
    code: int | None = None
    init: InitReport | None = None
    failure: RingfenceError | None = None
    destruction: Destruction | None = None
    published: bool = False
    left: dict[str, MountChanges] = field(default_factory=dict)
    """What it changed in each writable mount."""


@dataclass(slots=True, eq=False)
class RunExecution:
    """One run. Use it once."""

    host: RunnerHost
    plan: RunPlan
    streams: Streams = NO_STREAMS
    _: KW_ONLY
    on_claimed: Callable[[], Awaitable[None]] | None = None
    """Awaited once the claim is on Kafka, before anything exists. If it raises, nothing starts and nothing more is
    published."""
    follows_activity: bool = True
    """Whether the report has what the run was allowed and denied. It takes readers of three topics, until the
    connection is closed."""
    awaits_events: bool = False
    """Whether the report waits for what the gateway blocked last. Needs `follows_activity`."""
    ends_with_lease_at: str | None = None
    """End the run when a lease of it at this target has ended. Needs `follows_activity`."""
    _at: _Progress = field(default_factory=_Progress, init=False)
    _stopped: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _relay: GatewayRelay | None = field(default=None, init=False)
    _folder: Path | None = field(default=None, init=False)
    _ca_pem: str | None = field(default=None, init=False)
    _before: dict[str, Survey] = field(default_factory=dict, init=False)

    def signal(self, number: int) -> None:
        """Send a signal to the command. Before it has started, the run is stopped instead."""
        if self._at.sandbox is not None and self._at.command_runs:
            self._at.sandbox.signal(number)
        else:
            self._at.code = _SIGNALLED + number
            self.stop(f"signal {number} before the command started")

    def stop(self, reason: str) -> None:
        """End the run at once: its sandbox is destroyed. `reason` stands in its record."""
        self._at.stop_reason = self._at.stop_reason or reason
        self._stopped.set()

    async def freeze(self) -> None:
        """Stop all processes of the sandbox where they are. Raises SandboxUnavailableError."""
        if self._at.sandbox is not None:
            await self._at.sandbox.freeze()

    async def thaw(self) -> None:
        """Let the processes of the sandbox go on."""
        if self._at.sandbox is not None:
            await self._at.sandbox.thaw()

    async def execute(self) -> RunReport:
        """Execute the run to its end, and report it.

        Raises:
            RunRefusedError, SandboxUnavailableError, SandboxSpecError: it may not start so; nothing was claimed.
            UnavailableError: Kafka did not take the claim; nothing was started.
            RingfenceError: it was claimed and could not be started. Everything of it is gone, and its end is published.
        """
        began = time.monotonic()
        connection, plan = self.host.connection, self.plan
        directory = await connection.directory()
        check_plan(plan, directory, connection.settings.trust_domain, self.host.name, self._now_s())
        check_private_paths(plan.mounts, self.host.private_paths)
        check_owners(plan.mounts)
        if reasons := await self.host.backend.available():
            raise RunRefusedError("; ".join(reasons), code=Code.SANDBOX_UNAVAILABLE)
        self._ca_pem = self._read_ca()
        for mount in plan.mounts:
            if mount.writable:
                self._before[mount.name] = await asyncio.to_thread(survey_mount, mount.for_sandbox())
        activity = RunActivity(connection, plan.run_id, plan.agent_id)
        if self.follows_activity:
            await activity.follow()
        if plan.order_id is None:
            # Before the claim: if this process is killed right after it, or does not learn of it, the next run on this
            # machine finds the folder, and reports the run as lost if there is one.
            self._folder = await asyncio.to_thread(make_run_folder, plan.run_id)
        await self._publish("claimed")
        if self.on_claimed is not None:
            await self.on_claimed()
        try:
            await self._until_stopped(self._carry_out(activity))
        except RingfenceError as error:
            self._at.failure = error
        finally:
            await asyncio.shield(self._end())
        if self._at.failure is not None and self._at.code is None:
            raise self._at.failure
        live = await activity.leases_ended(_LEASES_END_WITHIN_S) if self._at.published else ()
        missing = await self._await_events(activity) if self.awaits_events else None
        assert self._at.destruction is not None
        return RunReport(
            run_id=plan.run_id,
            agent_id=plan.agent_id,
            task_id=plan.task_id,
            backend=self.host.backend.name,
            code=_KILLED if self._at.code is None else self._at.code,
            reason=self._reason(),
            wall_s=time.monotonic() - began,
            destruction=self._at.destruction,
            published=self._at.published,
            allowed=activity.allowed(),
            denied=activity.denied(),
            relays=activity.relays(),
            left_in_mounts=self._left_in_mounts(),
            changed_in_mounts=tuple(
                f"mount {name}: {one}" for name, found in self._at.left.items() for one in found.others
            ),
            live_leases=live,
            connections=self._relay.relayed if self._relay is not None else 0,
            sent_bytes=self._at.init.sent_bytes if self._at.init is not None else None,
            received_bytes=self._at.init.received_bytes if self._at.init is not None else None,
            unknown=activity.problem or missing,
        )

    async def _await_events(self, activity: RunActivity) -> str | None:
        """Wait until all that the gateway recorded of the run is read. Returns why the last of it may be missing."""
        if self._relay is None or not self._relay.relayed or activity.problem is not None:
            return None
        until = time.monotonic() + _EVENTS_WITHIN_S
        if not self._at.published:
            reason = "the end of the run is not on Kafka, so the gateway does not know of it"
        elif not await self._relay.wait_for_removal(_EVENTS_WITHIN_S):
            reason = f"the gateway did not publish all of it within {_EVENTS_WITHIN_S:g} s"
        elif not await self.host.connection.caught_up(max(0.0, until - time.monotonic())):
            reason = f"Kafka's topics were not read to their end within {_EVENTS_WITHIN_S:g} s"
        else:
            return None
        return f"what was blocked last may be missing: {reason}"

    def _read_ca(self) -> str | None:
        """The gateway's CA certificate. Raises RunRefusedError."""
        path = self.host.gateway_ca_file
        try:
            return path.read_text() if path is not None else None
        except (OSError, UnicodeDecodeError):
            raise RunRefusedError(f"the gateway's CA certificate cannot be read at {path}").with_remedy(
                "start the gateway, which writes it, or correct RINGFENCE_GATEWAY_CA_FILE"
            ) from None

    # --- the way to the command ---

    async def _carry_out(self, activity: RunActivity) -> None:
        plan, host = self.plan, self.host
        if self._folder is None:
            self._folder = await asyncio.to_thread(make_run_folder, plan.run_id)
        folder = self._folder
        control = ControlChannel.listen(folder)
        self._relay = relay = GatewayRelay(
            folder / "gateway.sock", host.gateway_sockets / f"{plan.run_id}.sock"
        )
        try:
            await relay.listen()
            relays = self._relays(await host.connection.directory())
            self._at.sandbox = sandbox = await host.backend.start(
                self._spec(control.path, relay.path, relays), self.streams
            )
            await _while_alive(sandbox, control.accept(_INIT_WITHIN_S))
            kid = thumbprint(await control.public_key())
            activity.started(kid)
            await self._publish("started", kid)
            enrolment, _ = await asyncio.gather(
                self._enrol(control, kid), relay.wait_for_gateway(_GATEWAY_WITHIN_S)
            )
            direct = not has_loopback_target(await host.connection.directory(), plan.task_id)
            await control.start(self._start_command(enrolment, relays, loopback_direct=direct))
            self._at.command_runs = True
            await self._wait(sandbox, control, activity)
        except CommandStartError as error:
            self._at.code = error.exit_code
            raise
        except ControlLostError as error:
            if self._at.exit is None:
                raise RingfenceError(
                    f"the first program of the sandbox ended: {error}", code=Code.SANDBOX_FAILED
                ) from None
            raise
        finally:
            control.close()

    def _relays(self, directory: Directory) -> tuple[Relay, ...]:
        """The relays of the task's targets without HTTP. Targets without a relay are logged, and the run continues."""
        addresses, without = raw_addresses(directory, self.plan.task_id)
        usable = list[tuple[str, int]]()
        for address in addresses:
            try:
                relays_of([*usable, address])
                usable.append(address)
            except RelayError as error:
                without.append(str(error))
        for reason in without:
            log.warning("run %s: no relay: %s", self.plan.run_id, reason)
        return relays_of(usable)

    def _spec(self, control: Path, gateway: Path, relays: Sequence[Relay]) -> SandboxSpec:
        plan = self.plan
        init = init_command(self.host.backend.name)
        limits = ResourceLimits(
            memory_bytes=plan.limits.memory_bytes,
            cpus=plan.limits.cpu_millis / 1000,
            pids=plan.limits.pids,
            ttl_s=max(1.0, plan.deadline_s - time.time()),
        )
        return SandboxSpec(
            run_id=plan.run_id,
            argv=init.argv,
            mounts=(*init.mounts, *(mount.for_sandbox() for mount in plan.mounts)),
            socket=gateway,
            control=control,
            hosts=hosts_of(relays),
            low_ports=needs_low_ports(relays),
            addresses=addresses_of(relays),
            limits=limits,
            image=plan.image,
        )

    async def _enrol(self, control: ControlChannel, kid: str) -> str:
        """Let the key that was made inside be enrolled. Returns the enrolment."""
        connection, plan = self.host.connection, self.plan
        domain = connection.settings.trust_domain
        token = enrolment_token(
            connection.key,
            domain,
            plan.agent_id,
            RunRef(run_id=plan.run_id, task_id=plan.task_id),
            kid,
            now_s=int(self._now_s()),
            deadline_s=plan.deadline_s,
        )
        request = await control.enrol(token, trust_domain=domain, agent_id=plan.agent_id)
        return await post_enrolment(connection.settings, request.decode())

    def _start_command(
        self, enrolment: str, relays: Sequence[Relay], *, loopback_direct: bool
    ) -> StartCommand:
        plan, settings = self.plan, self.host.connection.settings
        through_proxy = {} if loopback_direct else {"NO_PROXY": "", "no_proxy": ""}
        return StartCommand(
            argv=plan.argv,
            environment={**through_proxy, **plan.environment},
            working_directory=plan.working_directory,
            enrolment=enrolment,
            trust_root=settings.trust_root,
            trust_domain=settings.trust_domain,
            agent_id=plan.agent_id,
            task_id=plan.task_id,
            relays=tuple(relays),
            ca_pem=self._ca_pem,
        )

    async def _wait(self, sandbox: Sandbox, control: ControlChannel, activity: RunActivity) -> None:
        """Wait for the end of the command, and end the run if its task, its agent or its lease ends before."""
        watching, leasing, reporting = (
            asyncio.create_task(work)
            for work in (self._watch_records(), self._watch_lease(activity), self._read_report(control))
        )
        ending = asyncio.create_task(sandbox.wait())
        try:
            await asyncio.wait({ending, reporting}, return_when=asyncio.FIRST_COMPLETED)
            # A sandbox ends with its init. A command that can write to the memory of bubblewrap's process 1, which has
            # its uid, can keep it from that.
            await asyncio.wait({ending}, timeout=_OUTLIVES_INIT_S)
            if not ending.done():
                self.stop("its init has ended, and its sandbox went on")
            self._at.exit = await ending
        finally:
            # What init said last may still be on its way, after the end of its sandbox.
            await asyncio.wait({reporting}, timeout=1)
            for task in (watching, leasing, reporting, ending):
                task.cancel()
            await asyncio.gather(watching, leasing, reporting, ending, return_exceptions=True)
        self._at.code = self._at.exit.code

    async def _read_report(self, control: ControlChannel) -> None:
        with contextlib.suppress(ControlLostError):
            self._at.init = await control.ended()

    async def _watch_lease(self, activity: RunActivity) -> None:
        if self.ends_with_lease_at is not None:
            lease_id = await activity.lease_over(self.ends_with_lease_at)
            self.stop(f"its lease {lease_id} at {self.ends_with_lease_at} has ended")

    async def _watch_records(self) -> None:
        directory = await self.host.connection.directory()
        while True:
            try:
                task, agent = directory.task(self.plan.task_id), directory.agent(self.plan.agent_id)
            except ChainError as error:
                self.stop(f"a record does not verify: {error.code}")
                return
            if task is None or task.state.status != "active":
                self.stop("its task has ended")
            if agent is None or agent.state.status != "active":
                self.stop(f"its agent is {agent.state.status if agent is not None else 'unknown'}")
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _until_stopped(self, work: Any) -> None:
        """Do the work, but leave it where the run is stopped."""
        working, stopped = asyncio.create_task(work), asyncio.create_task(self._stopped.wait())
        try:
            await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                await working
        finally:
            for one in (working, stopped):
                one.cancel()
            await asyncio.gather(working, stopped, return_exceptions=True)

    # --- the end ---

    async def _end(self) -> None:
        """Destroy everything, and publish the end."""
        self._at.destruction = await self._destroyed()
        if self._relay is not None:
            await self._relay.close()
        self._at.left = {mount.name: _UNSURVEYED for mount in self.plan.mounts if mount.writable}
        surveys = asyncio.create_task(self._survey_mounts())
        _, late = await asyncio.wait({surveys}, timeout=_SURVEYS_WITHIN_S)
        with contextlib.suppress(UnavailableError):
            await self._publish("ended", self._at.kid, within_s=_PUBLISH_WITHIN_S)
            self._at.published = True
        # Not before: the end of a run that is not on Kafka is reported by the next one that finds its folder. The
        # runner of an ordered run does that itself.
        if self._folder is not None and (self._at.published or self.plan.order_id is not None):
            await asyncio.to_thread(remove_run_folder, self._folder)
        await surveys
        for left in self._left_in_mounts() if late else ():
            log.warning("run %s: %s", self.plan.run_id, left)

    async def _survey_mounts(self) -> None:
        for mount in self.plan.mounts:
            if mount.writable:
                self._at.left[mount.name] = await asyncio.to_thread(
                    changes_of, mount.for_sandbox(), self._before[mount.name]
                )

    async def _destroyed(self) -> Destruction:
        """Destroy the sandbox. What cannot be looked at counts as left: the end is published whatever happens here."""
        if self._at.sandbox is None:
            return Destruction(self.plan.run_id)
        try:
            return await self._at.sandbox.destroy()
        except (OSError, RingfenceError) as error:
            log.exception("run %s could not be destroyed", self.plan.run_id)
            return Destruction(
                self.plan.run_id, processes=(f"unknown: {type(error).__name__}: {error}"[:300],)
            )

    def _reason(self) -> str | None:
        if self._at.stop_reason is not None:
            return self._at.stop_reason
        if self._at.failure is not None:
            return f"{self._at.failure.code}: {self._at.failure.message}"[:1000]
        if self._at.exit is None or self._at.exit.reason is ExitReason.COMMAND:
            return None
        return {ExitReason.TTL: "its time was over", ExitReason.KILLED: "its sandbox was killed"}[
            self._at.exit.reason
        ]

    def _exit(self) -> RunExit:
        code, reason = self._at.code, self._reason()
        if code is None:
            return RunExit(reason=reason or "it was not started")
        if _SIGNALLED < code <= _SIGNALLED + 64:
            return RunExit(signal=code - _SIGNALLED, reason=reason)
        return RunExit(code=code, reason=reason)

    def _left_in_mounts(self) -> tuple[str, ...]:
        return tuple(
            f"mount {name}: {one}" for name, found in self._at.left.items() for one in found.dangerous
        )

    def _remained(self) -> tuple[str, ...]:
        gone = self._at.destruction
        assert gone is not None
        found = [*gone.remained, *self._left_in_mounts()]
        return tuple(found if len(found) <= _REMAINED else [*found[: _REMAINED - 1], "and more"])

    # --- Kafka ---

    async def _publish(
        self, status: RunStatus, kid: str | None = None, *, within_s: float | None = None
    ) -> None:
        """Publish what becomes of the run. Returns once Kafka has acknowledged it. Raises UnavailableError.

        `within_s`: try again for so long.
        """
        connection, plan = self.host.connection, self.plan
        record = Run(
            iss=connection.key.id,
            aud=connection.settings.trust_domain,
            iat=int(self._now_s()),
            jti=str(uuid.uuid4()),
            run_id=plan.run_id,
            order_id=plan.order_id,
            nonce=plan.nonce,
            ordered_by=plan.ordered_by,
            agent_id=plan.agent_id,
            task_id=plan.task_id,
            status=status,
            key_thumbprint=kid,
            deadline=plan.deadline_s,
            backend=self.host.backend.name,
            limits=plan.limits,
            policy_digest=plan.rules_digest(self.host.backend.name),
            image_digest=plan.image_digest,
            mounts=tuple(mount.for_record() for mount in plan.mounts),
            exit=self._exit() if status == "ended" else None,
            remained=self._remained() if status == "ended" else (),
            at_ms=connection.clock.now_ms(),
        )
        delays, until = backoff(0.2, 3.0), time.monotonic() + (within_s or 0)
        while True:
            try:
                async with asyncio.timeout(_PUBLISH_WITHIN_S):
                    await connection.publish(RUN, plan.run_id, record)
                break
            except TimeoutError:
                # Not again: the producer itself tries for as long as it lives, and would then write both.
                raise UnavailableError(
                    f"Kafka at {connection.settings.kafka} did not take the run as {status} within "
                    f"{_PUBLISH_WITHIN_S:g} s; is the broker up?"
                ) from None
            except UnavailableError as error:
                if time.monotonic() >= until:
                    log.error("run %s is not published as %s: %s", plan.run_id, status, error)
                    raise
                await asyncio.sleep(next(delays))
        self._at.status, self._at.kid = status, kid

    def _now_s(self) -> float:
        return self.host.connection.clock.now_ms() / 1000


async def _while_alive(sandbox: Sandbox, work: Coroutine[Any, Any, None]) -> None:
    """Do the work. Raises RingfenceError if the sandbox ends before it is done: nobody would come."""
    working, ended = asyncio.create_task(work), asyncio.create_task(sandbox.wait())
    try:
        await asyncio.wait({working, ended}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise RingfenceError(
                f"the first program of the sandbox ended with {ended.result().code}", code=Code.SANDBOX_FAILED
            ).with_remedy("see what this machine lacks: ringfence doctor")
        await working
    finally:
        for task in (working, ended):
            task.cancel()
        await asyncio.gather(working, ended, return_exceptions=True)
