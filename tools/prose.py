"""Find prose that needs a second reading: long sentences, paragraphs inside table cells, rows outside their table.

    python -m tools.prose                 # every page
    python -m tools.prose docs/policy.md  # these pages

Prints one line for each finding, as `path:line: what is wrong: its first words`, and exits with 1 if there is one.
Code blocks, HTML and headings are not prose. A span of code counts as the words in it, a link as the words of its text.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
SENTENCE_WORDS = 35
"""A sentence with more words is too long."""
CELL_WORDS = 30
"""A table cell with more words is a paragraph."""
CELL_SENTENCES = 2
FEW_WORDS = 20
"""A table cell with more sentences is a paragraph as well, unless all of it has no more than these words."""
SHOWN_WORDS = 12

_CODE = "\x00"
"""Stands before each span of code, which may begin a sentence. What is in a span ends none."""
_NO_ENDS = str.maketrans(".!?", ",,,")
_SENTENCE_END = re.compile(
    r"(?<=[.!?])[)\"'”’*]*\s+(?=[\"'“‘(*]*[A-Z0-9])|(?<=[.!?])[)\"'”’]*\s+(?=\x00)|\n{2,}"
)
_ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|cf|vs|etc|no|Nr|resp)\.(?=\s)", re.IGNORECASE)
_NUMBER = re.compile(r"^\d+\.\s")
_WORD = re.compile(r"\w")


@dataclass(frozen=True)
class Finding:
    """One sentence or table cell that is too long. `line` counts from 1, and is that of the block it stands in."""

    path: str
    line: int
    problem: str
    text: str

    def __str__(self) -> str:
        words = self.text.replace(_CODE, "").split()
        return f"{self.path}:{self.line}: {self.problem}: {' '.join(words[:SHOWN_WORDS])} …"


def pages(root: Path = ROOT) -> list[Path]:
    """The pages that the rule is for: those of the root folder, of docs/ and of examples/."""
    folders = (root / "docs", root / "examples")
    return sorted(root.glob("*.md")) + [page for folder in folders for page in sorted(folder.rglob("*.md"))]


def findings(text: str, path: str) -> list[Finding]:
    """What is too long in one page of Markdown. `path` is only copied into the findings."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    return [found for block in _blocks(tokens) for found in _judge(block, path)]


@dataclass(frozen=True)
class _Block:
    line: int
    text: str
    in_table: bool


def _blocks(tokens: Sequence[Token]) -> Iterator[_Block]:
    line = 0
    opened: list[str] = []
    for token in tokens:
        if token.map:
            line = token.map[0] + 1
        if token.type == "inline":
            if "heading" not in opened:
                yield _Block(line, _prose(token.children or []), in_table="td" in opened)
        elif token.nesting == 1:
            opened.append(token.type.removesuffix("_open"))
        elif token.nesting == -1:
            opened.pop()


def _prose(children: Sequence[Token]) -> str:
    """What a reader sees, with a mark before each span of code."""
    parts = []
    for child in children:
        match child.type:
            case "text":
                parts.append(child.content)
            case "code_inline":
                parts.append(_CODE + child.content.translate(_NO_ENDS))
            case "softbreak":
                parts.append(" ")
            case "hardbreak":
                parts.append("\n\n")
            case "html_inline" if child.content.startswith("<br"):
                parts.append("\n\n")
            case _:
                pass
    return "".join(parts)


def sentences(text: str) -> list[str]:
    """The sentences of one block. A full stop ends one if a capital letter, a figure or a span of code follows."""
    text = _ABBREVIATIONS.sub(r"\1", _NUMBER.sub("", text))
    return [one for part in _SENTENCE_END.split(text) if (one := part.strip())]


def _count(text: str) -> int:
    return sum(1 for word in text.split() if _WORD.search(word))


def _judge(block: _Block, path: str) -> Iterator[Finding]:
    said = sentences(block.text)
    words = _count(block.text)
    if block.in_table and (words > CELL_WORDS or (len(said) > CELL_SENTENCES and words > FEW_WORDS)):
        yield Finding(path, block.line, f"table cell of {words} words, {len(said)} sentences", block.text)
        return
    if not block.in_table and block.text.startswith("|"):
        yield Finding(path, block.line, "row outside its table", block.text)
    for sentence in said:
        if (length := _count(sentence)) > SENTENCE_WORDS:
            yield Finding(path, block.line, f"sentence of {length} words", sentence)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pages", nargs="*", type=Path)
    chosen = parser.parse_args().pages or pages()
    found = [one for page in chosen for one in findings(page.read_text(), _name(page))]
    sys.stdout.writelines(f"{one}\n" for one in found)
    return 1 if found else 0


def _name(page: Path) -> str:
    page = page.resolve()
    return str(page.relative_to(ROOT) if page.is_relative_to(ROOT) else page)


if __name__ == "__main__":
    sys.exit(main())
