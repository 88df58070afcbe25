"""A runner as a process of its own, driven by JSON lines: `python host.py OPTIONS`. It imports nothing of the tests.

Each line of its input is a call, `{"id": 1, "call": "start", …}`; each line of its output answers one. What commands
write is collected and returned by `wait`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from ringfence.kernel.base.errors import RingfenceError
from ringfence.runner.sandbox import bubblewrap
from ringfence.runner.sandbox.backend import (
    Mount,
    ResourceLimits,
    Sandbox,
    SandboxBackend,
    SandboxSpec,
    Streams,
)


class Host:
    def __init__(self, backend: SandboxBackend) -> None:
        self._backend = backend
        self._sandboxes: dict[str, Sandbox] = {}
        self._said: dict[str, list[asyncio.Task[bytes]]] = {}
        self._feeding: list[asyncio.Task[None]] = []

    async def start(self, spec: dict[str, Any], stdin: str | None = None) -> dict[str, Any]:
        made = _spec(spec)
        read_out, out = os.pipe2(os.O_CLOEXEC)
        read_err, err = os.pipe2(os.O_CLOEXEC)
        entrance, feed = os.pipe2(os.O_CLOEXEC)
        # In a thread: it may be more than a pipe holds.
        self._feeding.append(asyncio.create_task(asyncio.to_thread(_feed, feed, (stdin or "").encode())))
        try:
            sandbox = await self._backend.start(made, Streams(entrance, out, err))
        finally:
            for descriptor in (out, err, entrance):
                os.close(descriptor)
        self._sandboxes[made.run_id] = sandbox
        self._said[made.run_id] = [asyncio.create_task(_collect(read)) for read in (read_out, read_err)]
        return {"pid": sandbox.pid}

    async def wait(self, run_id: str) -> dict[str, Any]:
        ended = await self._sandboxes[run_id].wait()
        return {"code": ended.code, "reason": ended.reason.value}

    async def said(self, run_id: str) -> list[str]:
        return [(await task).decode(errors="replace") for task in self._said[run_id]]

    async def signal(self, run_id: str, number: int) -> None:
        self._sandboxes[run_id].signal(number)

    async def freeze(self, run_id: str) -> None:
        await self._sandboxes[run_id].freeze()

    async def thaw(self, run_id: str) -> None:
        await self._sandboxes[run_id].thaw()

    async def destroy(self, run_id: str) -> dict[str, Any]:
        return _report(await self._sandboxes[run_id].destroy())

    async def sweep(self) -> list[dict[str, Any]]:
        return [_report(one) for one in await self._backend.sweep()]

    async def available(self) -> list[str]:
        return await self._backend.available()


def _spec(fields: dict[str, Any]) -> SandboxSpec:
    fields = dict(fields)
    fields["argv"] = tuple(fields["argv"])
    fields["addresses"] = tuple(fields.pop("addresses", ()))
    fields["mounts"] = tuple(
        Mount(Path(host), inside, writable, tuple(hidden))
        for host, inside, writable, *hidden in fields.pop("mounts", ())
    )
    fields["files"] = {path: text.encode() for path, text in fields.pop("files", {}).items()}
    fields["limits"] = ResourceLimits(**fields.pop("limits", {}))
    sockets = {name: Path(fields.pop(name)) for name in ("socket", "control") if fields.get(name)}
    return SandboxSpec(**{**fields, **sockets})


def _report(destruction: Any) -> dict[str, Any]:
    return {
        "run_id": destruction.run_id,
        "complete": destruction.complete,
        "left": [*destruction.processes, *destruction.mounts, *destruction.cgroups, *destruction.files],
        "usage": vars(destruction.usage),
    }


def _feed(descriptor: int, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError), os.fdopen(descriptor, "wb") as file:
        file.write(data)


async def _collect(descriptor: int) -> bytes:
    return await asyncio.to_thread(_read_all, descriptor)


def _read_all(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb") as file:
        return file.read(1 << 20)


async def _answer(host: Host, call: dict[str, Any]) -> None:
    number, name = call.pop("id"), call.pop("call")
    try:
        answer = {"id": number, "result": await getattr(host, name)(**call)}
    except RingfenceError as error:
        answer = {
            "id": number,
            "error": {"code": error.code, "message": error.message, "remedy": error.remedy},
        }
    except Exception as error:
        answer = {"id": number, "error": {"code": "crash", "message": repr(error), "remedy": None}}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


async def _serve(backend: SandboxBackend) -> None:
    host = Host(backend)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    tasks = set()
    while line := await reader.readline():
        task = asyncio.create_task(_answer(host, json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


def _give_all_capabilities() -> None:
    """Make the command root of its user namespace in full, as if it had found a way to become that."""
    arguments = bubblewrap._Start._arguments

    def with_capabilities(*given: Any) -> list[str]:
        made = arguments(*given)
        made[made.index("--cap-drop")] = "--cap-add"
        return made

    bubblewrap._Start._arguments = with_capabilities  # type: ignore[assignment, method-assign]


def _backend(options: dict[str, Any]) -> SandboxBackend:
    kind, state = options.pop("kind"), Path(options.pop("state"))
    if options.pop("all_capabilities", False):
        _give_all_capabilities()
    if kind == "bubblewrap":
        return bubblewrap.BubblewrapBackend(state, **options)
    # It needs httpx, which the Python of an ordinary user may lack.
    from ringfence.runner.sandbox.oci import OciBackend

    return OciBackend(state, **options)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    asyncio.run(_serve(_backend(json.loads(sys.argv[1]))))
