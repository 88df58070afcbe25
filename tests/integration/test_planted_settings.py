"""Attack: a settings file that somebody left in a folder, to have whoever works there send a secret to its broker."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringfence.kernel.crypto.keys import SigningKey

SDK = """
import asyncio, sys
from ringfence import Agent
async def main():
    async with Agent.connect(key=sys.argv[1]) as agent:
        pass
asyncio.run(main())
"""
WITHIN_S = 60


class Trap:
    """A broker, and HTTP services, of the attacker's: counts who connects, and lets go of them."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self.victims = 0
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                victim, _ = self._socket.accept()
                self.victims += 1
                victim.close()

    def seen(self) -> int:
        """Who connected until now: what waits to be accepted was accepted before the connection made here."""
        with socket.create_connection(self._socket.getsockname()) as own:
            own.settimeout(WITHIN_S)
            with contextlib.suppress(ConnectionError):
                assert own.recv(1) == b""
        return self.victims - 1

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(WITHIN_S)


@pytest.fixture
def trap() -> Iterator[Trap]:
    made = Trap()
    yield made
    made.close()


@pytest.fixture
def sponsor(tmp_path: Path) -> Path:
    """The file of the sponsor's key, as it should be: mode 0600, far from the planted file."""
    file = tmp_path / "home" / "sponsor.json"
    file.parent.mkdir()
    SigningKey.generate("spiffe://ringfence.local/user/sam").save(file)
    return file


def planted(trap: Trap, secret: Path) -> str:
    urls = "".join(
        f'{name}_url = "http://{trap.address}"\n'
        for name in ("registry", "policy", "issuer", "revoker", "audit", "gateway")
    )
    return (
        f'kafka = "{trap.address}"\nkafka_security_protocol = "SASL_PLAINTEXT"\n'
        f'kafka_sasl_username = "x"\nkafka_sasl_password = "file:{secret}"\n'
        f'trust_root = "{"A" * 43}"\nredis_url = "redis://{trap.address}/0"\nidentity = "{secret}"\n{urls}'
    )


def run_in(
    folder: Path, words: list[str], *, at_home: Path, **settings: str
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RINGFENCE_")}
    # What is asked where nothing is planted: nobody.
    environment |= {"RINGFENCE_REDIS_URL": "redis://127.0.0.1:1/0", "HOME": str(at_home), **settings}
    return subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=WITHIN_S, check=False
    )


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "ringfence.cli.main", *words]


@pytest.mark.parametrize(
    "what",
    [
        "approvals list",
        "agent list",
        "audit tail --no-follow",
        "doctor",
        "serve registry",
        "topics check",
        "sdk",
    ],
)
def test_a_planted_settings_file_sees_no_connection(
    trap: Trap, sponsor: Path, tmp_path: Path, what: str
) -> None:
    folder = tmp_path / "clone"
    (folder / ".ringfence").mkdir(parents=True)
    for place in ("ringfence.toml", ".ringfence/ringfence.toml"):
        (folder / place).write_text(planted(trap, sponsor))
    if what == "serve registry":
        # A planted key as well: nothing else stands in the way of this start.
        key = SigningKey.generate("spiffe://ringfence.local/service/registry")
        key.save(folder / ".ringfence/keys/registry.json")
    words = (
        [sys.executable, "-c", SDK, str(sponsor)]
        if what == "sdk"
        else command("--identity", str(sponsor), *what.split())
    )
    done = run_in(folder, words, at_home=sponsor.parent)
    assert done.returncode == 1, done.stderr
    assert trap.seen() == 0


def test_settings_file_that_its_user_named_is_used(trap: Trap, sponsor: Path, tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    (tmp_path / "ringfence.toml").write_text(planted(trap, sponsor))
    words = command("--identity", str(sponsor), "agent", "list")
    run_in(tmp_path, words, at_home=sponsor.parent, RINGFENCE_CONFIG="ringfence.toml")
    assert trap.seen() > 0
