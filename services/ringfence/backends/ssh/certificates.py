"""OpenSSH user certificates: contents and signing."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    SSHCertificateBuilder,
    SSHCertificateType,
)

from ringfence.backends.ssh.host_helper import KEY_ID, PRINCIPAL, serial_of
from ringfence.backends.ssh.privileges import AllowedCommands

BEFORE_S: Final = 300
"""A certificate is valid from so long before it is made, because the host's clock may be behind."""
_OWN_S: Final = 300
_EXTENSIONS: Final = {"terminal": b"permit-pty", "forward": b"permit-port-forwarding"}


def for_lease(
    authority: Ed25519PrivateKey,
    key: Ed25519PublicKey,
    name: str,
    allowed: AllowedCommands,
    *,
    run: Sequence[str],
    source_addresses: str | None,
    began_s: int,
    deadline_s: int,
) -> str:
    """Return a certificate that allows exactly `allowed`, as one line.

    Args:
        name: the lease's, `<trust domain>.<lease id>`. Serial and key id follow from it.
        run: the command line that the host runs to choose among commands.
        source_addresses: networks in CIDR notation, separated by commas; None allows any.
        began_s: start of the lease in seconds since 1970; `deadline_s`: its end.
    """  # fmt: skip
    builder = (
        SSHCertificateBuilder()
        .public_key(key)
        .type(SSHCertificateType.USER)
        .serial(serial_of(name))
        .key_id((KEY_ID + name).encode())
        .valid_principals([(PRINCIPAL + allowed.user).encode()])
        .valid_after(began_s - BEFORE_S)
        .valid_before(deadline_s)
    )
    if "shell" not in allowed.login_kinds:
        granted = [f"{verb}:{command}" for verb, command in allowed.commands]
        forced = shlex.join([*run, allowed.user, *granted])
        builder = builder.add_critical_option(b"force-command", forced.encode())
    if source_addresses is not None:
        builder = builder.add_critical_option(b"source-address", source_addresses.encode())
    for way in sorted(allowed.login_kinds & _EXTENSIONS.keys(), key=_EXTENSIONS.__getitem__):
        builder = builder.add_extension(_EXTENSIONS[way], b"")
    return builder.sign(authority).public_bytes().decode()


def for_ringfence(authority: Ed25519PrivateKey, key: Ed25519PublicKey, user: str, now_s: int) -> str:
    """Return the certificate for Ringfence's own login. Its serial is 0, which the KRL never revokes."""
    return (
        SSHCertificateBuilder()
        .public_key(key)
        .type(SSHCertificateType.USER)
        .serial(0)
        .key_id(b"ringfence")
        .valid_principals([(PRINCIPAL + user).encode()])
        .valid_after(now_s - BEFORE_S)
        .valid_before(now_s + _OWN_S)
        .sign(authority)
        .public_bytes()
        .decode()
    )


def private_text(key: Ed25519PrivateKey) -> str:
    """Return a private key in OpenSSH format."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()


def public_text(key: Ed25519PublicKey) -> str:
    """Return a public key as one line."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
