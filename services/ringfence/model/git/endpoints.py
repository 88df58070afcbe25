"""Which repository and service of a Git server a request is for (gitprotocol-http)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

GitService = Literal["git-upload-pack", "git-receive-pack"]
SERVICES: Final[tuple[GitService, ...]] = get_args(GitService)
_SUFFIX: Final = ".git"
_REF: Final = "ref"
"""Separates repository and ref in resources, so that no repository's path may have such a segment."""
_VERSION: Final = re.compile(r"version=([012])")


@dataclass(frozen=True, slots=True)
class GitEndpoint:
    """One of the four requests of smart HTTP."""

    service: GitService
    advertises: bool
    """Whether it asks for the service's refs and capabilities (`info/refs`). Otherwise it uses the service."""
    repository: tuple[str, ...]
    """The segments of the repository's path, without `.git` at the end."""


def git_endpoint(method: str, segments: Sequence[str], query: str) -> GitEndpoint | None:
    """Return the endpoint that a request is for, or None if it is for none. Dumb HTTP has none.

    Args:
        method: as it was sent.
        segments: of the path, decoded.
        query: as it was sent. `info/refs` names its service there, exactly once and with nothing besides.
    """
    for service in SERVICES:
        if method == "POST" and segments[-1:] == (service,) and not query:
            return _endpoint(service, segments[:-1], advertises=False)
        if method == "GET" and tuple(segments[-2:]) == ("info", "refs") and query == f"service={service}":
            return _endpoint(service, segments[:-2], advertises=True)
    return None


def is_near_endpoint(segments: Sequence[str]) -> bool:
    """Whether the path is that of an endpoint, whatever method and query. Other rules than Git's never map it."""
    last = segments[-1].lower() if segments else ""
    return last in SERVICES or [one.lower() for one in segments[-2:]] == ["info", "refs"]


def protocol_version(values: Sequence[str]) -> int | None:
    """Return the version that `Git-Protocol` asks for, or None if it is not exactly one known version.

    `values`: the header's value, each time that it comes.
    """
    match = _VERSION.fullmatch(values[0]) if len(values) == 1 else None
    return int(match[1]) if match is not None else None


def _endpoint(service: GitService, path: Sequence[str], *, advertises: bool) -> GitEndpoint | None:
    if not path:
        return None
    repository = (*path[:-1], path[-1].removesuffix(_SUFFIX))
    if _REF in repository or not repository[-1] or repository[-1].endswith(_SUFFIX):
        return None
    return GitEndpoint(service, advertises, repository)
