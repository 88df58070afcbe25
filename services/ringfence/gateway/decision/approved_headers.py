"""The headers that an approval covers. Exactly these are forwarded with an approved action, and no others.

A header can change the meaning of the same bytes (`Content-Type`, `Content-Encoding`, `Destination`). So an approval
covers all headers that will be forwarded, before the credential is added. Values may be secrets, and the topic keeps a
question for days: the person sees the values of a fixed list, and only the names of all others.
"""

from __future__ import annotations

import hashlib
from typing import Final

from ringfence.backends.http import secret_header
from ringfence.gateway.contract import Attempt, Headers
from ringfence.messages.approval import MAX_HEADER_NAME_CHARS, MAX_HEADERS, ShownHeader
from ringfence.messages.registry import TargetState

DROPPED: Final = frozenset({"traceparent", "tracestate", "baggage", "date", "x-request-id"})
"""Clients change these with each attempt. They are neither hashed nor forwarded, so that an exact retry matches its
question.
"""
SHOWN_VALUES: Final = frozenset({
    "content-type", "content-encoding", "content-language", "content-range", "content-disposition", "range",
    "if-match", "if-none-match", "if-modified-since", "if-unmodified-since", "if-range", "prefer", "upgrade",
    # WebDAV (RFC 4918)
    "destination", "overwrite", "depth",
    # The operation itself, at targets that read it in a header.
    "x-http-method-override", "x-http-method", "x-method-override", "x-original-method", "x-original-url",
    "x-original-uri", "x-rewrite-url", "soapaction", "x-amz-target", "x-amz-acl", "x-amz-copy-source", "x-goog-acl",
    "x-goog-copy-source",
})  # fmt: skip
"""A person sees the values of these: they change what a request does, and never hold secrets."""
MAX_VALUE_CHARS: Final = 2048
"""For one value that is shown."""
MAX_SHOWN_CHARS: Final = 8000
"""For all names and values together: a person reads no more, and an answer embeds its question."""


def headers_to_approve(attempt: Attempt, target: TargetState) -> Headers | None:
    """The headers of an action that needs approval, as they will be forwarded; None if the gateway has not seen all.

    The gateway does not forward the `DROPPED` ones. A proxy that shows one of them might, so then the result is None.
    """
    headers = attempt.headers() if attempt.headers is not None else None
    if headers is None or (not attempt.sent_by_gateway and any(name in DROPPED for name, _ in headers)):
        return None
    injected = secret_header(target)
    replaced = injected.replace("_", "-") if injected is not None else None
    return tuple(header for header in headers if header[0] not in DROPPED and header[0] != replaced)


def digest_of_headers(headers: Headers) -> str:
    """SHA-256, in hexadecimal, over names and values in order, each preceded by its length.

    A length is four bytes, big-endian. Text is encoded as ISO 8859-1: each byte as it is forwarded.
    """
    hashed = hashlib.sha256()
    for header in headers:
        for text in header:
            raw = text.encode("latin-1")
            hashed.update(len(raw).to_bytes(4, "big") + raw)
    return hashed.hexdigest()


def shown_to_approver(headers: Headers) -> tuple[ShownHeader, ...]:
    """The headers as the person sees them."""
    return tuple(
        ShownHeader(name=name, value=value if name in SHOWN_VALUES else None) for name, value in headers
    )


def unshowable_reason(headers: Headers) -> str | None:
    """Why a person cannot be shown these headers, or None."""
    shown_values = [value for name, value in headers if name in SHOWN_VALUES]
    if not all(" " <= char <= "~" for value in shown_values for char in value):
        names = ", ".join(sorted(SHOWN_VALUES & {name for name, _ in headers}))
        return f"the values of {names} have to be printable ASCII"
    if len(headers) > MAX_HEADERS or any(len(name) > MAX_HEADER_NAME_CHARS for name, _ in headers):
        return f"it may have {MAX_HEADERS} headers, with names of {MAX_HEADER_NAME_CHARS} characters"
    if max(map(len, shown_values), default=0) > MAX_VALUE_CHARS:
        return f"a header whose value is shown may have {MAX_VALUE_CHARS} characters"
    if sum(len(name) for name, _ in headers) + sum(map(len, shown_values)) > MAX_SHOWN_CHARS:
        return f"its headers are more than the {MAX_SHOWN_CHARS} characters that a person is shown"
    return None
