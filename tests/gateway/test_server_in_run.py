"""A target that is a server in a run: which socket its requests go to, and what they carry."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from ringfence.gateway.contract import DecisionCore
from ringfence.gateway.dataplane.plane import DataPlane, DataPlaneSettings
from tests.gateway.table_gate import SECRET, TASK, Entry, TableGate

RUN, OTHER = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
URL = "http://gateway/noted/files/a"


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rf-") as folder:
        yield Path(folder)


@contextlib.asynccontextmanager
async def listening(folder: Path) -> AsyncIterator[TableGate]:
    gate = TableGate({"noted": Entry("stdio://run", frozenset())})
    plane = DataPlane(DecisionCore(gate, lambda _: False), settings=DataPlaneSettings(fast_path=False))
    await plane.start()
    for run in (RUN, OTHER):
        await plane.listen_for_task(folder / f"{run}.sock", TASK, run_id=run)
    await plane.listen_for_task(folder / f"{TASK}.sock", TASK)
    try:
        yield gate
    finally:
        await plane.close()


@contextlib.asynccontextmanager
async def bridge(path: Path) -> AsyncIterator[list[str]]:
    """The runner's side: it answers every request, and keeps its head."""
    heads: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                heads.append((await reader.readuntil(b"\r\n\r\n")).decode().lower())
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield heads
    finally:
        server.close()


async def get(folder: Path, socket: str) -> httpx.Response:
    transport = httpx.AsyncHTTPTransport(uds=str(folder / f"{socket}.sock"))
    async with httpx.AsyncClient(transport=transport, timeout=20) as http:
        return await http.get(URL, headers={"Authorization": f"DPoP {uuid.UUID(int=1)}"})


async def test_a_request_goes_to_the_server_of_its_own_run_without_any_credential(folder: Path) -> None:
    async with listening(folder), bridge(folder / f"{RUN}.stdio") as heads:
        assert (await get(folder, RUN)).text == "ok"
        (head,) = heads
        assert "\r\nhost: noted\r\n" in head
        assert "authorization" not in head
        assert SECRET not in head
        elsewhere = await get(folder, OTHER)
        assert (elsewhere.status_code, elsewhere.json()["code"]) == (502, "target_unreachable")
        assert (await get(folder, TASK)).status_code == 502
        assert len(heads) == 1


async def test_socket_of_another_owner_or_type_is_not_connected(folder: Path) -> None:
    async with listening(folder), bridge(folder / "elsewhere") as heads:
        (folder / f"{RUN}.stdio").symlink_to(folder / "elsewhere")
        answer = await get(folder, RUN)
        assert (answer.status_code, answer.json()["code"]) == (502, "target_not_verified")
        (folder / f"{RUN}.stdio").unlink()
        (folder / f"{RUN}.stdio").write_text("a file")
        assert (await get(folder, RUN)).json()["code"] == "target_not_verified"
        assert heads == []
