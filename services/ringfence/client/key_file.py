"""The signing key of who is calling: loaded from its file, and across its rotations replaced or loaded again."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from ringfence.client.errors import IdentityError
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.config_file import unread_here
from ringfence.kernel.crypto.keys import KeyFileError, SigningKey

log = logging.getLogger(__name__)


class _Version(NamedTuple):
    """Identifies one content of a file by its metadata, without reading it."""

    device: int
    inode: int
    modified_ns: int
    size: int


class KeyFile:
    """A key file that is reloaded when it is replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last_version = self._version()

    def changed(self, key: SigningKey) -> SigningKey:
        """Return the key in the file, or `key` where the file is unchanged or holds no key of the same identity.

        A file that cannot be used is logged and ignored: the current key stays valid during the overlap of its
        rotation.
        """
        version = self._version()
        if version is None or version == self._last_version:
            return key
        self._last_version = version
        try:
            new_key = SigningKey.load(self.path)
        except KeyFileError as error:
            log.error("the key file was replaced by what is no key; the old one is used on: %s", error)
            return key
        if new_key.id != key.id:
            log.error(
                "the key file %s was replaced by a key of %s; the old one is used on", self.path, new_key.id
            )
            return key
        if new_key.kid != key.kid:
            log.info("signing with key %s from now on", new_key.kid)
        return new_key

    def _version(self) -> _Version | None:
        try:
            new_key = self.path.stat()
        except OSError:
            return None  # between the old file and the new one
        return _Version(new_key.st_dev, new_key.st_ino, new_key.st_mtime_ns, new_key.st_size)


def successor_key(key: SigningKey, new: SigningKey | Path | str) -> SigningKey:
    """Load another key of the same identity, from a key or the path of its file.

    Raises IdentityError if it belongs to another identity, KeyFileError.
    """
    new_key = new if isinstance(new, SigningKey) else SigningKey.load(Path(new))
    if new_key.id != key.id:
        raise IdentityError(f"that is a key of {new_key.id}; this is {key.id}, and stays it")
    return new_key


def load_key(key: SigningKey | Path | str | None, settings: ClientSettings) -> SigningKey:
    """Return the signing key: `key` itself, or the key in the file that `key` or `settings.identity` names.

    Raises IdentityError if no key is named, KeyFileError if the file holds none.
    """
    if isinstance(key, SigningKey):
        return key
    path = key or settings.identity
    if path is None:
        raise IdentityError(
            "nobody said who is calling: name a key file with --identity or RINGFENCE_IDENTITY "
            f"(make one with: ringfence key new){unread_here()}"
        )
    return SigningKey.load(Path(path))


def key_file(key: SigningKey | Path | str | None, settings: ClientSettings) -> KeyFile | None:
    """The key file that `load_key` reads; None if the key was passed as an object or no file is named."""
    path = None if isinstance(key, SigningKey) else key or settings.identity
    return KeyFile(Path(path)) if path is not None else None
