"""Web origins of passkeys in the trust bundle: where people sign, and where they open sessions of the console.

An origin that has ended stays in the bundle, so what was signed there in its time stays valid. Its use never changes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from ringfence.client.admin.trust_setup import (
    CeremonyError,
    TrustFolder,
    load_root_and_bundle,
    sign_next_bundle,
)
from ringfence.messages.base import PasskeyUse
from ringfence.messages.trust import Origin, TrustBundle

_LOCAL = "localhost"
_USUAL_PORTS = {"https": 443, "http": 80}


@dataclass(frozen=True, slots=True)
class OriginChange:
    """A change of the origins of a trust bundle. URLs are those that people open."""

    sign: Sequence[str] = ()
    """Sign pages, where people sign with passkeys."""
    session: Sequence[str] = ()
    """Consoles, where people open sessions."""
    end: Sequence[str] = ()
    """Origins that end now."""
    rp_id: str | None = None
    """The relying party id of new passkeys. None: the one of the bundle, else what all origins have in common."""


NO_CHANGE = OriginChange()


def set_origins(folder: TrustFolder, change: OriginChange) -> TrustBundle:
    """Sign the next version of the trust bundle, with other origins. The end of the bundle stays what it is.

    Returns the bundle. Needs the root's key. Raises CeremonyError if an origin cannot be one, if the relying
    party id does not fit all of them, or if there is no trust root.
    """
    root, bundle = load_root_and_bundle(folder)
    now_s = int(time.time())
    rp_id, origins = changed_origins(change, now_s, bundle.rp_id, bundle.origins)
    return sign_next_bundle(folder, bundle, root, now_s, rp_id=rp_id, origins=origins)


def changed_origins(
    change: OriginChange, now_s: int, rp_id: str | None = None, before: Sequence[Origin] = ()
) -> tuple[str | None, tuple[Origin, ...]]:
    """The relying party id and the origins of a bundle after a change; `rp_id` and `before` are those of the bundle
    before. Pure. Raises CeremonyError.
    """
    origins = list(before)
    for url in change.end:
        name = origin_of(url)
        found = [index for index, one in enumerate(origins) if one.origin == name and _counts(one, now_s)]
        if not found:
            named = ", ".join(one.origin for one in origins if _counts(one, now_s)) or "none"
            raise CeremonyError(f"{name} is no origin that is in force; these are: {named}")
        for index in found:
            # It may have begun a moment ahead of now; an origin never ends before it begins.
            end_s = max(now_s, origins[index].not_before)
            origins[index] = origins[index].model_copy(update={"not_after": end_s})
    added: list[tuple[str, PasskeyUse]] = [(url, "sign") for url in change.sign]
    added += [(url, "session") for url in change.session]
    for url, use in added:
        _add(origins, origin_of(url), use, now_s)
    in_force = [one.origin for one in origins if _counts(one, now_s)]
    rp_id = change.rp_id or rp_id or (_common_rp_id(in_force) if in_force else None)
    if rp_id is not None:
        _check_rp_id(rp_id, in_force)
    return rp_id, tuple(origins)


def origin_of(url: str) -> str:
    """The origin of a URL, as browsers write it. Raises CeremonyError if passkeys cannot be used there."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        raise CeremonyError(f"{url} is no URL") from None
    if parts.scheme not in _USUAL_PORTS:
        raise CeremonyError(f"{url} must begin with https://")
    if parts.path not in ("", "/") or parts.query or parts.fragment or parts.username is not None:
        raise CeremonyError(f"{url} is more than an origin; give scheme, host and port alone")
    if not host.isascii():
        raise CeremonyError(f"give the host of {url} as DNS has it (xn--...)")
    if not host or host.rpartition(".")[2].isdigit() or ":" in host:
        raise CeremonyError(f"passkeys need a domain name, and {url} has none: an IP address is no rpId")
    if parts.scheme != "https" and (parts.scheme, host) != ("http", _LOCAL):
        raise CeremonyError(
            f"{url} must begin with https://; only in development http://localhost:PORT will do"
        )
    shown_port = "" if port in (None, _USUAL_PORTS[parts.scheme]) else f":{port}"
    try:
        return Origin(origin=f"{parts.scheme}://{host}{shown_port}", use="sign", not_before=0).origin
    except ValueError:
        raise CeremonyError(f"{url} is no origin; give it as https://HOST or https://HOST:PORT") from None


def _add(origins: list[Origin], name: str, use: PasskeyUse, now_s: int) -> None:
    same = [one for one in origins if one.origin == name]
    if other := next((one for one in same if one.use != use), None):
        raise CeremonyError(
            f"{name} is, or was, a {other.use} origin, and its use never changes; take another for use {use}"
        )
    if any(_counts(one, now_s) for one in same):
        return
    before_s = max((one.not_after or 0 for one in same), default=0)
    origins.append(Origin(origin=name, use=use, not_before=max(before_s, now_s - 60)))


def _counts(origin: Origin, now_s: int) -> bool:
    return origin.not_after is None or now_s < origin.not_after


def _host(origin: str) -> str:
    return urlsplit(origin).hostname or ""


def _common_rp_id(origins: Sequence[str]) -> str:
    """The longest domain that all these origins have in common."""
    hosts = list(dict.fromkeys(map(_host, origins)))
    if len(hosts) == 1:
        return hosts[0]
    common: list[str] = []
    for labels in zip(*(reversed(host.split(".")) for host in hosts), strict=False):
        if len(set(labels)) > 1:
            break
        common.insert(0, labels[0])
    if len(common) < 2:
        raise CeremonyError(
            f"the origins have no domain in common ({', '.join(origins)}): passkeys need one that all are part of"
        )
    return ".".join(common)


def _check_rp_id(rp_id: str, origins: Sequence[str]) -> None:
    for origin in origins:
        host = _host(origin)
        if host != rp_id and not host.endswith(f".{rp_id}"):
            raise CeremonyError(
                f"the rpId {rp_id} is neither the host of {origin} nor a domain above it; give another with --rp-id, "
                "or end that origin with --end-origin"
            )
    if "." not in rp_id and any(_host(origin) != rp_id for origin in origins):
        raise CeremonyError(f"the rpId {rp_id} is a top-level domain; browsers take none")
