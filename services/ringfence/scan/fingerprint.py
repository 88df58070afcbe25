"""Fingerprints of secrets: an HMAC-SHA-256 with a key of this machine's user, so that nobody else can test guesses."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path
from typing import Final

from ringfence.kernel.base.private_files import make_private_folder, open_private
from ringfence.scan.findings import SecretValue

KEY_NAME: Final = "fingerprint.key"
_KEY_BYTES: Final = 32
_HEX: Final = 16


class Fingerprinter:
    """Makes fingerprints with one key. Equal secrets have equal fingerprints, on this machine alone."""

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        self._key = key

    def of(self, value: SecretValue) -> str:
        digest = hmac.new(self._key, value.reveal().encode("utf-8", "surrogatepass"), hashlib.sha256)
        return digest.hexdigest()[:_HEX]


def state_folder() -> Path | None:
    """Return the folder of the scan's state: `$XDG_STATE_HOME/ringfence/scan`, otherwise below `~/.local/state`.

    None if the user has no home directory.
    """
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():
        home = Path(os.environ.get("HOME", ""))
        if not (home.is_absolute() and home.is_dir()):
            return None
        state = home / ".local" / "state"
    return state / "ringfence" / "scan"


def load_key(folder: Path) -> bytes:
    """Return the key in a folder (mode 0600). The first call creates it.

    Raises OSError, NotPrivateError if file or folder belong to another user, and ValueError if the file has no key.
    """
    make_private_folder(folder)
    path = folder / KEY_NAME
    try:
        made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        pass
    else:
        with os.fdopen(made, "wb") as file:
            os.fchmod(made, 0o600)
            file.write(secrets.token_bytes(_KEY_BYTES))
    with os.fdopen(open_private(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
            raise ValueError("not a file of this user")
        key = file.read(_KEY_BYTES + 1)
    if len(key) != _KEY_BYTES:
        raise ValueError(f"not {_KEY_BYTES} bytes")
    return key
