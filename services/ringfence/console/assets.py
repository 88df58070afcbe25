"""The console's own files, each named by its digest, and the policies under which browsers run them.

Scripts run by digest alone (CSP Level 3, 8.4), so a file that somebody changed on its way does nothing. For
styles, digests are of what stands in the page (CSP Level 3, 6.7.3), so the style does.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final

SCRIPTS: Final = ("console.js", "sign_in.js")
STYLE: Final = "console.css"
ICON: Final = "icon.svg"
_TYPES: Final = {
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class Asset:
    path: str
    """Below the origin; another content has another path, so browsers keep it for good."""
    content: bytes
    media_type: str
    integrity: str
    """Its digest, as Subresource Integrity has it."""


@cache
def assets() -> dict[str, Asset]:
    folder = files("ringfence.console").joinpath("static")
    made = {}
    for name in (*SCRIPTS, STYLE, ICON):
        content = folder.joinpath(name).read_bytes()
        sha256 = hashlib.sha256(content).digest()
        stem, _, suffix = name.partition(".")
        integrity = "sha256-" + b64encode(sha256).decode()
        path = f"/static/{stem}-{sha256.hex()[:16]}.{suffix}"
        made[name] = Asset(path, content, _TYPES[suffix], integrity)
    return made


def content_security_policy(sign_origin: str | None) -> str:
    """The policy of every page. Forms may lead to `sign_origin`, where people sign: a redirect counts too."""
    digests = " ".join(f"'{assets()[name].integrity}'" for name in SCRIPTS)
    directives = {
        "default-src": "'none'",
        "script-src": digests,
        "style-src": f"'{assets()[STYLE].integrity}'",
        "img-src": "'self'",
        "connect-src": "'self'",
        "form-action": f"'self' {sign_origin}" if sign_origin else "'self'",
        "base-uri": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in directives.items())
