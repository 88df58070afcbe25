"""The pool of a runner: images, mounts and limits that orders may request; and the supervision of a local run.

An order names a pool, an image by its digest and mounts by their names. Paths of hosts and values of the environment
are in the pool's file alone. A local run is supervised by heartbeats that name it, the guard of their silence, and
stops (`guarded`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import tomllib
from collections.abc import AsyncIterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ringfence.client.connection import Connection
from ringfence.kernel.base.errors import SettingsError
from ringfence.kernel.base.ids import digest
from ringfence.kernel.base.text import visible
from ringfence.kernel.base.validation_problems import explain
from ringfence.messages.base import Name
from ringfence.messages.codes import Code
from ringfence.messages.operations import Heartbeat
from ringfence.messages.run import ImageDigest, Labels, RunOrder
from ringfence.messages.topics import HEARTBEAT, RUN_ORDER
from ringfence.model.verdict import ALLOWED, Refused, Verdict, refused
from ringfence.runner.active_runs import StopTable
from ringfence.runner.heartbeats import Heartbeats, SilenceGuard
from ringfence.runner.lifecycle.execution import RunExecution
from ringfence.runner.lifecycle.plan import PlannedMount, RunPlan, RunRefusedError, check_owners
from ringfence.runner.sandbox.backend import SandboxSpec, SandboxSpecError


class _OneRun:
    """The one run of this process (`Freezable`)."""

    def __init__(self, execution: RunExecution) -> None:
        self._execution = execution

    async def freeze(self) -> None:
        await self._execution.freeze()

    async def thaw(self) -> None:
        await self._execution.thaw()

    async def destroy(self, reason: str) -> None:
        self._execution.stop(reason)


@contextlib.asynccontextmanager
async def guarded(connection: Connection, plan: RunPlan, execution: RunExecution) -> AsyncIterator[None]:
    """Send heartbeats for a run, freeze and destroy it while Kafka acknowledges none, and end it when it is stopped.

    `connection`: connected with the runner's key. Entered once a heartbeat was acknowledged: revokers count the silence
    of every run. Raises UnavailableError if the topic `run.order` cannot be read.
    """
    key = connection.key

    async def send(heartbeat: Heartbeat) -> None:
        await connection.publish(HEARTBEAT, key.id, heartbeat)

    heartbeats = Heartbeats(
        send, key.id, connection.settings.trust_domain, connection.clock, lambda: (plan.run_id,)
    )
    guard = SilenceGuard(heartbeats, _OneRun(execution), grace_s=connection.settings.run_grace_s)
    stops = StopTable(await connection.directory())

    def stop(run_id: str) -> None:
        reason = stops.reason(
            run_id, agent_id=plan.agent_id, task_id=plan.task_id, ordered_by=plan.ordered_by
        )
        if run_id == plan.run_id and reason is not None:
            execution.stop(reason)

    stops.on_stop(stop)
    # Nobody can know of the run, and stop it, before it is claimed.
    await connection.follow([RUN_ORDER], stops.on_records, since_ms=None, key=plan.run_id)
    tasks = [asyncio.create_task(job) for job in (heartbeats.run(), guard.run())]
    try:
        await heartbeats.acknowledged()
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


EVERY: Final = "*"
"""In `agents`: every agent that lets this runner start runs of it."""
_SETTING: Final = "RINGFENCE_RUNNER_POOL_FILE"
_AGENT: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_VARIABLE: Final = r"^[A-Za-z_][A-Za-z0-9_]*$"
WORKSPACE: Final = "/workspace"
"""The folder inside that mounts stand in, each under its name."""
_OF_THE_RUN: Final = ("RINGFENCE_",)
"""Variables that the run sets itself begin so."""


def _agent(name: str) -> str:
    if name != EVERY and not _AGENT.fullmatch(name):
        raise ValueError("must be the name of an agent, or '*' for every agent")
    return name


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PoolMount(_Strict):
    """A folder of the host that orders may mount by its name. Inside, it is at `/workspace/NAME`."""

    path: Path
    read_write: bool = False
    """Whether an order may write to it."""
    as_root: bool = False
    """Whether it may do so although root owns the folder, for a runner of root. What it writes then belongs to root."""
    hide: tuple[str, ...] = ()
    """Relative paths below it at which runs see an empty file or folder."""


class PoolLimits(_Strict):
    """The most that one order may ask for."""

    memory_bytes: Annotated[int, Field(ge=4 << 20, lt=2**53)] = 2 << 30
    cpu_millis: Annotated[int, Field(ge=10, le=1_024_000)] = 1000
    """In thousandths of one processor."""
    pids: Annotated[int, Field(ge=4, le=4_194_304)] = 256
    ttl_s: Annotated[int, Field(ge=1, le=86_400)] = 1800


class Pool(_Strict):
    """A pool. All its runners have the same file."""

    name: Name
    labels: Labels = Field(default_factory=dict)
    """What an order may demand of the pool that runs it, for example a zone or a kind of hardware."""
    concurrency: Annotated[int, Field(ge=1, le=500)] = 4
    """How many runs go on at once in this process."""
    queue_length: Annotated[int, Field(ge=0, le=10_000)] = 100
    """How many orders wait, at most. A further one is refused."""
    backend: Literal["bubblewrap", "oci"] = "bubblewrap"
    images: tuple[ImageDigest, ...] = ()
    """The container images that orders may name, for `oci`."""
    default_image: ImageDigest | None = None
    """The image of orders that name none."""
    agents: Annotated[tuple[Annotated[str, AfterValidator(_agent)], ...], Field(min_length=1)]
    """The agents whose runs it takes; `["*"]`: all that let this runner start runs of them."""
    commands: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """The programs that orders may run, as the first word of their command; None: any."""
    mounts: dict[Name, PoolMount] = Field(default_factory=dict)
    limits: PoolLimits = PoolLimits()
    environment: dict[Annotated[str, Field(pattern=_VARIABLE)], str] = Field(default_factory=dict)
    """Variables of every run. No secrets: every command of the pool reads them."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Pool:
        if self.backend == "bubblewrap" and (self.images or self.default_image):
            raise ValueError("images are for the backend oci: remove them, or write backend = 'oci'")
        if self.backend == "oci" and not self.images:
            raise ValueError("the backend oci needs images: list the digests that orders may name")
        if self.default_image is not None and self.default_image not in self.images:
            raise ValueError("default_image is none of images: add it there")
        if self.backend == "oci" and (writable := [n for n, one in self.mounts.items() if one.read_write]):
            raise ValueError(
                f"the backend oci has no writable mounts: remove read_write of {', '.join(sorted(writable))}"
            )
        if taken := [name for name in self.environment if name.startswith(_OF_THE_RUN)]:
            raise ValueError(f"the run itself sets {', '.join(sorted(taken))}: remove it from environment")
        try:
            SandboxSpec(
                "pool",
                ("true",),
                environment=self.environment,
                mounts=tuple(one.for_sandbox() for one in pool_mounts(self)),
            )
        except SandboxSpecError as error:
            raise ValueError(str(error)) from None
        return self

    @cached_property
    def digest(self) -> str:
        """The digest of the file's content, from which the `policy_digest` of the pool's runs is made."""
        return digest(json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")))

    def check_order(self, order: RunOrder) -> Verdict:
        """Check that this pool runs what a verified order asks for.

        1. The order is for this pool.
        2. The pool runs something for the agent.
        3. It runs the command.
        4. It has the image, or has no images and the order names none.
        5. It has every label that the order demands.
        6. It has every mount, writable where that is asked for.
        7. No limit is above its own.
        """
        image = order.image or self.default_image
        if order.pool != self.name:
            return refused(
                Code.ORDER_OTHER_POOL, f"the order is for pool {order.pool}, and this is {self.name}"
            )
        if EVERY not in self.agents and order.agent_id not in self.agents:
            return refused(
                Code.AGENT_NOT_IN_POOL, f"pool {self.name} runs nothing for agent {order.agent_id}"
            )
        if self.commands is not None and order.command[0] not in self.commands:
            what = visible(order.command[0])[:200]
            return refused(Code.COMMAND_NOT_IN_POOL, f"pool {self.name} does not run {what!r}")
        if self.backend == "bubblewrap" and order.image is not None:
            return refused(
                Code.IMAGE_NOT_IN_POOL,
                f"pool {self.name} has no images: leave the image out, or use another pool",
            )
        if self.backend == "oci" and image not in self.images:
            message = (
                f"pool {self.name} does not run the image {image}" if image else "the order names no image"
            )
            return refused(Code.IMAGE_NOT_IN_POOL, message)
        for check in (self._check_labels, self._check_mounts, self._check_limits):
            if isinstance(verdict := check(order), Refused):
                return verdict
        return ALLOWED

    def _check_labels(self, order: RunOrder) -> Verdict:
        for name, value in (order.labels or {}).items():
            if self.labels.get(name) != value:
                own = self.labels.get(name)
                has = f"has {visible(own)!r} there" if own is not None else "has no such label"
                message = f"the order demands {name}={visible(value)[:256]}, and pool {self.name} {has}"
                return refused(Code.LABEL_NOT_IN_POOL, message)
        return ALLOWED

    def _check_mounts(self, order: RunOrder) -> Verdict:
        names = [mount.name for mount in order.mounts]
        if len(set(names)) < len(names):
            return refused(Code.MOUNT_REPEATED, "the order names a mount twice")
        for mount in order.mounts:
            known = self.mounts.get(mount.name)
            if known is None:
                return refused(Code.MOUNT_NOT_IN_POOL, f"pool {self.name} has no mount {mount.name}")
            if mount.read_write and not known.read_write:
                return refused(Code.MOUNT_READ_ONLY, f"mount {mount.name} of pool {self.name} is read-only")
        return ALLOWED

    def _check_limits(self, order: RunOrder) -> Verdict:
        asked = {**order.limits.model_dump(), "ttl_s": order.ttl_s}
        for name, most in self.limits.model_dump().items():
            if asked[name] > most:
                message = f"{name} is {asked[name]}, and pool {self.name} allows {most} at most"
                return refused(Code.LIMIT_ABOVE_POOL, message)
        return ALLOWED

    def plan(self, order: RunOrder, *, order_id: str, run_id: str, deadline_s: int) -> RunPlan:
        """Build the plan for an order without a problem. `deadline_s`: the run's latest end, in seconds since 1970."""
        image = order.image or self.default_image
        writable = {mount.name: mount.read_write for mount in order.mounts}
        return RunPlan(
            run_id=run_id,
            agent_id=order.agent_id,
            task_id=order.task_id,
            argv=order.command,
            deadline_s=deadline_s,
            limits=order.limits,
            order_id=order_id,
            ordered_by=order.iss,
            environment=self.environment,
            mounts=tuple(
                _planned(name, self.mounts[name], read_write) for name, read_write in writable.items()
            ),
            image=image,
            image_digest=image,
            policy_digest=self.digest,
        )


def pool_mounts(pool: Pool) -> tuple[PlannedMount, ...]:
    """All mounts that orders may request, as they would be mounted."""
    return tuple(_planned(name, one, one.read_write) for name, one in pool.mounts.items())


def _planned(name: str, mount: PoolMount, read_write: bool) -> PlannedMount:
    return PlannedMount(
        name, mount.path, f"{WORKSPACE}/{name}", read_write, as_root=mount.as_root, hidden=mount.hide
    )


def read_pool(file: Path) -> Pool:
    """Read a pool from a file: TOML, or JSON if its name ends in `.json`. Raises SettingsError."""
    try:
        # As JSON: it has lists for tuples and texts for paths, and everything else is strict.
        pool = Pool.model_validate_json(json.dumps(_parsed(file)))
    except OSError as error:
        raise SettingsError(f"{_SETTING}: cannot read {file}: {error.strerror}") from None
    except ValidationError as error:
        raise SettingsError(f"{_SETTING}: {file}: {explain(error)}") from None
    for name, mount in pool.mounts.items():
        if not mount.path.is_dir():
            raise SettingsError(
                f"{_SETTING}: {file}: mount {name}: there is no folder {mount.path}; make it, or correct the path"
            )
    try:
        check_owners(pool_mounts(pool))
    except RunRefusedError as error:
        raise SettingsError(f"{_SETTING}: {file}: {error.message}; {error.remedy}") from None
    return pool


def _parsed(file: Path) -> Any:
    data = file.read_bytes()
    try:
        text = data.decode()
        return json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:  # of both kinds, and of what is no UTF-8
        kind = "JSON" if file.suffix == ".json" else "TOML"
        raise SettingsError(f"{_SETTING}: {file} is no {kind}: {error}") from None
