"""The runner's side of the control channel. The other end is untrusted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path
from typing import Final, TypeVar

from pydantic import ValidationError

from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError
from ringfence.kernel.crypto import jws as signed
from ringfence.kernel.crypto.keys import public_key
from ringfence.messages.base import PublicJwk
from ringfence.messages.codes import Code
from ringfence.messages.enrolment import InstanceEnrol
from ringfence.runner.control.messages import (
    MAX_FROM_INIT_BYTES,
    ControlMessageError,
    EnrolmentMessage,
    EnrolMessage,
    InitReport,
    Message,
    PublicKeyMessage,
    StartCommand,
    StartedMessage,
    StartFailedMessage,
    decode,
    encode,
)

NAME: Final = "control.sock"
ANSWER_WITHIN_S: Final = 30.0
"""How long an answer of init may take. A busy machine needs some tenths of a second."""
_MAX_PATH_BYTES: Final = 107
_SHELL_CODES: Final = (126, 127)
_MAX_REASON: Final = 500
_PUBLIC_MEMBERS: Final = frozenset({"kty", "crv", "x", "y"})

M = TypeVar("M", bound=Message)


class ControlLostError(RingfenceError):
    """Raised if the init of a sandbox ended, missed a deadline, or broke the protocol. End its sandbox."""

    code = Code.CONTROL_LOST


class CommandStartError(RingfenceError):
    """Raised if the command cannot be run. `exit_code` is a shell's: 127 not found, 126 not executable."""

    code = Code.COMMAND_NOT_STARTED

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ControlChannel:
    """One control channel. Its methods are called once each, in the order in which they stand here.

    All of them raise ControlLostError. After that, the channel is closed.
    """

    def __init__(self, path: Path, listener: socket.socket) -> None:
        """Use `listen`."""
        self.path = path
        self._listener: socket.socket | None = listener
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._key: PublicJwk | None = None

    @classmethod
    def listen(cls, folder: Path) -> ControlChannel:
        """Listen at `control.sock` in a folder that only this user can enter.

        The sandbox reaches the socket by its mount, and needs no right to the folder. Users of this machine who could
        enter it could act as the sandbox's init, so the folder is closed to them. Raises OSError, and
        ControlLostError if the path is too long for a socket.
        """
        folder.chmod(0o700)
        path = folder / NAME
        if len(os.fsencode(path)) > _MAX_PATH_BYTES:
            raise ControlLostError(
                f"{path} is too long for the path of a socket, which has {_MAX_PATH_BYTES} bytes"
            ).with_remedy("give the runner a folder with a shorter path")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.setblocking(False)
            listener.bind(os.fspath(path))
            # The user inside is another one than the runner's.
            path.chmod(0o666)
            listener.listen(1)
        except OSError:
            listener.close()
            raise
        return cls(path, listener)

    async def accept(self, within_s: float) -> None:
        """Wait up to `within_s` seconds for the one connection. After it, or if none comes, nobody can connect."""
        assert self._listener is not None, "a channel accepts once"
        connection: socket.socket | None = None
        try:
            async with asyncio.timeout(within_s):
                connection, _ = await asyncio.get_running_loop().sock_accept(self._listener)
        except TimeoutError:
            raise ControlLostError(f"the init of the sandbox did not connect within {within_s:g} s") from None
        finally:
            self._end_listening()
        self._reader, self._writer = await asyncio.open_unix_connection(
            sock=connection, limit=MAX_FROM_INIT_BYTES
        )

    async def public_key(self) -> PublicJwk:
        """Receive the public key of the instance, which init made."""
        message = await self._receive(PublicKeyMessage, within_s=ANSWER_WITHIN_S)
        if not message.jwk.keys() <= _PUBLIC_MEMBERS:
            raise self._lost("its key has members that no public key has")
        try:
            jwk = PublicJwk.model_validate(dict(message.jwk))
            public_key(jwk)
        except (ValidationError, ValueError):
            raise self._lost("its key is no public key that signs") from None
        self._key = jwk
        return jwk

    async def enrol(self, token: str, *, trust_domain: str, agent_id: str) -> bytes:
        """Let init sign the enrolment of the key with `token`. Returns its signed `instance.enrol` for the registry.

        The registry verifies the signature. Here the message is only compared with the request.
        """
        await self._send(EnrolMessage(token, trust_domain, agent_id))
        message = await self._receive(EnrolmentMessage, within_s=ANSWER_WITHIN_S)
        try:
            claims = signed.parse(message.jws).unverified_claims(InstanceEnrol)
        except InvalidMessageError:
            raise self._lost("it signed no instance.enrol") from None
        if claims.key != self._key or claims.token != token:
            raise self._lost("it signed another enrolment than it was asked for")
        return message.jws.encode()

    async def start(self, command: StartCommand) -> None:
        """Start the command; returns when it runs. Raises CommandStartError if it cannot be run."""
        await self._send(command)
        message = await self._receive(StartedMessage, StartFailedMessage, within_s=ANSWER_WITHIN_S)
        if isinstance(message, StartFailedMessage):
            self.close()
            code = message.code if message.code in _SHELL_CODES else _SHELL_CODES[0]
            raise CommandStartError(message.reason[:_MAX_REASON], code)

    async def ended(self) -> InitReport:
        """Wait for the end of the command. ControlLostError if init ended without a report, as after SIGKILL."""
        report = await self._receive(InitReport, within_s=None)
        if report.exit_code > 255:
            raise self._lost("it reports an exit code that no program has")
        return report

    def close(self) -> None:
        """Close the channel. Init kills a command that still runs: its runner is gone."""
        self._end_listening()
        if self._writer is not None:
            self._writer.close()

    def _end_listening(self) -> None:
        if self._listener is not None:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
            # Who waits to be accepted is refused with it.
            self._listener.close()
            self._listener = None

    async def _send(self, message: Message) -> None:
        assert self._writer is not None, "accept comes first"
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                self._writer.write(encode(message))
                await self._writer.drain()
        except TimeoutError:
            raise self._lost("it does not read what it is told") from None
        except OSError:
            raise self._lost("it has ended") from None

    async def _receive(self, *expected: type[M], within_s: float | None) -> M:
        assert self._reader is not None, "accept comes first"
        try:
            async with asyncio.timeout(within_s):
                line = await self._reader.readuntil(b"\n")
        except TimeoutError:
            raise self._lost(f"it did not answer within {within_s:g} s") from None
        except asyncio.LimitOverrunError:
            raise self._lost("it sent a message that is too long") from None
        except (asyncio.IncompleteReadError, OSError):
            raise self._lost("it has ended") from None
        try:
            return decode(line, *expected)
        except ControlMessageError as error:
            raise self._lost(error.message) from None

    def _lost(self, reason: str) -> ControlLostError:
        self.close()
        return ControlLostError(f"the init of the sandbox is not to be relied on: {reason}")
