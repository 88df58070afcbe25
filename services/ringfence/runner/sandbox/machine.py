"""Checks what this machine offers for sandboxes. Each problem has a remedy."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringfence.kernel.base.programs import find_program
from ringfence.runner.sandbox import seccomp
from ringfence.runner.sandbox.cgroups import find_mounted

_OLDEST_BUBBLEWRAP = (0, 8)
_NOBODY = 65534
OCI_SOCKETS = ("/run/podman/podman.sock", "/run/docker.sock", "/var/run/docker.sock")

_working: set[tuple[str, int]] = set()


@dataclass(frozen=True)
class MachineFact:
    """A property of this machine. `problem`: what does not work because of it; None if everything does."""

    name: str
    value: str
    problem: str | None = None
    remedy: str | None = None


def facts() -> list[MachineFact]:
    """Check the machine. It starts `bwrap true` once, and nothing else."""
    obstacles = bubblewrap_obstacles()
    found = [
        MachineFact("kernel", f"{platform.system()} {platform.release()} {platform.machine()}"),
        MachineFact("bubblewrap", bubblewrap_version() or "not installed", "; ".join(obstacles) or None),
        MachineFact("user namespaces", _sysctl("user.max_user_namespaces") or "none"),
    ]
    restricted = _sysctl("kernel.apparmor_restrict_unprivileged_userns")
    if restricted is not None:
        found.append(
            MachineFact("AppArmor restriction of user namespaces", "on" if restricted == "1" else "off")
        )
    missing = seccomp.unavailable()
    found.append(MachineFact("libseccomp", "missing" if missing else "present", missing))
    controllers = find_mounted()
    lacking = [name for name in ("memory", "cpu", "pids") if name not in controllers]
    found.append(
        MachineFact(
            "control groups",
            ", ".join(f"{name} (version {version})" for name, version in sorted(controllers.items()))
            or "none",
            f"no limit of {' and '.join(lacking)}" if lacking else None,
        )
    )
    sockets = [path for path in OCI_SOCKETS if Path(path).is_socket()]
    found.append(MachineFact("podman or docker", ", ".join(sockets) or find_program("podman") or "not found"))
    swap = len(_lines("/proc/swaps")) > 1
    found.append(
        MachineFact(
            "swap",
            "on" if swap else "off",
            "what a sandbox without a memory control group wrote to memory may reach the disk"
            if swap
            else None,
            "swapoff -a, or encrypt the swap with a key that each start makes" if swap else None,
        )
    )
    return [*found, MachineFact("core dumps", _sysctl("kernel.core_pattern") or "unknown")]


def bubblewrap_version(program: str = "bwrap") -> str | None:
    path = find_program(program)
    if path is None:
        return None
    ended = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, env={})
    return ended.stdout.strip().removeprefix("bubblewrap ") or None


def bubblewrap_obstacles(program: str = "bwrap") -> list[str]:
    """The reasons why bubblewrap cannot make a sandbox here, with remedies; empty if it can. A success is cached."""
    path = find_program(program)
    if path is None:
        return [f"{program} is not installed: apt install bubblewrap"]
    user = os.geteuid()
    if (path, user) in _working:
        return []
    version = bubblewrap_version(program)
    numbers = tuple(int(number) for number in re.findall(r"\d+", version or "")[:2])
    if numbers < _OLDEST_BUBBLEWRAP:
        return [f"bubblewrap {version} is too old: version 0.8 or newer is needed"]
    said = _try_bubblewrap(path)
    if said is None:
        _working.add((path, user))
        return []
    return [_explained(said)]


def _try_bubblewrap(path: str) -> str | None:
    """Make a sandbox with all namespaces once. Returns None if that works, otherwise bwrap's error."""
    # Root gives itself up before it starts bwrap: it has to work for somebody without rights.
    identity: dict[str, Any] = {}
    if os.geteuid() == 0:
        identity = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
    namespaces = ["--unshare-all", "--unshare-user", "--disable-userns"]
    try:
        ended = subprocess.run(
            [path, *namespaces, "--ro-bind", "/", "/", "--proc", "/proc", "true"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            env={"PATH": os.defpath},
            cwd="/",
            **identity,
        )
    except OSError as error:
        return str(error)
    return None if ended.returncode == 0 else ended.stderr[:500].decode(errors="replace").strip()


def _explained(said: str) -> str:
    if _sysctl("kernel.unprivileged_userns_clone") == "0":
        return "user namespaces are switched off: sysctl kernel.unprivileged_userns_clone=1"
    if _sysctl("user.max_user_namespaces") in (None, "0"):
        return "there are no user namespaces: sysctl user.max_user_namespaces=10000"
    if _sysctl("kernel.apparmor_restrict_unprivileged_userns") == "1":
        return (
            "AppArmor lets unprivileged programs make no user namespaces: give bwrap a profile with `userns,` "
            "(/etc/apparmor.d/bwrap), or sysctl kernel.apparmor_restrict_unprivileged_userns=0"
        )
    return (
        f"bubblewrap makes no sandbox here ({said or 'it gave no reason'}): in a container, allow user namespaces and "
        "mounts of /proc, or use the backend oci"
    )


def _sysctl(name: str) -> str | None:
    lines = _lines("/proc/sys/" + name.replace(".", "/"))
    return lines[0] if lines else None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
