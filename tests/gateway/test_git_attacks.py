"""Requests to a Git server that two readers could understand differently do not reach it; others are written anew."""

from __future__ import annotations

import contextlib
import gzip
import struct
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from ringfence.cli.commands.target_templates import TEMPLATES
from ringfence.dev.processes import free_port
from ringfence.gateway.domain import ApprovalRequired
from ringfence.messages.registry import VerbFloor
from tests.gateway.mcp_place import McpPlace, mcp_placed
from tests.gateway.target import Received, Target
from tests.support.in_memory_registry import permission

TEMPLATE = TEMPLATES["git"]
VERBS = tuple(TEMPLATE.verbs)
LEASE = permission("repo/o/n", "repo/o/n/ref/heads/a", "repo/o/n/ref/tags/**", verbs=VERBS)
WIDE = permission("**", verbs=VERBS)
OLD, NEW, ZEROS = "1" * 40, "2" * 40, "0" * 40
PACK = b"PACK" + struct.pack(">II", 2, 0) + b"\x00" * 20
FLUSH = b"0000"
CAPABILITIES = "report-status side-band-64k agent=git/2"
FETCH = b"0032want " + OLD.encode() + b"\n0000"
PUSH_TYPE = {"Content-Type": "application/x-git-receive-pack-request"}
FETCH_TYPE = {"Content-Type": "application/x-git-upload-pack-request"}
PUSH, UPLOAD = "/o/n.git/git-receive-pack", "/o/n.git/git-upload-pack"
ADVERTISED = (
    "report-status report-status-v2 delete-refs side-band-64k push-options push-cert=n atomic agent=x"
)


def line(text: str) -> bytes:
    return b"%04x%b" % (len(text) + 4, text.encode())


def command(ref: str = "refs/heads/a", capabilities: str | None = CAPABILITIES, new: str = NEW) -> bytes:
    return line(f"{OLD} {new} {ref}" + (f"\0 {capabilities}" if capabilities is not None else ""))


@dataclass
class Attacked:
    place: McpPlace
    server: Target
    http: httpx.AsyncClient

    async def send(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        piece: int = 0,
    ) -> httpx.Response:
        """`piece`: send the body in chunks of so many bytes."""

        async def chunks() -> AsyncIterator[bytes]:
            for at in range(0, len(body), piece):
                yield body[at : at + piece]

        content = chunks() if piece else body
        return await self.http.request(method, path, content=content, headers=dict(headers or {}))

    @property
    def seen(self) -> list[Received]:
        return self.server.requests


def respond(received: Received) -> bytes:
    service = "git-upload-pack" if "upload-pack" in received.target else "git-receive-pack"
    if received.method == "POST":
        media, body = f"application/x-{service}-result", b""
    else:
        media = f"application/x-{service}-advertisement"
        body = line(f"# service={service}\n") + FLUSH + line(f"{OLD} refs/heads/a\0{ADVERTISED}\n") + FLUSH
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {media}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@contextlib.asynccontextmanager
async def attacked(folder: Path, *leases: Any, server: Target | None = None) -> AsyncIterator[Attacked]:
    verbs = tuple(VerbFloor(verb=verb, floor=floor) for verb, floor in TEMPLATE.verbs.items())
    async with (
        (server or Target(respond=respond)).serving() as target,
        mcp_placed(
            target.port, folder, *(leases or (LEASE,)), rules=TEMPLATE.requests, verbs=verbs, wide=WIDE
        ) as place,
    ):
        assert place.plane is not None
        port = free_port()
        await place.plane.listen("127.0.0.1", port, names=[f"localhost:{port}"])
        async with httpx.AsyncClient(base_url=f"http://localhost:{port}/staging", timeout=20) as http:
            yield Attacked(place, target, http)


@pytest.mark.parametrize("piece", [0, 1, 7, 5000])
async def test_push_is_written_anew(tmp_path: Path, piece: int) -> None:
    tags = b"".join(command(f"refs/tags/{number}", None) for number in range(20))
    body = line(f"shallow {OLD}\n") + command() + tags + FLUSH + PACK
    async with attacked(tmp_path) as place:
        answer = await place.send("POST", PUSH, body, PUSH_TYPE, piece=piece)
        assert answer.status_code == 200, answer.text
        clean = line(f"shallow {OLD}") + line(f"{OLD} {NEW} refs/heads/a\0{CAPABILITIES}")
        assert [one.body for one in place.seen] == [clean + tags + FLUSH + PACK]


@pytest.mark.parametrize("piece", [0, 3])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        command() + PACK,
        command()[:-3],
        command() + FLUSH,
        command() + FLUSH + b"PAC",
        command() + FLUSH + command("refs/heads/main") + FLUSH + PACK,
        command(new=ZEROS) + FLUSH + command("refs/heads/main", new=ZEROS) + FLUSH,
        command(new=ZEROS) + FLUSH + PACK,
        FLUSH + command() + FLUSH + PACK,
        FLUSH + PACK,
        command() + command(capabilities=None) + FLUSH + PACK,
        command() + command("refs/tags/x") + FLUSH + PACK,
        command(capabilities="report-status push-options") + FLUSH + line("ci.skip") + FLUSH + PACK,
        command(capabilities="report-status  atomic") + FLUSH + PACK,
        command(capabilities="report-status atomic ") + FLUSH + PACK,
        command(capabilities="report-status\0atomic") + FLUSH + PACK,
        command(capabilities="report-status=x") + FLUSH + PACK,
        command(capabilities="agent") + FLUSH + PACK,
        command(capabilities="atomic atomic") + FLUSH + PACK,
        command(capabilities="object-format=sha256") + FLUSH + PACK,
        line(f"push-cert\0 {CAPABILITIES}") + line("push-cert-end\n") + FLUSH + PACK,
        command() + b"0001" + line("x") + FLUSH + PACK,
        command() + b"0004" + FLUSH + PACK,
        command() + b"0002" + FLUSH + PACK,
        command() + b"ffff" + b"x" * 70_000,
        b"0x" + command()[2:] + FLUSH + PACK,
        command("refs/heads/a\n") + FLUSH + PACK,
        command("refs/heads/a refs/heads/b") + FLUSH + PACK,
        command("refs/heads//a") + FLUSH + PACK,
        command("refs/heads/../heads/b") + FLUSH + PACK,
        command("refs/heads/*") + FLUSH + PACK,
        command("HEAD") + FLUSH + PACK,
        command(new="2" * 64) + FLUSH + PACK,
        line(f"shallow {OLD}") + FLUSH,
        b"".join(command(f"refs/tags/{at:060}", None) for at in range(3000)) + FLUSH + PACK,
    ],
    ids=[
        "empty", "no flush", "cut", "no pack", "cut pack", "second list", "second list after deletes",
        "pack after deletes", "list after probe", "pack after probe", "ref twice", "capabilities twice", "push options",
        "two spaces", "space at the end", "NUL", "value", "no value", "capability twice", "other format",
        "certificate", "delimiter", "empty line", "response end", "too long line", "no length", "line end in ref",
        "space in ref", "empty segment", "dots", "wildcard", "no ref", "two formats", "only shallow", "too many",
    ],
)  # fmt: skip
async def test_ambiguous_push_does_not_reach_the_server(tmp_path: Path, body: bytes, piece: int) -> None:
    async with attacked(tmp_path) as place:
        answer = await place.send("POST", PUSH, body, PUSH_TYPE, piece=piece and max(piece, len(body) // 50))
        assert answer.status_code == 400, answer.text
        assert answer.json()["code"] == "git_request_invalid"
        assert place.seen == []


@pytest.mark.parametrize("path", [PUSH, "/o/n/git-receive-pack", "/o/n.git/%67it-receive-pack"])
async def test_refused_ref_is_reported(tmp_path: Path, path: str) -> None:
    async with attacked(tmp_path) as place:
        body = command() + command("refs/heads/main", None) + FLUSH + PACK
        answer = await place.send("POST", path, body, PUSH_TYPE)
        assert (answer.status_code, answer.headers["content-type"]) == (
            200,
            "application/x-git-receive-pack-result",
        )
        assert (
            b"ng refs/heads/a beyond_lease: no live lease allows push on repo/o/n/ref/heads/main"
            in answer.content
        )
        assert place.seen == []
        body = command() + FLUSH + PACK
        assert (await place.send("POST", path, body, PUSH_TYPE)).status_code == 200
        clean = line(f"{OLD} {NEW} refs/heads/a\0{CAPABILITIES}") + FLUSH + PACK
        assert [one.body for one in place.seen] == [clean]


@pytest.mark.parametrize(
    ("lease", "status"),
    [(LEASE, 200), (permission("repo/o/n", "repo/o/n/ref/**", verbs=("fetch",)), 403)],
    ids=["pusher", "reader"],
)
async def test_probe_and_advertisement_need_a_verb_of_pushes(tmp_path: Path, lease: Any, status: int) -> None:
    async with attacked(tmp_path, lease) as place:
        for method, path, body, headers in (
            ("POST", PUSH, FLUSH, PUSH_TYPE),
            ("GET", "/o/n.git/info/refs?service=git-receive-pack", b"", {}),
        ):
            answer = await place.send(method, path, body, headers)
            assert answer.status_code == status
            assert (answer.headers["content-type"] == "text/plain; charset=utf-8") is (status == 403)
        assert [one.body for one in place.seen] == ([FLUSH, b""] if status == 200 else [])


async def test_push_is_refused_where_a_person_would_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask(*args: Any, **kwargs: Any) -> ApprovalRequired:
        return ApprovalRequired("sponsor", "1")

    async with attacked(tmp_path) as place:
        monkeypatch.setattr(place.place, "answer", ask)
        answer = await place.send("POST", PUSH, command() + FLUSH + PACK, PUSH_TYPE)
        assert b"ng refs/heads/a body_unseen: a person cannot approve a single push" in answer.content
        answer = await place.send("GET", "/o/n.git/info/refs?service=git-receive-pack")
        assert answer.text.startswith("body_unseen: ")
        assert place.seen == []


async def test_advertisement_has_the_capabilities_that_pass(tmp_path: Path) -> None:
    async with attacked(tmp_path) as place:
        answer = await place.send("GET", "/o/n.git/info/refs?service=git-receive-pack")
        kept = "report-status report-status-v2 delete-refs side-band-64k atomic agent=x"
        assert line(f"{OLD} refs/heads/a\0{kept}\n") in answer.content
        answer = await place.send("GET", "/o/n.git/info/refs?service=git-upload-pack")
        assert b"push-cert" in answer.content, "of fetches, all pass"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/o/n.git/info/refs", 403),
        ("GET", "/o/n.git/info/refs?service=git-upload-pack&service=git-receive-pack", 403),
        ("GET", "/o/n.git/info/refs?service=git-upload-pack&x=1", 403),
        ("GET", "/o/n.git/info/refs?service=git-upload-archive", 403),
        ("GET", "/o/n.git/info/refs?service=git%2Dupload%2Dpack", 403),
        ("HEAD", "/o/n.git/info/refs?service=git-upload-pack", 403),
        ("GET", "/o/n.git/HEAD", 403),
        ("GET", "/o/n.git/objects/info/packs", 403),
        ("GET", "/o/n.git/git-upload-pack", 403),
        ("GIT", "/o/n", 403),
        ("POST", f"{UPLOAD}?service=git-receive-pack", 403),
        ("POST", "/o/n.git/git-upload-archive", 403),
        ("POST", "/o/n.git/GIT-UPLOAD-PACK", 403),
        ("POST", "/o/n.git/info/lfs/objects/batch", 403),
        ("GET", "/o/ref/info/refs?service=git-upload-pack", 403),
        ("GET", "/o/.git/info/refs?service=git-upload-pack", 403),
        ("GET", "/info/refs?service=git-upload-pack", 403),
        ("GET", "/o/x/%2e%2e/n.git/info/refs?service=git-upload-pack", 403),
        ("POST", "/o/n.git/git-receive-pack/", 403),
        ("POST", UPLOAD, 400),
    ],
)  # fmt: skip
async def test_request_beside_smart_http_is_refused(
    tmp_path: Path, method: str, path: str, status: int
) -> None:
    async with attacked(tmp_path, permission("**", verbs=VERBS)) as place:
        answer = await place.http.send(
            httpx.Request(
                method, httpx.URL(str(place.http.base_url)).copy_with(raw_path=f"/staging{path}".encode()),
                content=FETCH if method == "POST" else None,
            )
        )  # fmt: skip
        assert answer.status_code == status, answer.text
        assert place.seen == []


@pytest.mark.parametrize(
    ("path", "headers", "body"),
    [
        (PUSH, {**PUSH_TYPE, "Content-Encoding": "gzip"}, gzip.compress(command() + FLUSH + PACK, mtime=0)),
        (PUSH, FETCH_TYPE, command() + FLUSH + PACK),
        (UPLOAD, PUSH_TYPE, FETCH),
        (UPLOAD, FETCH_TYPE, command() + FLUSH + PACK),
        (UPLOAD, FETCH_TYPE, FETCH[:-2]),
        (UPLOAD, {**FETCH_TYPE, "Content-Encoding": "deflate"}, FETCH),
        (UPLOAD, {**FETCH_TYPE, "Content-Encoding": "gzip"}, FETCH),
        (UPLOAD, {**FETCH_TYPE, "Content-Encoding": "gzip"}, gzip.compress(FETCH, mtime=0) * 2),
        (UPLOAD, {**FETCH_TYPE, "Content-Encoding": "gzip"}, gzip.compress(FETCH, mtime=0)[:-4]),
        (UPLOAD, {**FETCH_TYPE, "Content-Encoding": "gzip"}, gzip.compress(FETCH * 100_000, mtime=0)),
        (UPLOAD, FETCH_TYPE, FETCH * 100_000),
        (UPLOAD, FETCH_TYPE, line("command=bundle-uri") + FLUSH),
        (UPLOAD, FETCH_TYPE, line("command=fetch") + b"0001" + line("packfile-uris https") + FLUSH),
    ],
    ids=[
        "gzip push", "push as fetch", "fetch as push", "pack to fetch", "cut", "deflate", "no gzip", "two members",
        "cut gzip", "bomb", "too long", "bundle-uri", "packfile-uris",
    ],
)  # fmt: skip
async def test_ambiguous_body_does_not_reach_the_server(
    tmp_path: Path, path: str, headers: dict[str, str], body: bytes
) -> None:
    async with attacked(tmp_path) as place:
        answer = await place.send("POST", path, body, headers)
        assert (answer.status_code, answer.json()["code"]) == (400, "git_request_invalid")
        assert place.seen == []


@pytest.mark.parametrize("piece", [0, 9])
async def test_compressed_fetch_is_forwarded_decoded(tmp_path: Path, piece: int) -> None:
    async with attacked(tmp_path) as place:
        headers = {**FETCH_TYPE, "Content-Encoding": "gzip", "Git-Protocol": "version=2"}
        answer = await place.send("POST", UPLOAD, gzip.compress(FETCH, mtime=0), headers, piece=piece)
        assert answer.status_code == 200
        (received,) = place.seen
        assert received.body == FETCH
        assert received.values("content-encoding") == []
        assert received.values("git-protocol") == ["version=2"]


@pytest.mark.parametrize(
    ("service", "sent", "forwarded"),
    [
        ("git-upload-pack", ["version=2"], ["version=2"]),
        ("git-upload-pack", ["version=1"], ["version=1"]),
        ("git-upload-pack", ["version=3"], []),
        ("git-upload-pack", ["version=2:x=1"], []),
        ("git-upload-pack", ["version=2", "version=0"], []),
        ("git-receive-pack", ["version=2"], []),
    ],
)
async def test_protocol_version_is_forwarded_as_parsed(
    tmp_path: Path, service: str, sent: list[str], forwarded: list[str]
) -> None:
    async with attacked(tmp_path) as place:
        headers = [*(("Git-Protocol", one) for one in sent), ("Git_Protocol", "version=1")]
        await place.http.get(f"/o/n.git/info/refs?service={service}", headers=headers)
        (received,) = place.seen
        assert received.values("git-protocol") == forwarded
        assert received.values("git_protocol") == []


@pytest.mark.parametrize(
    ("media", "body", "status"),
    [
        ("text/plain", f"{OLD}\trefs/heads/a\n".encode(), 502),
        ("application/x-git-receive-pack-advertisement", FLUSH, 502),
        ("application/x-git-upload-pack-advertisement", b"<html>", None),
        ("application/x-git-upload-pack-advertisement", line("# service=git-receive-pack\n") + FLUSH, None),
        ("application/x-git-upload-pack-advertisement", line("# service=git-upload-pack\n") + FLUSH + b"00", None),
    ],
    ids=["dumb", "other service", "page", "other name", "cut"],
)  # fmt: skip
async def test_answer_that_is_no_advertisement_is_not_forwarded(
    tmp_path: Path, media: str, body: bytes, status: int | None
) -> None:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {media}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    async with attacked(tmp_path, server=Target(respond=lambda _: head + body)) as place:
        try:
            answer = await place.send("GET", "/o/n.git/info/refs?service=git-upload-pack")
        except httpx.RemoteProtocolError:
            assert status is None
        else:
            assert answer.status_code == status
