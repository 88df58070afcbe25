"""The command line by which a runner starts init, for each sandbox backend."""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.codes import Code
from ringfence.runner.sandbox.backend import Mount

_INSIDE: Final = "/opt/ringfence"
_NEEDED: Final = ("cryptography", "_cffi_backend", "orjson")
"""The packages that init imports, with what they need beside them."""
_OF_THE_MACHINE: Final = Path("/usr")
"""bubblewrap shows it at the same path."""
_HIDDEN: Final = (Path("/usr/etc"), Path("/usr/local/etc"))


class InitUnavailableError(RingfenceError):
    """Raised if this installation has no init that a sandbox could start."""

    code = Code.INIT_UNAVAILABLE


@dataclass(frozen=True)
class InitCommand:
    """The command line of init (`SandboxSpec.argv`), and the mounts that it needs."""

    argv: tuple[str, ...]
    mounts: tuple[Mount, ...] = ()


def init_command(backend: str) -> InitCommand:
    """Build the command line of init for the backend `bubblewrap` or `oci`. Raises InitUnavailableError.

    bubblewrap shows this installation read-only below `/opt/ringfence`: Python where it is not in /usr, the package
    `ringfence`, and the folders of the packages that it needs. The image of a container needs `python3` with
    `ringfence` installed.
    """
    if backend == "oci":
        return InitCommand(("python3", "-I", "-m", "ringfence.runner.init"))
    if backend != "bubblewrap":
        raise InitUnavailableError(f"nothing is known about init in sandboxes of the backend {backend!r}")
    mounts: list[Mount] = []
    prefix = Path(os.path.realpath(sys.base_prefix))
    program = Path(os.path.realpath(sys.executable))
    inside = _shown(prefix, f"{_INSIDE}/python", mounts)
    if not program.is_relative_to(prefix):
        raise InitUnavailableError(f"{program} is not below {prefix}, where its library is").with_remedy(
            "start the runner with a Python that was installed in one folder"
        )
    interpreter = f"{inside}/{program.relative_to(prefix)}"
    # The package alone: beside it may be a clone with many other files.
    package = Path(os.path.realpath(__file__)).parents[2]
    folders = [f"{_INSIDE}/lib"]
    _shown(package, f"{folders[0]}/{package.name}", mounts, always=True)
    for number, folder in enumerate(_package_folders()):
        folders.append(_shown(folder, f"{_INSIDE}/packages-{number}", mounts))
    start = (interpreter, "-I", "-S", "-B", f"{folders[0]}/{package.name}/runner/init/bootstrap.py", *folders)
    if inside != str(prefix) and sysconfig.get_config_var("Py_ENABLE_SHARED"):
        start = ("/usr/bin/env", f"LD_LIBRARY_PATH={inside}/lib", *start)
    return InitCommand(start, tuple(mounts))


def _shown(folder: Path, inside: str, mounts: list[Mount], *, always: bool = False) -> str:
    """The path inside of a folder of this machine, which is mounted where it is not shown already."""
    hidden = any(folder.is_relative_to(one) for one in _HIDDEN)
    if folder.is_relative_to(_OF_THE_MACHINE) and not hidden and not always:
        return str(folder)
    mounts.append(Mount(folder, inside, installed=True))
    return inside


def _package_folders() -> list[Path]:
    folders: dict[Path, None] = {}
    for name in _NEEDED:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise InitUnavailableError(f"the package {name} is not installed").with_remedy(
                "pip install 'ringfence[runner]'"
            )
        origin = Path(os.path.realpath(spec.origin))
        folders[origin.parents[1] if spec.submodule_search_locations else origin.parent] = None
    return list(folders)
