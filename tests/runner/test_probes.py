"""The bypass suite: each probe reaches what is planted outside, and nothing from inside. One sandbox runs many of them.

A probe that does not reach it outside either proves nothing here: it is skipped with the reason, and pytest lists it.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from ringfence.dev.processes import StackError
from tests.conftest import needed
from tests.runner.conftest import BUBBLEWRAP
from tests.runner.places import CallError, Place, Runner, interpreter, running
from tests.runner.probe_programs import BLOCKED, DRIVER, PROBES, REACHED, Results, program, results

PLACES = [
    *BUBBLEWRAP,
    *(
        replace(place, name=f"{place.name}-capable", options={"all_capabilities": True})
        for place in BUBBLEWRAP
    ),
]
"""Also with the command as root of its namespace, with all capabilities there: the filter alone has to hold then."""
DOTFILES = (
    ".ssh/id_ed25519",
    ".aws/credentials",
    ".netrc",
    ".config/gh/hosts.yml",
    ".docker/config.json",
    ".npmrc",
)
SOCKETS = {
    "docker": "/run/docker.sock",
    "containerd": "/run/containerd/containerd.sock",
    "podman": "/run/podman/podman.sock",
    "ssh-agent": "/run/user/1000/keyring/ssh",
    "gpg-agent": "/run/user/1000/gnupg/S.gpg-agent",
    "session-bus": "/run/user/1000/bus",
    "system-bus": "/run/dbus/system_bus_socket",
    "systemd": "/run/systemd/private",
}
FAMILIES = {
    "netlink": (socket.AF_NETLINK, socket.SOCK_RAW),
    "packet": (socket.AF_PACKET, socket.SOCK_RAW),
    "vsock": (socket.AF_VSOCK, socket.SOCK_STREAM),
    "alg": (socket.AF_ALG, socket.SOCK_SEQPACKET),
    "key": (15, socket.SOCK_RAW),
    "tipc": (socket.AF_TIPC, socket.SOCK_RDM),
    "bluetooth": (31, socket.SOCK_RAW),
    "xdp": (44, socket.SOCK_RAW),
}
CALLS = ("bpf", "chroot", "fanotify_init", "fsopen", "kcmp", "name_to_handle_at", "open_tree", "perf_event_open",
         "pidfd_getfd", "syslog", "userfaultfd")  # fmt: skip
PLAIN = ("abstract_socket", "cgroup_files", "clone", "descriptors", "device", "dns", "environment", "exhaust_disk",
         "exhaust_memory", "exhaust_pids", "home", "icmp", "io_uring", "keyrings", "kill", "machine_files", "mount",
         "other_abi", "proc_cmdline", "proc_environ", "proc_mem", "proc_root", "proc_sys", "process_vm", "ptrace",
         "setns", "setuid", "shared_memory", "symlink", "tiocsti", "unshare")  # fmt: skip
LIMITS: dict[str, dict[str, Any]] = {
    "exhaust_memory": {"memory_bytes": 128 << 20},
    "exhaust_pids": {"pids": 50},
}


@dataclass(frozen=True)
class Case:
    name: str
    program: str
    given: dict[str, Any]


CASES = [
    *(Case(name, name, {}) for name in PLAIN),
    Case("metadata-ipv4", "http_connection", {"address": ["169.254.169.254", 80]}),
    Case("metadata-ipv6", "http_connection", {"address": ["fd00:ec2::254", 80]}),
    Case("metadata-by-name", "http_connection", {"address": ["metadata.google.internal", 80]}),
    Case("loopback-service", "http_connection", {"address": ["127.0.0.1", 8471]}),
    *(Case(f"socket-of-{name}", "host_socket", {"path": path}) for name, path in SOCKETS.items()),
    *(Case(f"family-{name}", "socket_family", {"family": int(family), "kind": int(kind)})
      for name, (family, kind) in FAMILIES.items()),
    *(Case(f"call-{name}", "system_call", {"name": name}) for name in CALLS),
]  # fmt: skip


class Plant:
    """What is planted for one place, and how to run a program beside it."""

    def __init__(
        self, place: Place, folder: Path, process: subprocess.Popen[bytes], given: dict[str, Any]
    ) -> None:
        self.place = place
        self.folder = folder
        self.given = given
        self.secret = folder / "beside" / "secret"
        self.enter = ("nsenter", f"--target={process.pid}", "--net", "--mount", "--")
        self.as_user = ("setpriv", f"--reuid={place.uid}", f"--regid={place.uid}", "--clear-groups", "--")

    @property
    def environment(self) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "HOME": self.given["home"], "AWS_SECRET_ACCESS_KEY": self.canary}

    @property
    def canary(self) -> str:
        return str(self.given["canary"])[::-1]

    def work(self, cases: Iterable[Case], **given: Any) -> str:
        """What the driver is to do."""
        return json.dumps(
            [(case.name, program(case.program), {**self.given, **case.given, **given}) for case in cases]
        )

    def outside(self) -> Results:
        """Run all probes as the runner's user, with what a shell of theirs has."""
        opened = os.open(self.secret, os.O_RDONLY)
        try:
            done = subprocess.run(
                [*self.enter, *self.as_user, interpreter(self.place.uid), "-c", DRIVER],
                input=self.work(CASES), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True,
                env=self.environment, cwd="/", pass_fds=[opened],
            )  # fmt: skip
        finally:
            os.close(opened)
        return results(done.stdout)


@pytest.fixture(scope="package")
def plant(request: pytest.FixtureRequest, place: Place) -> Iterator[Plant]:
    with needed(request):
        if os.geteuid() != 0:
            raise StackError("the probes need root: what they look for is planted in namespaces of its own")
    with tempfile.TemporaryDirectory(prefix="ringfence-probes-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        for part in ("home", "mounted", "scratch", "beside"):
            (folder / part).mkdir()
            os.chown(folder / part, place.uid, place.uid)
        canary = f"canary-{secrets.token_hex(16)}"
        secret = folder / "beside" / "secret"
        secret.write_text(canary)
        os.chown(secret, place.uid, place.uid)
        (folder / "mounted" / "link-absolute").symlink_to(secret)
        (folder / "mounted" / "link-relative").symlink_to("../beside/secret")
        given = {
            "canary": canary[::-1],
            "uid": place.uid,
            "folder": str(folder),
            "home": str(folder / "home"),
            "mounted": str(folder / "mounted"),
            "scratch": str(folder / "scratch"),
            "secret_file": str(secret),
            "port": 8471,
            "abstract": f"ringfence-{secrets.token_hex(4)}",
            "sockets": SOCKETS,
            "dotfiles": DOTFILES,
            "shared_memory": f"/dev/shm/ringfence-{secrets.token_hex(4)}",
            "shared_key": 1 + secrets.randbelow(1 << 30),
        }
        process = subprocess.Popen(
            [
                "unshare",
                "--net",
                "--mount",
                "--propagation",
                "private",
                sys.executable,
                PROBES / "plant.py",
                json.dumps(given),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        victim = None
        try:
            assert process.stdout is not None
            with needed(request):
                if process.stdout.readline() != b"ready\n":
                    raise StackError(
                        "what the probes look for could not be planted: apt install iproute2, util-linux"
                    )
            plant = Plant(place, folder, process, given)
            # A program of the same user that holds the canary in its environment, its arguments and its memory. It ends
            # with its input, whatever ends this process.
            victim = subprocess.Popen(
                [*plant.enter, *plant.as_user, "sh", "-c", "echo started; read line", canary],
                env=plant.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/",
            )  # fmt: skip
            assert victim.stdout is not None
            victim.stdout.readline()
            given["victim"] = victim.pid
            yield plant
        finally:
            if victim is not None:
                victim.communicate()
            process.communicate()


@pytest.fixture(scope="package")
async def inside(plant: Plant, place: Place, code: Path) -> AsyncIterator[Runner]:
    """A runner that has inherited everything: the environment, an open file, the home directory, the namespaces."""
    folder = plant.folder / "runner"
    folder.mkdir()
    os.chown(folder, place.uid, place.uid)
    opened = os.open(plant.secret, os.O_RDONLY)
    started = running(
        place,
        folder,
        code,
        prefix=(*plant.enter, *plant.as_user),
        environment=plant.environment,
        descriptors=(opened,),
    )
    async with started as runner:
        yield runner
    os.close(opened)


@pytest.fixture(scope="package")
def outside(plant: Plant) -> Results:
    """What each probe does outside."""
    return plant.outside()


@pytest.fixture(scope="package")
async def blocked(place: Place, plant: Plant, inside: Runner) -> dict[str, list[Results]]:
    """What each probe does inside, by case: as another user there, and as root. Those without limits of their own share
    a sandbox.
    """
    found: dict[str, list[Results]] = {case.name: [] for case in CASES}
    apart = [[case] for case in CASES if case.program in LIMITS]
    together = [case for case in CASES if case.program not in LIMITS]
    for cases, root_inside in itertools.product(
        [together, *apart], (True,) if place.capable else (False, True)
    ):
        try:
            ended = await inside.run(
                "python3", "-c", DRIVER, stdin=plant.work(cases, mounted="/mnt/mounted"),
                mounts=[[plant.given["mounted"], "/mnt/mounted", place.backend == "bubblewrap"]],
                limits={"ttl_s": 300, **LIMITS.get(cases[0].program, {})},
                home_bytes=16 << 20, tmp_bytes=16 << 20, shm_bytes=16 << 20, root_inside=root_inside,
            )  # fmt: skip
        except CallError as refused:
            if (refused.code, cases[0].program) == ("sandbox_unavailable", "exhaust_memory"):
                continue  # not started at all rather than without the limit
            raise
        if cases[0].program == "exhaust_memory" and ended.code == 137:
            continue
        assert ended.code == 0, ended
        said = results(ended.stdout)
        for case in cases:
            found[case.name].append(said)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_reached_outside_and_not_inside(
    place: Place, outside: Results, blocked: dict[str, list[Results]], case: Case
) -> None:
    status, said = outside[case.name]
    assert status in (REACHED, BLOCKED), f"the probe is broken: {said}"
    if status == BLOCKED:
        pytest.skip(f"not provable here: {case.name} as uid {place.uid}: {said}")
    if place.capable and case.program == "setuid":
        pytest.skip("it has every capability already")
    assert blocked[case.name] or case.program == "exhaust_memory"
    for code, why in [one[case.name] for one in blocked[case.name]]:
        killed = case.program == "exhaust_memory" and code == -signal.SIGKILL
        assert killed or code == BLOCKED, f"{code}: {why}"


async def test_a_capable_place_has_all_capabilities(place: Place, inside: Runner) -> None:
    """Or the probes there would prove no more than at the others."""
    status = (await inside.run("cat", "/proc/self/status", root_inside=True)).stdout
    effective = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff"))
    assert bool(effective & 1 << 21) == place.capable  # CAP_SYS_ADMIN
