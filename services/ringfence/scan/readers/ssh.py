"""Readers of SSH and keyrings: private keys with and without passphrase, SSH agents, and the places of keyrings.

No encrypted keyring is read, but every program in the user's session can open it.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from ringfence.scan import kinds
from ringfence.scan.candidates import Candidate, candidate_of, pems_in
from ringfence.scan.documents import ini_options
from ringfence.scan.findings import Access, Pattern
from ringfence.scan.readers.reader import FileReader, Machine, MachineReader, secret_or_format
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


_PPK: Final = re.compile(
    r"PuTTY-User-Key-File-\d: .*?Encryption: (\S+).*?Private-Lines: \d+\r?\n(.*?)Private-", re.DOTALL
)
_USERS: Final = ("ssh, git and every process of the user",)


class SshKeyReader(FileReader):
    """Reads private keys of SSH."""

    name = "ssh-key"
    paths = (".ssh/*", "id_rsa", "id_ed25519", "id_ecdsa", "id_dsa", "*.ppk", "ssh_host_*_key")
    on_machine = ("~/.ssh/*", "/etc/ssh/ssh_host_*_key")

    def accepts(self, file: SourceFile) -> bool:
        return b"PRIVATE KEY" in file.data or file.data.startswith(b"PuTTY-User-Key-File-")

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        for (kind, body), offset in pems_in(file.text):
            if kind.id == kinds.PRIVATE_KEY.id:  # an older form, which ssh reads as well
                kind = kinds.SSH_KEY
            elif kind.id == "private-key-encrypted":
                kind = kinds.SSH_KEY_LOCKED
            yield self._of_key(kind, body, file, file.line_at(offset))
        for match in _PPK.finditer(file.text):
            kind = kinds.SSH_KEY if match[1] == "none" else kinds.SSH_KEY_LOCKED
            yield self._of_key(kind, "".join(match[2].split()), file, None)

    def _of_key(self, kind: kinds.Kind, body: str, file: SourceFile, line: int | None) -> Candidate:
        if file.name.startswith("ssh_host_"):
            kind = replace(
                kind, id="ssh-host-key", title="SSH host key", pattern=kinds.GCP_SERVICE_ACCOUNT.pattern
            )
        found = candidate_of(kind, body, "key", opens=Access(subject=file.name), line=line, used_by=_USERS)
        if kind.id == kinds.SSH_KEY_LOCKED.id:
            found = replace(
                found, remarks=("an agent needs the passphrase as well, or an SSH agent that has the key",)
            )
        return found


class SshAgentReader(MachineReader):
    """Reports that an SSH agent runs. It does not query it: that needs a connection, and some agents ask their user."""

    name = "ssh-agent"

    def read(self, machine: Machine) -> Iterator[tuple[str, Candidate]]:
        path = machine.environ.get("SSH_AUTH_SOCK", "")
        if not path:
            return
        try:
            is_socket = stat.S_ISSOCK(os.lstat(path).st_mode)
        except (OSError, ValueError):
            return
        if is_socket:
            yield (
                str(Path(path)),
                Candidate(
                    "SSH_AUTH_SOCK", kinds.SSH_AGENT, None, Access("SSH"), ("every process that has this variable",),
                    remarks=("whoever can reach the socket signs with all keys in the agent",),
                ),
            )  # fmt: skip
