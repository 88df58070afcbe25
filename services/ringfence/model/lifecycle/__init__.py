"""What a command does to a user, an agent, a target or a task, and who may give it. Pure.

The registry applies these rules when a command comes in; every reader applies the same rules again to the commands
that a record embeds. So a registry that lies is found out.
"""

from __future__ import annotations

from ringfence.model.lifecycle.apply import MAY_WIDEN, apply, command_subject, subject_key
from ringfence.model.lifecycle.context import Actor, CommandRefusedError, Context
from ringfence.model.lifecycle.evidence import may_be_dropped, still_needed
from ringfence.model.lifecycle.tasks import MAX_DEPTH, agents_of

__all__ = [
    "MAX_DEPTH",
    "MAY_WIDEN",
    "Actor",
    "CommandRefusedError",
    "Context",
    "agents_of",
    "apply",
    "command_subject",
    "may_be_dropped",
    "still_needed",
    "subject_key",
]
