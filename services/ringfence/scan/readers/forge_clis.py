"""The command lines of GitHub (`gh`) and GitLab (`glab`): tokens of signed-in users."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ringfence.scan import kinds
from ringfence.scan.candidates import Candidate, candidate_of, of_format
from ringfence.scan.documents import mapping, parse_yaml, text_of
from ringfence.scan.findings import Access
from ringfence.scan.names import is_placeholder
from ringfence.scan.readers.reader import FileReader
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
