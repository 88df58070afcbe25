"""The plan of a run (owner, command, mounts, limits), its checks before the start, and the sandbox backend by name.

The checks find early, as the runner, what policy, issuer and registry would refuse later; each of them still checks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.ids import digest
from ringfence.messages.codes import Code, inactive_agent
from ringfence.messages.run import Mount as NamedMount
from ringfence.messages.run import RunLimits
from ringfence.model.identity.runners import runner_issuer
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.unknown_fields import is_understood
from ringfence.runner.sandbox.backend import HOME, Mount, SandboxBackend
from ringfence.runner.sandbox.bubblewrap import BubblewrapBackend
from ringfence.runner.sandbox.machine import OCI_SOCKETS
from ringfence.runner.sandbox.oci import OciBackend
from ringfence.runner.sandbox.seccomp import policy_text


class RunRefusedError(RingfenceError):
    """Raised if a run may not start as requested. Nothing has been claimed or started."""

    code = Code.RUN_REFUSED


@dataclass(frozen=True)
class PlannedMount:
    """A mounted folder, by the name that the run's record has for it. No record holds a path of the host."""

    name: str
    host: Path
    inside: str
    writable: bool = False
    as_root: bool = False
    """Runs of root may write there although root owns it; what they write then belongs to root."""
    hidden: tuple[str, ...] = ()
    """As in the sandbox's `Mount`."""

    def for_sandbox(self) -> Mount:
        return Mount(self.host, self.inside, self.writable, self.hidden)

    def for_record(self) -> NamedMount:
        return NamedMount(name=self.name, read_write=self.writable)


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run. `RunExecution.execute` needs nothing else from the caller."""

    run_id: str
    agent_id: str
    task_id: str
    argv: tuple[str, ...]
    deadline_s: int
    """The end of the run at the latest, in seconds since 1970."""
    limits: RunLimits
    nonce: str | None = None
    """Of a local run; an ordered run has `order_id` and `ordered_by`."""
    order_id: str | None = None
    ordered_by: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    """Besides what the run itself sets. Never from an order."""
    mounts: tuple[PlannedMount, ...] = ()
    image: str | None = None
    image_digest: str | None = None
    policy_digest: str | None = None
    """Over the rules of the runner's pool. None: over the rules of the sandbox alone."""

    @property
    def working_directory(self) -> str:
        """The first mount, or the home directory."""
        return self.mounts[0].inside if self.mounts else HOME

    def rules_digest(self, backend: str) -> str:
        """Return the digest of what the sandbox allows: backend, limits, mounts, system calls and the pool's rules."""
        rules = {
            "backend": backend,
            "limits": self.limits.model_dump(),
            "mounts": [
                {**mount.for_record().model_dump(), "as_root": mount.as_root, "hidden": mount.hidden}
                for mount in self.mounts
            ],
            "image": self.image_digest,
            "syscalls": digest(policy_text()),
            "pool": self.policy_digest,
        }
        return digest(json.dumps(rules, sort_keys=True, separators=(",", ":")))


def check_owners(mounts: Iterable[PlannedMount]) -> None:
    """Check who would own what a run writes. Raises RunRefusedError where it is root and the plan does not allow it."""
    for mount in mounts:
        owned_by_root = os.geteuid() == 0 and mount.writable and mount.host.stat().st_uid == 0
        if owned_by_root and not mount.as_root:
            raise RunRefusedError(
                f"{mount.host} belongs to root, so root would own what the run writes there"
            ).with_remedy(
                "give the folder to another user (chown), or allow it: --mount DIR:rw-as-root, in a pool as_root = true"
            )


def check_plan(plan: RunPlan, directory: Directory, trust_domain: str, runner: str, now_s: float) -> None:
    """Check early, as the runner, what policy, issuer and registry would refuse later. Each of them still checks it.

    Args:
        directory: verified records, up to date.
        runner: the runner's name in the trust bundle.
        now_s: the present, in seconds.

    Raises RunRefusedError.
    """
    try:
        task, agent = directory.task(plan.task_id), directory.agent(plan.agent_id)
    except ChainError as error:
        raise RunRefusedError(f"the records of the task or its agent do not verify: {error}") from None
    if task is None:
        raise RunRefusedError(f"there is no task {plan.task_id}", code=Code.TASK_UNKNOWN).with_remedy(
            "assign one: ringfence task assign AGENT --allow SCOPE --for 1h --purpose TEXT"
        )
    if task.state.status != "active" or task.state.not_after <= now_s:
        raise RunRefusedError(f"task {plan.task_id} has ended", code=Code.TASK_ENDED).with_remedy(
            "assign the agent a new one"
        )
    if task.state.agent_id != plan.agent_id:
        message = f"task {plan.task_id} was assigned to {task.state.agent_id}"
        raise RunRefusedError(message, code=Code.TASK_OTHER_AGENT)
    if agent is None:
        raise RunRefusedError(f"agent {plan.agent_id} is unknown", code=Code.AGENT_UNKNOWN)
    if (status := agent.state.status) != "active":
        raise RunRefusedError(f"agent {plan.agent_id} is {status}", code=inactive_agent(status))
    issuer = runner_issuer(trust_domain, runner)
    lives = [
        selector.max_life_s
        for selector in agent.state.attestation or ()
        if selector.runner == runner and selector.issuer == issuer and is_understood(selector)
    ]
    if not lives:
        raise RunRefusedError(
            f"agent {plan.agent_id} does not let {runner} start runs of it", code=Code.INSTANCE_UNMATCHED
        ).with_remedy(
            f"its sponsor does: ringfence agent set-attestation {plan.agent_id} --selector runner={runner}"
        )
    # The enrolment of the run's key is not renewed: it has to last until the end.
    if plan.deadline_s - now_s > max(lives) + 1:
        raise RunRefusedError(
            f"agent {plan.agent_id} lets runs by {runner} last {max(lives)} s at most", code=Code.RUN_TOO_LONG
        ).with_remedy(
            f"use a shorter --ttl, or let its sponsor allow more: --selector 'runner={runner} life=2h'"
        )


BACKENDS: Final = ("bubblewrap", "oci")


def make_backend(
    name: str, state: Path, *, oci_socket: Path | None = None, oci_runtime: str | None = None
) -> SandboxBackend:
    """Return the backend with this name. `state`: the folder of the records of started sandboxes.

    Raises RunRefusedError for an unknown name, and for `oci` if no engine's socket is found.
    """
    if name == "bubblewrap":
        return BubblewrapBackend(state)
    if name != "oci":
        raise RunRefusedError(f"there is no backend {name}; there are {' and '.join(BACKENDS)}")
    socket = oci_socket or next((Path(path) for path in OCI_SOCKETS if Path(path).is_socket()), None)
    if socket is None:
        raise RunRefusedError("there is no socket of Podman or Docker here").with_remedy(
            "systemctl enable --now podman.socket; or name it by RINGFENCE_RUNNER_OCI_SOCKET"
        )
    return OciBackend(state, socket=socket, runtime=oci_runtime)
