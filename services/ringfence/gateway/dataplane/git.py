"""Requests to Git servers: the forwarded head, the filter of the response, and denials that Git shows."""

from __future__ import annotations

import dataclasses
from http import HTTPStatus
from typing import Final

from ringfence.gateway.contract import GitRequest, Verdict
from ringfence.gateway.dataplane.mcp_responses import media_type
from ringfence.kernel.http1.head import RequestHead, RequestRefusedError, ResponseHead
from ringfence.messages.codes import Code
from ringfence.model.git.advertisement import AdvertisementFilter
from ringfence.model.git.endpoints import GitEndpoint, protocol_version
from ringfence.model.git.pkt_lines import GitRequestError, packet

_PROTOCOL: Final = b"git-protocol"
_DROPPED: Final = frozenset({_PROTOCOL, b"git_protocol", b"content-encoding"})
"""A body is forwarded decoded. CGI does not tell `-` from `_`."""
_TEXT: Final = "text/plain; charset=utf-8"
_MAX_TEXT_CHARS: Final = 4000
_GitAnswer = tuple[int, str, bytes]
"""Status, media type and body."""


def check_git_head(request: RequestHead, endpoint: GitEndpoint) -> None:
    """Check that the body is declared as one for this service, and sent as it is for a push. Raises GitRequestError."""
    if endpoint.advertises:
        return
    wanted = f"application/x-{endpoint.service}-request"
    if request.values.get(b"content-type", b"") != wanted.encode():
        raise GitRequestError(f"the Content-Type of a request to this service is {wanted}")
    if endpoint.service == "git-receive-pack" and content_coding(request) not in ("", "identity"):
        raise GitRequestError("a push is sent without Content-Encoding")


def content_coding(request: RequestHead) -> str:
    """The value of `Content-Encoding` in lower case; empty without one."""
    return request.values.get(b"content-encoding", b"").strip(b" \t").lower().decode("latin-1")


def git_head(request: RequestHead, endpoint: GitEndpoint, added_bytes: int) -> RequestHead:
    """The head to forward, with the protocol version as it was parsed.

    `added_bytes`: by how much the forwarded body is longer than the one that was sent.
    """
    lines = [(name, line) for name, line in request.section.lines if name not in _DROPPED]
    versions = [
        line.partition(b":")[2].strip(b" \t").decode("latin-1")
        for name, line in request.section.lines
        if name == _PROTOCOL
    ]
    version = protocol_version(versions) if endpoint.service == "git-upload-pack" else None
    if version is not None:
        lines.append((_PROTOCOL, b"Git-Protocol: version=%d" % version))
    return dataclasses.replace(
        request,
        section=dataclasses.replace(request.section, lines=lines),
        fields=lines,
        length=request.length + added_bytes if request.length is not None else None,
    )


def advertisement_filter(git: GitRequest | None, response: ResponseHead) -> AdvertisementFilter | None:
    """The filter for the response to a request, if it is an advertisement.

    Raises RequestRefusedError if the target answers with something else, such as the refs of dumb HTTP.
    """
    if git is None or not git.endpoint.advertises or response.status >= HTTPStatus.MULTIPLE_CHOICES:
        return None
    service = git.endpoint.service
    if media_type(response.values.get(b"content-type")) != f"application/x-{service}-advertisement".encode():
        raise RequestRefusedError(
            Code.TARGET_UNREADABLE, "the target does not speak smart HTTP there: dumb HTTP is not forwarded"
        )
    return AdvertisementFilter(service)


def git_denial(verdict: Verdict, git: GitRequest, advice: str | None) -> _GitAnswer:
    """The answer to a denied request. Git shows text only in answers to `info/refs`; else reports of status 200.

    `advice`: the command that asks for the missing credential, if one would help.
    """
    first = verdict.reasons[0] if verdict.reasons else None
    reason = f"{first.code}: {first.message}" if first is not None else "it is not allowed"
    hint = f"ask for it: {advice}" if advice is not None else None
    text = "\n".join(filter(None, (reason, hint)))[:_MAX_TEXT_CHARS]
    service = git.endpoint.service
    result = None
    if not git.endpoint.advertises and verdict.status != HTTPStatus.UNAUTHORIZED:
        result = (
            git.commands.rejection(reason, hint)
            if git.commands is not None
            else packet(b"ERR " + text.replace("\n", "; ").encode())
        )
    if result is None:
        return verdict.status, _TEXT, text.encode() + b"\n"
    return HTTPStatus.OK.value, f"application/x-{service}-result", result
