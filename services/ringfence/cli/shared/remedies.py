"""What to do next after an error that does not say it by itself, by the error's code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ringfence.messages.codes import Code

REMEDIES: Final[Mapping[str, str]] = {
    Code.AGENT_UNKNOWN: "ringfence agent list",
    Code.BEYOND_SCOPE: "ask for less, or have the side widened that the reasons name: task, ceiling or entitlements",
    Code.IDENTITY_WRONG: "name the right key file with --identity FILE; make one with: ringfence key new",
    Code.KAFKA_FAILED: "ringfence doctor",
    Code.KEY_FILE_INVALID: "name another key file with --identity FILE; make one with: ringfence key new",
    Code.KEY_LINE_ENDED: "have the agent's sponsor run: ringfence agent rotate-key",
    Code.KEY_REUSED: "find who has a copy of the key file; its sponsor runs: ringfence agent rotate-key",
    Code.LEASE_UNKNOWN: "ringfence lease list",
    Code.NOT_AUDITOR: "name the key file of an auditor with --identity FILE",
    Code.REPORT_UNKNOWN: "list the reports of a user's keys with: ringfence user keys USER",
    Code.RESTS_ON_COMPROMISED: "set anew what is held, or have the report lifted: ringfence user confirm-compromise",
    Code.NOT_OPERATOR: "name the key file of an operator with --identity FILE",
    Code.NOT_SPONSOR: "name the key file of the agent's sponsor with --identity FILE",
    Code.SEVERAL_TARGETS: "ask for each target with its own request",
    Code.TARGET_UNKNOWN: "ringfence target list",
    Code.TASK_UNKNOWN: "ringfence task list",
    Code.TIMEOUT: "wait longer with --timeout DURATION; its sponsor sees it by: ringfence approvals list",
    Code.TTL_TOO_LONG: "ask for a shorter life with --ttl DURATION",
    Code.UNAVAILABLE: "ringfence doctor",
    Code.UNKNOWN_AGENT: "ringfence agent list",
    Code.UNKNOWN_TARGET: "ringfence target list",
    Code.UNKNOWN_TASK: "ringfence task list",
    Code.UNKNOWN_USER: "ringfence user list",
    Code.USER_UNKNOWN: "ringfence user list",
    Code.VERB_UNKNOWN: "ringfence target list",
}
"""Only where the same is right for each error of this code."""
