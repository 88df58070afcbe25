"""What MkDocs calls while it builds the site (`hooks` in mkdocs.yml)."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tools.references.__main__ import built
from tools.site.command_marks import shown
from tools.site.indents import widened
from tools.site.links import linked_paths, listing, page_of, path_of, site_links

_ROOT = Path(__file__).parents[2]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for every file of the repository that a page links to, and the references that are not in git."""
    waiting = [path_of(file.src_uri) for file in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        for target in linked_paths(_ROOT, path, (_ROOT / path).read_text()):
            if (_ROOT / target / "README.md").exists():
                target = f"{target}/README.md"
            page = page_of(_ROOT, target)
            inside = target.startswith("docs/") and not (_ROOT / target).is_dir()
            if target in seen or inside:
                continue
            seen.add(target)
            if target.endswith(".md"):
                waiting.append(target)
                content = (_ROOT / target).read_text()
            else:
                content = listing(_ROOT, target)
            files.append(File.generated(config, page, content=content))
    for path, content in built().items():
        files.append(File.generated(config, f"reference/{path}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes links of the repository links of the site, lists those of Python-Markdown, and marks of commands text."""
    del config, files
    return widened(site_links(_ROOT, page.file.src_uri, shown(markdown)))
