"""Builds the sign page: its files, with what it is for and the digests of its modules stamped into them.

The same input makes the same bytes. So anybody with the source can compare what an origin serves with what it should.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from urllib.parse import urlsplit

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.private_files import write_public
from ringfence.kernel.base.settings import BusSettings
from ringfence.messages.codes import Code
from ringfence.sign_page.settings import SignPageSettings

CSP_HEADER = "Content-Security-Policy"
CHECKSUMS = "SHA256SUMS"
_TEMPLATE, _STYLE, _CONFIG, _ENTRY = "index.html", "style.css", "config.js", "main.js"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    "": "text/plain; charset=utf-8",
}


class SignPageError(RingfenceError):
    """Raised when the sign page cannot be built: a setting is missing, or the folder holds something else."""

    code = Code.SIGN_PAGE_FAILED


@dataclass(frozen=True, slots=True)
class PageConfig:
    """What a page is for. It refuses to work anywhere else."""

    trust_domain: str
    trust_root: str
    """The pinned root's fingerprint (RFC 7638 thumbprint)."""
    rp_id: str
    origin: str
    session_origins: tuple[str, ...] = ()
    """Consoles to which answers may go, besides programs on the person's own machine."""
    least_version: int = 0
    """The oldest version of the trust bundle that it takes, also in a browser that has seen none yet."""

    def __post_init__(self) -> None:
        """Raises SignPageError if browsers would make no passkeys of this RP ID on this origin."""
        host = urlsplit(self.origin).hostname or ""
        if not self.trust_root:
            raise SignPageError(
                "RINGFENCE_TRUST_ROOT is not set: the page pins it; it is what ringfence init printed"
            )
        if host != self.rp_id and not host.endswith(f".{self.rp_id}"):
            raise SignPageError(
                f"{self.origin} makes no passkeys for the RP ID {self.rp_id}: that is its host, or a domain above it"
            )
        if self.origin in self.session_origins:
            raise SignPageError(f"{self.origin} is a console too: the sign page needs an origin of its own")


def page_config(settings: BusSettings, page: SignPageSettings) -> PageConfig:
    """Return what the page is for, by the settings. Raises SignPageError if they do not say it."""
    if page.origin is None:
        raise SignPageError(
            "RINGFENCE_SIGN_PAGE_ORIGIN is not set: it is where people open the page, and the trust bundle names it "
            "(ringfence init --sign-origin)"
        )
    return PageConfig(
        trust_domain=settings.trust_domain,
        trust_root=settings.trust_root,
        rp_id=page.rp_id or urlsplit(page.origin).hostname or "",
        origin=page.origin,
        session_origins=page.session_origins,
        least_version=page.least_version,
    )


@dataclass(frozen=True, slots=True)
class Page:
    """A built page: its files by name, and the Content-Security-Policy that its server sends."""

    files: Mapping[str, bytes]
    csp: str

    def write(self, folder: Path) -> None:
        """Write the files into a folder, which holds nothing else. Raises SignPageError, OutputFileError."""
        folder.mkdir(parents=True, exist_ok=True)
        foreign = sorted(path.name for path in folder.iterdir() if path.name not in self.files)
        if foreign:
            raise SignPageError(
                f"{folder} holds {foreign[0]}, which is no part of the page; name a folder of its own"
            )
        for name, content in self.files.items():
            write_public(folder / name, content)


def checksums(page: Page) -> dict[str, str]:
    """The SHA-256 (hex) of each file, as `sha256sum` prints it."""
    return _checksums(page.files)


def _checksums(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def content_type(name: str) -> str:
    return _TYPES[Path(name).suffix]


def build(config: PageConfig) -> Page:
    source = {
        entry.name: entry.read_bytes()
        for entry in files("ringfence.sign_page").joinpath("static").iterdir()
        if entry.name.endswith((".html", ".css", ".js"))
    }
    style, template = source.pop(_STYLE).decode(), source.pop(_TEMPLATE).decode()
    source[_CONFIG] = _config_module(config)
    modules = dict(sorted(source.items()))
    # Import maps have the digest of each imported module; the first one has it on its own element.
    import_map = json.dumps(
        {"integrity": {f"./{name}": _digest(content) for name, content in modules.items()}}, sort_keys=True
    )
    scripts = [_digest(import_map.encode()), *dict.fromkeys(map(_digest, modules.values()))]
    meta = _csp(config, scripts, _digest(style.encode()))
    html = template
    for mark, value in {
        "@CSP@": meta, "@STYLE@": style, "@IMPORTMAP@": import_map, "@MAIN@": _digest(modules[_ENTRY]),
    }.items():  # fmt: skip
        html = html.replace(mark, value)
    page = {_TEMPLATE: html.encode(), **modules}
    sums = "".join(f"{digest}  {name}\n" for name, digest in _checksums(page).items())
    # A page in a frame could be covered by another; only a header can say so.
    return Page({**page, CHECKSUMS: sums.encode()}, f"{meta}; frame-ancestors 'none'")


def _config_module(config: PageConfig) -> bytes:
    values = {
        "trustDomain": config.trust_domain,
        "trustRoot": config.trust_root,
        "rpId": config.rp_id,
        "origin": config.origin,
        "sessionOrigins": list(config.session_origins),
        "leastVersion": config.least_version,
    }
    return f"export const config = Object.freeze({json.dumps(values, indent=2)});\n".encode()


def _digest(content: bytes) -> str:
    return "sha256-" + b64encode(hashlib.sha256(content).digest()).decode()


def _csp(config: PageConfig, scripts: list[str], style: str) -> str:
    directives = {
        "default-src": "'none'",
        "script-src": " ".join(f"'{one}'" for one in scripts),
        "style-src": f"'{style}'",
        # Answers go to programs on the person's machine, and to consoles.
        "connect-src": " ".join(("http://127.0.0.1:*", *config.session_origins)),
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in directives.items())
