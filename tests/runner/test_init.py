"""Init in a real sandbox: the command, its end, its streams, and what it has."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.keys import SigningKey, public_key
from ringfence.messages.enrolment import InstanceEnrol
from ringfence.runner.control.channel import CommandStartError
from ringfence.runner.control.messages import EnrolMessage
from ringfence.runner.init.instance import sign_enrolment
from ringfence.runner.init.instance_key import InstanceKey
from tests.runner.run_host import AGENT, ENROLMENT, TRUST_DOMAIN, RunHost, run_host


@pytest.fixture
async def host() -> AsyncIterator[RunHost]:
    async with run_host() as host:
        yield host


async def test_the_exit_code_and_the_streams_are_the_commands(host: RunHost) -> None:
    data = os.urandom(3_000_000)
    ended = await host.run("sh", "-c", "cat; echo done >&2; exit 7", stdin=data)
    assert (ended.code, ended.stderr) == (7, b"done\n")
    assert ended.stdout == data
    assert ended.report is not None
    assert ended.report.exit_code == 7


async def test_arguments_and_variables_may_be_any_bytes(host: RunHost) -> None:
    strange = os.fsdecode(b"\xff\xfe 'x'\n\xc3\xa4")
    program = "import os, sys; print(ascii(os.fsencode(sys.argv[1])), ascii(os.environb[b'GIVEN']))"
    ended = await host.python(program, strange, environment={"GIVEN": strange})
    assert ended.text == f"{os.fsencode(strange)!r} {os.fsencode(strange)!r}\n"


@pytest.mark.parametrize(
    ("argv", "code"),
    [(["/no/such/program"], 127), (["no-such-program"], 127), (["/etc/passwd"], 126), (["/usr"], 126)],
)
async def test_a_command_that_cannot_be_run_is_reported_as_a_shell_does(
    host: RunHost, argv: list[str], code: int
) -> None:
    with pytest.raises(CommandStartError) as refused:
        await host.start(*argv)
    assert refused.value.exit_code == code
    assert argv[0] in refused.value.message


async def test_a_working_directory_that_is_not_there_is_reported(host: RunHost) -> None:
    with pytest.raises(CommandStartError, match="/no/such/folder") as refused:
        await host.start("true", working_directory="/no/such/folder")
    assert refused.value.exit_code == 126


async def test_a_command_that_a_signal_ends_is_reported_as_a_shell_does(host: RunHost) -> None:
    ended = await host.run("sh", "-c", "kill -TERM $$")
    assert ended.code == 128 + signal.SIGTERM


async def test_the_key_of_the_enrolment_is_the_one_in_memory_inside(host: RunHost) -> None:
    run = await host.start(
        *("sh", "-c", 'cat "$RINGFENCE_RUN_INSTANCE/key.json" "$RINGFENCE_RUN_INSTANCE/enrolment.jws"')
    )
    ended = await run.finish()
    decoder = json.JSONDecoder()
    key, end = decoder.raw_decode(ended.text)
    assert ended.text[end:].strip() == ENROLMENT
    assert key["id"] == f"spiffe://{TRUST_DOMAIN}/agent/{AGENT}"
    assert key["jwk"]["x"] == run.key.x
    claims = parse(run.enrolment.decode()).unverified_claims(InstanceEnrol)
    assert (claims.iss, claims.key, claims.token) == (key["id"], run.key, "a token")


def test_what_the_instance_key_writes_is_what_the_kernel_reads(tmp_path: Path) -> None:
    key = InstanceKey()
    key.save(tmp_path / "key.json", "spiffe://acme.example/agent/bot")
    loaded = SigningKey.load(tmp_path / "key.json")
    assert (loaded.id, loaded.kid) == ("spiffe://acme.example/agent/bot", key.kid)
    assert loaded.public.model_dump(exclude_none=True) == key.jwk
    text = sign_enrolment(key, EnrolMessage("a token", "acme.example", "bot"))
    signed = verify(
        parse(text),
        InstanceEnrol,
        lambda issuer, kid: public_key(loaded.public) if (issuer, kid) == (loaded.id, key.kid) else None,
        audience="acme.example",
        appended_at_ms=time.time_ns() // 1_000_000,
    )
    assert signed.claims.key == loaded.public
