"""CI files: literal secrets in the variables and scripts of pipelines."""

from __future__ import annotations

from collections.abc import Iterator

from ringfence.scan.candidates import Candidate, classify
from ringfence.scan.documents import parse_yaml, walk
from ringfence.scan.readers.fields import classify_command, classify_document, once
from ringfence.scan.readers.reader import FileReader
from ringfence.scan.source_files import SourceFile

_USED = {"used_by": ("every job of the pipeline, and whoever can read the repository",)}
_SCRIPTS = frozenset(
    ("run", "script", "before_script", "after_script", "command", "commands", "bash", "install")
)


class CiReader(FileReader):
    """Reads the pipeline files of CI systems."""

    name = "ci"
    paths = (
        ".github/workflows/*.yml", ".github/workflows/*.yaml", ".github/actions/*/action.yml", ".gitlab-ci.yml",
        ".gitlab/ci/*.yml", ".circleci/config.yml", "azure-pipelines.yml", "azure-pipelines.yaml",
        "bitbucket-pipelines.yml", ".travis.yml", ".drone.yml", ".woodpecker.yml", "buildspec.yml", "cloudbuild.yaml",
        "Jenkinsfile", "appveyor.yml", ".buildkite/pipeline.yml",
    )  # fmt: skip

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        if file.name == "Jenkinsfile":
            yield from once(self._commands(file.text, "script"))
            return
        for document in parse_yaml(file.text):
            yield from once(self._of(document))

    def _of(self, document: object) -> Iterator[Candidate]:
        yield from classify_document(document, **_USED)
        for path, value in walk(document):
            if _SCRIPTS.intersection(path):
                yield from self._commands(value, ".".join(path))
            elif "=" in value and "\n" not in value:  # `env: [NAME=value]` of Travis and others
                name, _, content = value.partition("=")
                yield from classify(
                    name.strip(), content.strip().strip("\"'"), ".".join((*path, name.strip()))[:200], **_USED
                )

    def _commands(self, text: str, field: str) -> Iterator[Candidate]:
        for line in text.splitlines():
            yield from classify_command(line.strip().removeprefix("export "), field, **_USED)
