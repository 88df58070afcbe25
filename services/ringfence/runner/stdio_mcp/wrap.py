"""Runs an MCP server in a sandbox, and its client's messages through the gateway, until one of both ends.

The client's side: posts each line of the client's output to the gateway, and writes the answers to its input.

The gateway interprets lines and refuses them. This module reads from a message only what HTTP headers need: the
revision, and for 2026-07-28 the method and the name.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import httpx
import orjson

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.messages.base import Permission
from ringfence.messages.codes import Code
from ringfence.messages.registry import TargetState
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.target_settings import STDIO_URL
from ringfence.runner.lifecycle.execution import RunExecution, RunnerHost
from ringfence.runner.lifecycle.plan import RunPlan, RunRefusedError
from ringfence.runner.lifecycle.report import RunReport
from ringfence.runner.sandbox.backend import Streams
from ringfence.runner.stdio_mcp.server_channel import (
    CANCELLED,
    INITIALIZE,
    INITIALIZED,
    MAX_MESSAGE_BYTES,
    Id,
    Outline,
    ServerChannel,
    StdioUpstream,
    header_value,
    outline_of,
)

log = logging.getLogger(__name__)

MAX_LINE_BYTES: Final = 2 * 1024 * 1024
"""A longer line is not posted. The gateway takes 1 MiB, and says so of what is between."""
_MAX_CALLS: Final = 64
"""Requests under way. The client is read no further then."""
_CONNECT_S: Final = 10.0
_REOPEN_S: Final = 1.0
_JSON: Final = "application/json"
_EVENTS: Final = "text/event-stream"
_STATELESS: Final = "2026-07-28"
_BAD_REQUEST: Final = 400
_REFUSED: Final = "the gateway refused a message: %s"

Write = Callable[[bytes], None]
"""Writes one message, without a line end, to the client."""


class ClientBridge:
    """One client, until its output ends."""

    def __init__(self, gateway_socket: Path, endpoint: str, write: Write) -> None:
        """`gateway_socket`: `RUN.sock`; `endpoint`: the path of the target's endpoint there, `/TARGET/mcp`."""
        transport = httpx.AsyncHTTPTransport(uds=str(gateway_socket))
        timeout = httpx.Timeout(None, connect=_CONNECT_S)
        self._http = httpx.AsyncClient(transport=transport, timeout=timeout, trust_env=False)
        self._url = f"http://gateway{endpoint}"
        self._write = write
        self._calls: dict[Id, asyncio.Task[None]] = {}
        self._free = asyncio.Semaphore(_MAX_CALLS)
        self._negotiated: str | None = None
        self._stream: asyncio.Task[None] | None = None

    async def run(self, reader: asyncio.StreamReader) -> None:
        """Post the client's messages until its output ends, and wait for the answers to them.

        `reader`: its limit is `MAX_LINE_BYTES`.
        """
        while (line := await self._next_line(reader)) is not None:
            if line:
                await self._take(line)
        await asyncio.gather(*self._calls.values(), return_exceptions=True)

    async def close(self) -> None:
        """End the exchanges in progress. Idempotent."""
        ending = [*self._calls.values(), *([self._stream] if self._stream is not None else [])]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        await self._http.aclose()

    # --- the client's messages ---

    async def _next_line(self, reader: asyncio.StreamReader) -> bytes | None:
        """The next line; b"" for a skipped one, None at the end."""
        try:
            return (await reader.readuntil(b"\n")).strip()
        except asyncio.IncompleteReadError as error:
            return error.partial.strip() or None
        except asyncio.LimitOverrunError as error:
            await reader.readexactly(error.consumed)
            with contextlib.suppress(asyncio.IncompleteReadError):
                while True:
                    try:
                        await reader.readuntil(b"\n")
                        break
                    except asyncio.LimitOverrunError as more:
                        await reader.readexactly(more.consumed)
            self._refuse(None, 413, Code.BODY_UNSEEN, f"a message has at most {MAX_LINE_BYTES} bytes here")
            return b""

    async def _take(self, line: bytes) -> None:
        try:
            outline = outline_of(line)
        except ValueError:
            # The gateway says what is wrong, and records it.
            outline = Outline(None, None, None, None, None, None)
        if outline.method == CANCELLED and outline.about in self._calls:
            # To leave is how HTTP cancels a request. The gateway asks nobody about it any more, and the server is told.
            self._calls[outline.about].cancel()
            return
        if not outline.is_request:
            # In its place: what follows an `initialized` must not overtake it.
            await self._post(line, outline)
            if outline.method == INITIALIZED and self._stream is None:
                self._stream = asyncio.create_task(self._listen())
            return
        id = outline.id
        assert id is not None
        if id in self._calls:
            self._refuse(
                id, _BAD_REQUEST, Code.MCP_ID_TAKEN, "a request with this id is under way: use another id"
            )
            return
        await self._free.acquire()
        call = self._calls[id] = asyncio.create_task(self._post(line, outline))
        call.add_done_callback(lambda done: self._end_call(id, done))

    def _end_call(self, id: Id, call: asyncio.Task[None]) -> None:
        self._free.release()
        if self._calls.get(id) is call:
            del self._calls[id]
        if not call.cancelled() and (error := call.exception()) is not None:
            # Not the error itself: it may hold what was sent.
            log.error("a request failed: %s", type(error).__name__)
            self._refuse(id, 500, Code.INTERNAL, "the request could not be carried to the gateway")

    # --- calls ---

    async def _post(self, line: bytes, outline: Outline) -> None:
        answered = False

        def pass_on(message: bytes) -> None:
            nonlocal answered
            found = _outline(message)
            if found is not None and found.is_response and found.id == outline.id:
                answered = True
                if outline.method == INITIALIZE:
                    self._negotiated = found.negotiated or self._negotiated
            self._write(message)

        try:
            async with self._http.stream(
                "POST", self._url, content=line, headers=self._headers(outline)
            ) as answer:
                if await self._read(answer, outline.id, pass_on):
                    answered = True
        except httpx.HTTPError as error:
            log.info("a call ended: %s", type(error).__name__)
        if outline.is_request and not answered:
            self._refuse(
                outline.id,
                502,
                Code.STREAM_ENDED,
                "the call ended without an answer: see the log of the gateway",
            )

    async def _read(self, answer: httpx.Response, id: Id | None, pass_on: Write) -> bool:
        """Read what comes of a call. Returns whether it is over with that: no stream, which may lack an answer."""
        kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if answer.status_code == HTTPStatus.OK and kind == _EVENTS:
            async for message in _events(answer):
                pass_on(message)
            return False
        body = await answer.aread()
        if kind == _JSON and _is_rpc(body):
            if id is None:
                log.warning(_REFUSED, _rpc_text(body), extra=rate_limited("refused"))
            pass_on(orjson.dumps(orjson.loads(body)))
        elif answer.status_code >= _BAD_REQUEST:
            problem = _problem(body, answer.status_code)
            if id is None:
                log.warning(_REFUSED, problem["detail"], extra=rate_limited("refused"))
            else:
                text = f"{problem['code']}: {problem['detail']}"
                pass_on(_error(id, answer.status_code, text, problem))
        else:
            return False
        return True

    async def _listen(self) -> None:
        """Keep the client's own stream open, where the task may have it (GET, up to 2025-11-25)."""
        headers = {"Accept": _EVENTS, **self._version(self._negotiated)}
        while True:
            try:
                async with self._http.stream("GET", self._url, headers=headers) as answer:
                    if answer.status_code != HTTPStatus.OK:
                        log.info(
                            "the task may not have a stream of the server's own messages: %d",
                            answer.status_code,
                        )
                        return
                    async for message in _events(answer):
                        self._write(message)
            except httpx.HTTPError as error:
                log.info("the stream of the server's own messages ended: %s", type(error).__name__)
            await asyncio.sleep(_REOPEN_S)

    def _headers(self, outline: Outline) -> dict[str, str]:
        headers = {"Content-Type": _JSON, "Accept": f"{_JSON}, {_EVENTS}"}
        if outline.version is None:
            return headers if outline.method == INITIALIZE else {**headers, **self._version(self._negotiated)}
        headers |= self._version(outline.version)
        if outline.version >= _STATELESS and outline.is_request:
            headers["Mcp-Method"] = header_value(outline.method or "")
            if outline.name is not None:
                headers["Mcp-Name"] = header_value(outline.name)
        return headers

    def _version(self, version: str | None) -> dict[str, str]:
        return {"MCP-Protocol-Version": header_value(version)} if version is not None else {}

    def _refuse(self, id: Id | None, status: int, code: Code, detail: str) -> None:
        self._write(
            _error(id, status, f"{code}: {detail}", {"code": code, "detail": detail, "status": status})
        )


async def _events(answer: httpx.Response) -> AsyncIterator[bytes]:
    """The messages in a stream of events, each as one line (HTML, 9.2.6). The gateway ends lines with LF or CR LF."""
    buffer, data = bytearray(), list[bytes]()
    async for piece in answer.aiter_bytes():
        buffer += piece
        *lines, rest = buffer.split(b"\n")
        buffer = bytearray(rest)
        for line in (bytes(one).removesuffix(b"\r") for one in lines):
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield b" ".join(data)
                data = []


def _outline(message: bytes) -> Outline | None:
    try:
        return outline_of(message)
    except ValueError:
        return None


def _is_rpc(body: bytes) -> bool:
    try:
        return bool(orjson.loads(body).get("jsonrpc"))
    except (ValueError, AttributeError):
        return False


def _rpc_text(body: bytes) -> str:
    error = orjson.loads(body).get("error")
    return str(error.get("message"))[:300] if isinstance(error, dict) else "an answer without a request"


def _problem(body: bytes, status: int) -> dict[str, Any]:
    """The problem details in an answer (RFC 9457)."""
    with contextlib.suppress(ValueError):
        found = orjson.loads(body)
        if isinstance(found, dict) and "code" in found and "detail" in found:
            return found
    return {"code": Code.HTTP_STATUS, "detail": f"it was answered {status}", "status": status}


def _error(id: Id | None, code: int, message: str, data: Mapping[str, Any]) -> bytes:
    error = {"code": code, "message": message, "data": data}
    return orjson.dumps({"jsonrpc": "2.0", "id": id, "error": error})


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
