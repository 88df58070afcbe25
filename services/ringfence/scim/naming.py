"""From the name that a directory gives a user to the id that Ringfence knows them by. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

_IN_AN_ID = re.compile(r"[a-z0-9]")
_NOT_IN_AN_ID = re.compile(r"[^a-z0-9._-]+")
_LONGEST = 58
"""Of 63: there is room for a number behind it."""


def ids_for(user_name: str, mail_domain: str | None) -> Iterator[str]:
    """Ids for a user name, the best first: `maria@example.com` is `maria-at-example.com`, or `maria` in its own domain.

    Empty where nothing of the name can be in an id.
    """
    text = user_name.strip().lower()
    if not _IN_AN_ID.search(text):
        return
    if mail_domain:
        text = text.removesuffix(f"@{mail_domain}")
    id = _NOT_IN_AN_ID.sub("-", text.replace("@", "-at-")).strip("._-")[:_LONGEST]
    if id:
        yield id
        yield from (f"{id}-{number}" for number in range(2, 1000))


def free_id(user_name: str, mail_domain: str | None, is_gone: Callable[[str], bool]) -> str | None:
    """The first id that nobody had who left for good: who comes later under the same name is somebody else."""
    return next((id for id in ids_for(user_name, mail_domain) if not is_gone(id)), None)
