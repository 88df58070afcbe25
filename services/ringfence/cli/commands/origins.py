"""Options of `ringfence init` about where people use passkeys, in the first or the next version of the trust bundle."""

from __future__ import annotations

from typing import Annotated

import typer

from ringfence.client.admin.origins import OriginChange

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
