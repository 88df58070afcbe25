"""Where instances get their platform's tokens: what is asked of it, and what is said where there is none."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from ringfence.client.errors import InvalidCallError
from ringfence.client.instance_enrolment import (
    GitHubActions,
    GoogleMetadata,
    TokenFile,
    TokenSourceError,
    source_of,
)

AUDIENCE = "spiffe://acme.example/enrol/kid"


class Platform:
    """Answers one request after the other, and keeps what was asked."""

    def __init__(self) -> None:
        self.heads: list[str] = []
        self.status, self.body = 200, "a.b.c"
        self.url = ""

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.heads[-1].split(" ")[1]).query)


@pytest.fixture
async def platform() -> AsyncIterator[Platform]:
    import asyncio

    found = Platform()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
        body = found.body.encode()
        writer.write(f"HTTP/1.1 {found.status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield found


def github(platform: Platform) -> GitHubActions:
    return GitHubActions({
        "ACTIONS_ID_TOKEN_REQUEST_URL": f"{platform.url}/idtoken?api-version=2.0",
        "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "s3cret-of-the-job",
    })  # fmt: skip


async def test_github_is_asked_for_a_token_for_one_key(platform: Platform) -> None:
    platform.body = json.dumps({"value": "a.b.c", "count": 1})
    assert await github(platform).token(AUDIENCE) == "a.b.c"
    assert platform.query == {"api-version": ["2.0"], "audience": [AUDIENCE]}
    assert "\r\nauthorization: bearer s3cret-of-the-job\r\n" in platform.heads[0].lower()


async def test_googles_metadata_server_is_asked_for_a_full_token(platform: Platform) -> None:
    assert await GoogleMetadata(platform.url).token(AUDIENCE) == "a.b.c"
    assert platform.query == {"audience": [AUDIENCE], "format": ["full"]}
    assert "\r\nmetadata-flavor: google\r\n" in platform.heads[0].lower()
    assert "/computeMetadata/v1/instance/service-accounts/default/identity?" in platform.heads[0]


async def test_a_file_is_read_anew_each_time(tmp_path: Path) -> None:
    source = TokenFile(tmp_path / "token")
    source.path.write_text("a.b.c\n")
    assert await source.token(AUDIENCE) == "a.b.c"
    source.path.write_text("d.e.f")
    assert await source.token(AUDIENCE) == "d.e.f"


async def test_missing_platform_token_is_reported_with_the_reason(platform: Platform, tmp_path: Path) -> None:
    with pytest.raises(TokenSourceError, match="id-token: write"):
        await GitHubActions({}).token(AUDIENCE)
    platform.status = 403
    with pytest.raises(TokenSourceError, match="answered 403") as refused:
        await github(platform).token(AUDIENCE)
    assert "s3cret" not in str(refused.value) + repr(github(platform))
    platform.status, platform.body = 200, "{}"
    with pytest.raises(TokenSourceError, match="without a token"):
        await github(platform).token(AUDIENCE)
    with pytest.raises(TokenSourceError, match="is no JWT"):
        await GoogleMetadata(platform.url).token(AUDIENCE)
    with pytest.raises(TokenSourceError, match="No such file"):
        await TokenFile(tmp_path / "none").token(AUDIENCE)
    (tmp_path / "empty").touch()
    with pytest.raises(TokenSourceError, match="is no JWT"):
        await TokenFile(tmp_path / "empty").token(AUDIENCE)
    with pytest.raises(TokenSourceError, match="does not answer"):
        await GoogleMetadata("http://127.0.0.1:9").token(AUDIENCE)


def test_sources_are_named_in_a_word() -> None:
    assert source_of("file:/var/run/token") == TokenFile(Path("/var/run/token"))
    assert isinstance(source_of("github"), GitHubActions)
    assert source_of("gcp") == GoogleMetadata()
    for wrong in ("", "file:", "github:x", "/var/run/token"):
        with pytest.raises(InvalidCallError, match="file:PATH"):
            source_of(wrong)
