"""What is ssh's own: what certificates say, ways in, whole connections, the KRL, and what the host decides."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from ringfence.backends import AccessError, SshBackend, TargetError, TargetRefusedError
from ringfence.backends.ssh.backend import SshLogin
from ringfence.backends.ssh.certificates import for_ringfence, private_text
from ringfence.backends.ssh.host_helper import serial_of
from ringfence.messages.base import Permission
from ringfence.messages.lease import Lease
from tests.backends.kinds import SSH_USERS, TARGET, SshKind, allow, lease, state
from tests.support.servers.ssh import BROKER, SshTarget, client, keygen, lives, may

ECHO = b"ping\n"


@pytest.fixture
def target(ssh_kind: SshKind) -> SshTarget:
    return ssh_kind.target


@pytest.fixture
async def backend(target: SshTarget) -> AsyncIterator[SshBackend]:
    backend = target.backend()
    yield backend
    await backend.close()


def wanting(*scope: Permission, **fields: Any) -> Lease:
    return lease("ssh", *scope, **fields)


READS_A = allow("read", "deploy/a")


async def value_of(backend: SshBackend, one: Lease, **settings: Any) -> str:
    target = state("ssh", **settings)
    assert backend.problem(one, target) is None
    return (await backend.mint(one, target)).value


def said_of(value: str, folder: Path) -> str:
    """What ssh-keygen reads in the certificate, with blanks made one."""
    (folder / "cert.pub").write_text(json.loads(value)["certificate"] + "\n")
    return " ".join(keygen("-L", "-f", str(folder / "cert.pub")).split())


# --- what a certificate says ------------------------------------------------------------------------------------------


async def test_certificate_says_what_the_lease_says_and_nothing_else(
    backend: SshBackend, tmp_path: Path
) -> None:
    one = wanting(READS_A, allow(("read", "write"), "deploy/b"))
    said = said_of(await value_of(backend, one, source_address="10.0.0.0/8, 192.0.2.7"), tmp_path)
    name = f"test.example.{one.lease_id}"
    assert f'Key ID: "ringfence:{name}" Serial: {serial_of(name)} Valid: from ' in said
    until = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(one.deadline))
    assert f" to {until} Principals: ringfence:deploy Critical Options: force-command " in said
    assert (
        " run deploy read:a read:b write:b source-address 10.0.0.0/8,192.0.2.7/32 Extensions: (none)" in said
    )
    await backend.undo(one.lease_id, target_id=TARGET)


@pytest.mark.parametrize("wrong", ["10.0.0.1/8", "everywhere", "10.0.0.0/8,", "", "*"])
async def test_networks_that_are_none_are_refused(backend: SshBackend, wrong: str) -> None:
    assert "operator" in (backend.problem(wanting(READS_A), state("ssh", source_address=wrong)) or "")


async def test_from_elsewhere_it_is_good_for_nothing(backend: SshBackend) -> None:
    one = wanting(READS_A)
    assert not await may(await value_of(backend, one, source_address="192.0.2.0/24"), "read a")
    assert await may(await value_of(backend, one, source_address="127.0.0.0/8"), "read a")
    await backend.undo(one.lease_id, target_id=TARGET)


async def test_only_permitted_command_needs_no_name(backend: SshBackend) -> None:
    one = wanting(READS_A)
    async with client(await value_of(backend, one)) as ssh:
        assert (await ssh.run(given=ECHO))[:2] == (0, ECHO)
        status, said, told = await ssh.run(command="write a", given=ECHO)
        assert (status, said) == (126, b"")
        assert "this credential runs: read a" in told
    await backend.undo(one.lease_id, target_id=TARGET)


# --- ways in ----------------------------------------------------------------------------------------------------------


async def test_a_shell_is_every_command_and_nothing_beside_it(backend: SshBackend, tmp_path: Path) -> None:
    one = wanting(allow("shell", "deploy"))
    value = await value_of(backend, one)
    assert said_of(value, tmp_path).endswith("Critical Options: (none) Extensions: (none)")
    assert await may(value, "/bin/cat")
    assert await may(value, "read line && echo $line")
    assert not await may(value, "-tt", "cat")
    assert not await may(value, "-W", "127.0.0.1:1", "")
    await backend.undo(one.lease_id, target_id=TARGET)


async def test_a_terminal_is_for_the_commands_that_there_are(backend: SshBackend, tmp_path: Path) -> None:
    one = wanting(READS_A, allow("terminal", "deploy"))
    value = await value_of(backend, one)
    assert said_of(value, tmp_path).endswith("Extensions: permit-pty")
    assert not await may(value, "-tt", "/bin/cat")
    await backend.undo(one.lease_id, target_id=TARGET)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's sshd can give a terminal to anybody")
async def test_a_terminal_is_one(backend: SshBackend) -> None:
    one = wanting(READS_A, allow("terminal", "deploy"))
    value = await value_of(backend, one)
    async with client(value) as ssh, ssh.open("-tt", command="read a") as session:
        assert session.stdin is not None
        assert session.stdout is not None
        session.stdin.write(ECHO)
        echoed = [await asyncio.wait_for(session.stdout.readline(), 30) for _ in range(2)]
        assert echoed == [b"ping\r\n"] * 2  # by the terminal, and by the command
    await backend.undo(one.lease_id, target_id=TARGET)


@contextlib.asynccontextmanager
async def greeter() -> AsyncIterator[int]:
    """A port at which somebody says hello."""

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def test_to_forward_is_not_to_run(backend: SshBackend, tmp_path: Path) -> None:
    one = wanting(allow("forward", "deploy"))
    value = await value_of(backend, one)
    assert said_of(value, tmp_path).endswith("Extensions: permit-port-forwarding")
    async with greeter() as port, client(value) as ssh:
        assert (await ssh.run("-W", f"127.0.0.1:{port}"))[:2] == (0, b"hello\n")
    for act in ("read a", "cat", ""):
        assert not await may(value, act)
    await backend.undo(one.lease_id, target_id=TARGET)


# --- how it ends ------------------------------------------------------------------------------------------------------


async def test_a_connection_in_which_nothing_runs_ends_too(backend: SshBackend) -> None:
    one = wanting(allow("forward", "deploy"))
    async with client(await value_of(backend, one)) as ssh, ssh.open("-v", "-N") as held:
        assert held.stderr is not None
        while b"Entering interactive session" not in await asyncio.wait_for(held.stderr.readline(), 30):
            pass
        await backend.undo(one.lease_id, target_id=TARGET)
        await asyncio.wait_for(held.wait(), 30)
        assert held.returncode == 255


async def test_processes_of_a_session_end_with_it(backend: SshBackend) -> None:
    one = wanting(allow("shell", "deploy"))
    script = "trap '' HUP TERM; sleep 600 & sleep 601 & (sleep 602; true) & echo $$; wait"
    async with client(await value_of(backend, one)) as ssh, ssh.open(command=script) as session:
        assert session.stdout is not None
        shell = psutil.Process(int(await asyncio.wait_for(session.stdout.readline(), 30)))
        while len(shell.children(recursive=True)) < 4:
            await asyncio.sleep(0.01)
        running = [shell, *shell.children(recursive=True)]
        await backend.undo(one.lease_id, target_id=TARGET)
        assert not [process for process in running if process.is_running() and process.status() != "zombie"]


async def test_other_leases_of_the_same_user_go_on(backend: SshBackend) -> None:
    one, other = wanting(READS_A), wanting(READS_A)
    async with (
        client(await value_of(backend, one)) as first,
        client(await value_of(backend, other)) as second,
        first.open(command="read a") as ending,
        second.open(command="read a") as lasting,
    ):
        assert await lives(ending)
        assert await lives(lasting)
        await backend.undo(one.lease_id, target_id=TARGET)
        assert not await lives(ending)
        assert await lives(lasting)
        await backend.undo(other.lease_id, target_id=TARGET)


async def test_ssh_keygen_says_of_the_krl_what_the_leases_say(
    backend: SshBackend, target: SshTarget, tmp_path: Path
) -> None:
    leases = [wanting(READS_A) for _ in range(4)]
    files = []
    for at, one in enumerate(leases):
        value = await value_of(backend, one)
        files.append(tmp_path / f"{at}-cert.pub")
        files[-1].write_text(json.loads(value)["certificate"] + "\n")
    await backend.undo(leases[1].lease_id, target_id=TARGET)
    await backend.undo(leases[3].lease_id, target_id=TARGET)
    login = SshLogin.parse(target.secret_file.read_text())
    key = Ed25519PrivateKey.generate().public_key()
    files.append(tmp_path / "own-cert.pub")
    files[-1].write_text(for_ringfence(login.authority, key, BROKER, int(time.time())) + "\n")
    krl = target.server.state / "krl"
    said = subprocess.run(
        ["ssh-keygen", "-Q", "-f", krl, *files], capture_output=True, text=True, check=False
    )
    verdicts = re.findall(r"-cert\.pub.*: (ok|REVOKED)$", said.stdout, re.MULTILINE)
    assert verdicts == ["ok", "REVOKED", "ok", "REVOKED", "ok"], said
    for one in leases:
        await backend.undo(one.lease_id, target_id=TARGET)


async def test_each_lock_holds_without_the_other(backend: SshBackend, target: SshTarget) -> None:
    one = wanting(READS_A)
    value = await value_of(backend, one)
    krl, open_ = target.server.state / "krl", target.server.state / "open" / f"test.example.{one.lease_id}"
    announced, everything_but_it = open_.read_bytes(), krl.read_bytes()
    open_.unlink()
    assert not await may(value, "read a")  # the program says no
    open_.write_bytes(announced)
    assert await may(value, "read a")
    await backend.undo(one.lease_id, target_id=TARGET)
    open_.write_bytes(announced)
    assert not await may(value, "read a")  # the KRL says no
    krl.write_bytes(everything_but_it)
    assert await may(value, "read a")
    await backend.undo(one.lease_id, target_id=TARGET)


async def test_a_state_that_is_lost_lets_nobody_in(backend: SshBackend, target: SshTarget) -> None:
    one = wanting(READS_A)
    value = await value_of(backend, one)
    shutil.rmtree(target.server.state)
    assert not await may(value, "read a")
    with pytest.raises(TargetError):  # nor Ringfence, as sshd cannot read the KRL
        await target.backend().standing(TARGET)
    subprocess.run([*target.server.helper, "init"], check=True)
    assert not await may(value, "read a")
    assert one.lease_id not in await backend.standing(TARGET)
    assert await may(await value_of(backend, one), "read a")
    assert await may(value, "read a")  # it is announced again
    await backend.undo(one.lease_id, target_id=TARGET)


# --- what the host decides --------------------------------------------------------------------------------------------


async def test_changed_host_configuration_applies_at_once(backend: SshBackend, target: SshTarget) -> None:
    one, shell = wanting(READS_A), wanting(allow("shell", "deploy"))
    value = await value_of(backend, one)
    try:
        target.server.write_config({"deploy": {"read": {"b": ["/bin/cat"]}}})
        async with client(value) as ssh:
            status, _, told = await ssh.run(given=ECHO)
            assert status == 1
            assert "there is no command read a any more" in told
        for wanted, why in ((one, "means no command"), (shell, "does not allow it")):
            with pytest.raises(TargetRefusedError, match=why):
                await backend.mint(wanted, state("ssh"))
        target.server.write_config({"other": {}})
        assert not await may(value, "read a")
        with pytest.raises(TargetRefusedError, match="no certificate can be for user 'deploy'"):
            await backend.mint(one, state("ssh"))
        target.server.config.chmod(0o666)
        with pytest.raises(TargetError, match="can be changed by others"):
            await backend.mint(one, state("ssh"))
    finally:
        target.server.write_config(SSH_USERS)
    assert await may(value, "read a")
    await backend.undo(one.lease_id, target_id=TARGET)


async def test_ringfence_itself_gets_the_program_that_answers_and_nothing_else(
    backend: SshBackend, target: SshTarget
) -> None:
    login = SshLogin.parse(target.secret_file.read_text())
    key = Ed25519PrivateKey.generate()
    value = {
        "url": f"ssh://{BROKER}@{target.address}/",
        "host_keys": list(login.host_keys),
        "certificate": for_ringfence(login.authority, key.public_key(), BROKER, int(time.time())),
        "private_key": private_text(key),
    }
    async with client(json.dumps(value)) as ssh:
        for asked in ("", "/bin/sh -c id", "run deploy read:a"):
            status, said, _ = await ssh.run(command=asked)
            assert (status, json.loads(said)) == (0, {"ringfence": 1})
        for options in (("-W", "127.0.0.1:1"), ("-l", "deploy"), ("-l", "root")):
            assert (await ssh.run(*options))[0] == 255, options


async def test_a_host_that_trusts_the_authority_but_has_no_program_lets_nobody_in(
    backend: SshBackend, target: SshTarget, tmp_path: Path
) -> None:
    one = wanting(READS_A)
    value = await value_of(backend, one)
    server = target.server
    config = server.folder / "sshd_config"
    await asyncio.to_thread(server.halt)
    try:
        await asyncio.to_thread(server.launch, without="AuthorizedPrincipals")
        assert "AuthorizedPrincipals" not in config.read_text()
        assert not await may(value, "read a")
    finally:
        await asyncio.to_thread(server.halt)
        await asyncio.to_thread(server.launch)
    assert await may(value, "read a")
    await backend.undo(one.lease_id, target_id=TARGET)


# --- Ringfence's own rights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("ssh://", "https://"), "no ssh://user@host:port"),
        ((f"{BROKER}@", ""), "no ssh://user@host:port"),
        (("ssh-ed25519", "ssh-nothing"), "a public key of the host is none"),
        (("BEGIN OPENSSH", "BEGIN"), "no private key of an authority"),
    ],
)
async def test_invalid_ssh_login_is_rejected(target: SshTarget, change: tuple[str, str], why: str) -> None:
    text = target.secret_file.read_text()
    with pytest.raises(ValueError, match=why):
        SshLogin.parse(text.replace(*change))


async def test_why_there_is_no_connection_is_said(
    target: SshTarget, ssh_kind: SshKind, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = ssh_kind.wrong_secrets()
    try:
        for what, why in (("password", "PermissionDenied"), ("another host", "HostKeyNotVerifiable")):
            target.secret_file.write_text(wrong[what])
            with pytest.raises(TargetError, match=f"does not answer \\({why}\\)"):
                await target.backend().standing(TARGET)
    finally:
        target.write_secret()
    await asyncio.to_thread(target.server.halt)
    try:
        await asyncio.to_thread(target.server.launch, without="ForceCommand")
        with pytest.raises(TargetError, match="no ringfence-ssh-helper there"):
            await target.backend().standing(TARGET)
        assert "serve" in caplog.text  # which is no command of the shell's, as that says
    finally:
        await asyncio.to_thread(target.server.halt)
        await asyncio.to_thread(target.server.launch)


async def test_one_who_gives_up_takes_nobody_along(backend: SshBackend) -> None:
    await backend.standing(TARGET)  # a connection is there
    for _ in range(5):
        asked = [asyncio.create_task(backend.standing(TARGET)) for _ in range(8)]
        await asyncio.sleep(0)
        asked[3].cancel()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(answers.pop(3), asyncio.CancelledError)
        assert all(isinstance(answer, frozenset) for answer in answers), answers


async def test_an_authority_is_ed25519_without_a_passphrase(target: SshTarget, tmp_path: Path) -> None:
    keygen("-t", "ed25519", "-N", "a passphrase", "-f", str(tmp_path / "locked"))
    other = generate_private_key(SECP256R1()).private_bytes(
        Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()
    )
    try:
        for authority, why in (
            ((tmp_path / "locked").read_text(), "passphrase"),
            (other.decode(), "not Ed25519"),
        ):
            head = target.secret_file.read_text().partition("-----")[0]
            target.secret_file.write_text(head + authority)
            with pytest.raises(AccessError, match=why):
                await target.backend().standing(TARGET)
    finally:
        target.write_secret()
