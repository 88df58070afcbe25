"""A real sshd for tests, on loopback, set up as the document says, and the broker's rights there.

It knows users that the machine does not have (libnss-wrapper), all of them the one that runs the tests: whoever that
is, root or not, nothing of the machine's own is touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ringfence.backends import SshBackend
from ringfence.backends.ssh import host_helper
from ringfence.client.agent.credentials import ssh_files
from ringfence.dev.processes import LOOPBACK, Child, StackError, free_port, spawn
from tests.support.servers.redis_target import Placed

DOCUMENT = Path(__file__).parents[3] / "docs" / "targets" / "ssh.md"
"""What is set up here is what it says."""
BROKER = "ringfence-broker"
HELPER = Path(host_helper.__file__)
_INSTALLED = "/usr/local/sbin/ringfence-ssh-helper"
_START_S = 30.0
_WRAPPERS = ("/usr/lib/*/libnss_wrapper.so", "/usr/lib64/libnss_wrapper.so")


def documented(language: str) -> str:
    """The first block of this language in the document."""
    return DOCUMENT.read_text().partition(f"```{language}\n")[2].partition("```")[0]


class SshServer:
    """One server. Everything of it is in `folder`, and goes with `stop`."""

    def __init__(self, users: Mapping[str, Any]) -> None:
        """`users`: what certificates can be good for, as the configuration of the program has it."""
        self.port = 0
        self._users = dict(users)
        self._child: Child | None = None
        self._folder = Path()
        self._sshd = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        self._wrapper = next((found for glob in _WRAPPERS for found in Path("/").glob(glob[1:])), None)
        if self._sshd is None or self._wrapper is None or shutil.which("ssh") is None:
            raise StackError(
                "OpenSSH or libnss-wrapper is missing: apt-get install openssh-server openssh-client libnss-wrapper"
            )

    @property
    def folder(self) -> Path:
        """Everything of the server's."""
        return self._folder

    @property
    def state(self) -> Path:
        return self._folder / "state"

    @property
    def config(self) -> Path:
        """The configuration of the program on the host."""
        return self._folder / "ringfence-ssh.json"

    @property
    def log(self) -> Path:
        return self._folder / "server.log"

    @property
    def host_key(self) -> str:
        return (self._folder / "host.pub").read_text().strip()

    @property
    def authority(self) -> str:
        return (self._folder / "authority").read_text()

    def start(self) -> None:
        """Return once it answers. Raises StackError."""
        self._folder = Path(tempfile.mkdtemp(prefix="ringfence-sshd-"))
        for name in ("host", "authority"):
            keygen("-t", "ed25519", "-N", "", "-C", name, "-f", str(self._folder / name))
        self._write_users()
        self.write_config(self._users)
        subprocess.run([*self.helper, "init"], check=True)
        self.launch()

    def write_config(self, users: Mapping[str, Any]) -> None:
        """What the administrator of the host decides."""
        given = json.loads(documented("json"))
        given |= {
            "authorities": [(self._folder / "authority.pub").read_text()],
            "state": str(self.state),
            "users": dict(users),
        }
        self.config.write_text(json.dumps(given))
        self.config.chmod(0o644)

    @property
    def helper(self) -> list[str]:
        """The program on the host, without an argument."""
        return [sys.executable, "-IS", str(HELPER), "--config", str(self.config)]

    def launch(self, without: str = "") -> None:
        """Start it, on the port that it had; `without` lines that have this word, if any."""
        self.port = self.port or free_port()
        self._write_server_config(without)
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        environment = {
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "LD_PRELOAD": str(self._wrapper),
            "NSS_WRAPPER_PASSWD": str(self._folder / "passwd"),
            "NSS_WRAPPER_GROUP": "/etc/group",
        }
        argv = [str(self._sshd), "-D", "-e", "-f", str(self._folder / "sshd_config")]
        self._child = spawn("sshd", argv, log_path=self.log, env=environment, cwd=self._folder)
        try:
            self._child.wait_until(self._answers, _START_S, f"takes connections on port {self.port}")
        except BaseException:
            self._child.kill()
            raise

    def halt(self) -> None:
        """End it, and all its connections."""
        if self._child is not None and self._child.alive:
            everything = psutil.Process(self._child.pid).children(recursive=True)
            self._child.kill()
            for process in everything:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(everything, timeout=10)

    def stop(self) -> None:
        """End it and delete its folder."""
        self.halt()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write_users(self) -> None:
        own = [
            line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith("deploy:")
        ]
        made = [
            f"{user}:x:{os.getuid()}:{os.getgid()}::{self._folder}:/bin/sh" for user in (BROKER, *self._users)
        ]
        (self._folder / "passwd").write_text("\n".join(own + made) + "\n")

    def _write_server_config(self, without: str) -> None:
        program = shlex.join(self.helper)
        lines = documented("sshd_config")
        for there, here in (
            ("/etc/ssh/ringfence_ca.pub", str(self._folder / "authority.pub")),
            ("/var/lib/ringfence-ssh", str(self.state)),
            (
                f"AuthorizedPrincipalsCommand {_INSTALLED}",
                f"AuthorizedPrincipalsCommand /usr/bin/env {program}",
            ),
            (f"sudo -n {_INSTALLED}", program),
            ("AuthorizedPrincipalsCommandUser root", f"AuthorizedPrincipalsCommandUser {getpass.getuser()}"),
        ):
            assert there in lines, there
            lines = lines.replace(there, here)
        if without:
            lines = "\n".join(line for line in lines.splitlines() if without not in line)
        head = [
            f"ListenAddress {LOOPBACK}:{self.port}",
            f"HostKey {self._folder / 'host'}",
            "PidFile none",
            "UsePAM no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "LogLevel VERBOSE",
            "Subsystem sftp internal-sftp",
        ]
        path = self._folder / "sshd_config"
        path.write_text("\n".join(head) + "\n" + lines)
        # Newer ones leave alone where many refusals come from, which here is everybody.
        more = "PerSourcePenalties no"
        known = subprocess.run(
            [str(self._sshd), "-t", "-f", str(path), "-o", more], capture_output=True, check=False
        )
        if known.returncode == 0:
            path.write_text("\n".join([*head, more]) + "\n" + lines)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, self.port), 1) as probe:
            return probe.recv(4) == b"SSH-"
        return False


def keygen(*args: str) -> str:
    """What ssh-keygen says. Raises CalledProcessError."""
    done = subprocess.run(
        ["ssh-keygen", *args], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    )
    return done.stdout


# --- a target on it ---------------------------------------------------------------------------------------------------


class SshTarget(Placed):
    """A server as a target. Agents reach it at `address`."""

    def __init__(self, target_id: str, server: SshServer, folder: Path) -> None:
        super().__init__(target_id, folder)
        self.server = server

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.server.port}"

    def backend(self, trust_domain: str = "test.example") -> SshBackend:
        return SshBackend(trust_domain, self.access())

    def write_secret(self, address: str | None = None) -> None:
        """Name the server, or another address, as the place where Ringfence works."""
        where = f"ssh://{BROKER}@{address or self.address}"
        self.place(f"{where}\n{self.server.host_key}\n{self.server.authority}")

    def names(self) -> set[str]:
        """The leases that stand there, whichever trust domain's."""
        folders = (self.server.state / "open", self.server.state / "sessions")
        return {path.name for folder in folders for path in folder.iterdir()}


# --- OpenSSH's client -------------------------------------------------------------------------------------------------


@dataclass
class Client:
    """What somebody who has a credential does with it."""

    config: Path
    target: str = "thing"

    def argv(self, *options: str, command: str = "") -> list[str]:
        words = ["ssh", "-F", str(self.config), *options, self.target]
        return [*words, command] if command else words

    @contextlib.asynccontextmanager
    async def open(self, *options: str, command: str = "") -> AsyncIterator[asyncio.subprocess.Process]:
        """The client with pipes to it; it ends with the block."""
        pipe = asyncio.subprocess.PIPE
        argv = self.argv(*options, command=command)
        process = await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe, stderr=pipe)
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(
                    process.pid, signal.SIGKILL
                )  # not by its own method, which may take its status for itself
            await process.communicate()

    async def run(self, *options: str, command: str = "", given: bytes = b"") -> tuple[int, bytes, str]:
        """Exit status, and what it and its errors say."""
        async with self.open(*options, command=command) as process:
            said, told = await asyncio.wait_for(process.communicate(given), 60)
        assert process.returncode is not None
        return process.returncode, said, told.decode(errors="replace")


@contextlib.asynccontextmanager
async def client(value: str) -> AsyncIterator[Client]:
    """OpenSSH's client with a credential of target `thing`, as `ringfence request --exec` gives it to one."""
    with tempfile.TemporaryDirectory(prefix="ringfence-ssh-client-") as folder:
        yield Client(ssh_files(value, "thing", Path(folder)))


async def may(value: str, *act: str) -> bool:
    """Whether the holder of a credential may do this: options of ssh, then the command. Other errors fail the test."""
    *options, command = act
    async with client(value) as ssh:
        status, said, told = await ssh.run(*options, command=command, given=b"ping\n")
    if "PTY allocation request failed" in told:
        return False
    if status == 0:
        assert said == b"ping\n", said
        return True
    assert status == 126 or any(word in told for word in REFUSALS), told
    return False


REFUSALS = (  # by the server; with 126 it is the program that chooses among commands
    "Permission denied (publickey)",
    "open failed: administratively prohibited",
    "remote port forwarding failed",
)


async def lives(session: asyncio.subprocess.Process) -> bool:
    """Whether what echoes still does."""
    assert session.stdin is not None
    assert session.stdout is not None
    try:
        session.stdin.write(b"ping\n")
        await session.stdin.drain()
        return await asyncio.wait_for(session.stdout.readline(), 30) == b"ping\n"
    except OSError:
        return False
