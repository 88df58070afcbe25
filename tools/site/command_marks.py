"""Shows on the site what a page says about tests of its commands: in the repository these marks are comments."""

from __future__ import annotations

import re

_MARK = re.compile(
    r"^(?P<indent>[ ]*)<!-- (?P<mark>commands: not run|commands: run by|not run):? (?P<text>.+?) -->[ ]*$",
    re.MULTILINE,
)
_SENTENCES = {
    "not run": "No test runs this: {}.",
    "commands: not run": "No test runs the commands of this page: {}.",
    "commands: run by": "Tests run the commands of this page: `{}`.",
}


def shown(markdown: str) -> str:
    """The Markdown of a page, with each mark as a sentence (see `tests/site/page_commands.py` for the marks)."""

    def sentence(found: re.Match[str]) -> str:
        text = _SENTENCES[found["mark"]].format(found["text"].removesuffix("."))
        return f"{found['indent']}*{text}*{{ .test-mark }}\n"

    return _MARK.sub(sentence, markdown)
