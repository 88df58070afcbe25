"""The environment variables by which programs find a proxy and the certificates behind it. Imports nothing slow."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_PROXY: Final = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")
"""curl reads `http_proxy` in lower case alone; others read either."""
_NO_PROXY: Final = ("NO_PROXY", "no_proxy")
_CA: Final = (
    "SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "GIT_SSL_CAINFO", "NODE_EXTRA_CA_CERTS",
    "npm_config_cafile", "PIP_CERT",
)  # fmt: skip
"""OpenSSL and Python (httpx), curl, requests, git, Node.js, npm, pip. npm has a variable of its own, because where a
file of npm says what it trusts, that of Node.js is not enough.
"""


def proxy_environment(url: str, ca_file: Path | None) -> dict[str, str]:
    """Return the variables for the programs of a task.

    Args:
        url: the proxy URL, with its password if it has one.
        ca_file: the gateway's CA certificate (PEM); None leaves out what concerns certificates.
    """
    variables = dict.fromkeys(_PROXY, url)
    # Empty: exceptions that the shell already has would lead around the gateway.
    variables |= dict.fromkeys(_NO_PROXY, "")
    if ca_file is not None:
        variables |= dict.fromkeys(_CA, str(ca_file))
    return variables
