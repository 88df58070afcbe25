"""The key that an agent signs with, over its changes: given anew, or found in its file, which was replaced."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from ringfence.client.errors import IdentityError
from ringfence.kernel.crypto.keys import KeyFileError, SigningKey

log = logging.getLogger(__name__)


class _Version(NamedTuple):
    """What tells one content of a file from another without reading it."""

    device: int
    inode: int
    modified_ns: int
    size: int


class KeyFile:
    """The file of a key, read again when another one lies there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._version()

    def changed(self, key: SigningKey) -> SigningKey:
        """The key that is in the file by now, or `key` where that is the same one, or holds none for the same identity.

        What cannot be used is logged and passed over: the key so far counts on for the overlap of its rotation.
        """
        version = self._version()
        if version is None or version == self._seen:
            return key
        self._seen = version
        try:
            found = SigningKey.load(self._path)
        except KeyFileError as error:
            log.error("the key file was replaced by what is no key; the old one is used on: %s", error)
            return key
        if found.id != key.id:
            log.error(
                "the key file %s was replaced by a key of %s; the old one is used on", self._path, found.id
            )
            return key
        if found.kid != key.kid:
            log.info("signing with key %s from now on", found.kid)
        return found

    def _version(self) -> _Version | None:
        try:
            found = self._path.stat()
        except OSError:
            return None  # between the old file and the new one
        return _Version(found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)


def succeeding(key: SigningKey, new: SigningKey | Path | str) -> SigningKey:
    """Another key of the same identity, as a key or the path of its file. Raises IdentityError, KeyFileError."""
    found = new if isinstance(new, SigningKey) else SigningKey.load(Path(new))
    if found.id != key.id:
        raise IdentityError(f"that is a key of {found.id}; this is {key.id}, and stays it")
    return found
