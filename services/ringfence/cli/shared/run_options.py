"""The options that a local run and an ordered run have in common, and the check of a local run's program.

A program in a mounted folder is refused early if it is a link to a file that the sandbox does not show, as in virtual
environments (pyenv, uv, conda). The kernel would only report a missing file.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from ringfence.client.errors import InvalidCallError

BackendOption = Annotated[
    str | None,
    typer.Option(
        "--backend", metavar="bubblewrap|oci", help="What makes the sandbox; the first that is here."
    ),
]
ImageOption = Annotated[
    str | None,
    typer.Option("--image", metavar="IMAGE", help="The container image, by its digest; for the backend oci."),
]
_SYSTEM: Final = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/alternatives")
"""The folders of the host in a sandbox without an image."""
_OF_NODE: Final = ("node", "npm", "npx")
_NODE_S: Final = 5.0
_MOST_LINKS: Final = 40
"""As many as the kernel follows (path_resolution(7))."""


def check_program(program: str, folders: Sequence[Path]) -> None:
    """Check the program of a run without an image. `folders`: the mounts; the first is the working directory.

    Raises InvalidCallError with the folder to mount.
    """
    if not folders or "/" not in program:
        return
    path = Path(os.path.normpath(folders[0] / program))
    for one in filter(None, (path, _interpreter(path))):
        if not any(one.is_relative_to(folder) for folder in folders) or not one.exists():
            continue
        if (hidden := _first_hidden(one, [*folders, *map(Path, _SYSTEM)])) is not None:
            folder = hidden.parent.parent if hidden.parent.name == "bin" else hidden.parent
            what = f"{program} is" if one == path else f"{program} needs {one}, which is"
            raise InvalidCallError(f"{what} a link to {hidden}, which is in no mounted folder").with_remedy(
                f"add --mount {folder}"
            )


def node_problem(program: str, search: str = os.defpath) -> str | None:
    """Return why requests of a Node.js program in a run without an image do not reach the gateway; None if they do.

    Node.js follows the proxy of its environment since 22.21 and 24.0 (`NODE_USE_ENV_PROXY`,
    https://nodejs.org/api/cli.html).
    `search`: the folders that are searched for `node`, the system's own; no mounted program is started here.
    """
    node = shutil.which("node", path=search) if program in _OF_NODE else None
    if node is None:
        return None
    try:
        answer = subprocess.run(
            [node, "--version"], capture_output=True, text=True, timeout=_NODE_S, check=False, env={}
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.fullmatch(r"v(\d+)\.(\d+)\.\d+\S*", answer.stdout.strip())
    if found is None:
        return None
    version = (int(found[1]), int(found[2]))
    if version >= (24, 0) or (version[0] == 22 and version[1] >= 21):
        return None
    return (
        f"Node.js {found[0]} knows no proxy of its environment, so its own requests do not reach the gateway and fail; "
        "use 22.21, or 24 or newer"
    )


def _interpreter(path: Path) -> Path | None:
    """Return the interpreter in the first line of a script; None without one."""
    try:
        with path.open("rb") as file:
            line = file.readline(4096)
    except OSError:
        return None
    words = line[2:].split() if line.startswith(b"#!") else []
    return Path(os.fsdecode(words[0])) if words else None


def _first_hidden(path: Path, shown: Sequence[Path]) -> Path | None:
    """Follow the links of a path. Return the first path on the way that is in none of the folders; None if all are."""
    for _ in range(_MOST_LINKS):
        if not any(path.is_relative_to(folder) for folder in shown):
            return path
        link = next((one for one in (*reversed(path.parents), path) if one.is_symlink()), None)
        if link is None:
            return None
        path = Path(os.path.normpath(link.parent / link.readlink() / path.relative_to(link)))
    return path


RunTtlOption = Annotated[str, typer.Option("--ttl", metavar="DURATION", help="How long the run may take.")]
MemoryOption = Annotated[
    str,
    typer.Option("--memory", metavar="SIZE", help="The most memory: a number of bytes, or with K, M or G."),
]
# The least that a sandbox can be limited to (`SandboxSpec`).
CpusOption = Annotated[
    float, typer.Option("--cpus", metavar="NUMBER", min=0.01, max=1024, help="How many processors.")
]
PidsOption = Annotated[
    int, typer.Option("--pids", metavar="NUMBER", min=4, max=4_194_304, help="How many processes.")
]
