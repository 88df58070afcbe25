"""The trust bundle, which says who speaks for which service, as Entity Management events (3004)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from ringfence.audit.events.bundles import BundleSeen
from ringfence.audit.events.ocsf import (
    ENTITY_MANAGEMENT,
    FAILURE,
    HIGH,
    MEDIUM,
    Event,
    event,
    moment,
    step,
    user_of,
)
from ringfence.messages.credential import Reason
from ringfence.messages.keys import KeyRecord
from ringfence.messages.trust import TrustBundle

if TYPE_CHECKING:
    from ringfence.kernel.kafka.record import Received

_CHANGED: Final = step("trust.changed", ENTITY_MANAGEMENT, 3, severity=MEDIUM)
_REPEATED: Final = step("trust.repeated", ENTITY_MANAGEMENT, "Repeat")
_FELL: Final = step(
    "trust.version_fell", ENTITY_MANAGEMENT, "Refuse Record", severity=HIGH, status=FAILURE, alert=True
)
_KEY: Final = "trust"
_NAMED: Final = 20


def told(record: Received, seen: BundleSeen) -> Event:
    """A bundle that a root signed stands on the topic."""
    bundle = seen.bundle
    who = user_of(bundle.iss)
    entity = {
        "name": "trust bundle", "uid": f"spiffe://{bundle.aud}/trust", "type_id": 99, "type": "Trust Bundle",
    }  # fmt: skip
    own: dict[str, Any] = {"actor": {"user": who}, "entity": entity}
    words: dict[str, Any] = {
        "revision": bundle.version,
        "known_revision": seen.before.version if seen.before is not None else None,
        "verified": {"by": bundle.iss, "kid": seen.kid},
    }
    match seen.fate:
        case "in force":
            own["entity_result"] = {**entity, "version": str(bundle.version), "data": _data(bundle, seen.kid)}
            message = (
                f"trust bundle {bundle.version} by {who['name']} came into force, until "
                f"{moment(bundle.exp * 1000)}: {_changes(seen.before, bundle)}"
            )
            return event(record, _CHANGED, message, own, words, key=_KEY, correlation=_KEY)
        case "again":
            message = (
                f"trust bundle {bundle.version}, which is in force, stands there again; it changes nothing"
            )
            return event(record, _REPEATED, message, own, words, key=_KEY, correlation=_KEY)
        case "fell":
            assert seen.before is not None
            message = f"trust bundle {bundle.version} was put there after bundle {seen.before.version}; it is refused"
            why = Reason(code="version_fell", message=message)
            return event(record, _FELL, message, own, words, key=_KEY, correlation=_KEY, reasons=(why,))


def _data(bundle: TrustBundle, root: str) -> dict[str, Any]:
    """What it says, with keys by their names."""
    return {
        "root": root,
        "not_after": bundle.exp,
        "services": [
            {
                "id": one.id,
                "roles": list(one.roles),
                "keys": _keys(one.keys),
                "encryption_keys": _keys(one.encryption_keys),
            }
            for one in bundle.services
        ],
        "oidc_issuers": [{"issuer": one.issuer, "uses": list(one.uses)} for one in bundle.oidc_issuers],
        "former_roots": _keys(bundle.former_roots),
    }


def _keys(keys: tuple[KeyRecord, ...]) -> list[dict[str, Any]]:
    return [{"kid": key.kid, "not_before": key.not_before, "not_after": key.not_after} for key in keys]


def _changes(before: TrustBundle | None, now: TrustBundle) -> str:
    """What is another than before, in words: services and issuers that came, went or have other keys."""
    was, there = _named(before), _named(now)
    told = [f"{name} is new" for name in there if name not in was]
    told += [f"{name} is gone" for name in was if name not in there]
    told += [f"{name} is changed" for name in there if name in was and was[name] != there[name]]
    if len(told) > _NAMED:
        told = [*told[:_NAMED], f"and {len(told) - _NAMED} more"]
    return ", ".join(told) or "nobody is another"


def _named(bundle: TrustBundle | None) -> dict[str, Any]:
    """Whoever it names, and what it says of them."""
    if bundle is None:
        return {}
    issuers = {f"issuer {one.issuer}": one for one in bundle.oidc_issuers}
    return {str(user_of(one.id)["name"]): one for one in bundle.services} | issuers
