"""axe-core, which looks for what keeps people from using a page. Fetched once from npm, into a cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from playwright.async_api import Page

from ringfence.dev.processes import StackError

VERSION = "4.14.1"
SHA256 = "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"
"""Of its `axe.min.js`."""
SERIOUS = ("serious", "critical")


def axe_file() -> Path:
    """The script. Raises StackError where it cannot be had, or is another one."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ringfence" / f"axe-{VERSION}"
    file = cache / "axe.min.js"
    if not file.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise StackError(
                "there is no npm, which fetches axe-core: install it (Debian: apt-get install npm)"
            )
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            done = subprocess.run(
                [npm, "pack", f"axe-core@{VERSION}", "--silent", "--ignore-scripts"],
                cwd=folder, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise StackError(f"npm does not give axe-core: {done.stderr}")
            with tarfile.open(next(Path(folder).glob("*.tgz"))) as packed:
                packed.extract("package/axe.min.js", folder, filter="data")
            (Path(folder) / "package" / "axe.min.js").replace(file)
    if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        raise StackError(f"{file} is not the axe-core that is pinned; remove it")
    return file


async def serious_problems(page: Page) -> list[str]:
    """What axe-core finds on a page that is serious or critical, a line each."""
    # The page's own policy runs no script of others, and that is not what is looked at here.
    session = await page.context.new_cdp_session(page)
    await session.send("Page.enable")
    await session.send("Runtime.evaluate", {"expression": axe_file().read_text(), "returnByValue": False})
    answer = await session.send(
        "Runtime.evaluate",
        {
            "expression": "axe.run({resultTypes: ['violations']}).then((r) => JSON.stringify(r.violations.map("
            "(v) => [v.impact, v.id, v.nodes.map((n) => n.html).slice(0, 3).join(' | '), v.help])))",
            "awaitPromise": True,
            "returnByValue": True,
        },
    )
    assert "exceptionDetails" not in answer, answer
    found = json.loads(answer["result"]["value"])
    return [f"{id}: {help}: {where}" for impact, id, where, help in found if impact in SERIOUS]
