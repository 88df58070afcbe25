"""`ringfence gateway connect` as a process of its own: what it prints works as it is, and it ends as it says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import stat
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from ringfence.gateway.dataplane.plane import DataPlane
from tests.gateway.certificates import Certificates
from tests.gateway.table_gate import TASK, Entry, TableGate, data_plane
from tests.gateway.target import Target

RINGFENCE = [sys.executable, "-P", "-m", "ringfence.cli.main"]
ASK = "import httpx; print(httpx.get('https://api.test/files/a').text)"


@dataclass
class Place:
    """A target with TLS behind a data plane that has a socket for TASK."""

    target: Target
    plane: DataPlane
    folder: Path

    @property
    def socket(self) -> Path:
        return self.folder / "tasks" / f"{TASK}.sock"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "NO_PROXY": "*",
            "RINGFENCE_CONFIG": os.devnull,
            "RINGFENCE_GATEWAY_SOCKETS": str(self.folder / "tasks"),
            "RINGFENCE_GATEWAY_CA_FILE": str(self.folder / "ca of the gateway.pem"),
        }

    @contextlib.asynccontextmanager
    async def connect(
        self, *words: str, under: Sequence[str] = ()
    ) -> AsyncIterator[asyncio.subprocess.Process]:
        """`under`: a program that runs it."""
        process = await asyncio.create_subprocess_exec(
            *under, *RINGFENCE, "gateway", "connect", "--task", TASK, *words, cwd=self.folder, env=self.environment,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()

    async def run(self, *words: str) -> tuple[int, str, str]:
        async with self.connect(*words) as process:
            out, err = await process.communicate()
            assert process.returncode is not None
            return process.returncode, out.decode(), err.decode()


@pytest_asyncio.fixture(loop_scope="package")
async def place() -> AsyncIterator[Place]:
    target = Target()
    async with contextlib.AsyncExitStack() as stack:
        # The path of a socket is short, and pytest's folders have the names of tests.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ringfence-")))
        certificates = Certificates(folder)
        await stack.enter_async_context(target.serving(certificates.server("localhost")))
        gate = TableGate({"api": Entry(f"https://localhost:{target.port}", frozenset({"api.test"}))})
        plane = data_plane(gate, tls=certificates.trusting())
        await plane.start()
        stack.push_async_callback(plane.close)
        made = Place(target, plane, folder)
        made.socket.parent.mkdir()
        await plane.listen_for_task(made.socket, TASK)
        plane.authority.write(folder / "ca of the gateway.pem")
        yield made


async def lines(process: asyncio.subprocess.Process) -> list[str]:
    """The lines for the shell that it prints."""
    assert process.stdout is not None
    found: list[str] = []
    while not found or not found[-1].startswith("export PIP_CERT="):
        line = (await process.stdout.readline()).decode()
        assert line, "it ended"
        found.append(line.rstrip("\n"))
    return found


async def shell(place: Place, printed: list[str], command: str) -> tuple[int, str]:
    """The status and the output of a command in a shell that read what was printed."""
    process = await asyncio.create_subprocess_exec(
        "sh", "-c", "\n".join([*printed, command]), env=place.environment, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode()


async def test_connect_prints_settings_that_work_in_a_shell(place: Place) -> None:
    async with place.connect() as process:
        printed = await lines(process)
        url = next(line for line in printed if "HTTPS_PROXY" in line).partition("=")[2].strip("'")
        assert any(line.startswith("#") and url in line for line in printed)
        assert await shell(place, printed, f'{sys.executable} -c "{ASK}"') == (0, "ok\n")
        wrong = [line.replace(url, url.replace("@", "x@")) for line in printed]
        assert (await shell(place, wrong, f'{sys.executable} -c "{ASK}" 2>&1'))[0] != 0
        command_line = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        assert url.split(":")[2].partition("@")[0].encode() not in command_line
    assert len(place.target.requests) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda one: one.name)
async def test_a_signal_ends_it(place: Place, number: signal.Signals) -> None:
    async with place.connect("--json") as process:
        assert process.stdout is not None
        told = json.loads(await process.stdout.readline())
        process.send_signal(number)
        out, err = await process.communicate()
        assert (process.returncode, out, err) == (0, b"", b"")
    with pytest.raises(OSError, match="refused"):
        await asyncio.open_connection("127.0.0.1", told["port"])


async def test_json_has_the_url_and_the_environment(place: Place) -> None:
    async with place.connect("--json") as process:
        assert process.stdout is not None
        told = json.loads(await process.stdout.readline())
    assert (told["task_id"], told["ca_file"]) == (TASK, str(place.folder / "ca of the gateway.pem"))
    assert told["url"].startswith("http://ringfence:")
    assert told["url"].endswith(f"@127.0.0.1:{told['port']}")
    assert told["environment"]["HTTPS_PROXY"] == told["environment"]["http_proxy"] == told["url"]
    assert told["environment"]["SSL_CERT_FILE"] == told["ca_file"]
    assert told["environment"]["NO_PROXY"] == ""


async def test_connect_ends_with_the_task(place: Place) -> None:
    async with place.connect() as process:
        await lines(process)
        await place.plane.close_for_task(place.socket)
        _, err = await process.communicate()
        assert process.returncode == 0
        assert "the task is over" in err.decode()


async def test_a_command_gets_the_environment_and_its_status_is_that_of_connect(place: Place) -> None:
    assert await place.run("--", sys.executable, "-c", ASK) == (0, "ok\n", "")
    assert await place.run("--", "sh", "-c", "exit 7") == (7, "", "")
    assert (await place.run("--", "sh", "-c", "kill -9 $$"))[0] == 128 + signal.SIGKILL
    status, out, err = await place.run("--", "no-such-program", "--json")
    assert (status, out) == (127, "")
    assert "no-such-program" in err
    (place.folder / "text").touch(mode=stat.S_IRUSR)
    assert (await place.run("--", "./text"))[0] == 126


async def test_a_signal_for_it_reaches_its_command(place: Place) -> None:
    program = (
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))\n"
        "print('ready', flush=True)\n"
        "signal.pause()"
    )
    async with place.connect("--", sys.executable, "-c", program) as process:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)  # a terminal's goes to both
        process.terminate()
        await process.communicate()
        assert process.returncode == 9


async def test_a_hang_up_does_not_end_it_under_nohup(place: Place) -> None:
    async with place.connect("--json", under=["nohup"]) as process:
        assert process.stdout is not None
        await process.stdout.readline()
        status = Path(f"/proc/{process.pid}/status").read_text()
        ignored = re.search(r"^SigIgn:\s*(\w+)", status, re.MULTILINE)
        assert ignored
        assert int(ignored[1], 16) & 1 << signal.SIGHUP - 1


async def test_a_command_goes_on_after_the_end_of_the_task(place: Place) -> None:
    program = (
        "import os, time, urllib.parse, socket\n"
        "port = urllib.parse.urlsplit(os.environ['HTTPS_PROXY']).port\n"
        "print('ready', flush=True)\n"
        "while not socket.socket().connect_ex(('127.0.0.1', port)): time.sleep(0.01)\n"
        "print('refused')"
    )
    async with place.connect("--", sys.executable, "-c", program) as process:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        await place.plane.close_for_task(place.socket)
        out, err = await process.communicate()
        assert (process.returncode, out) == (0, b"refused\n")
        assert b"the task is over" in err


async def test_connect_with_wrong_arguments_fails_with_the_reason(place: Place) -> None:
    status, out, err = await place.run("--task", TASK[:8])
    assert (status, out) == (2, "")
    assert "only how an id begins" in " ".join(err.split())
    status, out, err = await place.run("--socket", "none.sock")
    assert (status, out) == (1, "")
    assert "--delivery gateway" in err
    status, out, err = await place.run("--ca-file", "none.pem")
    assert (status, out) == (1, "")
    assert "none.pem" in err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, out, err = await place.run("--port", str(port))
    assert (status, out) == (1, "")
    assert f"port {port}" in err


async def test_only_http_without_a_certificate(place: Place) -> None:
    (place.folder / "ca of the gateway.pem").rename(place.folder / "ca.pem")
    environment = {**place.environment}
    del environment["RINGFENCE_GATEWAY_CA_FILE"]
    process = await asyncio.create_subprocess_exec(
        *RINGFENCE, "gateway", "connect", "--task", TASK, "--", "env",
        env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    assert process.returncode == 0
    assert b"HTTPS_PROXY=" in out
    assert b"SSL_CERT_FILE" not in out
    assert b"RINGFENCE_GATEWAY_CA_FILE" in err
