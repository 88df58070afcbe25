"""`ringfence init --oidc-issuer`: set which issuers' identity tokens are accepted, in the next version of the trust
bundle.

Options of `ringfence init` about where people use passkeys, in the first or the next version of the trust bundle.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ringfence.client.admin.origins import OriginChange
from ringfence.client.admin.trust_setup import (
    CeremonyError,
    TrustFolder,
    remove_oidc_issuer,
    set_oidc_issuer,
)
from ringfence.client.errors import checked
from ringfence.kernel.crypto.oidc import read_jwks
from ringfence.messages.trust import OidcIssuer, OidcUse

SignOption = Annotated[
    list[str] | None,
    typer.Option(
        "--sign-origin",
        metavar="URL",
        help="Origin of the sign page. Signs the next trust bundle if there is one, also with --renew. Repeatable.",
    ),
]
SessionOption = Annotated[
    list[str] | None,
    typer.Option(
        "--session-origin",
        metavar="URL",
        help="Where passkeys only open sessions: the console. Nothing that is signed there approves anything. "
        "Repeatable.",
    ),
]
EndOption = Annotated[
    list[str] | None,
    typer.Option(
        "--end-origin",
        metavar="URL",
        help="An origin that ends now. What was signed there before stays valid. Repeatable.",
    ),
]
RpIdOption = Annotated[
    str | None,
    typer.Option(
        "--rp-id",
        metavar="DOMAIN",
        help="The relying party id of new passkeys: the host of all origins, or a domain above them.",
        show_default="what the origins have in common",
    ),
]


def change_of(
    sign: list[str] | None, session: list[str] | None, end: list[str] | None, rp_id: str | None
) -> OriginChange | None:
    """The change of origins that the options ask for, or None."""
    if not (sign or session or end or rp_id):
        return None
    return OriginChange(sign or (), session or (), end or (), rp_id)


IssuerOption = Annotated[
    str | None,
    typer.Option(
        "--oidc-issuer",
        metavar="URL",
        help="Sign the next trust bundle, in which identity tokens of this issuer count, by the root that is there.",
    ),
]
JwksOption = Annotated[
    Path | None, typer.Option("--jwks", metavar="FILE", help="The issuer's keys (a JWKS), which are pinned.")
]
ForOption = Annotated[
    list[str] | None,
    typer.Option(
        "--oidc-for", metavar="USE", help="Whom its tokens speak for: users, instances. Repeatable."
    ),
]
DiscoveryOption = Annotated[
    bool,
    typer.Option(
        "--oidc-discovery",
        help="Pin no keys: the registry reads them from the issuer, over HTTPS. For instances alone.",
    ),
]
ClaimOption = Annotated[
    str,
    typer.Option(
        "--oidc-user-claim", metavar="CLAIM", help="Of tokens for users: which claim says whose it is."
    ),
]
SuffixOption = Annotated[
    str | None,
    typer.Option(
        "--oidc-user-suffix",
        metavar="TEXT",
        help="What that claim ends in, and the user's id does not: @example.com.",
    ),
]
ExternalOption = Annotated[
    bool,
    typer.Option(
        "--oidc-external-id", help="The claim is the externalId that a directory gave, and not the id."
    ),
]
EmailsVerifiedOption = Annotated[
    bool,
    typer.Option(
        "--oidc-emails-verified",
        help="With the claim email: accept it also in tokens without email_verified, as no user chooses "
        "their address at this issuer.",
    ),
]
RemoveOption = Annotated[
    str | None,
    typer.Option(
        "--remove-oidc-issuer",
        metavar="URL",
        help="Sign the next trust bundle, in which tokens of this issuer are rejected.",
    ),
]
_USES: dict[str, OidcUse] = {"users": "users", "instances": "instances"}


@dataclass(frozen=True, slots=True)
class IssuerOptions:
    """An issuer, as the options of the command describe it."""

    issuer: str
    jwks: Path | None
    uses: list[str]
    discovery: bool
    claim: str
    suffix: str | None
    external: bool
    emails_verified: bool


def add(trust: TrustFolder, new: IssuerOptions) -> tuple[int, str]:
    """Sign a bundle with an issuer. Returns its version, and a sentence about it. Raises CeremonyError, JwksError."""
    if unknown := sorted(set(new.uses) - set(_USES)):
        raise typer.BadParameter(f"{unknown[0]!r} is neither users nor instances", param_hint="--oidc-for")
    if not new.uses:
        raise typer.BadParameter("say whom its tokens speak for: users, instances", param_hint="--oidc-for")
    try:
        keys = read_jwks(new.jwks.read_bytes()) if new.jwks else ()
    except OSError as error:
        raise CeremonyError(f"cannot read {new.jwks}: {error.strerror}") from None
    if new.emails_verified and new.claim != "email":
        raise typer.BadParameter("goes with --oidc-user-claim email", param_hint="--oidc-emails-verified")
    with checked(new.issuer):
        oidc_issuer = OidcIssuer(
            issuer=new.issuer,
            uses=tuple(dict.fromkeys(_USES[use] for use in new.uses)),
            keys=keys,
            discovery=new.discovery,
            user_claim=new.claim,
            user_suffix=new.suffix,
            user_match="external_id" if new.external else "id",
            emails_verified=True if new.emails_verified else None,
        )
    version = set_oidc_issuer(trust, oidc_issuer).version
    known_by = f"{len(keys)} pinned keys" if keys else "keys that it publishes"
    return (
        version,
        f"Trust bundle {version} believes {new.issuer} for {', '.join(oidc_issuer.uses)}, by {known_by}.",
    )


def remove(trust: TrustFolder, issuer: str) -> tuple[int, str]:
    """Sign a bundle without an issuer. Returns its version, and a sentence about it. Raises CeremonyError."""
    version = remove_oidc_issuer(trust, issuer).version
    return version, f"Trust bundle {version} believes nothing of {issuer}."
