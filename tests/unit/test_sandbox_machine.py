"""What a machine lacks for sandboxes is named with a remedy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ringfence.runner.sandbox import machine, network


@pytest.mark.parametrize(
    ("sysctls", "remedy"),
    [
        ({"kernel.unprivileged_userns_clone": "0"}, "kernel.unprivileged_userns_clone=1"),
        ({"user.max_user_namespaces": "0"}, "user.max_user_namespaces="),
        ({}, "user.max_user_namespaces="),
        (
            {"user.max_user_namespaces": "9", "kernel.apparmor_restrict_unprivileged_userns": "1"},
            "/etc/apparmor.d/bwrap",
        ),
        ({"user.max_user_namespaces": "9"}, "backend oci"),
    ],
)
def test_each_obstacle_has_its_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sysctls: dict[str, str], remedy: str
) -> None:
    bwrap = tmp_path / "bwrap"
    bwrap.write_text(
        '#!/bin/sh\ntest "$1" = --version && echo bubblewrap 0.8.0 && exit\necho no namespace >&2\nexit 1\n'
    )
    bwrap.chmod(0o755)
    monkeypatch.setattr(machine, "_sysctl", sysctls.get)
    (reason,) = machine.bubblewrap_obstacles(str(bwrap))
    assert remedy in reason


def test_an_old_bubblewrap_is_an_obstacle(tmp_path: Path) -> None:
    bwrap = tmp_path / "bwrap"
    bwrap.write_text("#!/bin/sh\necho bubblewrap 0.6.2\n")
    bwrap.chmod(0o755)
    assert machine.bubblewrap_obstacles(str(bwrap)) == [
        "bubblewrap 0.6.2 is too old: version 0.8 or newer is needed"
    ]


def test_a_missing_bubblewrap_is_an_obstacle(tmp_path: Path) -> None:
    (reason,) = machine.bubblewrap_obstacles(str(tmp_path / "none"))
    assert "apt install bubblewrap" in reason


def test_facts_are_told_on_every_machine() -> None:
    names = {fact.name: fact for fact in machine.facts()}
    assert {"kernel", "bubblewrap", "libseccomp", "control groups", "swap", "core dumps"} <= names.keys()
    assert all(fact.value for fact in names.values())


def test_the_network_of_the_machine_itself_is_never_set_up() -> None:
    """As where a sandbox has ended, and its pid is another process's."""
    before = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()
    program = Path(network.__file__).with_name("network_setup.py")
    words = [sys.executable, "-I", "-S", str(program), str(os.getpid()), "low-ports", "203.0.113.9"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (1, "network: the sandbox has ended")
    assert Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text() == before
