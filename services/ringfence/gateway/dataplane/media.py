"""What the head of a request says of its body: whether everybody reads it as the JSON that the map looks at."""

from __future__ import annotations

import functools
import re
from typing import Final

_TOKEN: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - the token of RFC 9110, 5.6.2
_JSON: Final = re.compile(
    rf"application/(?:{_TOKEN}\+)?json((?:[ \t]*;[ \t]*{_TOKEN}=(?:{_TOKEN}|\"[^\"\\]*\"))*)", re.I
)
_CHARSET: Final = re.compile(r";[ \t]*charset=\"?([^\";]*)", re.IGNORECASE)


@functools.lru_cache(maxsize=1024)
def says_json(media: str | None, coding: str | None) -> bool:
    """Whether a body with this `Content-Type` and `Content-Encoding` is JSON in UTF-8 (RFC 8259, 8.1), as it is.

    By another type, in another charset or unpacked, the same bytes say another thing: a form can hide in a text of
    JSON. Where no type is said, some servers take a body for a form.
    """
    found = _JSON.fullmatch(media) if media is not None else None
    if found is None or (coding or "").strip().lower() not in ("", "identity"):
        return False
    charsets = _CHARSET.findall(found[1])
    return not charsets or (len(charsets) == 1 and charsets[0].strip().lower() in ("utf-8", "utf8"))
