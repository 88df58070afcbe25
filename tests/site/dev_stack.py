"""A running `ringfence dev` that several pages share, and a folder for the reader of each page."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ringfence.dev.processes import free_port
from ringfence.messages.api import GATEWAY_PORT, PORTS
from tests.site.dev_folder import PROGRAM, dev_running, inherited
from tests.site.page_commands import ROOT, run_page
from tests.site.stories import Story

_AGENTS_REACH = re.compile(r"Agents reach their targets through (\S+)")


@dataclass(frozen=True)
class DevStack:
    """A stack that has started. Pages on it must not use the same names for what they make."""

    folder: Path
    addresses: dict[str, str]
    """By the address that pages name: where this stack has it."""

    def read(self, page: Path, story: Story) -> str:
        """Do what a reader of the page does. Returns what the commands printed.

        The reader is in a clone after `make dev`: in a folder of their own, which has all that the clone has. A trust
        bundle that the page publishes is there for the reader of the next page, because the next change follows it.
        """
        clone = linked_clone(self.folder / "readers" / page.relative_to(ROOT).with_suffix(""))
        _link(self.folder / ".ringfence", clone / ".ringfence")
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        text = page.read_text()
        replaced = {old: self._here(new) for old, new in story.replaced.items()}
        replaced |= {usual: here for usual, here in self.addresses.items() if usual in text}
        environment = inherited() | {"HOME": str(home)}
        printed = run_page(page, clone, environment, replaced, self._here(story.before))
        shutil.copy2(clone / ".ringfence/trust-bundle.jws", self.folder / ".ringfence")
        return printed

    def _here(self, text: str) -> str:
        for usual, here in self.addresses.items():
            text = text.replace(usual, here)
        return text


def linked_clone(folder: Path) -> Path:
    """Make a folder that has all that a clone has, by links, and nothing else. Returns it."""
    names = subprocess.run(
        ["git", "ls-tree", "--name-only", "HEAD"], cwd=ROOT, capture_output=True, check=True
    )
    _link(ROOT, folder, names.stdout.decode().split())
    (folder / ".venv").symlink_to(PROGRAM.parents[1])
    return folder


def _link(source: Path, target: Path, names: Iterable[str] | None = None) -> None:
    """Make a folder with the files of another, and with links to its folders: commands follow no link to a file."""
    target.mkdir(parents=True)
    for path in source.iterdir() if names is None else [source / name for name in names]:
        if path.is_file():
            shutil.copy2(path, target)
        elif path.is_dir():
            (target / path.name).symlink_to(path)


@contextmanager
def dev_stack(folder: Path) -> Iterator[DevStack]:
    """Run `ringfence dev` in a folder, as after `make dev` in a clone."""
    with dev_running(folder):
        yield DevStack(folder, _addresses(folder, (folder / "dev.log").read_text()))


def _addresses(folder: Path, printed: str) -> dict[str, str]:
    settings = (folder / ".ringfence/ringfence.toml").read_text()
    found = {"127.0.0.1:9092": _setting(settings, "kafka")}
    for service, port in PORTS.items():
        running = f"{service}_url = " in settings
        address = (
            _setting(settings, f"{service}_url").removeprefix("http://")
            if running
            else f"127.0.0.1:{free_port()}"
        )
        found[f"127.0.0.1:{port}"] = address
    found |= {f"127.0.0.1:{port}": f"127.0.0.1:{free_port()}" for port in (8711, 8726)}
    files = free_port()
    found |= {"http.server 9001": f"http.server {files}", "127.0.0.1:9001": f"127.0.0.1:{files}"}
    door = _AGENTS_REACH.search(printed)
    assert door is not None, printed
    return found | {f"127.0.0.1:{GATEWAY_PORT}": door[1].removeprefix("http://")}


def _setting(settings: str, name: str) -> str:
    found = re.search(rf'^{name} = "(.*)"$', settings, re.MULTILINE)
    assert found is not None, settings
    return found[1]
