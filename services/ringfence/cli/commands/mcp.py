"""`ringfence mcp`: the Model Context Protocol on standard input and output."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

import typer

from ringfence.cli.commands.mcp_wrap import wrap
from ringfence.cli.shared import connect
from ringfence.cli.shared.id_lookup import check_whole_id
from ringfence.cli.shared.options import AgentOption, AttestOption, IdentityOption, identity, run

_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

app = typer.Typer(help="The Model Context Protocol, over standard input and output.", no_args_is_help=True)


app.command()(wrap)


@app.callback()
def _group() -> None:
    """The Model Context Protocol, over standard input and output."""


@app.command()
def serve(
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="TASK",
            callback=check_whole_id,
            help="The whole id of the only task that calls may name; RINGFENCE_TASK where not given.",
        ),
    ] = None,
    attest: AttestOption = None,
    agent_id: AgentOption = None,
    me: IdentityOption = None,
) -> None:
    """Serve tools by which an agent asks for credentials, waits for approvals, looks at its task, and releases.

    A client starts it, as the agent, and speaks with it over standard input and output. Results have the handles of
    leases, and never a credential. What was asked for here is withdrawn or given back when the client leaves. It needs
    the extra mcp of the package.
    """
    # Without the SDK of MCP this says so before anything connects.
    importlib.import_module("mcp.types")
    from ringfence.mcp_server.agent_tools import AgentTools
    from ringfence.mcp_server.stdio import serve_stdio

    task_id = task or os.environ.get("RINGFENCE_TASK") or None

    async def work() -> None:
        async with (
            _exit_on_end() as ended,
            connect.agent(identity(me), attest=attest, agent_id=agent_id) as agent,
        ):
            tools = AgentTools(agent, task_id)

            def on_output_closed() -> None:
                if not ended.done():
                    ended.set_result(1)

            serving = asyncio.create_task(serve_stdio(tools, on_output_closed))
            try:
                waited: tuple[asyncio.Future[Any], ...] = (serving, ended)
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await tools.close()
            if serving.done():
                serving.result()

    run(work())


@contextlib.asynccontextmanager
async def _exit_on_end() -> AsyncIterator[asyncio.Future[int]]:
    """A future for the exit status, which a signal to end resolves too. If resolved, the process ends after the block.

    A thread of the SDK may still read standard input then, and nothing can interrupt it.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def on_signal(number: signal.Signals) -> None:
        if not ended.done():
            ended.set_result(128 + number)

    numbers = _ENDING
    for number in numbers:
        loop.add_signal_handler(number, on_signal, number)
    yield ended
    for number in numbers:
        loop.remove_signal_handler(number)
    if ended.done():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended.result())
