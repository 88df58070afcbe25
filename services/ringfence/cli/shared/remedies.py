"""What to do next after an error that does not say it by itself, by the error's code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

REMEDIES: Final[Mapping[str, str]] = {
    "agent_unknown": "ringfence agent list",
    "beyond_scope": "ask for less, or have the side widened that the reasons name: task, ceiling or entitlements",
    "identity_wrong": "name the right key file with --identity FILE; make one with: ringfence key new",
    "kafka_failed": "ringfence doctor",
    "key_file_invalid": "name another key file with --identity FILE; make one with: ringfence key new",
    "lease_unknown": "ringfence lease list",
    "not_auditor": "name the key file of an auditor with --identity FILE",
    "not_operator": "name the key file of an operator with --identity FILE",
    "not_sponsor": "name the key file of the agent's sponsor with --identity FILE",
    "several_targets": "ask for each target with its own request",
    "target_unknown": "ringfence target list",
    "task_unknown": "ringfence task list",
    "timeout": "wait longer with --timeout DURATION; its sponsor sees it by: ringfence approvals list",
    "ttl_too_long": "ask for a shorter life with --ttl DURATION",
    "unavailable": "ringfence doctor",
    "unknown_agent": "ringfence agent list",
    "unknown_target": "ringfence target list",
    "unknown_task": "ringfence task list",
    "unknown_user": "ringfence user list",
    "user_unknown": "ringfence user list",
    "verb_unknown": "ringfence target list",
}
"""Only where the same is right for each error of this code."""
