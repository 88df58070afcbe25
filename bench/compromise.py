"""The blast radius of a compromised key among very many records: how long it takes to find it, and to hold it.

All in one process, without Kafka: what `ringfence user end-key --compromised` computes before it asks, and what the
registry decides, signs and takes in for each of its commands. Everything is signed as in life.
"""

from __future__ import annotations

import time

from ringfence.cli.commands.user_keys import _lists
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.registry import AgentState
from ringfence.model.records.key_compromise import KeyCompromise, Resting
from tests.support.in_memory_registry import TD, InMemoryRegistry, permission
from tests.support.user_keys import end_key

RECORDS = 100_000
_RESTING = 320
"""Agents that the thief of the key registered."""
_CEILING = (permission("env/staging/*"),)


class Installation(InMemoryRegistry):
    """Two operators, and agents of a sponsor. The sponsor registered most of them, and a stolen key the last ones."""

    def __init__(self, agents: int) -> None:
        super().__init__()
        self.organisation()
        self.give(self.user_set("root", "otto", ["operator"]))
        for number in range(agents - _RESTING):
            self._register("sam", f"agent-{number}")
        self.clock.ms += 1000
        self.since_ms = self.clock.ms
        for number in range(agents - _RESTING, agents):
            self._register("olga", f"agent-{number}")
        self.clock.ms += 1000

    def _register(self, by: str, agent_id: str) -> None:
        key = self.key_record(SigningKey.generate(f"spiffe://{TD}/agent/{agent_id}"))
        command = self.register(by, agent_id, "sam", keys=(key,), ceiling=_CEILING)
        state = AgentState(
            agent_id=agent_id, sponsor="sam", description=command.description, keys=command.keys,
            ceiling=command.ceiling, status="active",
        )  # fmt: skip
        problem = self.admit(self.sign_record(state, [self.embed(command)]))
        assert problem is None, problem


def run(_: str, agents: int = RECORDS) -> None:
    """Print seconds, with a cold and with a warm directory, and for all commands that hold what was found."""
    installation = Installation(max(agents, _RESTING))
    directory, kid = installation.directory, installation.key("olga").kid

    def resting() -> list[Resting]:
        began = time.perf_counter()
        found = KeyCompromise(directory, "olga", kid, installation.since_ms).resting(
            installation.clock.ms / 1000
        )
        print(f"{len(found)} rest on the key, found in {_since(began)}")
        return found

    print(f"  {agents:,} records, none verified yet: ", end="")
    resting()
    print("  again, the records that rest on it are verified: ", end="")
    found = resting()
    lists, began = _lists(found), time.perf_counter()
    for part in lists:
        holds = tuple(one.held for one in part)
        installation.give(
            end_key(
                installation,
                "otto",
                "olga",
                kid,
                compromised=True,
                since_ms=installation.since_ms,
                holds=holds,
            )
        )
    took = _since(began)
    held = sum(1 for one in found if (entry := directory.agent(one.held.id)) and entry.state.holds)
    print(f"  {held} held by {len(lists)} commands, decided and signed in {took}")


def _since(began: float) -> str:
    return f"{time.perf_counter() - began:.2f} s"
