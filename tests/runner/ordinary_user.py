"""An ordinary user of this machine with an installation of Ringfence, whom a root test starts processes as."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.runner.places import ORDINARY_UID

_ROOT = Path(__file__).parents[2]
_CONTROLLERS: Final = ("memory", "cpu", "cpuacct", "pids", "freezer")
_START: Final = 'group=$1; shift; for file in $group; do echo $$ > "$file"; done; exec "$@"'


@contextmanager
def ordinary_user() -> Iterator[tuple[str, ...]]:
    """The command that is `ringfence` for this user, in a control group of the user, as `Delegate=yes` gives one.

    Packages are those of this installation, where every user may read them. Skips are the caller's: see `obstacle`.
    """
    folder = Path(tempfile.mkdtemp(prefix="rf-user-"))
    groups = list[Path]()
    try:
        folder.chmod(0o755)
        site = folder / "site"
        shutil.copytree(
            sysconfig.get_paths()["purelib"], site, symlinks=True, copy_function=_link,
            ignore=shutil.ignore_patterns("__pycache__", "*.pth", "mypy*", "ruff*"),
        )  # fmt: skip
        for part in ("services", "deploy"):  # the policy bundle stands beside the package in a clone
            shutil.copytree(_ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        for path in (site, *site.rglob("*")):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
        program = folder / "ringfence"
        program.write_text(
            f"#!/bin/sh\nexport PYTHONPATH={folder}/services:{site} PYTHONDONTWRITEBYTECODE=1 HOME={folder}/home\n"
            'exec /usr/bin/python3 -P -m ringfence.cli.main "$@"\n'
        )
        program.chmod(0o755)
        (folder / "home").mkdir()
        os.chown(folder / "home", ORDINARY_UID, ORDINARY_UID)
        groups = [group for root in _roots() if (group := _delegated(root)) is not None]
        files = " ".join(str(group / "cgroup.procs") for group in groups)
        identity = f"--reuid={ORDINARY_UID}", f"--regid={ORDINARY_UID}", "--clear-groups", "--pdeathsig=keep"
        yield "sh", "-c", _START, "sh", files, "setpriv", *identity, str(program)
    finally:
        for group in groups:
            for inner in sorted(group.rglob("*"), reverse=True):
                if inner.is_dir():
                    inner.rmdir()
            group.rmdir()
        shutil.rmtree(folder)


def obstacle() -> str | None:
    """Why nobody can be another user here, or None."""
    if os.geteuid() != 0:
        return "not needed: all other tests run as an ordinary user here"
    version = ["/usr/bin/python3", "-c", "import sys; print(sys.version_info[:2])"]
    done = subprocess.run(version, capture_output=True, text=True, check=False)
    own = subprocess.run(["python3", *version[1:]], capture_output=True, text=True, check=False)
    if done.returncode or done.stdout != own.stdout:
        return (
            "not provable here: /usr/bin/python3 is of another version than the packages of this installation"
        )
    if shutil.which("setpriv") is None:
        return "not provable here: there is no setpriv (util-linux)"
    return None


def _link(source: str, target: str) -> str:
    """A hard link where that is possible, since the packages are large; the file has to be readable for all."""
    if Path(source).stat().st_mode & stat.S_IROTH:
        with contextlib.suppress(OSError):
            Path(target).hardlink_to(source)
            return target
    shutil.copyfile(source, target)
    Path(target).chmod(0o755 if os.access(source, os.X_OK) else 0o644)
    return target


def _roots() -> list[Path]:
    """The topmost control groups, of both versions."""
    legacy = [Path("/sys/fs/cgroup") / name for name in _CONTROLLERS]
    found = [root for root in legacy if (root / "cgroup.procs").exists()]
    return found or [Path("/sys/fs/cgroup")]


def _delegated(root: Path) -> Path | None:
    group = root / f"ringfence-test-{os.getpid()}"
    try:
        group.mkdir()
        for path in (group, *group.glob("cgroup.*"), *group.glob("tasks")):
            os.chown(path, ORDINARY_UID, ORDINARY_UID)
    except OSError:
        return None
    return group
