"""Readers of container tools: registry logins, kubeconfig files, and Compose, Kubernetes and Helm deployments.

Docker and Podman: passwords and identity tokens of container registries.
Kubeconfig files: tokens, keys and passwords of users, and which cluster each opens.
Deployments: Compose files, Kubernetes manifests, and values of Helm charts.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from typing import Any, Final

from ringfence.scan import kinds
from ringfence.scan.candidates import (
    Candidate,
    candidate_of,
    classify,
    host_of,
    of_basic,
    of_format,
    of_jwt,
    of_pem,
)
from ringfence.scan.documents import mapping, parse_json, parse_yaml, sequence, text_of
from ringfence.scan.findings import Access
from ringfence.scan.names import is_placeholder
from ringfence.scan.readers.reader import (
    FileReader,
    classify_document,
    classify_words,
    once,
    secret_or_format,
)
from ringfence.scan.source_files import SourceFile


class DockerReader(FileReader):
    """Reads the login files of Docker and Podman."""

    name = "docker"
    paths = (".docker/config.json", ".dockercfg", "containers/auth.json", ".dockerconfigjson")
    on_machine = (
        "~/.docker/config.json", "~/.dockercfg", "~/.config/containers/auth.json", "/run/user/*/containers/auth.json",
        "/root/.docker/config.json",
    )  # fmt: skip

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        yield from of_registries(parse_json(file.text))


def of_registries(document: object, prefix: str = "") -> Iterator[Candidate]:
    """Yield the credentials in a file of registry logins."""
    found = mapping(document)
    for registry, entry in mapping(found.get("auths", found)).items():
        login = mapping(entry)
        opens = Access(host=host_of(registry) or registry[:200], account=text_of(login.get("username")))
        more = {"opens": opens, "used_by": ("docker, podman and every process of the user",)}
        field = f"{prefix}auths.{registry}"
        encoded = text_of(login.get("auth")) or ""
        if in_auth := list(of_basic(encoded, f"{field}.auth", kind=kinds.REGISTRY, **more)):
            yield from in_auth
        elif password := text_of(login.get("password")):
            yield of_format(password, f"{field}.password", **more) or candidate_of(
                kinds.REGISTRY, password, f"{field}.password", **more
            )
        for name in ("identitytoken", "registrytoken"):
            if token := text_of(login.get(name)):
                yield of_format(token, f"{field}.{name}", **more) or candidate_of(
                    kinds.OAUTH_LOGIN, token, f"{field}.{name}", **more
                )


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


class ComposeReader(FileReader):
    """Reads Compose files."""

    name = "compose"
    paths = (
        "compose.yml",
        "compose.yaml",
        "compose.*.yml",
        "compose.*.yaml",
        "docker-compose*.yml",
        "docker-compose*.yaml",
    )

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        for document in parse_yaml(file.text):
            yield from once(self._of(mapping(document)))

    def _of(self, document: Mapping[str, Any]) -> Iterator[Candidate]:
        for name, service in mapping(document.get("services")).items():
            used: dict[str, Any] = {"used_by": (f"container {name}",)}
            found = mapping(service)
            for table, settings in (
                ("environment", found.get("environment")),
                ("build.args", mapping(found.get("build")).get("args")),
                ("labels", found.get("labels")),
            ):
                for variable, value in _variables(settings):
                    yield from classify(variable, value, f"services.{name}.{table}.{variable}", **used)
            for key in ("command", "entrypoint"):
                words = found.get(key)
                listed = words.split() if isinstance(words, str) else [str(one) for one in sequence(words)]
                yield from classify_words(listed, f"services.{name}.{key}", **used)
        yield from classify_document(document, used_by=("the containers of this file",))


def _variables(settings: Any) -> Iterator[tuple[str, str]]:
    for name, value in mapping(settings).items():
        if isinstance(value, str):
            yield name, value
    for one in sequence(settings):
        if isinstance(one, str) and "=" in one:
            name, _, value = one.partition("=")
            yield name, value


class KubernetesReader(FileReader):
    """Reads Kubernetes manifests."""

    name = "kubernetes"
    paths = ("*.yaml", "*.yml", "*.json")

    def accepts(self, file: SourceFile) -> bool:
        return b"apiVersion" in file.data and b"kind" in file.data and b"metadata" in file.data

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        documents = [parse_json(file.text)] if file.name.endswith(".json") else parse_yaml(file.text)
        for document in documents:
            items = sequence(mapping(document).get("items")) or [document]
            for item in items:
                yield from once(self._of(mapping(item)))

    def _of(self, document: Mapping[str, Any]) -> Iterator[Candidate]:
        kind = str(document.get("kind", ""))
        if kind == "SealedSecret" or "sops" in document:
            return  # encrypted values
        metadata = mapping(document.get("metadata"))
        label = f"{kind}/{metadata.get('name', '')}"
        namespace = text_of(metadata.get("namespace"))
        used: dict[str, Any]
        if kind == "Secret":
            used = {"used_by": (f"pods that mount {label}, and whoever can read secrets of the namespace",)}
            is_account = document.get("type") == "kubernetes.io/service-account-token"
            for table in ("data", "stringData"):
                for name, value in mapping(document.get(table)).items():
                    text = _decoded(value) if table == "data" else text_of(value)
                    if text is None:
                        continue
                    field = f"{label}.{table}.{name}"
                    if name in (".dockerconfigjson", ".dockercfg"):
                        yield from of_registries(parse_json(text), f"{field}.")
                    elif is_account and name == "token":
                        yield from secret_or_format(text, field, kinds.KUBERNETES_SERVICE_ACCOUNT, **used)
                    else:
                        yield from self._of_secret(name, text, field, namespace, used)
            return
        spec = _pod_spec(document)
        account = text_of(spec.get("serviceAccountName"))
        for container in (*sequence(spec.get("containers")), *sequence(spec.get("initContainers"))):
            name = str(mapping(container).get("name", ""))
            used = {"used_by": (f"{label}, container {name}",)}
            for one in sequence(mapping(container).get("env")):
                variable, value = mapping(one).get("name"), mapping(one).get("value")
                if isinstance(variable, str) and isinstance(value, str):
                    yield from classify(
                        variable, value, f"{label}.{name}.env.{variable}", opens=Access(role=account), **used
                    )
            words = [str(one) for key in ("command", "args") for one in sequence(mapping(container).get(key))]
            yield from classify_words(words, f"{label}.{name}.args", **used)
        yield from (
            one
            for one in classify_document(document, used_by=(label,))
            if not one.field.startswith("metadata.labels")
        )

    def _of_secret(
        self, name: str, text: str, field: str, namespace: str | None, used: dict[str, Any]
    ) -> Iterator[Candidate]:
        """Yield what a member of a Secret is: everything in it is one, unless it is a name, a host or a certificate."""
        found = list(
            classify(
                name, text, field, opens=Access(role=f"namespace {namespace}" if namespace else None), **used
            )
        )
        if found:
            yield from found
        elif not _is_plain(name, text):
            yield from secret_or_format(text, field, kinds.KEY, confidence="likely", **used)


def _is_plain(name: str, text: str) -> bool:
    plain = (
        "user",
        "username",
        "host",
        "port",
        "database",
        "dbname",
        "email",
        "url",
        "endpoint",
        "region",
        "namespace",
        "ca.crt",
        "tls.crt",
    )
    return (
        name.lower().endswith(plain) or "CERTIFICATE" in text or "\n" in text.strip() or len(text.strip()) < 8
    )


def _decoded(value: Any) -> str | None:
    if not isinstance(value, str):
        return None
    try:
        return base64.b64decode("".join(value.split()), validate=True).decode()
    except (binascii.Error, ValueError):
        return None


def _pod_spec(document: Mapping[str, Any]) -> Mapping[str, Any]:
    spec = mapping(document.get("spec"))
    job = mapping(mapping(spec.get("jobTemplate")).get("spec"))
    template = mapping(mapping(job or spec).get("template"))
    return mapping(template.get("spec")) or spec


class HelmValuesReader(FileReader):
    """Reads values files of Helm charts."""

    name = "helm-values"
    paths = ("values.yaml", "values.yml", "values-*.yaml", "values.*.yaml", "secrets.yaml", "*-values.yaml")

    def accepts(self, file: SourceFile) -> bool:
        return not KubernetesReader().accepts(file)

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        for document in parse_yaml(file.text):
            if "sops" in mapping(document):
                continue  # encrypted values
            yield from once(classify_document(document, used_by=("releases of this chart",)))
