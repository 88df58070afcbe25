"""The options that a local run and an ordered run have in common."""

from __future__ import annotations

from typing import Annotated

import typer

RunTtlOption = Annotated[str, typer.Option("--ttl", metavar="DURATION", help="How long the run may take.")]
MemoryOption = Annotated[
    str,
    typer.Option("--memory", metavar="SIZE", help="The most memory: a number of bytes, or with K, M or G."),
]
# The least that a sandbox can be limited to (`SandboxSpec`).
CpusOption = Annotated[
    float, typer.Option("--cpus", metavar="NUMBER", min=0.01, max=1024, help="How many processors.")
]
PidsOption = Annotated[
    int, typer.Option("--pids", metavar="NUMBER", min=4, max=4_194_304, help="How many processes.")
]
