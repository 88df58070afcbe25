"""Errors about subjects that are not there, with the id that was probably meant."""

from __future__ import annotations

from ringfence.client.errors import InvalidCallError
from ringfence.kernel.base.text import did_you_mean
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.records.directory import Directory


def unknown_subject(
    directory: Directory, kind: SubjectKind, id: str, remedy: str | None = None
) -> InvalidCallError:
    """Return the error for an id that no subject of this kind has. `remedy` is what to do; None: list them."""
    remedy = remedy or f"see: ringfence {kind} list"
    return InvalidCallError(f"there is no {kind} {id}{similar_id(directory, kind, id)}; {remedy}")


def similar_id(directory: Directory, kind: SubjectKind, id: str) -> str:
    """Return `; did you mean ID?` for the closest id of this kind, or an empty string."""
    return did_you_mean(id, [str(getattr(one.state, f"{kind}_id")) for one in directory.entries(kind)])
