"""`ringfence init --install`: valid for systemd, closed, and enough for every service."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringfence.cli.shared.settings_check import known_settings
from ringfence.client.admin.systemd_layout import write_systemd_layout
from ringfence.client.admin.trust_setup import SERVICE_ROLES, TrustFolder, make_trust
from ringfence.dev.processes import Child, free_port, spawn
from ringfence.dev.stack import readiness
from ringfence.kernel.base.settings import ServiceSettings
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.compose import ROOT
from tests.support.installation import STARTED, THIS_CLONE, WITHIN_S, Installation

UNIT = ROOT / "services/ringfence/client/admin/ringfence@.service"
MAX_EXPOSURE = "20"
"""Tenths of the score of `systemd-analyze security`, 0 to 100: a service without any protection has 96."""


def values(name: str) -> list[str]:
    """All values of a key of the unit."""
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)


def environment(service: str) -> dict[str, str]:
    """The variables of an instance of the template, on a machine that is called `host`."""
    pairs = [one.replace("%i", service).replace("%H", "host").partition("=") for one in values("Environment")]
    return {name: value for name, _, value in pairs}


def test_a_service_has_its_own_user_and_no_privilege() -> None:
    assert values("User") == values("Group") == ["ringfence-%i"]
    assert values("ExecStart") == ["/opt/ringfence/bin/ringfence serve %i"]
    assert values("CapabilityBoundingSet") == [""]
    assert (values("NoNewPrivileges"), values("ProtectSystem")) == (["yes"], ["strict"])
    own = environment("policy")
    assert set(own) <= known_settings()
    (state,) = values("StateDirectory")
    written = f"/var/lib/{state.replace('%i', 'policy')}"
    assert own["RINGFENCE_STATE_DIR"] == written
    assert own["RINGFENCE_GATEWAY_SPOOL"].startswith(f"{written}/")


@pytest.mark.tools
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    here = tmp_path / UNIT.name
    # It looks for the program, and for the user, on this machine.
    text = UNIT.read_text().replace("/opt/ringfence/bin/ringfence", THIS_CLONE.program)
    here.write_text(text.replace("=ringfence-%i\nGroup=ringfence-%i\n", "=root\nGroup=root\n"))
    assert systemd("analyze", "verify", str(here)) == ""
    systemd("analyze", "security", "--offline=true", f"--threshold={MAX_EXPOSURE}", "--no-pager", str(here))


@pytest.mark.tools
def test_systemd_makes_the_users_and_gives_each_its_keys(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.fail("only root gives files to other users: run this as root")
    trust, machine = TrustFolder(tmp_path / ".ringfence"), tmp_path / "machine"
    make_trust(trust, "acme.example", "olga")
    write_systemd_layout(machine, trust, ServiceSettings(), ["policy", "issuer"])
    systemd("sysusers", f"--root={machine}")
    for _ in range(2):  # also at the next boot
        assert systemd("tmpfiles", f"--root={machine}", "--create") == ""
    users = {
        line.split(":")[0]: int(line.split(":")[2])
        for line in (machine / "etc/passwd").read_text().splitlines()
    }
    assert users.keys() == {"ringfence-policy", "ringfence-issuer"}
    for role in ("policy", "issuer"):
        folder = machine / "etc/ringfence/keys" / role
        for path in (folder, *folder.iterdir()):
            status = path.stat()
            assert (status.st_uid, status.st_mode & 0o077) == (users[f"ringfence-{role}"], 0)
    assert (machine / "etc/ringfence/ringfence.toml").stat().st_mode & 0o777 == 0o644


def systemd(program: str, *arguments: str) -> str:
    """Run a program of systemd, and return its complaints."""
    found = shutil.which(f"systemd-{program}")
    assert found, f"systemd-{program} is not installed; on Debian: apt-get install systemd"
    done = subprocess.run([found, *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return "" if program == "sysusers" else done.stderr


@pytest.fixture
def services(
    kafka: Kafka, redis_server: RedisServer, tmp_path: Path
) -> Iterator[dict[str, tuple[Child, int]]]:
    """Every service with the environment of the unit alone; folders of the machine are in a temporary one."""
    here = Installation(
        THIS_CLONE,
        tmp_path,
        kafka=kafka.bootstrap,
        embedded_broker=kafka.embedded,
        redis_url=redis_server.url,
    )
    here.make()
    machine = tmp_path / "machine"
    here.say("init", "--install", str(machine), *(f"--service={name}" for name in STARTED))
    children: dict[str, tuple[Child, int]] = {}
    try:
        for name in STARTED:
            port = free_port()
            environment_here = {
                key: value.replace("/etc/", f"{machine}/etc/").replace("/var/lib/", f"{tmp_path}/var-")
                for key, value in environment(name).items()
            }
            child = spawn(
                name,
                [THIS_CLONE.program, "serve", name],
                env={"PATH": "/usr/bin:/bin", "RINGFENCE_HTTP": f"127.0.0.1:{port}", **environment_here},
                cwd=Path("/"),
                log_path=tmp_path / f"{name}.log",
            )
            children[name] = child, port
        yield children
    finally:
        for child, _ in children.values():
            child.kill()


def test_every_service_becomes_ready_with_it(services: dict[str, tuple[Child, int]]) -> None:
    assert services.keys() == set(SERVICE_ROLES)
    for child, port in services.values():
        child.wait_until(lambda port=port: readiness(port) is None, WITHIN_S, "was ready")  # type: ignore[misc]
