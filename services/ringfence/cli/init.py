"""`ringfence init`: the trust root, the service keys, the first operator."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ringfence.cli import oidc_issuers
from ringfence.client.ceremony import TrustFolder, add_gateways, make_trust, publish_bundle, publish_trust
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
    oidc_issuer: oidc_issuers.IssuerOption = None,
    jwks: oidc_issuers.JwksOption = None,
    oidc_for: oidc_issuers.ForOption = None,
    oidc_discovery: oidc_issuers.DiscoveryOption = False,
    oidc_user_claim: oidc_issuers.ClaimOption = "sub",
    oidc_user_suffix: oidc_issuers.SuffixOption = None,
    oidc_external_id: oidc_issuers.ExternalOption = False,
    remove_oidc_issuer: oidc_issuers.RemoveOption = None,
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
    if add_gateway:
        _add(trust, add_gateway, settings, out, publish=publish)
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
        _published(trust, version, settings, out, publish=publish)
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


def _add(
    trust: TrustFolder, gateways: list[str], settings: BusSettings, out: Console, *, publish: bool
) -> None:
    version = add_gateways(trust, gateways).version
    out.print(f"Trust bundle {version} has gateway {', '.join(gateways)} now.")
    for name in gateways:
        files = (trust.service_key(name), trust.encryption_key(name))
        out.print(f"Its keys:  {files[0]}, {files[1]}", soft_wrap=True)
    _published(trust, version, settings, out, publish=publish)


def _published(
    trust: TrustFolder, version: int, settings: BusSettings, out: Console, *, publish: bool
) -> None:
    if publish:
        asyncio.run(publish_bundle(trust, settings))
        out.print(f"Trust bundle {version} is on Kafka at {settings.kafka}.")
    else:
        out.print("Next: ringfence init --publish")
