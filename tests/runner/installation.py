"""A real `ringfence dev`, a target behind its gateway, and commands of people: runs on one machine are tried on it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

from ringfence.client.settings import ClientSettings
from tests.support.mortal import mortal

PROGRAM = Path(sys.executable).with_name("ringfence")
WITHIN_S = 90
SCOPE = "notes:read:note/*"


def until(happened: Callable[[], Any], what: str) -> Any:
    """Wait until something is so. Returns what it is."""
    over = time.monotonic() + WITHIN_S
    while not (value := happened()):
        assert time.monotonic() < over, f"{what} did not come"
        time.sleep(0.05)
    return value


class NotesServer:
    """A target: it answers every request, and remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.authorizations: list[str] = []
        requests, authorizations = self.requests, self.authorizations

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                requests.append(f"{self.command} {self.path}")
                authorizations.append(self.headers.get("Authorization", ""))
                body = b"buy milk\n"
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_DELETE = do_POST = do_PUT = do_HEAD = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> NotesServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@dataclass
class Installation:
    """A running stack in a folder, its target `notes`, and the agent `reader-bot` that may read there."""

    folder: Path
    notes: NotesServer
    task: str = ""
    pid: int = 0
    """Of `ringfence dev`."""
    listener: str = ""
    """The URL at which agents without a socket reach the gateway."""
    program: tuple[str, ...] = (str(PROGRAM),)
    """The command `ringfence`, maybe as another user."""
    uid: int | None = None
    """The user that the program runs as, if another one."""

    def inherited(self) -> dict[str, str]:
        """The environment without any setting of Ringfence."""
        return {name: value for name, value in os.environ.items() if not name.startswith("RINGFENCE_")}

    def environment(self, who: str = "sam") -> dict[str, str]:
        """The environment of a person of the installation."""
        return {
            **self.inherited(),
            "PATH": f"{PROGRAM.parent}:{os.environ['PATH']}",
            "RINGFENCE_CONFIG": str(self.folder / ".ringfence/ringfence.toml"),
            "RINGFENCE_IDENTITY": str(self.folder / f".ringfence/users/{who}.json"),
        }

    def call(
        self, *words: str, who: str = "sam", input: bytes = b"", environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Run `ringfence` with these words, as a person or in an environment of its own, to its end."""
        given = self.environment(who) if environment is None else {**self.inherited(), **environment}
        return subprocess.run(
            [*self.program, *words], cwd=self.folder, env=given, input=input, capture_output=True,
            timeout=WITHIN_S, check=False,
        )  # fmt: skip

    def say(self, *words: str, who: str = "sam") -> Any:
        """The same, which has to end well. Returns what it prints as JSON."""
        done = self.call("--json", *words, who=who)
        assert done.returncode == 0, f"{words}: {done.stdout.decode()}{done.stderr.decode()}"
        return json.loads(done.stdout) if done.stdout.strip() else None

    def settings(self, **more: Any) -> ClientSettings:
        """The settings of a client of the installation."""
        file = tomllib.loads((self.folder / ".ringfence/ringfence.toml").read_text())
        return ClientSettings(
            **{**{name: file[name] for name in ClientSettings.model_fields if name in file}, **more}
        )

    def start(self, *words: str, who: str = "sam", **more: Any) -> subprocess.Popen[bytes]:
        """Start `ringfence` with these words."""
        given: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
        return subprocess.Popen([*self.program, *words], cwd=self.folder, env=self.environment(who), **given)

    def run(self, *words: str, task: str | None = None, **more: Any) -> subprocess.CompletedProcess[bytes]:
        """`ringfence run` of the task, to its end."""
        return self.call("run", "--task", task or self.task, *words, **more)

    def report(self, *words: str, **more: Any) -> tuple[int, dict[str, Any], bytes]:
        """Exit code, report and standard output of `ringfence run --json`."""
        done = self.run("--json", *words, **more)
        lines = done.stderr.decode().strip().splitlines()
        assert lines, f"{done.returncode}: it says nothing"
        return done.returncode, json.loads(lines[-1]), done.stdout

    def own_folder(self, name: str) -> Path:
        """A new folder of the installation's user."""
        path = self.folder / name
        path.mkdir(parents=True)
        self.give(path)
        return path

    def service(self, name: str) -> psutil.Process:
        """The process of one of its services."""
        (found,) = [one for one in psutil.Process(self.pid).children() if name in one.cmdline()]
        return found

    def give(self, path: Path) -> None:
        """Let a file or folder be the installation's user's."""
        if self.uid is not None:
            os.chown(path, self.uid, self.uid)

    def assign(self, agent: str = "reader-bot", *, scope: str = SCOPE, lasts: str = "30m") -> str:
        """Assign a task on Maria's behalf. Returns its id."""
        made = self.say(
            "task", "assign", agent, "--purpose", "read notes", "--allow", scope, "--for", lasts, who="maria"
        )
        return str(made["task_id"])

    async def _organise(self) -> None:
        url = f"url=http://127.0.0.1:{self.notes.port}"
        say = self.say
        await asyncio.to_thread(
            say, "target", "add", "notes", "--description", "notes", "--backend", "jwt", "--setting", url,
            "--verb", "read", "--verb", "delete", "--request", "GET /notes/{name} read note/{name}",
            "--request", "DELETE /notes/{name} delete note/{name}", who="olga",
        )  # fmt: skip
        await asyncio.to_thread(
            say, "user", "set", "maria", "--add", "notes:read,delete:note/*", "--yes", who="olga"
        )
        await asyncio.to_thread(
            say, "agent", "register", "reader-bot", "--description", "reads notes", "--allow", SCOPE,
            "--selector", "runner=runner-1 life=1h",
        )  # fmt: skip
        self.task = await asyncio.to_thread(self.assign)


@contextlib.asynccontextmanager
async def installation(
    *, program: tuple[str, ...] = (str(PROGRAM),), uid: int | None = None, **environment: str
) -> AsyncIterator[Installation]:
    """`ringfence dev` in a folder with a short path, as those of sockets are short, with target and agent.

    `program`, `uid`: see `Installation`. `environment`: settings of its services, besides what it sets itself.
    """
    with tempfile.TemporaryDirectory(prefix="rf-") as folder, NotesServer() as notes:
        here = Installation(Path(folder), notes, program=program, uid=uid)
        here.give(here.folder)
        process = await asyncio.create_subprocess_exec(
            *mortal(*program, "dev", "--free-ports"), cwd=folder, env={**here.inherited(), **environment},
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        assert process.stdout is not None
        here.pid = process.pid
        try:
            said = b""
            while b"Ctrl-C ends everything" not in said:
                line = await process.stdout.readline()
                said += line
                assert line, said.decode()
            here.listener = said.decode().partition("reach their targets through ")[2].split()[0]
            await here._organise()
            yield here
        finally:
            if process.returncode is None:
                process.terminate()
            await process.communicate()
