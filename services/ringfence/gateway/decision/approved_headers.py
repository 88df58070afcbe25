"""The headers that a person approves with an action: exactly these go on with it, and no others.

A header can change what the same bytes mean (`Content-Type`, `Content-Encoding`, `Destination`), so an approval is over
all that will be forwarded, before the credential is put in. Values may be secrets, and the topic keeps a question for
days: the person sees the values of a fixed list, and of all others the names.
"""

from __future__ import annotations

import hashlib
from typing import Final

from ringfence.backends.http import secret_header
from ringfence.gateway.contract import Attempt, Headers
from ringfence.messages.approval import MAX_HEADER_NAME_CHARS, MAX_HEADERS, ShownHeader
from ringfence.messages.registry import TargetState

DROPPED: Final = frozenset({"traceparent", "tracestate", "baggage", "date", "x-request-id"})
"""Clients send another value with each attempt. Neither hashed nor forwarded: an exact retry finds its question."""
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
"""Those whose values a person is shown: they change what a request does, and never hold secrets."""
MAX_VALUE_CHARS: Final = 2048
"""Of a value that is shown."""
MAX_SHOWN_CHARS: Final = 8000
"""Of all names and values that are shown: nobody reads more, and an answer embeds its question."""


def headers_to_approve(attempt: Attempt, target: TargetState) -> Headers | None:
    """What goes on with an action that a person is asked about; None where not all of that was seen.

    The gateway leaves `DROPPED` out of what it forwards. A proxy that shows one of these may forward it.
    """
    found = attempt.headers() if attempt.headers is not None else None
    if found is None or (not attempt.sent_by_gateway and any(name in DROPPED for name, _ in found)):
        return None
    injected = secret_header(target)
    replaced = injected.replace("_", "-") if injected is not None else None
    return tuple(one for one in found if one[0] not in DROPPED and one[0] != replaced)


def digest_of_headers(headers: Headers) -> str:
    """SHA-256, in hexadecimal, over each name and each value in order, every one with its length before it.

    A length is four bytes, most significant first. Text is ISO 8859-1: each byte as it is forwarded.
    """
    hashed = hashlib.sha256()
    for header in headers:
        for text in header:
            raw = text.encode("latin-1")
            hashed.update(len(raw).to_bytes(4, "big") + raw)
    return hashed.hexdigest()


def shown_to_approver(headers: Headers) -> tuple[ShownHeader, ...]:
    """What a person sees of them."""
    return tuple(
        ShownHeader(name=name, value=value if name in SHOWN_VALUES else None) for name, value in headers
    )


def unshowable_reason(headers: Headers) -> str | None:
    """Why a person cannot be shown them, or None."""
    seen = [value for name, value in headers if name in SHOWN_VALUES]
    if not all(" " <= char <= "~" for value in seen for char in value):
        names = ", ".join(sorted(SHOWN_VALUES & {name for name, _ in headers}))
        return f"the values of {names} have to be printable ASCII"
    if len(headers) > MAX_HEADERS or any(len(name) > MAX_HEADER_NAME_CHARS for name, _ in headers):
        return f"it may have {MAX_HEADERS} headers, with names of {MAX_HEADER_NAME_CHARS} characters"
    if max(map(len, seen), default=0) > MAX_VALUE_CHARS:
        return f"a header whose value is shown may have {MAX_VALUE_CHARS} characters"
    if sum(len(name) for name, _ in headers) + sum(map(len, seen)) > MAX_SHOWN_CHARS:
        return f"its headers are more than the {MAX_SHOWN_CHARS} characters that a person is shown"
    return None
