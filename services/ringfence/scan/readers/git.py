"""git: stored credentials, remotes with a password, and headers in its configuration."""

from __future__ import annotations

from collections.abc import Iterator

from ringfence.scan.candidates import Candidate, classify, of_url
from ringfence.scan.documents import ini_options
from ringfence.scan.readers.fields import once
from ringfence.scan.readers.reader import FileReader
from ringfence.scan.source_files import SourceFile

_USED = {"used_by": ("git and every process of the user",)}


class GitCredentialsReader(FileReader):
    """Reads the file of git's credential store."""

    name = "git-credentials"
    paths = (".git-credentials", "git/credentials")
    on_machine = ("~/.git-credentials", "~/.config/git/credentials")

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        for number, line in enumerate(file.text.splitlines(), start=1):
            yield from of_url(line, f"line.{number}", line=number, **_USED)


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
            more = {"line": line, **_USED}
            yield from of_url(label, place, **more)
            if name.lower() == "extraheader":
                header, _, content = value.partition(":")
                yield from classify(header, content.strip(), place, **more)
            else:
                yield from classify(name, value, place, **more)
