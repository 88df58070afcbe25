"""The trial calls of `ringfence adopt`, as the agent's own program would make them: by proxy and CA of its environment.

Run by `ringfence gateway connect -- python -m ringfence.cli.adopt.trial ALLOWED REFUSED HEADERS`, with requests such as
`GET https://api.openai.com/v1/models` and a JSON object of headers. It has no secret. Exit 0: one request succeeded,
and the gateway refused the other.
"""

from __future__ import annotations

import json
import sys
import time

import httpx

_WITHIN_S = 20.0
_AGAIN_S = 0.2
_NOT_YET = frozenset(("no_lease", "stale_view", "target_unknown", "not_injectable"))
"""Codes of a gateway that has not read the newest records yet."""


def main() -> int:
    allowed, refused, headers = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    with httpx.Client(
        headers={**headers, "Authorization": "Bearer replaced-by-ringfence"}, timeout=_WITHIN_S
    ) as http:
        answer = _first_answer(http, allowed)
        if answer is None:
            return 1
        sys.stdout.write(f"{allowed}: {answer.status_code} {_code(answer)}".rstrip() + "\n")
        if not answer.is_success:
            return 1
        answer = http.request(*refused.split(" ", 1))
        code = _code(answer)
        sys.stdout.write(f"{refused}: {answer.status_code} {code}".rstrip() + "\n")
        return 0 if answer.status_code == httpx.codes.FORBIDDEN and code else 1


def _first_answer(http: httpx.Client, request: str) -> httpx.Response | None:
    """Return the first answer of a gateway that knows the newest records; None if none comes in time."""
    deadline_s = time.monotonic() + _WITHIN_S
    while True:
        late = time.monotonic() > deadline_s
        try:
            answer = http.request(*request.split(" ", 1))
            if late or _code(answer) not in _NOT_YET:
                return answer
        except httpx.TransportError as error:  # the gateway may have no socket of the task yet
            if late:
                sys.stdout.write(f"{request}: {type(error).__name__}\n")
                return None
        time.sleep(_AGAIN_S)


def _code(answer: httpx.Response) -> str:
    """Return the code of the gateway's refusal; empty if the answer is not the gateway's."""
    if "application/problem+json" not in answer.headers.get("content-type", ""):
        return ""
    document = answer.json()
    code = (
        document.get("code", "") if str(document.get("type", "")).startswith("urn:ringfence:problem:") else ""
    )
    return code if isinstance(code, str) else ""


if __name__ == "__main__":
    sys.exit(main())
