"""Package managers: npm, Yarn, PyPI (twine, pip, Poetry), Cargo, Maven, Gradle."""

from __future__ import annotations

import base64
import binascii
import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from ringfence.scan import kinds
from ringfence.scan.candidates import Candidate, classify, host_of
from ringfence.scan.documents import (
    assignments,
    ini_options,
    mapping,
    parse_toml,
    parse_yaml,
    text_of,
    xml_texts,
)
from ringfence.scan.findings import Access
from ringfence.scan.names import is_placeholder, is_reference
from ringfence.scan.readers.reader import FileReader, classify_document, secret_or_format
from ringfence.scan.source_files import SourceFile

_NPM = kinds.Kind("npm-auth", "npm registry token", kinds.KEY.pattern, "npm")
_NPM_PASSWORD = kinds.Kind("npm-password", "npm registry password", kinds.PASSWORD.pattern, "npm")
_PYPI = kinds.Kind("pypi-password", "Python index password", kinds.PASSWORD.pattern, "Python index")
_CARGO = kinds.Kind(
    "cargo-registry-token", "Cargo registry token", kinds.KEY.pattern, "crates.io", "crates.io"
)
_MAVEN = kinds.Kind("maven-password", "Maven server password", kinds.PASSWORD.pattern, "Maven repository")


class NpmReader(FileReader):
    """Reads the settings of npm and Yarn."""

    name = "npm"
    paths = (".npmrc", ".yarnrc.yml")
    on_machine = ("~/.npmrc", "~/.yarnrc.yml", "/etc/npmrc")

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        used = ("npm, yarn, pnpm and every process of the user",)
        if file.name == ".yarnrc.yml":
            for document in parse_yaml(file.text):
                yield from self._yarn(document, "", used)
            return
        for number, line in enumerate(file.text.splitlines(), start=1):
            name, equals, value = line.partition("=")
            name, value = name.strip(), value.strip().strip("\"'")
            if not equals or name.startswith(("#", ";")):
                continue
            registry, _, option = name.rpartition(":")
            opens = Access(host=host_of(registry.lstrip("/")) if registry else None)
            more: dict[str, Any] = {"opens": opens, "line": number, "used_by": used}
            if option == "_authToken":
                yield from secret_or_format(value, name, _NPM, **more)
            elif option == "_auth":
                yield from secret_or_format(value, name, kinds.BASIC_AUTH, **more)
            elif option == "_password" and not is_reference(value):
                with contextlib.suppress(binascii.Error, ValueError):
                    value = base64.b64decode(value, validate=True).decode()
                yield from secret_or_format(value, name, _NPM_PASSWORD, **more)

    def _yarn(self, document: Any, prefix: str, used: tuple[str, ...]) -> Iterator[Candidate]:
        found = mapping(document)
        opens = Access(host=host_of(text_of(found.get("npmRegistryServer")) or prefix) if prefix else None)
        for name, kind in (("npmAuthToken", _NPM), ("npmAuthIdent", _NPM_PASSWORD)):
            if value := text_of(found.get(name)):
                yield from secret_or_format(value, f"{prefix}{name}", kind, opens=opens, used_by=used)
        for table in ("npmRegistries", "npmScopes"):
            for registry, entry in mapping(found.get(table)).items():
                yield from self._yarn(entry, f"{table}.{registry}.", used)


class PythonIndexReader(FileReader):
    """Reads the settings of twine, pip and Poetry."""

    name = "pypi"
    paths = (".pypirc", "pip.conf", "pypoetry/auth.toml")
    on_machine = (
        "~/.pypirc",
        "~/.config/pip/pip.conf",
        "~/.pip/pip.conf",
        "/etc/pip.conf",
        "~/.config/pypoetry/auth.toml",
    )

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        used = {"used_by": ("twine, pip, Poetry and every process of the user",)}
        if file.name == "auth.toml":
            yield from self._poetry(parse_toml(file.text), used)
            return
        sections: dict[str, dict[str, str]] = defaultdict(dict)
        options = list(ini_options(file.text))
        for section, name, value, _ in options:
            sections[section][name.lower()] = value
        for section, name, value, line in options:
            if name.lower() == "password":
                repository = sections[section].get(
                    "repository", "https://upload.pypi.org" if section == "pypi" else ""
                )
                user = sections[section].get("username")
                opens = Access(host=host_of(repository), account=None if user == "__token__" else user)
                yield from secret_or_format(value, f"{section}.{name}", _PYPI, opens=opens, line=line, **used)
            else:
                yield from classify(name, value, f"{section}.{name}", line=line, **used)

    def _poetry(self, document: Any, used: dict[str, Any]) -> Iterator[Candidate]:
        for repository, login in mapping(document.get("http-basic")).items():
            if password := text_of(mapping(login).get("password")):
                opens = Access(account=text_of(mapping(login).get("username")))
                yield from secret_or_format(
                    password, f"http-basic.{repository}.password", _PYPI, opens=opens, **used
                )
        for repository, token in mapping(document.get("pypi-token")).items():
            if isinstance(token, str):
                yield from secret_or_format(token, f"pypi-token.{repository}", _PYPI, **used)


class CargoReader(FileReader):
    """Reads the credentials of Cargo."""

    name = "cargo"
    paths = (".cargo/credentials.toml", ".cargo/credentials", ".cargo/config.toml")
    on_machine = ("~/.cargo/credentials.toml", "~/.cargo/credentials", "~/.cargo/config.toml")

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        document = parse_toml(file.text)
        used = {"used_by": ("cargo and every process of the user",)}
        if token := text_of(mapping(document.get("registry")).get("token")):
            yield from secret_or_format(token, "registry.token", _CARGO, **used)
        for name, registry in mapping(document.get("registries")).items():
            if token := text_of(mapping(registry).get("token")):
                opens = Access(
                    service=f"Cargo registry {name}", host=host_of(str(mapping(registry).get("index", "")))
                )
                yield from secret_or_format(token, f"registries.{name}.token", _CARGO, opens=opens, **used)
        yield from classify_document(mapping(document.get("env")), **used)


class MavenReader(FileReader):
    """Reads the settings of Maven."""

    name = "maven"
    paths = (".m2/settings.xml", "settings.xml")
    on_machine = ("~/.m2/settings.xml",)

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        server, account = "", ""
        for path, value in xml_texts(file.text):
            if path[-1] == "id":
                server, account = value, ""
            elif path[-1] == "username":
                account = value
            elif (
                path[-1] in ("password", "passphrase")
                and not is_placeholder(value)
                and not is_reference(value)
            ):
                if value.startswith("{") and value.endswith("}"):
                    continue  # encrypted with the master password of settings-security.xml
                yield from secret_or_format(
                    value, f"{path[-2]}.{server}.{path[-1]}" if server else ".".join(path[-2:]), _MAVEN,
                    opens=Access(subject=f"{path[-2]} {server}", account=account or None),
                    used_by=("mvn and every process of the user",),
                )  # fmt: skip


class GradleReader(FileReader):
    """Reads the properties of Gradle."""

    name = "gradle"
    paths = ("gradle.properties",)
    on_machine = ("~/.gradle/gradle.properties",)

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        for name, value, line in assignments(file.text):
            yield from classify(name, value, line=line, used_by=("Gradle and every process of the user",))
