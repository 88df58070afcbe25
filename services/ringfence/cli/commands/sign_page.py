"""`ringfence sign-page`: build the static page on which people sign with passkeys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ringfence.cli.shared.options import JsonOption, wants_json
from ringfence.cli.shared.output import output_folder, print_json, say

app = typer.Typer(help="The page on which people sign with passkeys.", no_args_is_help=True)


@app.command()
def build(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", callback=output_folder, help="Where the files go; nothing else is there."
        ),
    ],
    origin: Annotated[
        str | None,
        typer.Option(
            "--origin",
            metavar="ORIGIN",
            help="Where people open it, such as https://sign.example.com.",
        ),
    ] = None,
    rp_id: Annotated[
        str | None,
        typer.Option(
            "--rp-id",
            metavar="DOMAIN",
            help="The RP ID of the passkeys; the origin's host if not given.",
        ),
    ] = None,
    session_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--session-origin",
            metavar="ORIGIN",
            help="A console that may take answers. Repeatable.",
        ),
    ] = None,
    least_version: Annotated[
        int | None,
        typer.Option(
            "--least-version",
            metavar="NUMBER",
            min=0,
            help="The oldest version of the trust bundle that the page takes: the one in force now.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the page's files into a folder, for any web server. The same input makes the same bytes.

    Trust domain and root are those of the settings, and so is what no option says (`RINGFENCE_SIGN_PAGE_*`). Compare
    the digests with what your server delivers: whoever can change these files can misuse every signature that people
    make there.
    """
    from ringfence.kernel.base.settings import BusSettings, load
    from ringfence.sign_page.build import build as build_page
    from ringfence.sign_page.build import checksums, page_config
    from ringfence.sign_page.settings import SignPageSettings

    named = {
        "origin": origin,
        "rp_id": rp_id,
        "session_origins": tuple(session_origin or ()) or None,
        "least_version": least_version,
    }
    given = {name: value for name, value in named.items() if value is not None}
    page = build_page(page_config(load(BusSettings), load(SignPageSettings, **given)))
    page.write(folder)
    if wants_json(as_json):
        print_json({"folder": str(folder), "sha256": checksums(page), "csp": page.csp})
        return
    say(
        f"{len(page.files)} files in {folder}; serve them with this header, and with nothing else beside them:"
    )
    say(f"Content-Security-Policy: {page.csp}")
    for name, digest in checksums(page).items():
        say(f"{digest}  {name}")
