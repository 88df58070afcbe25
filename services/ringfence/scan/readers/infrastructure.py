"""Readers of Terraform, Vault and, only with `--metadata`, the cloud metadata service.

Terraform and Vault: tokens of their command lines, variables, and secrets in state files.
Metadata service: the role or service account that every process here can use. This reader is the only one that opens
a connection, to the link-local address of the service. It asks for names, never for a credential.
"""

from __future__ import annotations

import http.client
import re
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import urlsplit

from ringfence.scan import kinds
from ringfence.scan.candidates import Candidate, classify
from ringfence.scan.documents import assignments, mapping, parse_json, sequence, text_of, walk
from ringfence.scan.findings import Access
from ringfence.scan.readers.reader import FileReader, Machine, MachineReader, name_in, once, secret_or_format
from ringfence.scan.source_files import SourceFile

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


_BLOCK: Final = re.compile(r'credentials\s+"([^"\n]{1,200})"\s*\{[^{}]{0,500}?token\s*=\s*"([^"\n]{8,2000})"')


class TerraformReader(FileReader):
    """Reads files of Terraform."""

    name = "terraform"
    paths = (
        "credentials.tfrc.json",
        ".terraformrc",
        "terraform.rc",
        "*.tfvars",
        "*.tfvars.json",
        "*.tfstate",
        "*.tfstate.backup",
    )
    on_machine = ("~/.terraform.d/credentials.tfrc.json", "~/.terraformrc")

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        used: dict[str, Any] = {"used_by": ("terraform and every process that can read the file",)}
        if file.name == "credentials.tfrc.json":
            for host, entry in mapping(mapping(parse_json(file.text)).get("credentials")).items():
                if token := text_of(mapping(entry).get("token")):
                    yield from secret_or_format(
                        token, f"credentials.{host}.token", kinds.TERRAFORM, opens=Access(host=host), **used
                    )
        elif file.name in (".terraformrc", "terraform.rc"):
            for match in _BLOCK.finditer(file.text):
                yield from secret_or_format(
                    match[2],
                    f"credentials.{match[1]}.token",
                    kinds.TERRAFORM,
                    opens=Access(host=match[1]),
                    **used,
                )
        elif file.name.endswith(".tfvars"):
            for name, value, line in assignments(file.text):
                yield from classify(name, value, line=line, **used)
        else:
            yield from once(self._json(file, used))

    def _json(self, file: SourceFile, used: dict[str, Any]) -> Iterator[Candidate]:
        document = mapping(parse_json(file.text))
        for resource in sequence(document.get("resources")):
            label = f"{mapping(resource).get('type')}.{mapping(resource).get('name')}"
            for path, value in walk(mapping(resource).get("instances")):
                yield from classify(name_in(path), value, f"{label}.{'.'.join(path)}", **used)
        for name, output in mapping(document.get("outputs")).items():
            if content := text_of(mapping(output).get("value")):
                yield from classify(name, content, f"outputs.{name}", **used)
        if "resources" not in document and "outputs" not in document:
            for path, value in walk(document):
                yield from classify(name_in(path), value, ".".join(path), **used)


class VaultReader(FileReader):
    """Reads the token file of the vault command."""

    name = "vault"
    paths = (".vault-token",)
    on_machine = ("~/.vault-token",)

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        value = file.text.strip()
        if 16 <= len(value) <= 4096 and len(value.split()) == 1:
            yield from secret_or_format(
                value, "token", kinds.VAULT, used_by=("vault, bao and every process of the user",)
            )
