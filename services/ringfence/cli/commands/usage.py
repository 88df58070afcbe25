"""`ringfence usage`: the tokens and requests of language models, by agent, task, model and day."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ringfence.cli.shared.audit_filters import AgentFilter, TaskFilter
from ringfence.cli.shared.id_lookup import whole_id
from ringfence.cli.shared.options import (
    IdentityOption,
    JsonOption,
    SinceOption,
    WideOption,
    identity,
    run,
    span_ms,
    wants_json,
)
from ringfence.cli.shared.output import print_json, print_table, say
from ringfence.cli.shared.progress import counting
from ringfence.cli.shared.tables import Column, ids
from ringfence.client.reports.read_api import ReadApi

if TYPE_CHECKING:
    from ringfence.client.reports.model_usage_report import ModelUsageReport


def usage(
    since: SinceOption = "30d",
    agent: AgentFilter = None,
    task: TaskFilter = None,
    wide: WideOption = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what agents used of language models, by agent, task, model and day (UTC).

    Tokens are those that count for limits. Where an answer does not say what it used, or says too little, they are an
    estimate or what was reserved. Operators and auditors see all, sponsors their agents, others what was on their
    behalf.
    """
    from ringfence.client.reports.model_usage_report import model_usage_report

    since_ms, _ = span_ms(since, None, int(time.time() * 1000))

    async def work() -> ModelUsageReport:
        whole = None if task is None else await whole_id("task", task, identity(me))
        async with ReadApi(identity(me)) as api:
            with counting("counting tokens", as_json=as_json) as progress:
                return await model_usage_report(api, since_ms, progress, agent=agent, task=whole)

    report = run(work())
    if wants_json(as_json):
        print_json(report.as_json())
        return
    rows = [
        (
            row.day, row.agent or "unknown", row.task or "", row.model or "", row.target or "",
            str(sums["requests"]), str(sums["tokens"]), str(sums["not_stated"]),
        )
        for row, sums in report.listed()
    ]  # fmt: skip
    columns: list[str | Column] = [
        "day",
        "agent",
        ids("task"),
        "model",
        "target",
        "requests",
        "tokens",
        "not stated",
    ]
    print_table(columns, rows, empty="no request to a model in this period", wide=wide)
    if rows:
        sums = report.sums()
        say(f"{sums['tokens']} tokens in {sums['requests']} requests")
