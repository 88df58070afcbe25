"""Runs an MCP server in a sandbox, and its client's messages through the gateway, until one of both ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import httpx

from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.codes import Code
from ringfence.messages.permission import Permission
from ringfence.messages.registry import TargetState
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.target_settings import STDIO_URL
from ringfence.runner.lifecycle.execution import RunExecution, RunnerHost
from ringfence.runner.lifecycle.plan import RunPlan, RunRefusedError
from ringfence.runner.lifecycle.report import RunReport
from ringfence.runner.sandbox.backend import Streams
from ringfence.runner.stdio_mcp.client_bridge import MAX_LINE_BYTES, ClientBridge
from ringfence.runner.stdio_mcp.server_channel import MAX_MESSAGE_BYTES, ServerChannel
from ringfence.runner.stdio_mcp.upstream import StdioUpstream

log = logging.getLogger(__name__)

_LOOK_EVERY_S: Final = 0.1
_EXIT_WITHIN_S: Final = 5.0
"""How long the server may take to end after its standard input was closed."""


@dataclass(frozen=True)
class WrappedServer:
    """A wrapped server: its target, and the permissions that its run requests."""

    target_id: str
    path: str
    """The path of the endpoint in the target's rules."""
    scopes: tuple[tuple[Permission, ...], ...]
    """One request for each: that of the target first."""

    @property
    def endpoint(self) -> str:
        return f"/{self.target_id}{self.path}"

    def command(
        self, argv: Iterable[str], *, task_id: str, reason: str, ttl_s: int, approved_within_s: int
    ) -> tuple[str, ...]:
        """The command of the run. It requests leases, starts the server, and releases them when the server ends."""
        words = list(argv)
        for scope in reversed(self.scopes):
            allow = [word for one in scope for word in ("--allow", one.model_dump_json())]
            words = [
                "ringfence", "request", "--exec", "--delivery", "gateway", "--task", task_id, "--reason", reason,
                "--ttl", f"{ttl_s}s", "--timeout", f"{approved_within_s}s", *allow, "--", *words,
            ]  # fmt: skip
        return tuple(words)


def wrapped_server(
    directory: Directory, task_id: str, target_id: str, wanted: Iterable[Permission]
) -> WrappedServer:
    """The server that a task may use. Raises RunRefusedError, with a remedy.

    `wanted`: the permissions to request; empty for all that the task allows at the target.
    """
    try:
        task, target = directory.task(task_id), directory.target(target_id)
    except ChainError as error:
        raise RunRefusedError(f"the records of the task or the target do not verify: {error}") from None
    if task is None:
        raise RunRefusedError(f"there is no task {task_id}", code=Code.TASK_UNKNOWN).with_remedy(
            "see: ringfence task list"
        )
    if target is None or target.state.status != "active":
        raise RunRefusedError(f"there is no target {target_id}", code=Code.TARGET_UNKNOWN).with_remedy(
            f"an operator adds it: ringfence target add {target_id} --template mcp --backend jwt --setting "
            f"url={STDIO_URL}"
        )
    path = _endpoint(target.state)
    asked = tuple(wanted) or tuple(one for one in task.state.scope if one.target == target_id)
    by_target: dict[str, list[Permission]] = {target_id: []}
    for permission in asked:
        by_target.setdefault(permission.target, []).append(permission)
    if not by_target[target_id]:
        raise RunRefusedError(f"nothing is asked for at {target_id}", code=Code.BEYOND_SCOPE).with_remedy(
            f"name a task that allows something there, or permissions of it: --allow {target_id}:VERB:RESOURCE"
        )
    return WrappedServer(target_id, path, tuple(tuple(scope) for scope in by_target.values()))


def _endpoint(target: TargetState) -> str:
    """The path of the target's MCP rules. Raises RunRefusedError if it is no server in a run."""
    url = (target.backend.model_extra or {}).get("url")
    if target.backend.kind != "jwt" or url != STDIO_URL:
        raise RunRefusedError(
            f"target {target.target_id} is no server in a run", code=Code.NOT_STDIO
        ).with_remedy(
            f"its record says so by --backend jwt --setting url={STDIO_URL}; servers over HTTP need no wrap"
        )
    paths = list(dict.fromkeys(rule.path for rule in target.requests if rule.method == "MCP"))
    if len(paths) != 1 or "{" in paths[0]:
        raise RunRefusedError(
            f"target {target.target_id} has no single MCP endpoint", code=Code.NOT_STDIO
        ).with_remedy("give all of its MCP rules the same path, such as /mcp")
    return paths[0]


class StdioWrap:
    """One wrapped server and its client. Use it once."""

    def __init__(
        self, host: RunnerHost, plan: RunPlan, server: WrappedServer, *, stdin: int, stdout: int
    ) -> None:
        """`stdin`, `stdout`: the descriptors by which the client writes and reads; pipes, sockets or terminals."""
        self._host = host
        self._plan = plan
        self._server = server
        self._client = (stdin, stdout)
        self._out: asyncio.Queue[bytes | None] = asyncio.Queue()
        # Four ends of two pipes: the sandbox has two of them.
        self._in_read, self._in_write = os.pipe()
        self._out_read, self._out_write = os.pipe()
        self.execution = RunExecution(
            host,
            plan,
            Streams(self._in_read, self._out_write, 2),
            ends_with_lease_at=server.target_id,
        )

    async def execute(self) -> RunReport:
        """Run the server until it, its client, its task or its lease ends. Raises as `RunExecution.execute`."""
        sockets = self._host.gateway_sockets
        channel = await self._open_channel()
        upstream = StdioUpstream(sockets / f"{self._plan.run_id}.stdio", self._server.target_id, channel)
        bridge = ClientBridge(
            sockets / f"{self._plan.run_id}.sock", self._server.endpoint, self._out.put_nowait
        )
        reading = asyncio.create_task(channel.run())
        serving = asyncio.create_task(self._serve(bridge, channel))
        writing = asyncio.create_task(self._write_out())
        try:
            await upstream.listen()
            return await self.execution.execute()
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            await bridge.close()
            await upstream.close()
            reading.cancel()
            self._out.put_nowait(None)
            await asyncio.gather(reading, writing, return_exceptions=True)
            for descriptor in (self._in_read, self._out_write):
                with contextlib.suppress(OSError):
                    os.close(descriptor)

    async def _open_channel(self) -> ServerChannel:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=MAX_MESSAGE_BYTES)
        await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(self._out_read, "rb", 0)
        )
        transport, protocol = await loop.connect_write_pipe(
            lambda: asyncio.streams.FlowControlMixin(loop=loop), os.fdopen(self._in_write, "wb", 0)
        )
        return ServerChannel(reader, asyncio.StreamWriter(transport, protocol, None, loop))

    async def _serve(self, bridge: ClientBridge, channel: ServerChannel) -> None:
        """Carry the client's messages, once the run has its lease. When the client leaves, the server ends."""
        try:
            await self._until_leased()
            loop = asyncio.get_running_loop()
            reader = asyncio.StreamReader(limit=MAX_LINE_BYTES)
            stdin = os.fdopen(os.dup(self._client[0]), "rb", 0)
            await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), stdin)
            await bridge.run(reader)
            channel.close_input()
            await asyncio.sleep(_EXIT_WITHIN_S)
            self.execution.stop("its client has left")
        except (ValueError, OSError) as error:
            self.execution.stop(f"its client cannot be read: {type(error).__name__}")
        except RingfenceError as error:
            self.execution.stop(f"{error.code}: {error.message}"[:300])

    async def _until_leased(self) -> None:
        """Wait until the gateway has the lease. Before that, it would refuse the client's first message."""
        path = self._host.gateway_sockets / f"{self._plan.run_id}.sock"
        url = f"http://ringfence/v1/tasks/{self._plan.task_id}"
        transport = httpx.AsyncHTTPTransport(uds=str(path))
        async with httpx.AsyncClient(transport=transport, timeout=10.0, trust_env=False) as http:
            while True:
                with contextlib.suppress(httpx.HTTPError, ValueError, KeyError, TypeError):
                    if any(
                        one["target"] == self._server.target_id
                        for one in (await http.get(url)).json()["leases"]
                    ):
                        return
                await asyncio.sleep(_LOOK_EVERY_S)

    async def _write_out(self) -> None:
        """Write messages to the client, in order."""
        while (message := await self._out.get()) is not None:
            try:
                await asyncio.to_thread(_write_all, self._client[1], message + b"\n")
            except OSError:
                self.execution.stop("its client takes nothing any more")
                return


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
