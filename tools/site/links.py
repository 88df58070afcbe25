"""Maps files of the repository to pages of the site, and the links of a page to those pages."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

DOCS = "docs"
OUTSIDE = "repository"
"""Where the site has the files that pages link to outside `docs/`."""
_FENCE = re.compile(r"(^ *(```+).*?^ *\2 *$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\(|^\[[^\]]+\]: )([^)\s]+)(\)|$)", re.MULTILINE)
_LANGUAGES = {".json": "json", ".py": "python", ".rego": "rego", ".yaml": "yaml", ".yml": "yaml"}


def linked_paths(root: Path, path: str, text: str) -> Iterator[str]:
    """The files and folders of the repository that a page links to.

    Args:
        root: the repository.
        path: the page, relative to `root`.
        text: its Markdown.

    Yields: paths relative to `root`, without anchors; those that do not exist are left out.
    """
    found: list[str] = []

    def note(link: str) -> str:
        name = link.partition("#")[0]
        if name and ":" not in name:
            target = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
            if not target.startswith("..") and (root / target).exists():
                found.append(target)
        return link

    _each_link(text, note)
    yield from found


def page_of(root: Path, path: str) -> str:
    """Where the site has a file or folder of the repository: the path of its page, relative to the site's sources."""
    if (root / path).is_dir():
        path = posixpath.join(path, "README.md")
    if path.startswith(f"{DOCS}/"):
        return path.removeprefix(f"{DOCS}/")
    return f"{OUTSIDE}/{path}" if path.endswith(".md") else f"{OUTSIDE}/{path}.md"


def path_of(page: str) -> str:
    """The Markdown file of the repository that a page of the site was made from."""
    return page.removeprefix(f"{OUTSIDE}/") if page.startswith(f"{OUTSIDE}/") else f"{DOCS}/{page}"


def site_links(root: Path, page: str, text: str) -> str:
    """The Markdown of a page with links that work on the site, as they do in the repository."""
    path = path_of(page)

    def moved(link: str) -> str:
        name, hash_, anchor = link.partition("#")
        if not name or ":" in name:
            return link
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
        if target.startswith("..") or not (root / target).exists():
            return link  # MkDocs reports it
        if target.startswith(f"{DOCS}/") and (root / target).is_file() and not target.endswith(".md"):
            to = target.removeprefix(f"{DOCS}/")  # as it is: pictures, examples
        else:
            to = page_of(root, target)
        return posixpath.relpath(to, posixpath.dirname(page) or ".") + hash_ + anchor

    return _each_link(text, moved)


def listing(root: Path, path: str) -> str:
    """A page for a folder or a file of the repository that is no Markdown. Searches do not find it."""
    head = f"---\nsearch:\n  exclude: true\n---\n# `{path}`\n\n"
    if (root / path).is_dir():
        names = sorted(
            f"{one.name}/" if one.is_dir() else one.name
            for one in (root / path).iterdir()
            if not one.name.startswith((".", "__"))
        )
        return head + "\n".join(f"- `{name}`" for name in names) + "\n"
    text = (root / path).read_text()
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{head}{fence}{_LANGUAGES.get(Path(path).suffix, 'text')}\n{text.rstrip()}\n{fence}\n"


def _each_link(text: str, change: Callable[[str], str]) -> str:
    """The text with each link outside code blocks changed."""
    parts = _FENCE.split(text)
    # Three parts for each code block: what stands before it, the block, its fence.
    for i in range(0, len(parts), 3):
        parts[i] = _LINK.sub(lambda found: found[1] + change(found[2]) + found[3], parts[i])
    return "".join(part for i, part in enumerate(parts) if i % 3 != 2)
