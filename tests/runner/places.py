"""Where the suite runs sandboxes: a runner process as root or as an ordinary user, and what a test asks of it."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ringfence.dev.processes import StackError

ORDINARY_UID = 61_842
"""A user that no machine has: it owns nothing but the folder that it is given."""
HOST = Path(__file__).with_name("host.py")
_SERVICES = Path(__file__).parents[2] / "services" / "ringfence"


class CallError(Exception):
    """What the runner answered instead of a result."""

    def __init__(self, code: str, message: str, remedy: str | None) -> None:
        super().__init__(f"{code}: {message}" + (f" ({remedy})" if remedy else ""))
        self.code = code
        self.remedy = remedy


@dataclass
class Ended:
    code: int
    reason: str
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Place:
    """One way to run sandboxes. `uid` is the runner's."""

    name: str
    backend: str
    uid: int
    options: dict[str, Any] = field(default_factory=dict)
    image: str | None = None

    @property
    def capable(self) -> bool:
        """The command has all capabilities of its user namespace, which no backend gives."""
        return bool(self.options.get("all_capabilities"))

    @property
    def root(self) -> bool:
        return self.uid == 0


class Runner:
    """A runner process, and the folder that its user owns."""

    def __init__(self, place: Place, process: asyncio.subprocess.Process, folder: Path) -> None:
        self.place = place
        self.process = process
        self.folder = folder
        self.state = folder / "state"
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._reading = asyncio.create_task(self._read())

    async def call(self, call: str, **arguments: Any) -> Any:
        """Raises CallError: what the runner answers, or that it has died."""
        if self._reading.done():
            raise CallError("dead", "the runner is dead", None)
        number = next(self._numbers)
        future = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"id": number, "call": call, **arguments}).encode() + b"\n")
        await self.process.stdin.drain()
        return await future

    def spec(self, *argv: str, **fields: Any) -> dict[str, Any]:
        """A specification; without a run id of its own it gets a new one."""
        image = {"image": self.place.image} if self.place.image else {}
        return {"run_id": f"t-{secrets.token_hex(6)}", "argv": list(argv), **image, **fields}

    async def run(self, *argv: str, stdin: str | None = None, **fields: Any) -> Ended:
        """Run a command to its end, and destroy its sandbox: nothing may remain."""
        spec = self.spec(*argv, **fields)
        await self.call("start", spec=spec, stdin=stdin)
        ended = await self.call("wait", run_id=spec["run_id"])
        report = await self.call("destroy", run_id=spec["run_id"])
        assert report["complete"], report
        stdout, stderr = await self.call("said", run_id=spec["run_id"])
        return Ended(ended["code"], ended["reason"], stdout, stderr)

    async def python(self, program: str, *arguments: str, **fields: Any) -> Ended:
        return await self.run("python3", "-c", program, *arguments, **fields)

    def own_folder(self, name: str) -> Path:
        """A new folder of the runner's user."""
        path = self.folder / name
        path.mkdir(parents=True)
        os.chown(path, self.place.uid, self.place.uid)
        return path

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()
        await self._reading

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            answer = json.loads(line)
            future = self._waiting.pop(answer["id"])
            if not future.done():
                if "error" in answer:
                    future.set_exception(CallError(**answer["error"]))
                else:
                    future.set_result(answer["result"])
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(CallError("dead", "the runner is dead", None))
                future.exception()  # its caller may be gone


@asynccontextmanager
async def running(
    place: Place,
    folder: Path,
    code: Path,
    *,
    prefix: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
    descriptors: tuple[int, ...] = (),
) -> AsyncIterator[Runner]:
    """A runner process with its state in `folder`. Killed at the end; what it left then is not looked for.

    A `prefix` has to make it a process of the place's user.
    """
    options = {"kind": place.backend, "state": str(folder / "state"), **place.options}
    identity: dict[str, Any] = {}
    if os.geteuid() != place.uid and not prefix:
        identity = {"user": place.uid, "group": place.uid, "extra_groups": []}
    process = await asyncio.create_subprocess_exec(
        *prefix,
        interpreter(place.uid),
        str(code / "host.py"),
        json.dumps(options),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        limit=1 << 24,
        cwd="/",
        env={"PATH": os.environ["PATH"], "HOME": str(folder), **(environment or {}), "PYTHONPATH": str(code)},
        pass_fds=descriptors,
        **identity,
    )
    runner = Runner(place, process, folder)
    try:
        yield runner
    finally:
        if process.returncode is None:
            await runner.kill()


def copy_code(folder: Path) -> Path:
    """The code that a runner process needs, where every user may read it: a clone may stand in a private folder."""
    package = folder / "ringfence"
    package.mkdir()
    (package / "__init__.py").touch()
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(_SERVICES / "kernel" / "base", package / "kernel" / "base", ignore=ignored)
    shutil.copytree(_SERVICES / "runner", package / "runner", ignore=ignored)
    (package / "kernel" / "__init__.py").touch()
    (package / "messages").mkdir()
    (package / "messages" / "__init__.py").touch()
    shutil.copy(_SERVICES / "messages" / "codes.py", package / "messages")
    shutil.copy(HOST, folder / "host.py")
    import pyseccomp

    assert pyseccomp.__file__ is not None
    shutil.copy(pyseccomp.__file__, folder)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def interpreter(uid: int) -> str:
    """A Python that this user may start. Raises StackError if there is none."""
    if uid == os.geteuid():
        return sys.executable
    identity: dict[str, Any] = {"user": uid, "group": uid, "extra_groups": []}
    for program in (sys.executable, "/usr/bin/python3"):
        try:
            check = "import asyncio, ctypes, json, sys; sys.exit(sys.version_info < (3, 11))"
            if (
                subprocess.run(
                    [program, "-c", check], check=False, capture_output=True, cwd="/", **identity
                ).returncode
                == 0
            ):
                return program
        except OSError:
            continue
    raise StackError("an ordinary user can start no Python 3.11 or newer here: apt install python3")
