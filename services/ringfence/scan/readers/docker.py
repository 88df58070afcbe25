"""Docker and Podman: passwords and identity tokens of container registries."""

from __future__ import annotations

from collections.abc import Iterator

from ringfence.scan import kinds
from ringfence.scan.candidates import Candidate, candidate_of, host_of, of_basic, of_format
from ringfence.scan.documents import mapping, parse_json, text_of
from ringfence.scan.findings import Access
from ringfence.scan.readers.reader import FileReader
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
