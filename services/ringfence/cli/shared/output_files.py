"""Output paths of commands: the callbacks that mark options and arguments as such, and the one writer.

Each option or argument that names a file or folder to write has one of the three callbacks. They check the path before
the command does anything; the writers of `private_files` check it again.
"""

from __future__ import annotations

import stat
import sys
from pathlib import Path

from ringfence.kernel.base.private_files import OutputFileError, check_output, write_private, write_public


def is_stdout(path: Path) -> bool:
    """Return whether an output path names stdout."""
    return str(path) in ("-", "/dev/stdout")


def output_file(path: Path | None) -> Path | None:
    """Callback of an output file that may be stdout (`-`). Raises OutputFileError."""
    return path if path is None or is_stdout(path) else kept_file(path)


def kept_file(path: Path | None) -> Path | None:
    """Callback of an output file that Ringfence reads again, such as a key: never stdout. Raises OutputFileError."""
    if path is not None:
        if is_stdout(path):
            raise OutputFileError(f"{path} is stdout, and this must be a file: name one")
        check_output(path)
    return path


def output_folder(path: Path | None) -> Path | None:
    """Callback of an output folder. Raises OutputFileError if it is a symbolic link or no folder."""
    if path is not None and (path.is_symlink() or path.exists()) and not stat.S_ISDIR(path.lstat().st_mode):
        kind = "a symbolic link, which is not followed" if path.is_symlink() else "no folder"
        raise OutputFileError(f"{path} is {kind}: name the folder itself")
    return path


def write_output(path: Path, content: str | bytes, *, public: bool = False) -> None:
    """Write a whole output file, or to stdout. `public`: with the mode that the umask gives.

    Raises OSError, OutputFileError.
    """
    if is_stdout(path):
        sys.stdout.flush()
        sys.stdout.buffer.write(content.encode() if isinstance(content, str) else content)
        sys.stdout.buffer.flush()
    elif public:
        write_public(path, content)
    else:
        write_private(path, content)
