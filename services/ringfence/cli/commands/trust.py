"""`ringfence trust`: the trust bundle that the root has signed. `ringfence init` signs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ringfence.cli.shared.options import JsonOption, run, wants_json
from ringfence.cli.shared.output import print_json, say
from ringfence.cli.shared.progress import progress

app = typer.Typer(help="The trust bundle that the root has signed.", no_args_is_help=True)


@app.command()
def publish(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="The signed bundle: trust-bundle.jws, which `ringfence init` makes.",
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Put a signed trust bundle on Kafka, without the root's key. Nothing happens if Kafka has it or a newer one.

    Its signature must be that of the root that the settings pin (RINGFENCE_TRUST_ROOT).
    """
    from ringfence.client.admin.bundle_publication import publish_signed_bundle
    from ringfence.kernel.base.settings import BusSettings, load

    with progress("publishing the trust bundle", as_json=as_json):
        version, published = run(publish_signed_bundle(file.read_text().strip(), load(BusSettings)))
    if wants_json(as_json):
        print_json({"trust_bundle": version, "published": published})
    elif published:
        say(f"Trust bundle {version} is on Kafka now.")
    else:
        say(f"Kafka has trust bundle {version} already; nothing was published.")
