"""Draws Mermaid diagrams as SVG when the site is built, so that readers' browsers need no script for them."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import mermaidx

_CACHE = Path(".cache/diagrams")
_ID = "my-svg"
"""The id that the library gives every diagram; a page with two needs different ones."""


def svg(source: str) -> str:
    """The diagram as an inline SVG element.

    Raises: mermaidx.MermaidRenderError where the source is not Mermaid's.
    """
    name = "d" + hashlib.sha256(source.encode()).hexdigest()[:12]
    kept = _CACHE / f"{name}.svg"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(_drawn(source))
    return _with_width(kept.read_text().replace(_ID, name))


def _drawn(source: str) -> str:
    drawn: str = mermaidx.render(source, theme="neutral").svg()
    return re.sub(r"\s*\n\s*", " ", drawn)


def _with_width(svg_element: str) -> str:
    """Gives the style sheet the width at which the text has its full size; the library only sets it as a maximum."""
    return re.sub(r"max-width: ([\d.]+px);", r"max-width: \1; --diagram-width: \1;", svg_element, count=1)


def fence(source: str, language: str, css_class: str, options: object, md: object, **more: object) -> str:
    """The formatter of `mermaid` blocks for pymdownx.superfences."""
    del language, css_class, options, md, more
    return f'<figure class="diagram">{svg(source)}</figure>'
