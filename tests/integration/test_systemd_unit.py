"""deploy/systemd: valid for systemd, closed, and enough for every service with the settings file of the page."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringfence.cli.shared.settings_check import known_settings
from ringfence.client.admin.trust_setup import SERVICE_ROLES
from ringfence.dev.processes import Child, free_port, spawn
from ringfence.dev.stack import readiness
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.compose import ROOT
from tests.support.installation import STARTED, THIS_CLONE, WITHIN_S, Installation

UNIT = ROOT / "deploy/systemd/ringfence@.service"
PAGE = (ROOT / "docs/operators/README.md").read_text()


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
    analyze = shutil.which("systemd-analyze")
    assert analyze, "systemd-analyze is not installed; on Debian: apt-get install systemd"
    here = tmp_path / UNIT.name
    # It looks for the program, and for the user, on this machine.
    text = UNIT.read_text().replace("/opt/ringfence/bin/ringfence", THIS_CLONE.program)
    here.write_text(text.replace("=ringfence-%i\nGroup=ringfence-%i\n", "=root\nGroup=root\n"))
    done = subprocess.run(
        [analyze, "verify", str(here)], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


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
    etc = tmp_path / "etc/ringfence"
    etc.mkdir(parents=True)
    given = here.environment()
    # The file of the page, with this installation's values and those that keep tests apart.
    names = re.findall(r"^    ([a-z_]+) = ", _page_file(), re.MULTILINE)
    names += ["topic_prefix", "redis_prefix", "embedded_broker"]
    own = {name: given.get(f"RINGFENCE_{name.upper()}", "https://issuer.acme.example") for name in names}
    # JSON and TOML write texts, numbers and truth values alike.
    plain = {"replication", "partitions", "embedded_broker"}
    (etc / "ringfence.toml").write_text(
        "".join(
            f"{name} = {value if name in plain else chr(34) + value + chr(34)}\n"
            for name, value in own.items()
        )
    )
    children: dict[str, tuple[Child, int]] = {}
    try:
        for name in STARTED:
            keys = etc / "keys" / name
            keys.mkdir(parents=True)
            for file in (here.folder / ".ringfence/keys").glob(f"{name}*.json"):
                shutil.copy2(file, keys)
            port = free_port()
            environment_here = {
                key: value.replace("/etc/", f"{tmp_path}/etc/").replace("/var/lib/", f"{tmp_path}/var-")
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


def _page_file() -> str:
    (block,) = re.findall(r"^    ```toml\n(.*?)^    ```", PAGE, re.MULTILINE | re.DOTALL)
    found: str = block
    return found


def test_every_service_becomes_ready_with_it(services: dict[str, tuple[Child, int]]) -> None:
    assert services.keys() == set(SERVICE_ROLES)
    for child, port in services.values():
        child.wait_until(lambda port=port: readiness(port) is None, WITHIN_S, "was ready")  # type: ignore[misc]
