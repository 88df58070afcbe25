"""The runner's side of the control channel against whoever may be at the other end."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ringfence.kernel.crypto.keys import SigningKey
from ringfence.runner.control import channel as channel_module
from ringfence.runner.control.channel import CommandStartError, ControlChannel, ControlLostError
from ringfence.runner.control.messages import (
    MAX_FROM_INIT_BYTES,
    ControlMessageError,
    EnrolmentMessage,
    EnrolMessage,
    InitReport,
    PublicKeyMessage,
    Relay,
    StartCommand,
    StartedMessage,
    StartFailedMessage,
    decode,
    encode,
)
from ringfence.runner.init.instance import InstanceKey, sign_enrolment

START = StartCommand(
    argv=("sh", "-c", "true"),
    environment={"A": "1"},
    working_directory="/tmp",
    enrolment="e",
    trust_root="r",
    trust_domain="acme.example",
    agent_id="bot",
    task_id="t",
    relays=(Relay("db.test", 5432, "127.0.1.1"),),
)


@dataclass
class Peer:
    """Whoever connected to the control socket."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def read(self) -> bytes:
        return await self.reader.readline()

    def write(self, data: bytes) -> None:
        self.writer.write(data)


@pytest.fixture
async def channel(tmp_path: Path) -> AsyncIterator[ControlChannel]:
    (tmp_path / "c").mkdir()
    channel = ControlChannel.listen(tmp_path / "c")
    yield channel
    channel.close()


@pytest.fixture
async def peer(channel: ControlChannel) -> AsyncIterator[Peer]:
    peer = Peer(*await asyncio.open_unix_connection(str(channel.path)))
    await channel.accept(10)
    yield peer
    peer.writer.close()


def line(**members: Any) -> bytes:
    return json.dumps(members).encode() + b"\n"


async def test_the_socket_is_for_all_and_its_folder_for_the_runner_alone(channel: ControlChannel) -> None:
    """A stranger who could connect first would be enrolled as the run."""
    assert stat.S_IMODE(channel.path.stat().st_mode) == 0o666
    assert stat.S_IMODE(channel.path.parent.stat().st_mode) == 0o700


async def test_one_connection_is_accepted_and_the_socket_is_gone(channel: ControlChannel) -> None:
    first, second = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    first.connect(str(channel.path))
    # It waits in the queue, as one that comes in the same moment would.
    second.connect(str(channel.path))
    kept = os.open(channel.path, os.O_PATH)
    await channel.accept(10)
    assert not channel.path.exists()
    second.settimeout(10)
    with pytest.raises(ConnectionResetError):
        if second.recv(1) == b"":
            raise ConnectionResetError
    third = socket.socket(socket.AF_UNIX)
    with pytest.raises(ConnectionRefusedError):
        third.connect(f"/proc/self/fd/{kept}")
    os.close(kept)
    for one in (first, second, third):
        one.close()


async def test_without_a_connection_the_socket_goes_too(channel: ControlChannel) -> None:
    with pytest.raises(ControlLostError, match="did not connect"):
        await channel.accept(0.01)
    assert not channel.path.exists()


async def test_a_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    with pytest.raises(ControlLostError, match="too long"):
        ControlChannel.listen(folder)


async def test_the_order_of_a_run(channel: ControlChannel, peer: Peer) -> None:
    key = InstanceKey()
    peer.write(encode(PublicKeyMessage(key.jwk)))
    assert (await channel.public_key()).x == key.jwk["x"]
    enrolling = asyncio.create_task(channel.enrol("a token", trust_domain="acme.example", agent_id="bot"))
    enrol = decode(await peer.read(), EnrolMessage)
    text = sign_enrolment(key, enrol)
    peer.write(encode(EnrolmentMessage(text)))
    assert await enrolling == text.encode()
    starting = asyncio.create_task(channel.start(START))
    assert decode(await peer.read(), StartCommand) == START
    peer.write(encode(StartedMessage()))
    await starting
    peer.write(encode(InitReport(7, 1, 2, 3, 4)))
    assert await channel.ended() == InitReport(7, 1, 2, 3, 4)


GARBAGE = {
    "nothing": b"",
    "no line": b"{}",
    "no JSON": b"hello\n",
    "binary": b"\xff\x00\xfe\n",
    "no object": b"[]\n",
    "empty": b"\n",
    "deep": b"[" * 60_000 + b"\n",
    "a name twice": b'{"type":"public_key","type":"public_key","jwk":{}}\n',
    "too long": b'{"type":"public_key","jwk":{"x":"' + b"a" * MAX_FROM_INIT_BYTES + b'"}}\n',
    "endless": b"a" * (4 * MAX_FROM_INIT_BYTES),
    "another message": encode(StartedMessage()),
    "out of order": encode(InitReport(0)),
    "a message of the runner": encode(EnrolMessage("a", "b", "c")),
    "unknown": line(type="other"),
    "type is no text": line(type=["public_key"]),
    "without members": line(type="public_key"),
    "more members": line(type="public_key", jwk={}, more=1),
    "members of another type": line(type="public_key", jwk=[1]),
    "numbers for texts": line(type="public_key", jwk={"kty": 1}),
    "no key": line(type="public_key", jwk={}),
    "a private key": line(type="public_key", jwk={**InstanceKey().jwk, "d": "AAAA"}),
    "not on the curve": line(type="public_key", jwk={**InstanceKey().jwk, "y": InstanceKey().jwk["x"]}),
    "a key that cannot sign": line(type="public_key", jwk={"kty": "OKP", "crv": "X25519", "x": "A" * 43}),
    "surrogates": b'{"type":"public_key","jwk":{"kty":"\\ud800"}}\n',
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
async def test_garbage_instead_of_a_key_ends_the_channel(
    channel: ControlChannel, peer: Peer, data: bytes
) -> None:
    peer.write(data)
    if data.endswith(b"\n") is False and len(data) <= MAX_FROM_INIT_BYTES:
        peer.writer.write_eof()
    with pytest.raises(ControlLostError):
        await channel.public_key()
    # It is closed: what follows is not believed any more.
    with pytest.raises(ControlLostError):
        await channel.start(START)


async def test_silence_ends_the_channel(
    channel: ControlChannel, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "ANSWER_WITHIN_S", 0.05)
    with pytest.raises(ControlLostError, match="did not answer"):
        await channel.public_key()


async def test_peer_that_does_not_read_is_given_up(
    channel: ControlChannel, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "ANSWER_WITHIN_S", 0.05)
    peer.reader._transport.pause_reading()  # type: ignore[attr-defined]
    big = StartCommand(**{**_fields(START), "environment": {"A": "x" * 4_000_000}})
    with pytest.raises(ControlLostError, match="does not read"):
        await channel.start(big)


def _fields(command: StartCommand) -> dict[str, Any]:
    return {name: getattr(command, name) for name in StartCommand.__slots__}


def _other_key(key: InstanceKey, enrol: EnrolMessage) -> str:
    return sign_enrolment(InstanceKey(), enrol)


def _other_token(key: InstanceKey, enrol: EnrolMessage) -> str:
    return sign_enrolment(key, EnrolMessage("another", enrol.trust_domain, enrol.agent_id))


def _other_message(key: InstanceKey, enrol: EnrolMessage) -> str:
    return key.sign("credential.request", {"iss": "x"})


@pytest.mark.parametrize(
    "answer",
    [_other_key, _other_token, _other_message, lambda *_: "garbage", lambda *_: "a.b.c", lambda *_: ""],
)
async def test_another_enrolment_than_was_asked_for_ends_the_channel(
    channel: ControlChannel, peer: Peer, answer: Callable[[InstanceKey, EnrolMessage], str]
) -> None:
    key = InstanceKey()
    peer.write(encode(PublicKeyMessage(key.jwk)))
    await channel.public_key()
    enrolling = asyncio.create_task(channel.enrol("a token", trust_domain="acme.example", agent_id="bot"))
    enrol = decode(await peer.read(), EnrolMessage)
    peer.write(encode(EnrolmentMessage(answer(key, enrol))))
    with pytest.raises(ControlLostError):
        await enrolling


@pytest.mark.parametrize(("code", "expected"), [(127, 127), (126, 126), (0, 126), (99999, 126)])
async def test_a_start_that_failed_has_the_code_of_a_shell(
    channel: ControlChannel, peer: Peer, code: int, expected: int
) -> None:
    peer.write(encode(StartFailedMessage(code, "x\x1b[2J" * 500)))
    with pytest.raises(CommandStartError) as refused:
        await channel.start(START)
    assert refused.value.exit_code == expected
    assert "\x1b" not in refused.value.message
    assert len(refused.value.message) < 4000


@pytest.mark.parametrize("code", [256, 1 << 40])
async def test_an_exit_code_that_no_program_has_is_not_believed(
    channel: ControlChannel, peer: Peer, code: int
) -> None:
    peer.write(encode(InitReport(code)))
    with pytest.raises(ControlLostError):
        await channel.ended()


@pytest.mark.parametrize("code", [-1, True, "1", 1.0, None])
async def test_an_exit_code_is_a_number(channel: ControlChannel, peer: Peer, code: Any) -> None:
    members = {"proxy_connections": 0, "relay_connections": 0, "sent_bytes": 0, "received_bytes": 0}
    peer.write(line(type="ended", exit_code=code, **members))
    with pytest.raises(ControlLostError):
        await channel.ended()


async def test_the_end_of_init_without_a_word_is_an_error(channel: ControlChannel, peer: Peer) -> None:
    peer.writer.close()
    with pytest.raises(ControlLostError, match="has ended"):
        await channel.ended()


def test_texts_of_the_operating_system_pass_unchanged() -> None:
    strange = os.fsdecode(bytes(range(1, 256)))
    command = StartCommand(**{**_fields(START), "argv": (strange, ""), "environment": {strange: strange}})
    assert decode(encode(command), StartCommand) == command


def test_a_nul_is_refused() -> None:
    with pytest.raises(ControlMessageError):
        encode(StartCommand(**{**_fields(START), "argv": ("a\0b",)}))


@pytest.mark.parametrize("port", [0, 65536, -1, "22", True])
def test_a_relay_with_another_port_is_refused(port: Any) -> None:
    members = json.loads(encode(START))
    members["relays"][0]["port"] = port
    with pytest.raises(ControlMessageError):
        decode(line(**members), StartCommand)


def test_secrets_are_in_no_representation() -> None:
    command = StartCommand(**{**_fields(START), "environment": {"TOKEN": "s3cret"}, "enrolment": "s3cret"})
    for message in (command, EnrolMessage("s3cret", "d", "a"), EnrolmentMessage("s3cret")):
        assert "s3cret" not in repr(message)


def test_the_key_is_in_no_representation() -> None:
    assert SigningKey.generate("x").kid not in repr(InstanceKey())
