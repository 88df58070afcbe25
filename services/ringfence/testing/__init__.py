"""An in-memory Ringfence for the test suites of agents: real rules, no Kafka, no Redis, no network.

```python
pytest_plugins = ["ringfence.testing"]                  # in conftest.py; or make an InMemoryRingfence yourself

async def test_deploys(in_memory_ringfence):
    in_memory_ringfence.target("staging", verbs=["deploy"])
    agent = in_memory_ringfence.agent("deploy-bot")
    scope = [Permission(target="staging", verbs=["deploy"], resources=["env/**"])]
    await deploy(agent, in_memory_ringfence.task("deploy-bot", scope))     # the code under test takes a ringfence.Agent
    assert [lease.status for lease in in_memory_ringfence.leases()] == ["released"]
```
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
