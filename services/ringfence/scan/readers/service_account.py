"""Service account tokens and secrets that a platform mounts into containers."""

from __future__ import annotations

from collections.abc import Iterator

from ringfence.scan import kinds
from ringfence.scan.candidates import Candidate, of_jwt
from ringfence.scan.readers.fields import secret_or_format
from ringfence.scan.readers.reader import FileReader
from ringfence.scan.source_files import SourceFile

_USED = {"used_by": ("every process in the container",)}


class ServiceAccountReader(FileReader):
    """Reads the tokens of service accounts that a platform mounts."""

    name = "service-account"
    paths = ("serviceaccount/token", "tokens/azure-identity-token", "secrets/tokens/*")
    on_machine = (
        "/var/run/secrets/kubernetes.io/serviceaccount/token",
        "/var/run/secrets/eks.amazonaws.com/serviceaccount/token",
        "/var/run/secrets/azure/tokens/azure-identity-token", "/var/run/secrets/tokens/*",
    )  # fmt: skip

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        token = file.text.strip()
        found = of_jwt(token, "token", kind=kinds.KUBERNETES_SERVICE_ACCOUNT, **_USED)
        if found is not None:
            yield found
        elif 16 <= len(token) <= 8192 and len(token.split()) == 1:
            yield from secret_or_format(token, "token", kinds.KUBERNETES_SERVICE_ACCOUNT, **_USED)


class MountedSecretReader(FileReader):
    """Secrets of Docker and Compose: one file each, named after the secret."""

    name = "mounted-secret"
    paths = ("run/secrets/*",)
    on_machine = ("/run/secrets/*",)

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        value = file.text.strip()
        if 4 <= len(value) <= 8192 and "\n" not in value:
            yield from secret_or_format(
                value, file.name, kinds.for_name(kinds.KEY, ()), confidence="likely", **_USED
            )
