"""The files of the sign page are what the source and the settings say, and the server gives nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import httpx
import pytest

from ringfence.sign_page.app import FileServer
from ringfence.sign_page.build import CHECKSUMS, PageConfig, SignPageError, build

ORIGIN = "https://sign.example.com"
CONSOLE = "https://console.example.com"
CONFIG = PageConfig("example.com", "root-of-trust", "example.com", ORIGIN, (CONSOLE,))
STATIC = Path(__file__).parents[2] / "services/ringfence/sign_page/static"


def digest(content: bytes) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content).digest()).decode()


def test_the_same_input_makes_the_same_bytes():
    assert build(CONFIG).files == build(CONFIG).files
    other = build(PageConfig("example.com", "another root", "example.com", ORIGIN, (CONSOLE,)))
    changed = {name for name, content in build(CONFIG).files.items() if other.files[name] != content}
    assert changed == {"config.js", "index.html", CHECKSUMS}


def test_a_page_says_what_it_is_for():
    text = build(CONFIG).files["config.js"].decode()
    assert json.loads(text.partition("freeze(")[2].rpartition(")")[0]) == {
        "trustDomain": "example.com", "trustRoot": "root-of-trust", "rpId": "example.com", "origin": ORIGIN,
        "sessionOrigins": [CONSOLE], "leastVersion": 0,
    }  # fmt: skip


def test_each_module_runs_by_its_digest_alone():
    page = build(CONFIG)
    html = page.files["index.html"].decode()
    modules = {name: content for name, content in page.files.items() if name.endswith(".js")}
    found = re.search(r'<script type="importmap">(.*?)</script>', html)
    assert found is not None
    assert json.loads(found[1])["integrity"] == {f"./{name}": digest(one) for name, one in modules.items()}
    allowed = re.search(r"script-src ([^;]*);", page.csp)
    assert allowed is not None
    assert set(allowed[1].split()) == {
        f"'{one}'" for one in (digest(found[1].encode()), *map(digest, modules.values()))
    }
    assert f'src="main.js" integrity="{digest(modules["main.js"])}"' in html


def test_csp_allows_no_foreign_source_or_connection():
    page = build(CONFIG)
    assert page.csp.startswith("default-src 'none'; ")
    assert f"connect-src http://127.0.0.1:* {CONSOLE}; " in page.csp
    assert page.csp.endswith("; frame-ancestors 'none'")
    for rule in (
        "base-uri 'none'",
        "form-action 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ):
        assert rule in page.csp
    for name, content in page.files.items():
        if name not in ("config.js", CHECKSUMS):
            others = set(re.findall(r"https?://[^\s\"'`;\\$]+", content.decode())) - {
                "http://127.0.0.1:*",
                CONSOLE,
            }
            assert others == set(), name


def test_no_module_parses_html_or_runs_text():
    forbidden = re.compile(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|setTimeout\(['\"]"
    )
    for path in STATIC.glob("*.js"):
        assert forbidden.search(path.read_text()) is None, path.name


def test_checksums_are_those_of_the_files(tmp_path: Path):
    page = build(CONFIG)
    page.write(tmp_path)
    for line in (tmp_path / CHECKSUMS).read_text().splitlines():
        told, name = line.split("  ")
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == told
    page.write(tmp_path)  # over itself
    (tmp_path / "more.html").write_text("")
    with pytest.raises(SignPageError, match=r"more\.html"):
        page.write(tmp_path)


@pytest.mark.parametrize(
    ("root", "rp_id", "origin", "sessions", "reason"),
    [
        ("", "example.com", ORIGIN, (), "RINGFENCE_TRUST_ROOT"),
        ("root", "example.org", ORIGIN, (), "makes no passkeys"),
        ("root", "ample.com", ORIGIN, (), "makes no passkeys"),
        ("root", "a.sign.example.com", ORIGIN, (), "makes no passkeys"),
        ("root", "example.com", ORIGIN, (ORIGIN,), "an origin of its own"),
    ],
)
def test_a_page_that_could_not_work_is_not_built(
    root: str, rp_id: str, origin: str, sessions: tuple[str, ...], reason: str
):
    with pytest.raises(SignPageError, match=reason):
        PageConfig("example.com", root, rp_id, origin, sessions)


# --- the server -------------------------------------------------------------------------------------------------------


async def ask(method: str = "GET", path: str = "/", **headers: str) -> httpx.Response:
    app = FileServer(build(CONFIG), frozenset(["sign.example.com"]))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url=ORIGIN) as http:
        return await http.request(method, path, headers=headers)


async def test_the_server_gives_the_files_with_their_headers():
    page = build(CONFIG)
    for name, content in page.files.items():
        answer = await ask(path=f"/{name}")
        assert (answer.status_code, answer.content) == (200, content)
        assert answer.headers["Content-Security-Policy"] == page.csp
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert (await ask()).content == page.files["index.html"]
    assert (await ask(path="/main.js")).headers["Content-Type"].startswith("text/javascript")
    assert (await ask("HEAD")).content == b""


@pytest.mark.parametrize(
    ("status", "method", "path", "host"),
    [
        (405, "POST", "/", "sign.example.com"),
        (405, "OPTIONS", "/", "sign.example.com"),
        (404, "GET", "/healthz", "sign.example.com"),
        (404, "GET", "/../app.py", "sign.example.com"),
        (404, "GET", "/.well-known/webauthn", "sign.example.com"),
        (404, "GET", "/?x=1", "sign.example.com"),
        (421, "GET", "/", "evil.example"),
        (421, "GET", "/", "sign.example.com.evil.example"),
        (421, "GET", "/", "127.0.0.1:8711"),
    ],
)
async def test_the_server_gives_nothing_else(status: int, method: str, path: str, host: str):
    answer = await ask(method, path, Host=host)
    assert answer.status_code == status
    assert "main.js" not in answer.text
    assert "Access-Control-Allow-Origin" not in answer.headers
