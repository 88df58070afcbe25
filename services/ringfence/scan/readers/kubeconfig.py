"""Kubeconfig files: tokens, keys and passwords of users, and which cluster each opens."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from typing import Any, Final

from ringfence.scan import kinds
from ringfence.scan.candidates import Candidate, candidate_of, classify, host_of, of_jwt, of_pem
from ringfence.scan.documents import mapping, parse_yaml, sequence, text_of
from ringfence.scan.findings import Access
from ringfence.scan.names import is_placeholder
from ringfence.scan.readers.fields import once
from ringfence.scan.readers.reader import FileReader
from ringfence.scan.source_files import SourceFile

_USED: Final[dict[str, Any]] = {"used_by": ("kubectl, helm and every process of the user",)}


class KubeconfigReader(FileReader):
    """Reads kubeconfig files."""

    name = "kubeconfig"
    paths = (
        ".kube/*",
        "kubeconfig",
        "kubeconfig.*",
        "*.kubeconfig",
        "k3s/k3s.yaml",
        "*.yaml",
        "*.yml",
        "*.conf",
    )
    on_machine = (
        "~/.kube/config",
        "~/.kube/*.yaml",
        "~/.kube/*.yml",
        "/etc/rancher/k3s/k3s.yaml",
        "/etc/kubernetes/*.conf",
    )

    def accepts(self, file: SourceFile) -> bool:
        return b"clusters" in file.data and b"users" in file.data and b"contexts" in file.data

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        for document in parse_yaml(file.text):
            servers = {
                mapping(one).get("name"): text_of(mapping(mapping(one).get("cluster")).get("server"))
                for one in sequence(mapping(document).get("clusters"))
            }
            clusters = {
                mapping(mapping(one).get("context")).get("user"): mapping(mapping(one).get("context")).get(
                    "cluster"
                )
                for one in sequence(mapping(document).get("contexts"))
            }
            for one in sequence(mapping(document).get("users")):
                name = str(mapping(one).get("name", ""))
                server = servers.get(clusters.get(name))
                # All of them open the API server, also those whose kind does not say so.
                opens = Access("Kubernetes", host_of(server) if server else None, name or None)
                yield from once(_of_user(mapping(mapping(one).get("user")), f"users.{name}", opens))


def _of_user(user: Mapping[str, Any], field: str, opens: Access) -> Iterator[Candidate]:
    if (token := text_of(user.get("token"))) and not is_placeholder(token):
        yield of_jwt(token, f"{field}.token", opens=opens, **_USED) or candidate_of(
            kinds.KUBERNETES_USER, token, f"{field}.token", opens=opens, **_USED
        )
    if data := text_of(user.get("client-key-data")):
        try:
            pem = base64.b64decode(data, validate=False).decode("ascii", "replace")
        except binascii.Error:
            pem = ""
        found = of_pem(pem, f"{field}.client-key-data")
        if found is not None and found.value is not None:
            yield candidate_of(
                kinds.KUBERNETES_USER, found.value.reveal(), f"{field}.client-key-data", opens=opens, **_USED
            )
    if (password := text_of(user.get("password"))) and not is_placeholder(password):
        yield candidate_of(kinds.PASSWORD, password, f"{field}.password", opens=opens, **_USED)
    for name, value in mapping(mapping(user.get("auth-provider")).get("config")).items():
        if isinstance(value, str) and name.endswith(("-token", "client-secret")):
            place = f"{field}.auth-provider.config.{name}"
            yield of_jwt(value, place, kind=kinds.KUBERNETES_USER, opens=opens, **_USED) or candidate_of(
                kinds.KUBERNETES_USER, value, place, opens=opens, **_USED
            )
    for one in sequence(mapping(user.get("exec")).get("env")):
        variable, content = text_of(mapping(one).get("name")), text_of(mapping(one).get("value"))
        if variable and content:
            yield from classify(variable, content, f"{field}.exec.env.{variable}", opens=opens, **_USED)
