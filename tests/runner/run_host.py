"""A runner's part in a run, for tests of init: a sandbox, its control channel, and a gateway that says what it saw."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ringfence.messages.keys import PublicJwk
from ringfence.runner.control.channel import ControlChannel, ControlLostError
from ringfence.runner.control.messages import InitReport, Relay, StartCommand
from ringfence.runner.control.relays import hosts_of, needs_low_ports
from ringfence.runner.init.command import init_command
from ringfence.runner.sandbox.backend import Mount, Sandbox, SandboxExit, SandboxSpec, Streams
from ringfence.runner.sandbox.bubblewrap import BubblewrapBackend

TRUST_DOMAIN = "acme.example"
AGENT = "bot"
ENROLMENT = "enrolment.of.this.run"
WITHIN_S = 60.0


@dataclass
class Finished:
    """The end of a run."""

    code: int
    stdout: bytes
    stderr: bytes
    report: InitReport | None

    @property
    def text(self) -> str:
        return self.stdout.decode()


@dataclass
class Run:
    """A run whose command has started."""

    sandbox: Sandbox
    channel: ControlChannel
    key: PublicJwk
    enrolment: bytes
    streams: list[asyncio.Task[bytes]] = field(default_factory=list)

    async def finish(self) -> Finished:
        """Wait for the end, and check that nothing is left."""
        try:
            report: InitReport | None = await self.channel.ended()
        except ControlLostError:
            report = None
        ended: SandboxExit = await self.sandbox.wait()
        await self.close()
        stdout, stderr = [await stream for stream in self.streams]
        return Finished(ended.code, stdout, stderr, report)

    async def close(self) -> None:
        self.channel.close()
        report = await self.sandbox.destroy()
        assert report.complete, report


class RunHost:
    """Starts runs in bubblewrap sandboxes, each as the lifecycle of a runner does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._backend = BubblewrapBackend(folder / "state")
        self._open: list[Run] = []

    async def start(
        self,
        *argv: str,
        stdin: bytes = b"",
        environment: Mapping[str, str] | None = None,
        working_directory: str = "/home/agent",
        relays: Sequence[Relay] = (),
        socket: Path | None = None,
        ca_pem: str | None = None,
        mounts: Sequence[Mount] = (),
        **fields: Any,
    ) -> Run:
        """Raises CommandStartError, once its sandbox has been destroyed."""
        run_id = f"t-{secrets.token_hex(6)}"
        private = self.folder / run_id
        private.mkdir()
        channel = ControlChannel.listen(private)
        init = init_command("bubblewrap")
        spec = SandboxSpec(
            run_id=run_id,
            argv=init.argv,
            mounts=(*init.mounts, *mounts),
            control=channel.path,
            socket=socket,
            hosts=hosts_of(relays),
            low_ports=needs_low_ports(relays),
            **fields,
        )
        read_out, out = os.pipe2(os.O_CLOEXEC)
        read_err, err = os.pipe2(os.O_CLOEXEC)
        entrance, feed = os.pipe2(os.O_CLOEXEC)
        try:
            sandbox = await self._backend.start(spec, Streams(entrance, out, err))
        finally:
            for descriptor in (out, err, entrance):
                os.close(descriptor)
        streams = [asyncio.create_task(asyncio.to_thread(_read_all, read)) for read in (read_out, read_err)]
        writing = asyncio.create_task(asyncio.to_thread(_write_all, feed, stdin))
        streams[0].add_done_callback(lambda _: writing)  # keeps it alive
        try:
            await channel.accept(WITHIN_S)
            key = await channel.public_key()
            enrolment = await channel.enrol("a token", trust_domain=TRUST_DOMAIN, agent_id=AGENT)
            run = Run(sandbox, channel, key, enrolment, streams)
            self._open.append(run)
            await channel.start(
                StartCommand(
                    argv=argv,
                    environment=environment or {},
                    working_directory=working_directory,
                    enrolment=ENROLMENT,
                    trust_root="root-fingerprint",
                    trust_domain=TRUST_DOMAIN,
                    agent_id=AGENT,
                    task_id="5b0e6a5e-61c5-4d4b-9f6a-5a1f6d7d3b52",
                    relays=tuple(relays),
                    ca_pem=ca_pem,
                )
            )
        except BaseException:
            channel.close()
            assert (await sandbox.destroy()).complete
            raise
        return run

    async def run(self, *argv: str, **fields: Any) -> Finished:
        """Run a command to its end."""
        return await (await self.start(*argv, **fields)).finish()

    async def python(self, program: str, *arguments: str, **fields: Any) -> Finished:
        return await self.run("/usr/bin/python3", "-c", program, *arguments, **fields)

    async def close(self) -> None:
        for run in self._open:
            await run.close()


@asynccontextmanager
async def run_host() -> AsyncIterator[RunHost]:
    """A host whose folder is short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="ringfence-runs-"))
    host = RunHost(folder)
    try:
        yield host
    finally:
        await host.close()
        shutil.rmtree(folder)


def _read_all(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def _write_all(descriptor: int, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError), os.fdopen(descriptor, "wb") as file:
        file.write(data)
