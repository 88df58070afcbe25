"""Entity Management events (OCSF class 3004) of the trust bundle, which lists the keys of the services.

Each record on `trust` is classified once, by offset: it activated a bundle, repeated the one in force, or is outdated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

from ringfence.audit.events import kinds
from ringfence.audit.events.ocsf import Copied, EventContext, OcsfEvent, event, event_time, user_of
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import KeyRecord
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.messages.trust import Origin, TrustBundle

_MAX_NAMED_CHANGES: Final = 20
_REMEMBERED_RECORDS: Final = 10_000


_KEY_FIELDS = Copied(KeyRecord, "kid not_before not_after")
_ORIGIN_FIELDS = Copied(Origin, "origin use not_before not_after")


def bundle_event(record: Received, classified: BundleRecord) -> OcsfEvent:
    """A bundle signed by a trusted root was published."""
    bundle, before = classified.bundle, classified.before
    root = user_of(bundle.iss)
    entity = {
        "name": "trust bundle", "uid": f"spiffe://{bundle.aud}/trust", "type_id": 99, "type": "Trust Bundle",
    }  # fmt: skip
    attributes: dict[str, Any] = {"actor": {"user": root}, "entity": entity}
    fields: dict[str, Any] = {
        "revision": bundle.version,
        "known_revision": before.version if before is not None else None,
        "verified": {"by": bundle.iss, "kid": classified.kid},
    }
    reasons: tuple[Reason, ...] = ()
    match classified.status:
        case "activated":
            data = _data(bundle, classified.kid)
            attributes["entity_result"] = {**entity, "version": str(bundle.version), "data": data}
            message = (
                f"trust bundle {bundle.version} by {root['name']} came into force, until "
                f"{event_time(bundle.exp)}: {_changes(before, bundle)}"
            )
        case "repeated":
            message = (
                f"trust bundle {bundle.version}, which is in force, stands there again; it changes nothing"
            )
        case _:
            assert before is not None
            message = (
                f"trust bundle {bundle.version} was put there after bundle {before.version}; it is refused"
            )
            reasons = (Reason(code=Code.VERSION_FELL, message=message),)
    return event(
        record, kinds.TRUST[classified.status], message, attributes, fields, EventContext("trust", "trust"),
        reasons=reasons,
    )  # fmt: skip


def _data(bundle: TrustBundle, root: str) -> dict[str, Any]:
    services = [
        {
            "id": one.id, "roles": list(one.roles), "keys": _keys(one.keys),
            "encryption_keys": _keys(one.encryption_keys),
        }
        for one in bundle.services
    ]  # fmt: skip
    origins = [_ORIGIN_FIELDS(one) for one in bundle.origins]
    return {
        "root": root,
        "not_after": bundle.exp,
        "services": services,
        "oidc_issuers": [{"issuer": one.issuer, "uses": list(one.uses)} for one in bundle.oidc_issuers],
        "former_roots": _keys(bundle.former_roots),
        **({"rp_id": bundle.rp_id, "origins": origins} if origins else {}),
    }


def _keys(keys: tuple[KeyRecord, ...]) -> list[dict[str, Any]]:
    return [_KEY_FIELDS(key) for key in keys]


def _changes(before: TrustBundle | None, now: TrustBundle) -> str:
    """The differences between two bundles as text: services, issuers and origins that are new, gone or changed."""
    fields_before, fields_now = _bundle_fields(before), _bundle_fields(now)
    changes = [f"{name} is new" for name in fields_now if name not in fields_before]
    changes += [f"{name} is gone" for name in fields_before if name not in fields_now]
    changes += [
        f"{name} is changed"
        for name in fields_now
        if name in fields_before and fields_before[name] != fields_now[name]
    ]
    if len(changes) > _MAX_NAMED_CHANGES:
        changes = [*changes[:_MAX_NAMED_CHANGES], f"and {len(changes) - _MAX_NAMED_CHANGES} more"]
    return ", ".join(changes) or "nobody is another"


def _bundle_fields(bundle: TrustBundle | None) -> dict[str, Any]:
    """The services, OIDC issuers and origins of a bundle, by name."""
    if bundle is None:
        return {}
    issuers = {f"issuer {one.issuer}": one for one in bundle.oidc_issuers}
    origins = {f"{one.use} origin {one.origin}": one for one in bundle.origins}
    return {str(user_of(one.id)["name"]): one for one in bundle.services} | issuers | origins


class BundleRecord(NamedTuple):
    """A bundle whose root is the pinned one, or descends from it."""

    status: Literal["activated", "repeated", "outdated"]
    """`repeated`: the very bundle in force; `outdated`: not of a higher version than the bundle in force."""
    bundle: TrustBundle
    kid: str
    """Key id of the root that signed it."""
    before: TrustBundle | None
    """The bundle in force until then."""


@dataclass(slots=True, eq=False)
class BundleHistory:
    """Classifies every record on `trust` once, in offset order: the topic has one partition.

    The topic is read from the beginning at each start, so classifications survive a restart.
    """

    trust: TrustStore
    """An empty trust store that nobody else loads."""
    _in_force: TrustBundle | None = field(init=False, default=None)
    _next: int = field(init=False, default=0)
    _classified: BoundedDict[int, BundleRecord | InvalidMessageError] = field(
        init=False, default_factory=lambda: BoundedDict(_REMEMBERED_RECORDS)
    )

    def on_records(self, records: Sequence[Received]) -> None:
        for record in records:
            self._read(record)

    def record_of(self, record: Received) -> BundleRecord:
        """The classification of a record. Raises InvalidMessageError if it is no valid bundle."""
        self._read(record)
        classified = self._classified.get(record.offset)
        if classified is None:
            raise InvalidMessageError("too many bundles came after it", code=Code.BUNDLE_FORGOTTEN)
        if isinstance(classified, InvalidMessageError):
            raise classified
        return classified

    def _read(self, record: Received) -> None:
        if record.offset < self._next:
            return
        self._next = record.offset + 1
        try:
            self._classified[record.offset] = self._classify(record)
        except InvalidMessageError as error:
            self._classified[record.offset] = error

    def _classify(self, record: Received) -> BundleRecord:
        if not record.value:
            raise InvalidMessageError("a bundle is never deleted", code=Code.TOMBSTONE)
        current, before = self.trust.compact, self._in_force
        newer = self.trust.load(record.value, record.appended_at_ms / 1000)
        jws = parse(record.value)
        bundle = jws.unverified_claims(TrustBundle)  # the trust store verified it
        if newer:
            self._in_force = bundle
        status: Literal["activated", "repeated", "outdated"] = (
            "activated" if newer else "repeated" if record.value == current else "outdated"
        )
        return BundleRecord(status, bundle, jws.header.kid, before)
