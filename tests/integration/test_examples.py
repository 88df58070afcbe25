"""Each folder of examples/ runs as its README says: its commands, in one shell, against `ringfence dev`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ringfence.dev.processes import free_port
from tests.site.shown_output import differs

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(page.parent.name for page in (ROOT / "examples").glob("*/README.md"))
OVER_HTTP = {"no-sdk"}
"""Examples that are told where the gateway is. To others its address would say: ask over HTTP instead of Kafka."""
NEED_PROGRAMS = {"unmodified-client"}
"""Examples with curl."""
PORT = "9001"
"""The port of the examples' own servers. A free one stands for it, in all files of the copy."""
WITHIN_S = 100
_BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_END = "end of the command:"


@dataclass
class Step:
    """A command, and the lines that it prints, as `shown_output.py` compares them."""

    command: str
    prints: list[str]


def steps_of(page: Path) -> list[Step]:
    """The commands of all `console` blocks of a page."""
    steps: list[Step] = []
    for block in _BLOCK.findall(page.read_text()):
        for line in block.splitlines():
            if line.startswith("$ "):
                steps.append(Step(line.removeprefix("$ "), []))
            else:
                steps[-1].prints.append(line)
    return steps


@dataclass
class Shell:
    """A shell in the folder of a reader, with what it has printed and was not asked for yet."""

    process: asyncio.subprocess.Process

    async def run(self, command: str, prints: list[str]) -> list[str]:
        """Run a command: it has to end with 0, and every line has to come, in any order: some run in the background.

        Returns what came.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(f'{command}\nprintf "\\n{_END} $?\\n"\n'.encode())
        lines: list[str] = []
        ended = False
        missing = [line for line in prints if line.strip("…")]
        try:
            async with asyncio.timeout(WITHIN_S):
                while missing or not ended:
                    line = await self._line()
                    if line.startswith(_END):
                        assert line == f"{_END} 0", "\n".join([command, *lines, line])
                        ended = True
                        continue
                    lines.append(line)
                    if (
                        found := next((one for one in missing if not differs(one, [line])), None)
                    ) is not None:
                        missing.remove(found)
        except TimeoutError:
            came = "\n".join(lines)
            raise AssertionError(f"{command}: {missing} did not come; what came:\n{came}") from None
        return lines

    async def _line(self) -> str:
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        assert line, "the shell ended"
        return line.decode().rstrip("\n")


@dataclass
class Reader:
    """Somebody with a clone, `make dev` in one terminal and a second terminal."""

    folder: Path
    gateway: str = ""
    """The gateway's URL for agents."""

    @property
    def environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RINGFENCE_")}
        return {**inherited, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def copy(self, name: str) -> Path:
        """Copy an example as it is, but for the port of its server."""
        to = self.folder / "examples" / name
        shutil.copytree(ROOT / "examples" / name, to, ignore=shutil.ignore_patterns("__pycache__"))
        port = str(free_port())
        for file in [one for one in to.rglob("*") if one.is_file()]:
            file.write_text(file.read_text().replace(PORT, port))
        return to

    @contextlib.asynccontextmanager
    async def shell(self, **environment: str) -> AsyncIterator[Shell]:
        # Clients of Kafka alone look at the usual port, and this stack has free ones.
        settings = tomllib.loads((self.folder / ".ringfence/ringfence.toml").read_text())
        process = await asyncio.create_subprocess_exec(
            "bash", cwd=self.folder, env={**self.environment, "RINGFENCE_KAFKA": settings["kafka"], **environment},
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            limit=2**20, start_new_session=True,
        )  # fmt: skip
        try:
            yield Shell(process)
        finally:
            # With what it started in the background.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            await process.wait()


@pytest.fixture(scope="module")
async def reader() -> AsyncIterator[Reader]:
    """`ringfence dev` runs in a folder that has a short path, as those of sockets are short."""
    with tempfile.TemporaryDirectory(prefix="rf-") as folder:
        reader = Reader(Path(folder))
        process = await asyncio.create_subprocess_exec(
            "ringfence", "dev", "--free-ports", cwd=folder, env=reader.environment,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            said = b""
            while b"Ctrl-C ends everything" not in said:
                line = await process.stdout.readline()
                said += line
                assert line, said.decode()
            (reader.gateway,) = re.findall(
                "Agents reach their targets through (http://[0-9.:]+)", said.decode()
            )
            yield reader
        finally:
            if process.returncode is None:
                process.terminate()
            await process.communicate()


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=pytest.mark.tools) if one in NEED_PROGRAMS else one for one in EXAMPLES],
)
async def test_an_example_runs_as_its_readme_says(reader: Reader, name: str) -> None:
    folder = reader.copy(name)
    steps = steps_of(folder / "README.md")
    assert any(step.prints for step in steps)
    task = "TASK"
    environment = {"RINGFENCE_DOOR": reader.gateway} if name in OVER_HTTP else {}
    async with reader.shell(**environment) as shell:
        await shell.run("source .ringfence/dev.sh", [])
        for step in steps:
            # As a reader does: TASK stands for the id that was printed.
            command = re.sub(r"(?<=task )TASK\b|(?<= )TASK(?= )", task, step.command)
            lines = await shell.run(command, step.prints)
            if " task assign " in step.command:
                task = _UUID.findall("\n".join(lines))[0]


def test_a_step_is_read_with_what_it_prints(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("```console\n$ a b\none …\ntwo\n$ c\n```\n\n```sh\n$ d\n```\n")
    assert steps_of(page) == [Step("a b", ["one …", "two"]), Step("c", [])]


async def test_a_line_that_does_not_come_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".ringfence").mkdir()
    (tmp_path / ".ringfence/ringfence.toml").write_text('kafka = "127.0.0.1:1"')
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "WITHIN_S", 0.2)
        async with Reader(tmp_path).shell() as shell:
            with pytest.raises(AssertionError, match="two"):
                await shell.run("echo one", ["one", "two"])
    async with Reader(tmp_path).shell() as shell:
        with pytest.raises(AssertionError, match="end of the command: 1"):
            await shell.run("false", [])
