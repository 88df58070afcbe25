"""The cloud metadata service, only with `--metadata`: the role or service account that every process here can use.

It is the only reader that opens a connection, to the link-local address of the metadata service. It asks for names,
never for a credential.
"""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from typing import Final
from urllib.parse import urlsplit

from ringfence.scan import kinds
from ringfence.scan.candidates import Candidate
from ringfence.scan.findings import Access
from ringfence.scan.readers.reader import Machine, MachineReader

_TIMEOUT_S: Final = 1.0
_MOST_BYTES: Final = 4096
_USERS: Final = ("every process of this machine that reaches the metadata service",)


class CloudMetadataReader(MachineReader):
    """Asks the metadata service for the names of roles and service accounts."""

    name = "cloud-metadata"

    def read(self, machine: Machine) -> Iterator[tuple[str, Candidate]]:
        if not machine.metadata:
            return
        base = machine.metadata_url
        token = _ask(base, "PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
        headers = {"X-aws-ec2-metadata-token": token} if token else {}
        role = _ask(base, "GET", "/latest/meta-data/iam/security-credentials/", headers)
        if role:
            yield _found(base, "AWS", "iam/security-credentials", role=role.splitlines()[0][:100])
            return
        google = {"Metadata-Flavor": "Google"}
        account = _ask(base, "GET", "/computeMetadata/v1/instance/service-accounts/default/email", google)
        if account:
            scopes = (
                _ask(base, "GET", "/computeMetadata/v1/instance/service-accounts/default/scopes", google)
                or ""
            )
            yield _found(
                base,
                "Google Cloud",
                "service-accounts/default",
                subject=account[:200],
                scopes=tuple(scopes.split())[:50],
            )
            return
        azure = _ask(
            base,
            "GET",
            "/metadata/instance/compute/resourceId?api-version=2021-02-01&format=text",
            {"Metadata": "true"},
        )
        if azure:
            yield _found(base, "Azure", "identity", account=azure[:300])


def _found(base: str, service: str, field: str, **opens: object) -> tuple[str, Candidate]:
    access = Access(service=service, host=urlsplit(base).netloc, **opens)  # type: ignore[arg-type]
    return base, Candidate(
        field, kinds.CLOUD_METADATA, None, access, _USERS,
        remarks=("agents in a sandbox of `ringfence run` cannot reach the metadata service",),
    )  # fmt: skip


def _ask(base: str, method: str, path: str, headers: dict[str, str]) -> str | None:
    address = urlsplit(base)
    connection = http.client.HTTPConnection(address.hostname or "", address.port or 80, timeout=_TIMEOUT_S)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        body = answer.read(_MOST_BYTES)
        return body.decode("utf-8", "replace").strip() if answer.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
