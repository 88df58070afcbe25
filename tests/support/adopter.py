"""Who adopts a credential: a developer on a running stack, by the command line."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ringfence.cli.commands.dev import client_settings
from ringfence.client.admin.administrator import Administrator
from ringfence.dev.stack import Stack
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.registry import Role
from ringfence.model.identity.spiffe_ids import spiffe_id
from tests.runner.installation import Installation

PROGRAM = (sys.executable, "-m", "ringfence.cli.main")


@dataclass
class Adopter:
    """A developer with a folder of their own, who is operator, sponsor and the agent's user by three key files."""

    stack: Stack
    folder: Path
    mark: str
    secrets: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "RINGFENCE_CONFIG": os.devnull,
            "RINGFENCE_GATEWAY_SOCKETS": str(self.stack.sockets),
            "RINGFENCE_GATEWAY_CA_FILE": str(self.stack.gateway_ca),
            **self.stack.environment(),
        }
        self.keys = {
            "--operator": self.stack.trust.user_key(self.stack.options.operator),
            "--sponsor": self.folder / "sam.json",
            "--user": self.folder / "maria.json",
        }

    @property
    def agent(self) -> str:
        return f"bot-{self.mark}"

    def place(self, target: str) -> Path:
        return self.stack.secrets / target

    async def make(self, by: Path | None = None) -> Adopter:
        """Make the sponsor and the user. `by`: the key of who gives them their keys; olga's if not given."""
        settings = client_settings(self.stack.environment())
        async with Administrator.connect(by or self.keys["--operator"], settings) as olga:
            made: tuple[tuple[str, list[Role]], ...] = (("sam", ["sponsor"]), ("maria", []))
            for who, roles in made:
                name = f"{who}-{self.mark}"
                key = SigningKey.generate(spiffe_id(settings.trust_domain, "user", name))
                key.save(self.folder / f"{who}.json")
                await olga.set_user(name, name=who.title(), roles=roles, keys=[key], entitlements=())
        return self

    async def run(self, *words: str, status: int = 0) -> str:
        """What a command printed. No output has a secret."""
        process = await asyncio.create_subprocess_exec(
            *words, cwd=self.folder, env=self.environment, stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        printed = (await asyncio.wait_for(process.communicate(), 120))[0].decode()
        assert process.returncode == status, printed
        for secret in self.secrets:
            assert secret not in printed
        return printed

    async def adopt(
        self, *words: str, without: Sequence[str] = (), status: int = 0, program: Sequence[str] = PROGRAM
    ) -> str:
        keys = [word for role, key in self.keys.items() if role not in without for word in (role, str(key))]
        return await self.run(*program, "adopt", *words, *keys, "--yes", status=status)

    async def ringfence(self, role: str, *words: str) -> str:
        return await self.run(*PROGRAM, "--identity", str(self.keys[role]), *words)

    async def as_printed(self, printed: str, role: str) -> None:
        """Run the command that another person has to run, as they would."""
        command = printed.partition("then run adopt again: ringfence ")[2].strip()
        await self.ringfence(role, *shlex.split(command))

    def state(self) -> dict[str, bytes]:
        """All files of the folder of the state, by name."""
        return {
            one.name: one.read_bytes() for one in (self.folder / ".local/state/ringfence/adopt").iterdir()
        }


def adopt_in(here: Installation, home: Path, secret: str, *words: str, status: int = 0) -> str:
    """What `ringfence adopt` printed on an installation, without the secret. `home`: of the developer."""
    users = here.folder / ".ringfence/users"
    keys = [
        word
        for role, who in (("operator", "olga"), ("sponsor", "sam"), ("user", "maria"))
        for word in (f"--{role}", str(users / f"{who}.json"))
    ]
    environment = {**here.environment(), "HOME": str(home), "XDG_STATE_HOME": str(home / "state")}
    done = here.call("adopt", *words, "--yes", *keys, environment=environment)
    printed = (done.stdout + done.stderr).decode()
    assert done.returncode == status, printed
    assert secret not in printed
    return printed
