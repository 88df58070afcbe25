"""Finds the target of a request, with its request map compiled once for each revision."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Final

from ringfence.backends.target_settings import TargetSettingsError, settings_of
from ringfence.gateway.contract import Attempt
from ringfence.gateway.domain import Refusal, refuse
from ringfence.messages.codes import Code
from ringfence.messages.registry import AnyRecord, TargetRecord, TargetState
from ringfence.model.http_targets import RequestMap, RequestMapError
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.target_settings import HttpSettings, JwtSettings

_PORTS: Final = {"http": 80, "https": 443}
_AUTHORITY: Final = re.compile(r"([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::([0-9]{1,5}))?")

Endpoint = tuple[str, str, int]
"""Scheme, host in lower case, and port."""


@dataclass(frozen=True, slots=True)
class CompiledTarget:
    state: TargetState
    record: AnyRecord
    map: RequestMap
    url: str | None
    """Scheme and authority of the target; None if its record has none."""

    def can_be_sent(self, attempt: Attempt) -> bool:
        """Whether the request can be sent: the gateway needs the record's URL, a proxy in front has its own."""
        return self.url is not None or not attempt.sent_by_gateway


@functools.lru_cache(maxsize=4096)
def endpoint_of(scheme: str, authority: str) -> Endpoint | None:
    """The canonical form of an authority; None for an invalid one, or one with user information."""
    match = _AUTHORITY.fullmatch(authority)
    if match is None or scheme not in _PORTS:
        return None
    port = int(match[2]) if match[2] is not None else _PORTS[scheme]
    return (scheme, match[1].lower(), port) if 0 < port < 65536 else None


class Targets:
    """An index of targets by id and by endpoint."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._compiled: dict[str, CompiledTarget] = {}
        self._ids_by_endpoint: dict[Endpoint, set[str]] = {}
        self._endpoints: dict[str, Endpoint] = {}
        directory.on_change(self._on_change)

    def find(self, attempt: Attempt) -> CompiledTarget | Refusal:
        """The one active target that a request is for.

        1. Named by its id, the target can be used (`_by_id`). Otherwise:
        2. A usable target is at the scheme, host and port of the request (`target_unknown`).
        3. It is the only one there (`target_ambiguous`).
        """
        if attempt.target_id is not None:
            return self._by_id(attempt.target_id)
        endpoint = endpoint_of(attempt.scheme, attempt.authority or "")
        ids = self._ids_by_endpoint.get(endpoint, set()) if endpoint is not None else set()
        candidates = [target for id in sorted(ids) if isinstance(target := self._by_id(id), CompiledTarget)]
        candidates = [
            target
            for target in candidates
            if target.url is not None and _endpoint_of_url(target.url) == endpoint
        ]
        if not candidates:
            return refuse(
                Code.TARGET_UNKNOWN, "no target is there: have an operator add it, or ask for another"
            )
        if len(candidates) > 1:
            names = ", ".join(target.state.target_id for target in candidates)
            return refuse(Code.TARGET_AMBIGUOUS, f"several targets are there ({names}): go by /<target>/...")
        return candidates[0]

    def url_of(self, target: TargetState) -> str | None:
        """As the function `url_of`, cached for the last revision. Raises TargetSettingsError."""
        compiled = self._compiled.get(target.target_id)
        return compiled.url if compiled is not None and compiled.state is target else url_of(target)

    def is_target_host(self, authority: str) -> bool:
        """Whether a target may be at this authority, by http or https. Others are denied before any other check."""
        for scheme in _PORTS:
            endpoint = endpoint_of(scheme, authority)
            if endpoint is not None and self._ids_by_endpoint.get(endpoint):
                return True
        return False

    def hosts(self) -> frozenset[str]:
        return frozenset(host for (_, host, _), ids in self._ids_by_endpoint.items() if ids)

    def _by_id(self, target_id: str) -> CompiledTarget | Refusal:
        """The target with this id.

        1. Its record can be trusted (`record_untrusted`), and there is one (`target_unknown`).
        2. It is active (`target_removed`).
        3. Its request map and settings can be used (`target_invalid`).
        """
        try:
            entry = self._directory.target(target_id)
        except ChainError as error:
            return refuse(Code.RECORD_UNTRUSTED, str(error))
        if entry is None:
            return refuse(Code.TARGET_UNKNOWN, f"there is no target {target_id[:64]}")
        if entry.state.status != "active":
            return refuse(Code.TARGET_REMOVED, f"target {target_id} was removed")
        compiled = self._compiled.get(target_id)
        if compiled is not None and compiled.record is entry.record:
            return compiled
        try:
            compiled = CompiledTarget(
                entry.state, entry.record, RequestMap(entry.state.requests), url_of(entry.state)
            )
        except (RequestMapError, TargetSettingsError) as error:
            return refuse(Code.TARGET_INVALID, f"the record of target {target_id} cannot be used: {error}")
        self._compiled[target_id] = compiled
        return compiled

    def _on_change(self, kind: SubjectKind, id: str) -> None:
        """Update the index. It holds unverified records, so its results are verified afterwards."""
        record = self._directory.unverified(kind, id) if kind == "target" else None
        if not isinstance(record, TargetRecord):
            return
        before = self._endpoints.pop(id, None)
        if before is not None:
            self._ids_by_endpoint[before].discard(id)
        try:
            url = url_of(record.state)
        except TargetSettingsError:
            return
        endpoint = _endpoint_of_url(url) if url is not None else None
        if endpoint is not None:
            self._endpoints[id] = endpoint
            self._ids_by_endpoint.setdefault(endpoint, set()).add(id)


def url_of(target: TargetState) -> str | None:
    """Scheme and authority of a target; None if its record has none. Raises TargetSettingsError."""
    if target.backend.kind == "http":
        return settings_of(target, HttpSettings).url
    if target.backend.kind == "jwt":
        return settings_of(target, JwtSettings).url
    return None


def _endpoint_of_url(url: str) -> Endpoint | None:
    scheme, _, authority = url.partition("://")
    return endpoint_of(scheme, authority)
