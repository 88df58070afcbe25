"""Names options instead of the fields of messages: people do not know the fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.codes import Code

_OPTIONS: Final[Mapping[str, str]] = {
    "comment": "--comment",
    "count": "--count",
    "delivery": "--delivery",
    "description": "--description",
    "max_ttl_s": "--max-ttl",
    "name": "--name",
    "not_after": "--for or --until",
    "note": "--note",
    "on_behalf_of": "--on-behalf-of",
    "purpose": "--purpose",
    "reason": "--reason",
    "scope": "--allow",
    "sponsor": "--sponsor",
    "ttl_s": "--ttl",
    "verbs": "--verb",
}
"""The option that fills a field, where it has another name than a person would guess."""
_FIELD = re.compile(r"(?<=[:;] )(?:terms\.)?([a-z_]+)(?:\.\d+)*(?:\.[a-z_]+)*(?=: )")


def with_options(error: RingfenceError) -> str:
    """Return the message of an error. Where it is about the arguments of a call, fields are named by their options."""
    if error.code != Code.CALL_INVALID:
        return error.message
    return _FIELD.sub(lambda found: _OPTIONS.get(found[1], found[0]), error.message)
