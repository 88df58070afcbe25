"""Grants at a desk where the test plays policy."""

from __future__ import annotations

from typing import Any

from ringfence.kernel.crypto.jws import parse, sign
from ringfence.messages.approval import Grant
from tests.support.benches.issuer_bench import Asked, IssuerBench
from tests.support.world import Party


def grant(desk: IssuerBench, by: Party | None = None, **fields: Any) -> str:
    """A grant that covers what the tests here ask for, but for `fields`."""
    given = {
        "agent_id": desk.bot.name,
        "task_id": desk.task,
        "scope": desk.scope("read", "deploy", resource="env/staging/*"),
        "count": 2,
        "ttl_s": 600,
        "delivery": "agent",
        "revisions": desk.revisions,
    }
    by = by or desk.sam
    return sign(desk.world.claims(Grant, by, **{**given, **fields}), by.key)


async def granted(desk: IssuerBench, *grants: str, verb: str = "deploy", **fields: Any) -> Asked:
    """A request, and a decision that allows it by grants."""
    asked = await desk.ask(verb)
    await desk.decide(asked, **{"grants": grants, "required": ("sponsor",), **fields})
    return asked


def claims_of(compact: str) -> Grant:
    return parse(compact).unverified_claims(Grant)
