"""The targets of a task without HTTP: their addresses, by the targets' records, to which the sandbox's relays lead."""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit

from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.target_settings import RELAYED_KINDS

_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


def raw_addresses(directory: Directory, task_id: str) -> tuple[list[tuple[str, int]], list[str]]:
    """Return host and port of each target of a task without HTTP, and the reasons why other targets have no relay.

    Only verified records that name an address for agents (`address`) count.
    """
    found, without = list[tuple[str, int]](), list[str]()
    task = directory.task(task_id)
    for target_id in sorted({permission.target for permission in task.state.scope} if task else ()):
        try:
            target = directory.target(target_id)
        except ChainError as error:
            without.append(f"the record of {target_id} does not verify: {error.code}")
            continue
        if (
            target is None
            or target.state.status != "active"
            or target.state.backend.kind not in RELAYED_KINDS
        ):
            continue
        address = (target.state.backend.model_extra or {}).get("address")
        if not isinstance(address, str):
            without.append(f"target {target_id} has no address for agents in its record")
            continue
        host, _, port = address.rpartition(":")
        found.append((host.strip("[]"), int(port)))
    return found, without


def has_loopback_target(directory: Directory, task_id: str) -> bool:
    """Whether the task has an HTTP target on this machine's loopback interface, as on a developer's machine.

    Loopback inside is the sandbox's own. So requests to it have to go through the proxy as well.
    """
    task = directory.task(task_id)
    for permission in task.state.scope if task else ():
        try:
            target = directory.target(permission.target)
        except ChainError:
            continue
        url = (target.state.backend.model_extra or {}).get("url") if target is not None else None
        if isinstance(url, str) and urlsplit(url).hostname in _LOOPBACK:
            return True
    return False
