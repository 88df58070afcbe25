"""Terraform and Vault: tokens of their command lines, variables, and secrets in state files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from ringfence.scan import kinds
from ringfence.scan.candidates import Candidate, classify
from ringfence.scan.documents import assignments, mapping, parse_json, sequence, text_of, walk
from ringfence.scan.findings import Access
from ringfence.scan.readers.fields import name_in, once, secret_or_format
from ringfence.scan.readers.reader import FileReader
from ringfence.scan.source_files import SourceFile

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
