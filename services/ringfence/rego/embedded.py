"""The embedded engine: evaluates the bundle with regorus, compiled once, in worker processes of the service.

A worker process answers in time, or it is killed and a new one replaces it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections import deque
from typing import cast

import orjson

from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.codes import Code
from ringfence.rego.bundle import Bundle, BundleError
from ringfence.rego.engine import (
    ISSUANCE,
    Answer,
    PolicyFailedError,
    PolicyTimeoutError,
    PolicyUnavailableError,
    read_result,
)

START_TIMEOUT_S = 60.0
"""How long a bundle may take to compile and to pass its tests."""
_ONCE_MORE_S = 0.05
_INHERITED = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "LANG", "LC_ALL")
"""What a worker sees of the environment: nothing that a bundle should not."""


class WorkerLostError(RingfenceError):
    """The worker ended before this input's turn came: another worker may answer it."""

    code = Code.WORKER_LOST


class Worker(asyncio.Protocol):
    """One worker with one bundle. Answers come in the order of the inputs. Made by `start_worker`."""

    def __init__(self, revision: str, timeout_s: float) -> None:
        self.revision = revision
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[asyncio.Future[bytes]] = deque()
        self._outgoing: list[bytes] = []
        self._received = bytearray()
        self._turn_began = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._late = False
        self._overdue = False
        self._drained: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._process: asyncio.subprocess.Process | None = None

    @property
    def alive(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, message: bytes) -> bytes:
        """Its answer to one message.

        Raises PolicyTimeoutError if that took longer than the time-out from its turn on, PolicyFailedError if it
        ended the worker, WorkerLostError if its turn never came.
        """
        if self._transport is None or self._transport.is_closing():
            raise WorkerLostError("the worker has ended")
        answer: asyncio.Future[bytes] = self._loop.create_future()
        if not self._waiting:
            self._turn_began, self._late = self._loop.time(), False
            if self._timer is None:
                self._timer = self._loop.call_later(self._timeout_s, self._look)
        self._waiting.append(answer)
        if not self._outgoing:
            self._loop.call_soon(self._write)
        self._outgoing += (len(message).to_bytes(4, "big"), message)
        return await answer

    async def retire(self) -> None:
        """Answer what was asked, then end."""
        if self.alive and self._waiting:
            self._drained = self._loop.create_future()
            await self._drained
        await self.end()

    async def end(self) -> None:
        """End it at once; what it was asked is lost."""
        if self._transport is not None:
            self._transport.abort()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    # --- the socket ---

    def _write(self) -> None:
        """What was asked in one turn of the loop goes out together."""
        message, self._outgoing = b"".join(self._outgoing), []
        if self._transport is not None:
            self._transport.write(message)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while len(self._received) >= 4:
            end = 4 + int.from_bytes(self._received[:4], "big")
            if len(self._received) < end:
                return
            message = bytes(self._received[4:end])
            del self._received[:end]
            self._turn_began, self._late = self._loop.time(), False
            answer = self._waiting.popleft()
            if not answer.done():
                answer.set_result(message)
        if self._drained is not None and not self._waiting and not self._drained.done():
            self._drained.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        failure: RingfenceError = PolicyFailedError(
            "the policy bundle could not be evaluated: its worker ran out of memory or crashed"
        )
        if self._overdue:
            failure = PolicyTimeoutError(
                f"the policy bundle did not answer within {self._timeout_s * 1000:.0f} ms"
            )
        for answer in self._waiting:
            if not answer.done():
                answer.set_exception(failure)
            failure = WorkerLostError("the worker ended over what was asked before")
        self._waiting.clear()
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    # --- the watch ---

    def _look(self) -> None:
        """One timer looks after all inputs: set for the earliest moment at which the present turn may be over."""
        self._timer = None
        if not self._waiting:
            return
        left_s = self._turn_began + self._timeout_s - self._loop.time()
        if left_s <= 0 and not self._late:
            # Where this loop was late itself, the answer is there and only has to be read.
            self._late, left_s = True, _ONCE_MORE_S
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look)
            return
        self._overdue = True
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        if self._transport is not None:
            self._transport.abort()


async def start_worker(bundle: Bundle, entry_point: str, timeout_s: float) -> Worker:
    """A worker that evaluates `entry_point` of a bundle, compiled and tested.

    Raises BundleError if the bundle is not fit for it, PolicyUnavailableError if no process can be started.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "ringfence.rego.worker_process", str(os.getpid()),
                stdin=theirs.fileno(), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
                env={name: os.environ[name] for name in _INHERITED if name in os.environ},
            )  # fmt: skip
        except OSError as error:
            ours.close()
            raise PolicyUnavailableError(f"no worker could be started for policy: {error.strerror}") from None
    worker = Worker(bundle.revision, timeout_s)
    worker._process = process
    ours.setblocking(False)
    await worker._loop.create_unix_connection(lambda: worker, sock=ours)
    document = {"modules": bundle.modules, "tests": bundle.tests, "entry_point": entry_point}
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            problem = await _starting(worker, orjson.dumps(document))
    except TimeoutError:
        problem = f"it took longer than {START_TIMEOUT_S:.0f} s to compile and to pass its tests"
    except (PolicyFailedError, WorkerLostError):
        problem = "it crashed the process that compiled and tested it, or took all its memory"
    except BaseException:
        await worker.end()
        raise
    if problem:
        await worker.end()
        raise BundleError(f"the policy bundle {bundle.folder} cannot be used: {problem}")
    return worker


async def _starting(worker: Worker, document: bytes) -> str:
    """What the worker says of its bundle. Judged by another time-out than its answers."""
    timeout_s, worker._timeout_s = worker._timeout_s, 2 * START_TIMEOUT_S
    try:
        return (await worker.ask(document)).decode()
    finally:
        worker._timeout_s = timeout_s
        if worker._timer is not None:
            worker._timer.cancel()
            worker._timer = None


log = logging.getLogger(__name__)

TIMEOUT_MS = 1000
_TRIES = 5
"""So many workers may be lost over the inputs of others before an input is given up."""


class EmbeddedEngine:
    """A `PolicyEngine` without a server. A new worker replaces one that was killed."""

    def __init__(self, bundle: Bundle, *, timeout_ms: int = TIMEOUT_MS, entry_point: str = ISSUANCE) -> None:
        """Nothing is evaluated before `start`. `timeout_ms` is what one evaluation may take."""
        self._bundle = bundle
        self._timeout_s = timeout_ms / 1000
        self._entry_point = entry_point
        self._worker: Worker | None = None
        self._replacing = asyncio.Lock()

    @property
    def revision(self) -> str:
        return self._bundle.revision

    async def start(self) -> None:
        await self.use(self._bundle)

    async def use(self, bundle: Bundle) -> None:
        worker = await start_worker(bundle, self._entry_point, self._timeout_s)
        async with self._replacing:
            before, self._worker, self._bundle = self._worker, worker, bundle
        if before is not None:
            await before.retire()

    async def evaluate(self, input_json: bytes) -> Answer:
        for _ in range(_TRIES):
            worker = self._worker
            if worker is None or not worker.alive:
                worker = await self._replaced()
            try:
                answer = await worker.ask(input_json)
            except WorkerLostError:
                continue
            if answer[:1] != b"+":
                raise PolicyFailedError(
                    f"the policy bundle could not be evaluated: {answer[1:].decode(errors='replace')}"
                )
            return Answer(read_result(answer[1:]), worker.revision)
        raise PolicyUnavailableError("the policy engine was lost again and again over other requests")

    async def close(self) -> None:
        if self._worker is not None:
            await self._worker.end()

    async def _replaced(self) -> Worker:
        """The worker that takes the place of a lost one: the first who notices starts it."""
        async with self._replacing:
            if self._worker is None or not self._worker.alive:
                log.error("the policy worker was lost; a new one is started")
                if self._worker is not None:
                    await self._worker.end()
                try:
                    self._worker = await start_worker(self._bundle, self._entry_point, self._timeout_s)
                except BundleError as error:  # it was fit before: the machine is out of something
                    raise PolicyUnavailableError(str(error)) from None
            return self._worker
