"""`ringfence init`: the trust root, the service keys, the first operator."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ringfence.cli.commands import oidc_issuers
from ringfence.cli.shared.options import JsonOption, run, wants_json
from ringfence.cli.shared.output import print_json, say
from ringfence.client.admin.key_rotation import OVERLAP_S, rotate_services
from ringfence.client.admin.key_rotation import renew as renewed
from ringfence.client.admin.key_rotation import rotate_root as root_rotated
from ringfence.client.admin.trust_setup import (
    ON_DEMAND,
    TrustFolder,
    add_gateways,
    add_services,
    make_trust,
    publish_bundle,
    publish_trust,
    signed_before,
)
from ringfence.client.errors import InvalidCallError
from ringfence.kernel.base.settings import BusSettings, load
from ringfence.kernel.crypto.service_keys import files_before, next_file

_OPERATOR = "operator"


def init(
    folder: Annotated[Path, typer.Option(help="Where to keep what is made.")] = Path(".ringfence"),
    operator: Annotated[
        str | None,
        typer.Option(
            help="User id of the first operator. With --publish, later: their key and role are given to them anew.",
            show_default=_OPERATOR,
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="Their name.")] = "First operator",
    gateway: Annotated[
        list[str] | None,
        typer.Option("--gateway", metavar="NAME", help="A gateway that gets a key of its own. Repeatable."),
    ] = None,
    add_gateway: Annotated[
        list[str] | None,
        typer.Option(
            "--add-gateway",
            metavar="NAME",
            help="Sign the next trust bundle, with one more gateway, by the root that is there. Repeatable.",
        ),
    ] = None,
    add_service: Annotated[
        list[str] | None,
        typer.Option(
            "--add-service",
            metavar="NAME",
            help=f"Sign the next trust bundle, with a key for a service ({', '.join(ON_DEMAND)}) "
            "that the trust was made without. Repeatable.",
        ),
    ] = None,
    oidc_issuer: oidc_issuers.IssuerOption = None,
    jwks: oidc_issuers.JwksOption = None,
    oidc_for: oidc_issuers.ForOption = None,
    oidc_discovery: oidc_issuers.DiscoveryOption = False,
    oidc_user_claim: oidc_issuers.ClaimOption = "sub",
    oidc_user_suffix: oidc_issuers.SuffixOption = None,
    oidc_external_id: oidc_issuers.ExternalOption = False,
    oidc_emails_verified: oidc_issuers.EmailsVerifiedOption = False,
    remove_oidc_issuer: oidc_issuers.RemoveOption = None,
    rotate_service: Annotated[
        list[str] | None,
        typer.Option(
            "--rotate-service",
            metavar="NAME",
            help="Sign the next trust bundle, with new keys for a service or gateway beside its old ones. Repeatable.",
        ),
    ] = None,
    overlap_h: Annotated[
        int,
        typer.Option(
            "--overlap-hours", min=0, max=8760, help="How long the old keys of a service still count."
        ),
    ] = OVERLAP_S // 3600,
    compromised: Annotated[
        bool,
        typer.Option(
            "--compromised", help="With --rotate-service: the old keys were stolen, and end at once."
        ),
    ] = False,
    rotate_root: Annotated[
        bool,
        typer.Option(
            "--rotate-root",
            help="Make a new root, to which the old one hands over, and sign the next bundle by it.",
        ),
    ] = False,
    compromised_since: Annotated[
        datetime | None,
        typer.Option(
            "--compromised-since",
            metavar="UTC",
            help="With --rotate-root: what the old root signed after that moment counts for nothing.",
        ),
    ] = None,
    renew: Annotated[
        bool,
        typer.Option(
            "--renew",
            help="Sign the next trust bundle: the same keys for another year, by the root that is there.",
        ),
    ] = False,
    publish: Annotated[
        bool,
        typer.Option(
            "--publish",
            help="Put the bundle on Kafka, and with the first one the first operator; makes them where they are not.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make the offline root key, a key for each service, and the first operator's key."""
    if not name.strip():
        raise typer.BadParameter("say what they are called", param_hint="--name")
    if compromised and not rotate_service:
        raise typer.BadParameter(
            "--compromised says of a service's key that it was stolen: add --rotate-service"
        )
    if compromised_since and not rotate_root:
        raise typer.BadParameter("--compromised-since is about the root: add --rotate-root")
    changes = (add_gateway, add_service, rotate_service, rotate_root, renew, oidc_issuer, remove_oidc_issuer)
    if sum(map(bool, changes)) > 1:
        raise typer.BadParameter(
            "one change at a time: --add-gateway, --add-service, --rotate-service, --rotate-root, --renew, "
            "--oidc-issuer or --remove-oidc-issuer"
        )
    settings, trust, told = load(BusSettings), TrustFolder(folder), _Told(wants_json(as_json))
    following: Callable[[], int] | None = None
    if add_gateway:
        following = partial(_add, trust, add_gateway, told)
    elif add_service:
        following = partial(_add_services, trust, add_service, told)
    elif rotate_service:
        overlap_s = 0 if compromised else overlap_h * 3600
        following = partial(_rotate_services, trust, rotate_service, told, overlap_s, compromised)
    elif rotate_root:
        following = partial(_rotate_root, trust, told, _moment_s(compromised_since))
    elif renew:
        following = partial(_renew, trust, told)
    elif oidc_issuer:
        following = partial(
            _add_issuer, trust, oidc_issuer, told, jwks, oidc_for, discovery=oidc_discovery,
            claim=oidc_user_claim, suffix=oidc_user_suffix, external=oidc_external_id,
            emails_verified=oidc_emails_verified,
        )  # fmt: skip
    elif remove_oidc_issuer:
        following = partial(_remove_issuer, trust, remove_oidc_issuer, told)
    try:
        if following is not None:
            told.data["trust_bundle"] = following()
            _next_version(trust, settings, told, publish=publish)
        else:
            first = operator or (None if trust.root_key.exists() else _OPERATOR)
            if not (publish and trust.root_key.exists()):
                _make(trust, settings, first or _OPERATOR, gateway or ["gateway"], told)
            if publish:
                _publish(trust, settings, first, name, told)
            else:
                told.line("Next: ringfence topics apply, then ringfence init --publish")
    finally:
        told.end()


class _Told:
    """What was done: a line at once for people, one document at the end for programs."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self.data: dict[str, Any] = {}

    def line(self, text: str) -> None:
        if not self._as_json:
            say(text)

    def end(self) -> None:
        if self._as_json and self.data:
            print_json({"published": False, **self.data})


def _make(trust: TrustFolder, settings: BusSettings, operator: str, gateways: list[str], told: _Told) -> None:
    fingerprint = make_trust(trust, settings.trust_domain, operator, gateways=gateways)
    told.data |= {
        "trust_bundle": 1,
        "trust_domain": settings.trust_domain,
        "trust_root": fingerprint,
        "root_key": str(trust.root_key),
        "service_keys": str(trust.path / "keys"),
        "operator_key": str(trust.user_key(operator)),
    }
    told.line(f"Trust root for {settings.trust_domain}, fingerprint:")
    told.line(f"  export RINGFENCE_TRUST_ROOT={fingerprint}")
    told.line(f"Root key:      {trust.root_key}   move it off this machine")
    told.line(f"Service keys:  {trust.path / 'keys'}   one file for each service, and no other")
    told.line(f"Operator key:  {trust.user_key(operator)}")


def _publish(trust: TrustFolder, settings: BusSettings, operator: str | None, name: str, told: _Told) -> None:
    """Put what there is on Kafka: the bundle, and the first operator where they are named, or the bundle is the first.

    A later bundle leaves them alone: they may have been disabled since, and have other roles and keys.
    """
    version = signed_before(trust)[1].version
    if operator is None and version == 1:
        operator = _made_operator(trust)
    if operator is None:
        run(publish_bundle(trust, settings))
        told.line(f"Trust bundle {version} is on Kafka at {settings.kafka}.")
        told.line(
            "The first operator stays as they are; to give them their key and role anew: --operator NAME"
        )
    else:
        run(publish_trust(trust, settings, operator, name))
        told.line(f"Trust bundle {version} and operator {operator} are on Kafka at {settings.kafka}.")
        told.data["operator"] = operator
    told.data |= {"trust_bundle": version, "published": True}


def _made_operator(trust: TrustFolder) -> str:
    """Whose key was made with the root, where it is the only one."""
    made = sorted(file.stem for file in trust.user_key(_OPERATOR).parent.glob("*.json"))
    return made[0] if len(made) == 1 else _OPERATOR


def _moment_s(since: datetime | None) -> int | None:
    """UTC, unless it says otherwise."""
    if since is None:
        return None
    at = since if since.tzinfo else since.replace(tzinfo=UTC)
    if at > datetime.now(UTC):
        raise InvalidCallError(
            f"--compromised-since {at.isoformat()} is still to come; say since when it was"
        )
    return int(at.timestamp())


def _next_version(trust: TrustFolder, settings: BusSettings, told: _Told, *, publish: bool) -> None:
    if publish:
        run(publish_bundle(trust, settings))
        told.line(f"Trust bundle {told.data['trust_bundle']} is on Kafka at {settings.kafka}.")
        told.data["published"] = True
    else:
        told.line("Next: ringfence init --publish")


def _add(trust: TrustFolder, gateways: list[str], told: _Told) -> int:
    version = add_gateways(trust, gateways).version
    told.line(f"Trust bundle {version} has gateway {', '.join(gateways)} now.")
    for name in gateways:
        told.line(f"Its keys:  {trust.service_key(name)}, {trust.encryption_key(name)}")
    return version


def _add_services(trust: TrustFolder, names: list[str], told: _Told) -> int:
    version = add_services(trust, names).version
    told.line(f"Trust bundle {version} has {', '.join(names)} now.")
    for name in names:
        told.line(f"Its key:  {trust.service_key(name)}")
    return version


def _rotate_services(
    trust: TrustFolder, names: list[str], told: _Told, overlap_s: int, compromised: bool
) -> int:
    version = rotate_services(trust, names, overlap_s=overlap_s, compromised=compromised).version
    for name in names:
        for file in (trust.service_key(name), trust.encryption_key(name)):
            if next_file(file).exists():
                told.line(f"Its keys, until now and from now on:  {file}, {next_file(file)}")
        for file in files_before(trust.encryption_key(name)):
            told.line(f"Its key that leases of before may need:  {file}")
    ends = "end at once" if compromised else f"count for {overlap_s // 3600} h more"
    told.line(f"Trust bundle {version} has new keys of {', '.join(names)}; the old ones {ends}.")
    told.line(
        "Put all files where the service runs, before the bundle is on Kafka: it reads them by itself then."
    )
    return version


def _rotate_root(trust: TrustFolder, told: _Told, compromised_since_s: int | None) -> int:
    rotated = root_rotated(trust, compromised_since_s=compromised_since_s)
    told.data |= {"trust_root": rotated.fingerprint, "root_key": str(trust.root_key)}
    told.data["former_root_key"] = str(rotated.former)
    told.line(
        f"Trust bundle {rotated.bundle.version} is signed by a new root. What runs follows it by itself."
    )
    told.line("Whatever starts from now on should pin the new one:")
    told.line(f"  export RINGFENCE_TRUST_ROOT={rotated.fingerprint}")
    told.line(f"Root key:      {trust.root_key}   move it off this machine")
    told.line(f"The one before: {rotated.former}   destroy it once that bundle is on Kafka")
    return rotated.bundle.version


def _renew(trust: TrustFolder, told: _Told) -> int:
    bundle = renewed(trust)
    until = datetime.fromtimestamp(bundle.exp, UTC).date()
    told.line(f"Trust bundle {bundle.version} holds until {until}.")
    return bundle.version


def _add_issuer(
    trust: TrustFolder, issuer: str, told: _Told, jwks: Path | None, uses: list[str] | None, **how: Any
) -> int:
    version, said = oidc_issuers.add(trust, issuer, jwks, uses, **how)
    told.line(said)
    return version


def _remove_issuer(trust: TrustFolder, issuer: str, told: _Told) -> int:
    version, said = oidc_issuers.remove(trust, issuer)
    told.line(said)
    return version
