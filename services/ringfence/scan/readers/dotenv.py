"""`.env` files: `NAME=value` lines that programs and agents load into their environment."""

from __future__ import annotations

from collections.abc import Iterator

from ringfence.scan.candidates import Candidate, classify
from ringfence.scan.documents import assignments
from ringfence.scan.readers.reader import FileReader
from ringfence.scan.source_files import SourceFile


class DotenvReader(FileReader):
    name = "dotenv"
    paths = (".env", ".env.*", "*.env", ".envrc", ".dev.vars")

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        for name, value, line in assignments(file.text):
            yield from classify(name, value, line=line, used_by=("programs that load this file",))
