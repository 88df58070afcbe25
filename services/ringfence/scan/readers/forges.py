"""Readers of git and its forges: tokens of `gh` and `glab`, git's stored credentials, and secrets in CI files.

git: stored credentials, remotes with a password, and headers in its configuration.
CI files: literal secrets in the variables and scripts of pipelines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ringfence.scan import kinds
from ringfence.scan.candidates import Candidate, candidate_of, classify, of_format, of_url
from ringfence.scan.documents import ini_options, mapping, parse_yaml, text_of, walk
from ringfence.scan.findings import Access
from ringfence.scan.names import is_placeholder
from ringfence.scan.readers.reader import FileReader, classify_command, classify_document, once
from ringfence.scan.source_files import SourceFile


class GithubCliReader(FileReader):
    """Reads the hosts file of `gh`."""

    name = "github-cli"
    paths = ("gh/hosts.yml",)
    on_machine = ("~/.config/gh/hosts.yml",)

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        used = ("gh, git and every process of the user",)
        for document in parse_yaml(file.text):
            for host, entry in mapping(document).items():
                api = "api.github.com" if host == "github.com" else host
                logins = [(str(mapping(entry).get("user", "")), entry, host)]
                logins += [
                    (user, one, f"{host}.users.{user}")
                    for user, one in mapping(mapping(entry).get("users")).items()
                ]
                seen: set[str] = set()
                for user, login, field in logins:
                    token = text_of(mapping(login).get("oauth_token"))
                    if token and token not in seen and not is_placeholder(token):
                        seen.add(token)
                        opens = Access(host=api, account=user or None)
                        place = f"{field}.oauth_token"
                        yield of_format(token, place, opens=opens, used_by=used) or candidate_of(
                            kinds.GITHUB_LOGIN, token, place, opens=opens, used_by=used
                        )


class GitlabCliReader(FileReader):
    """Reads the configuration of `glab`."""

    name = "gitlab-cli"
    paths = ("glab-cli/config.yml", ".python-gitlab.cfg")
    on_machine = ("~/.config/glab-cli/config.yml",)

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        used = ("glab and every process of the user",)
        for document in parse_yaml(file.text):
            for host, entry in mapping(mapping(document).get("hosts")).items():
                for name in ("token", "oauth2_refresh_token", "job_token"):
                    token = text_of(mapping(entry).get(name))
                    if token and not is_placeholder(token):
                        opens = Access(host=host, account=text_of(mapping(entry).get("user")))
                        place = f"hosts.{host}.{name}"
                        # `!!null` of older versions is a tag, not a value; what is left is the token.
                        found = of_format(token, place, opens=opens, used_by=used)
                        yield found or candidate_of(
                            replace(kinds.GITLAB_LOGIN, host=host), token, place, opens=opens, used_by=used
                        )


_GIT_USED = {"used_by": ("git and every process of the user",)}


class GitCredentialsReader(FileReader):
    """Reads the file of git's credential store."""

    name = "git-credentials"
    paths = (".git-credentials", "git/credentials")
    on_machine = ("~/.git-credentials", "~/.config/git/credentials")

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        for number, line in enumerate(file.text.splitlines(), start=1):
            yield from of_url(line, f"line.{number}", line=number, **_GIT_USED)


class GitConfigReader(FileReader):
    """Reads configuration files of git."""

    name = "git-config"
    paths = (".git/config", ".gitconfig", "git/config", "modules/*/config")
    on_machine = ("~/.gitconfig", "~/.config/git/config", "/etc/gitconfig")

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        yield from once(self._options(file))

    def _options(self, file: SourceFile) -> Iterator[Candidate]:
        for section, name, value, line in ini_options(file.text):
            kind, _, label = section.partition(" ")
            label = label.strip('"')
            # A label may be a URL with the very password.
            place = f"{kind}.{name}" if "://" in label or not label else f"{kind}.{label}.{name}"
            more = {"line": line, **_GIT_USED}
            yield from of_url(label, place, **more)
            if name.lower() == "extraheader":
                header, _, content = value.partition(":")
                yield from classify(header, content.strip(), place, **more)
            else:
                yield from classify(name, value, place, **more)


_PIPELINE_USED = {"used_by": ("every job of the pipeline, and whoever can read the repository",)}
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
        yield from classify_document(document, **_PIPELINE_USED)
        for path, value in walk(document):
            if _SCRIPTS.intersection(path):
                yield from self._commands(value, ".".join(path))
            elif "=" in value and "\n" not in value:  # `env: [NAME=value]` of Travis and others
                name, _, content = value.partition("=")
                yield from classify(
                    name.strip(),
                    content.strip().strip("\"'"),
                    ".".join((*path, name.strip()))[:200],
                    **_PIPELINE_USED,
                )

    def _commands(self, text: str, field: str) -> Iterator[Candidate]:
        for line in text.splitlines():
            yield from classify_command(line.strip().removeprefix("export "), field, **_PIPELINE_USED)
