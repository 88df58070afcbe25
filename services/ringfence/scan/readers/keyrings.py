"""Keyrings: reports their places. It reads no encrypted one, but every program in the user's session can open them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

from ringfence.scan import kinds
from ringfence.scan.candidates import Candidate
from ringfence.scan.documents import ini_options
from ringfence.scan.findings import Access, Pattern
from ringfence.scan.readers.fields import secret_or_format
from ringfence.scan.readers.reader import FileReader
from ringfence.scan.source_files import SourceFile

KEYRING: Final = kinds.Kind("keyring", "keyring of a signed-in user", Pattern.USER_TOKEN)
_OTHER: Final = kinds.Kind("key-store", "encrypted store of keys or passwords", Pattern.OTHER)
_NAMES: Final = {
    ".keyring": ("GNOME Keyring", KEYRING), ".kwl": ("KWallet", KEYRING), ".keychain-db": ("macOS Keychain", KEYRING),
    ".kdbx": ("KeePass", _OTHER), ".key": ("GnuPG", _OTHER),
}  # fmt: skip


class KeyringReader(FileReader):
    """Reports the files of keyrings."""

    name = "keyring"
    paths = (
        "keyrings/*.keyring", "kwalletd/*.kwl", "Library/Keychains/*.keychain-db", "*.kdbx",
        "private-keys-v1.d/*.key",
    )  # fmt: skip
    on_machine = (
        "~/.local/share/keyrings/*.keyring", "~/.local/share/kwalletd/*.kwl", "~/Library/Keychains/*.keychain-db",
        "~/.gnupg/private-keys-v1.d/*.key",
    )  # fmt: skip

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        service, kind = _NAMES[os.path.splitext(file.name)[1]]
        if file.data.startswith(b"[keyring]"):
            # The form of a GNOME keyring without a password: each secret is in clear.
            for section, name, value, line in ini_options(file.text):
                if name == "secret":
                    yield from secret_or_format(
                        value,
                        f"{section}.secret",
                        kinds.KEY,
                        line=line,
                        used_by=("every process of the user",),
                    )
            return
        yield Candidate(
            "keyring", kind, None, Access(service), ("every process of the user, while it is unlocked",),
            remarks=("the scan does not open it",),
        )  # fmt: skip
