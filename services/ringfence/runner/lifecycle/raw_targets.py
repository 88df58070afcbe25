"""The targets of a task that speak no HTTP, and where the sandbox's relays lead: the address in the target's record."""

from __future__ import annotations

from typing import Final

from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory

RAW_KINDS: Final = frozenset({"postgres", "redis", "ssh"})


def raw_addresses(directory: Directory, task_id: str) -> tuple[list[tuple[str, int]], list[str]]:
    """Return host and port of each target of a task that speaks no HTTP, and the reasons why others have no relay.

    Only records count that verify, and that name an address for agents (`address`).
    """
    found, without = list[tuple[str, int]](), list[str]()
    task = directory.task(task_id)
    for target_id in sorted({permission.target for permission in task.state.scope} if task else ()):
        try:
            target = directory.target(target_id)
        except ChainError as error:
            without.append(f"the record of {target_id} does not verify: {error.code}")
            continue
        if target is None or target.state.status != "active" or target.state.backend.kind not in RAW_KINDS:
            continue
        address = (target.state.backend.model_extra or {}).get("address")
        if not isinstance(address, str):
            without.append(f"target {target_id} has no address for agents in its record")
            continue
        host, _, port = address.rpartition(":")
        found.append((host.strip("[]"), int(port)))
    return found, without
