"""`ringfence init`: the trust root, the service keys, the first operator."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ringfence.cli import oidc_issuers
from ringfence.client.ceremony import (
    TrustFolder,
    add_gateways,
    add_services,
    make_trust,
    publish_bundle,
    publish_trust,
)
from ringfence.client.rotation import OVERLAP_S, rotate_services
from ringfence.client.rotation import renew as renewed
from ringfence.client.rotation import rotate_root as root_rotated
from ringfence.kernel.service_keys import next_file
from ringfence.kernel.settings import BusSettings, load


def init(
    folder: Annotated[Path, typer.Option(help="Where to keep what is made.")] = Path(".ringfence"),
    operator: Annotated[str, typer.Option(help="User id of the first operator.")] = "operator",
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
            help="Sign the next trust bundle, with a key for a service (scim, signals) "
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
    remove_oidc_issuer: oidc_issuers.RemoveOption = None,
    rotate_service: Annotated[
        list[str] | None,
        typer.Option(
            "--rotate-service",
            metavar="NAME",
            help="Sign the next trust bundle, with a new key for a service or gateway beside its old one. Repeatable.",
        ),
    ] = None,
    overlap_h: Annotated[
        int, typer.Option("--overlap-hours", min=0, help="How long the old key of a service still counts.")
    ] = OVERLAP_S // 3600,
    compromised: Annotated[
        bool,
        typer.Option(
            "--compromised", help="With --rotate-service: the old key was stolen, and ends at once."
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
            "--publish", help="Put bundle and first operator on Kafka; makes them where they are not."
        ),
    ] = False,
) -> None:
    """Make the offline root key, a key for each service, and the first operator's key."""
    settings = load(BusSettings)
    trust = TrustFolder(folder)
    out = Console()
    if compromised and not rotate_service:
        raise typer.BadParameter(
            "--compromised says of a service's key that it was stolen: add --rotate-service"
        )
    if compromised_since and not rotate_root:
        raise typer.BadParameter("--compromised-since is about the root: add --rotate-root")
    if sum(map(bool, (add_gateway, add_service, rotate_service, rotate_root, renew))) > 1:
        raise typer.BadParameter(
            "one change at a time: --add-gateway, --add-service, --rotate-service, --rotate-root or --renew"
        )
    following: Callable[[], int] | None = None
    if add_gateway:
        following = partial(_add, trust, add_gateway, out)
    elif add_service:
        following = partial(_add_services, trust, add_service, out)
    elif rotate_service:
        overlap_s = 0 if compromised else overlap_h * 3600
        following = partial(_rotate_services, trust, rotate_service, out, overlap_s, compromised)
    elif rotate_root:
        since_s = int(compromised_since.replace(tzinfo=UTC).timestamp()) if compromised_since else None
        following = partial(_rotate_root, trust, out, since_s)
    elif renew:
        following = partial(_renew, trust, out)
    if following is not None:
        _next_version(following(), trust, settings, out, publish=publish)
        return
    if oidc_issuer or remove_oidc_issuer:
        if oidc_issuer and remove_oidc_issuer:
            raise typer.BadParameter("set one issuer, or remove one", param_hint="--remove-oidc-issuer")
        if oidc_issuer:
            version, said = oidc_issuers.add(
                trust, oidc_issuer, jwks, oidc_for, discovery=oidc_discovery,
                claim=oidc_user_claim, suffix=oidc_user_suffix, external=oidc_external_id,
            )  # fmt: skip
        else:
            version, said = oidc_issuers.remove(trust, remove_oidc_issuer or "")
        out.print(said, soft_wrap=True)
        _next_version(version, trust, settings, out, publish=publish)
        return
    if not (publish and trust.root_key.exists()):
        fingerprint = make_trust(trust, settings.trust_domain, operator, gateways=gateway or ["gateway"])
        out.print(f"Trust root for [bold]{settings.trust_domain}[/], fingerprint:")
        out.print(f"  export RINGFENCE_TRUST_ROOT={fingerprint}", soft_wrap=True)
        out.print(f"Root key:      {trust.root_key}   move it off this machine")
        out.print(f"Service keys:  {folder / 'keys'}   one file for each service, and no other")
        out.print(f"Operator key:  {trust.user_key(operator)}")
    if publish:
        asyncio.run(publish_trust(trust, settings, operator, name))
        out.print(f"Trust bundle and operator [bold]{operator}[/] are on Kafka at {settings.kafka}.")
    else:
        out.print("Next: ringfence topics apply, then ringfence init --publish")


def _next_version(
    version: int, trust: TrustFolder, settings: BusSettings, out: Console, *, publish: bool
) -> None:
    if publish:
        asyncio.run(publish_bundle(trust, settings))
        out.print(f"Trust bundle {version} is on Kafka at {settings.kafka}.")
    else:
        out.print("Next: ringfence init --publish")


def _add(trust: TrustFolder, gateways: list[str], out: Console) -> int:
    version = add_gateways(trust, gateways).version
    out.print(f"Trust bundle {version} has gateway {', '.join(gateways)} now.")
    for name in gateways:
        files = (trust.service_key(name), trust.encryption_key(name))
        out.print(f"Its keys:  {files[0]}, {files[1]}", soft_wrap=True)
    return version


def _add_services(trust: TrustFolder, names: list[str], out: Console) -> int:
    version = add_services(trust, names).version
    out.print(f"Trust bundle {version} has {', '.join(names)} now.")
    for name in names:
        out.print(f"Its key:  {trust.service_key(name)}", soft_wrap=True)
    return version


def _rotate_services(
    trust: TrustFolder, names: list[str], out: Console, overlap_s: int, compromised: bool
) -> int:
    version = rotate_services(trust, names, overlap_s=overlap_s, compromised=compromised).version
    for name in names:
        files = (trust.service_key(name), next_file(trust.service_key(name)))
        out.print(f"Its keys, until now and from now on:  {files[0]}, {files[1]}", soft_wrap=True)
    ends = "ends at once" if compromised else f"counts for {overlap_s // 3600} h more"
    out.print(f"Trust bundle {version} has a new key of {', '.join(names)}; the old one {ends}.")
    out.print(
        "Put both files where the service runs, before the bundle is on Kafka: it reads them by itself then."
    )
    return version


def _rotate_root(trust: TrustFolder, out: Console, compromised_since_s: int | None) -> int:
    rotated = root_rotated(trust, compromised_since_s=compromised_since_s)
    out.print(
        f"Trust bundle {rotated.bundle.version} is signed by a new root. What runs follows it by itself."
    )
    out.print("Whatever starts from now on should pin the new one:")
    out.print(f"  export RINGFENCE_TRUST_ROOT={rotated.fingerprint}", soft_wrap=True)
    out.print(f"Root key:      {trust.root_key}   move it off this machine", soft_wrap=True)
    out.print(f"The one before: {rotated.former}   destroy it once that bundle is on Kafka", soft_wrap=True)
    return rotated.bundle.version


def _renew(trust: TrustFolder, out: Console) -> int:
    bundle = renewed(trust)
    until = datetime.fromtimestamp(bundle.exp, UTC).date()
    out.print(f"Trust bundle {bundle.version} holds until {until}.")
    return bundle.version
