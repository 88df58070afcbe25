"""`ringfence topics`: create them, and check that they are what the contract says."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ringfence.cli.context import wants_json

app = typer.Typer(help="Create the topics, and check them.", no_args_is_help=True)
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def apply(as_json: JsonOption = False) -> None:
    """Create every topic that is not there yet."""
    from ringfence.kernel.settings import ServiceSettings, load
    from ringfence.kernel.topics_admin import TopicsAdmin

    async def work() -> list[str]:
        async with TopicsAdmin(load(ServiceSettings)) as admin:
            return await admin.apply()

    created = asyncio.run(work())
    out = Console()
    if wants_json(as_json):
        out.print_json(json.dumps({"created": created}))
    else:
        out.print("\n".join(f"created {name}" for name in created) or "all topics are there")


@app.command()
def check(as_json: JsonOption = False) -> None:
    """Compare the topics with the contract; exit 1 where one differs."""
    from ringfence.kernel.settings import ServiceSettings, load
    from ringfence.kernel.topics_admin import TopicsAdmin

    async def work() -> list[dict[str, str]]:
        async with TopicsAdmin(load(ServiceSettings)) as admin:
            return [
                {"topic": d.topic, "what": d.what, "expected": d.expected, "found": d.found}
                for d in await admin.check()
            ]

    differences = asyncio.run(work())
    out = Console()
    if wants_json(as_json):
        out.print_json(json.dumps({"differences": differences}))
    elif differences:
        table = Table("topic", "what", "expected", "found")
        for difference in differences:
            table.add_row(*difference.values())
        out.print(table)
    else:
        out.print("all topics are as the contract says")
    if differences:
        raise typer.Exit(1)
