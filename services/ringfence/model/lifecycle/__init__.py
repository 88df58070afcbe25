"""State machine of users, agents, targets and tasks: what each command changes, and who may give it. Pure.

The registry applies these rules to each new command. Every reader applies the same rules again to the
commands that a record embeds. So a registry that lies is detected.

Enters: a state, a command of `messages.registry`, and a `Context` (signer, time, roles, consent).
Leaves: the next state, or CommandRefusedError with a reason; where each key comes from (`KeyHistory`).
Imports: `scope`, `identity` and lower parts of the model, `kernel` and `messages`.
Read first: `apply.py` (dispatches a command to its rules), `context.py` (what a rule knows, shared checks),
`key_history.py` (when a key is accepted for approvals).
"""

from __future__ import annotations

from ringfence.model.lifecycle.agents import REUSE_AFTER_S
from ringfence.model.lifecycle.apply import apply, by_person, command_subject, may_widen, subject_key
from ringfence.model.lifecycle.context import Actor, CommandRefusedError, Context, KeyUse
from ringfence.model.lifecycle.evidence import may_be_dropped, still_needed
from ringfence.model.lifecycle.holds import (
    check_hold,
    elements_set_by,
    held_keys,
    hold_of,
    hold_text,
    is_apart,
)
from ringfence.model.lifecycle.key_history import (
    NO_HISTORY,
    WAIT_S,
    Giver,
    KeyHistory,
    KeyOrigin,
    KeyProof,
    SignerKey,
    check_endorsement,
)
from ringfence.model.lifecycle.second_person import (
    NO_PROVENANCE,
    Person,
    Provenance,
    Signatures,
    check_author,
    check_second,
    check_widening,
    is_compared,
    may_second,
    needs_second,
    sponsors_of,
)
from ringfence.model.lifecycle.state_comparison import delegates_operator, is_minor, is_minor_for_user, widens
from ringfence.model.lifecycle.tasks import MAX_DEPTH, agents_of

__all__ = [
    "MAX_DEPTH",
    "NO_HISTORY",
    "NO_PROVENANCE",
    "REUSE_AFTER_S",
    "WAIT_S",
    "Actor",
    "CommandRefusedError",
    "Context",
    "Giver",
    "KeyHistory",
    "KeyOrigin",
    "KeyProof",
    "KeyUse",
    "Person",
    "Provenance",
    "Signatures",
    "SignerKey",
    "agents_of",
    "apply",
    "by_person",
    "check_author",
    "check_endorsement",
    "check_hold",
    "check_second",
    "check_widening",
    "command_subject",
    "delegates_operator",
    "elements_set_by",
    "held_keys",
    "hold_of",
    "hold_text",
    "is_apart",
    "is_compared",
    "is_minor",
    "is_minor_for_user",
    "may_be_dropped",
    "may_second",
    "may_widen",
    "needs_second",
    "sponsors_of",
    "still_needed",
    "subject_key",
    "widens",
]
