"""An in-memory Ringfence for the test suites of agents: real rules and a gateway, no Kafka, no Redis, no network.

```python
pytest_plugins = ["ringfence.testing"]  # in conftest.py; or make an InMemoryRingfence yourself

async def test_deploys(in_memory_ringfence):
    in_memory_ringfence.target("staging", verbs=["deploy"])
    agent = in_memory_ringfence.agent("deploy-bot")
    scope = [Permission(target="staging", verbs=["deploy"], resources=["env/**"])]
    await deploy(agent, in_memory_ringfence.task("deploy-bot", scope))  # your code, with a ringfence.Agent
    assert [lease.status for lease in in_memory_ringfence.leases()] == ["released"]
```

Enters: a test's calls: users, targets, agents, tasks, approvals, revocations, time; requests through the gateway.
Leaves: `ringfence.Agent` and other SDK objects on an in-memory bus; leases and recorded actions to assert.
Imports: every package below, services included; it needs the extra `testing`. Not `faststream` beside it.
Read first: `in_memory.py` (`InMemoryRingfence`, for a test), `services.py` (the services, most by their own
`wire`), `gateway.py` (a client of httpx, the gateway, a test's server), `bus.py` (Kafka in memory).
"""

from __future__ import annotations

_EXTRA = "ringfence.testing needs the packages of the extra 'testing': pip install 'ringfence[testing]'"

try:
    from ringfence.testing.in_memory import InMemoryRingfence, NothingPendingError, People
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] == "ringfence":
        raise
    raise ModuleNotFoundError(f"{_EXTRA} (it lacks {error.name})", name=error.name) from None

try:
    from ringfence.testing.plugin import in_memory_ringfence as in_memory_ringfence
except ModuleNotFoundError as error:
    if error.name != "pytest":  # without pytest there is no fixture, and all else works
        raise

__all__ = ["InMemoryRingfence", "NothingPendingError", "People"]
