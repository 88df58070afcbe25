"""A runner's part in a run, for tests of init: a sandbox, its control channel, and a gateway that says what it saw."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ringfence.messages.base import PublicJwk
from ringfence.runner.control.channel import ControlChannel, ControlLostError
from ringfence.runner.control.messages import (
    InitReport,
    Relay,
    StartCommand,
    addresses_of,
    hosts_of,
    needs_low_ports,
)
from ringfence.runner.init.command import init_command
from ringfence.runner.sandbox.backend import Mount, Sandbox, SandboxExit, SandboxSpec, Streams
from ringfence.runner.sandbox.bubblewrap import BubblewrapBackend

TRUST_DOMAIN = "acme.example"
AGENT = "bot"
ENROLMENT = "enrolment.of.this.run"
TASK = "5b0e6a5e-61c5-4d4b-9f6a-5a1f6d7d3b52"
WITHIN_S = 30.0


def _certificate() -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gateway")])
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
        .decode()
    )


CA_PEM = _certificate()
"""A certificate that nobody has the key of."""


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


class Output:
    """What comes out of a pipe."""

    def __init__(self, descriptor: int) -> None:
        self._data = bytearray()
        self._arrived = asyncio.Condition()
        self._reading = asyncio.create_task(self._read(descriptor))

    async def until(self, text: bytes) -> None:
        """Wait until this has come."""
        async with asyncio.timeout(WITHIN_S), self._arrived:
            await self._arrived.wait_for(lambda: text in self._data)

    async def whole(self) -> bytes:
        """Wait for the end."""
        await self._reading
        return bytes(self._data)

    async def _read(self, descriptor: int) -> None:
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", buffering=0)
        )
        while data := await reader.read(65536):
            async with self._arrived:
                self._data += data
                self._arrived.notify_all()
        transport.close()


@dataclass
class Run:
    """A run whose command has started."""

    sandbox: Sandbox
    channel: ControlChannel
    key: PublicJwk
    enrolment: bytes
    stdout: Output
    stderr: Output

    async def finish(self) -> Finished:
        """Wait for the end, and check that nothing is left."""
        try:
            report: InitReport | None = await self.channel.ended()
        except ControlLostError:
            report = None
        ended: SandboxExit = await self.sandbox.wait()
        await self.close()
        return Finished(ended.code, await self.stdout.whole(), await self.stderr.whole(), report)

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
        self._writing: list[asyncio.Task[None]] = []

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
        enrol: Callable[[PublicJwk], str] = lambda jwk: ENROLMENT,
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
            addresses=addresses_of(relays),
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
        stdout, stderr = Output(read_out), Output(read_err)
        self._writing.append(asyncio.create_task(asyncio.to_thread(_write_all, feed, stdin)))
        try:
            await channel.accept(WITHIN_S)
            key = await channel.public_key()
            enrolment = await channel.enrol("a token", trust_domain=TRUST_DOMAIN, agent_id=AGENT)
            run = Run(sandbox, channel, key, enrolment, stdout, stderr)
            self._open.append(run)
            await channel.start(
                StartCommand(
                    argv=argv,
                    environment=environment or {},
                    working_directory=working_directory,
                    enrolment=enrol(key),
                    trust_root="x" * 43,
                    trust_domain=TRUST_DOMAIN,
                    agent_id=AGENT,
                    task_id=TASK,
                    relays=tuple(relays),
                    ca_pem=ca_pem,
                )
            )
        except BaseException as error:
            channel.close()
            assert (await sandbox.destroy()).complete
            error.add_note((await stderr.whole()).decode(errors="replace"))
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
        await asyncio.gather(*self._writing)


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


def _write_all(descriptor: int, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError), os.fdopen(descriptor, "wb") as file:
        file.write(data)
