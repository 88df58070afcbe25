"""The built site: complete, read as its authors meant it, and without anything from another host.

At the end as a reader's browser shows it: no request leaves the machine, nothing sticks out, the search finds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from playwright.async_api import Browser, expect
from playwright.async_api import TimeoutError as PlaywrightTimeoutError

from tests.site.conftest import ROOT, build

_LOADED = {
    "script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "use": "href", "image": "href",
    "video": "src", "audio": "src", "object": "data", "embed": "src",
}  # fmt: skip
"""What a browser fetches by itself, and by which attribute."""


def foreign_hosts(text: str) -> list[str]:
    """The addresses with a host that a page or a stylesheet makes a browser fetch."""
    found: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            values = dict(attrs)
            if tag == "link" and values.get("rel") in ("canonical", "next", "prev", "alternate"):
                return
            address = values.get(_LOADED.get(tag, "")) or ""
            if re.match(r"(\w+:)?//", address):
                found.append(address)

    Reader().feed(text)
    found += re.findall(r"""url\(\s*["']?((?:\w+:)?//[^"')]+)""", text)
    found += re.findall(r"""@import\s+["']((?:\w+:)?//[^"']+)""", text)
    return found


def prose(page: Path) -> str:
    """The article of a built page without its code and its diagrams."""
    text = page.read_text()
    article = text[text.find("<article") : text.find("</article")]
    return re.sub(r"<(pre|code|svg)\b.*?</\1>", "", article, flags=re.DOTALL)


def misread(text: str) -> Iterator[str]:
    """Markdown that stayed text: a list, a table, a fence, emphasis."""
    for tag, inner in re.findall(r"<(p|li|td)>(.*?)</\1>", text, re.DOTALL):
        lists = r"^\s*(- |\d+\. |\||```)|" if tag != "td" else ""
        if re.search(rf"{lists}```|\*\*", inner, re.MULTILINE):
            yield inner[:120]


def test_built_site_loads_nothing_from_another_host(site: Path) -> None:
    files = [*site.rglob("*.html"), *site.rglob("*.css"), *site.rglob("*.svg")]
    assert len(files) > 100
    found = {str(file.relative_to(site)): foreign_hosts(file.read_text()) for file in files}
    assert {name: hosts for name, hosts in found.items() if hosts} == {}


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://unpkg.com/mermaid"></script>',
        '<link rel="stylesheet" href="//fonts.example/css">',
        '<img src="http://example.org/a.png">',
        "a { background: url('https://example.org/a.png') }",
        '@import "https://example.org/a.css";',
    ],
)
def test_another_host_would_be_found(text: str) -> None:
    assert foreign_hosts(text)
    assert not foreign_hosts(
        '<a href="https://example.org">elsewhere</a> <link rel="icon" href="assets/x.svg">'
    )


def test_every_page_is_on_the_site(site: Path) -> None:
    pages = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")]
    assert len(pages) > 100
    built = [
        page.with_name("index.html" if page.name == "README.md" else f"{page.stem}.html") for page in pages
    ]
    assert [str(page) for page in built if not (site / page).exists()] == []


def test_pages_are_read_as_they_were_written(site: Path) -> None:
    found = {str(page.relative_to(site)): list(misread(prose(page))) for page in site.rglob("*.html")}
    assert {name: texts for name, texts in found.items() if texts} == {}


def test_a_list_that_stayed_text_would_be_found() -> None:
    assert list(misread("<p>The rules:\n- one\n- two</p>"))
    assert list(misread("<td>**bold**</td>"))
    assert not list(misread("<p>one - two</p>"))


def test_diagrams_are_pictures_and_need_no_script(site: Path) -> None:
    sources = [page for page in (ROOT / "docs").rglob("*.md") if "```mermaid" in page.read_text()]
    assert sources
    for source in sources:
        page = site / source.relative_to(ROOT / "docs").with_suffix(".html")
        text = page.read_text()
        diagrams = source.read_text().count("```mermaid")
        assert text.count('<figure class="diagram"><svg') == diagrams, page
        # The style sheet keeps a diagram readable by its own width.
        assert text.count("--diagram-width: ") == diagrams, page
    assert not [page for page in site.rglob("*.html") if 'class="mermaid"' in page.read_text()]


def test_a_dead_link_fails_the_build(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    settings = tmp_path / "mkdocs.yml"
    settings.write_text(
        f"INHERIT: {ROOT}/mkdocs.yml\ndocs_dir: {docs}\nsite_dir: {tmp_path}/site\nhooks: []\n"
        "nav: [README.md]\nextra_css: []\n"
    )
    for text, said in (("[a](#no)", "#no"), ("[a](no.md)", "no.md")):
        (docs / "README.md").write_text(f"# It is\n\n{text}\n")
        done = build(tmp_path / "site", "--config-file", str(settings))
        assert done.returncode != 0
        assert said in done.stderr
    (docs / "README.md").write_text("# It is\n\n[a](#it-is)\n")
    assert build(tmp_path / "site", "--config-file", str(settings)).returncode == 0


def test_a_page_says_which_commands_no_test_runs(site: Path) -> None:
    page = (site / "operators/kubernetes.html").read_text()
    assert "No test runs this: these namespaces are yours" in page
    for built in site.rglob("*.html"):
        assert not re.search("<!-- (not run|commands)", built.read_text()), built


# --- in a browser ---

expect.set_options(timeout=20_000)  # where other programs have the machine, pages take their time
WIDTHS = (390, 1300)
FITS = "document.documentElement.scrollWidth <= window.innerWidth"


@pytest.mark.timeout(600)
async def test_every_page_fits_and_asks_nobody_else(browser: Browser, site: Path, address: str) -> None:
    page = await browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    too_wide = []
    pages = [one.relative_to(site) for one in site.rglob("*.html") if "repository" not in one.parts]
    for one in sorted(pages):
        await page.goto(f"{address}/{one}", wait_until="load")
        for width in WIDTHS:
            await page.set_viewport_size({"width": width, "height": 900})
            try:
                # The theme's script lays parts out anew after the width has changed.
                await page.wait_for_function(FITS, timeout=5000)
            except PlaywrightTimeoutError:
                too_wide.append((str(one), width))
    await page.close()
    assert len(asked) > len(pages)
    assert {url for url in asked if not url.startswith((address, "data:", "blob:"))} == set()
    assert too_wide == []


async def test_the_search_finds_a_page_without_another_host(browser: Browser, address: str) -> None:
    page = await browser.new_page(viewport={"width": 1300, "height": 900})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    await page.goto(f"{address}/index.html")
    await page.get_by_placeholder("Search").fill("kill switch")
    result = page.locator(".md-search-result__item a").first
    await expect(result).to_be_visible()
    await result.click()
    await expect(page.locator("article")).to_contain_text("kill switch", ignore_case=True)
    await page.close()
    assert {url for url in asked if not url.startswith((address, "data:", "blob:"))} == set()


async def test_tabs_lead_to_every_kind_of_reader(browser: Browser, address: str) -> None:
    page = await browser.new_page(viewport={"width": 1300, "height": 900})
    await page.goto(f"{address}/index.html")
    tabs = page.locator(".md-tabs__link")
    assert [text.strip() for text in await tabs.all_inner_texts()] == [
        "Start", "Agent developers", "Sponsors", "Operators",
        "Security and audit", "Contributors", "Concepts", "Reference",
    ]  # fmt: skip
    await page.close()
