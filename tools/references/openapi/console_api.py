"""The routes of the console. Browsers are its only clients."""

from __future__ import annotations

from dataclasses import replace

from ringfence.console.security import QUESTION_PATH
from ringfence.console.views.pages import PAGES
from ringfence.messages.api import CONSOLE_PORT
from tools.references.openapi.operation import (
    HTML,
    JSON,
    PLAIN,
    TEXT,
    Answer,
    Api,
    Operation,
    ok,
    record,
    ref,
)
from tools.references.openapi.service_apis import COMMON

_PROBES = ("/healthz", "/readyz", "/metrics")
_SEE_OTHER = {303: Answer("to another page; without a session to the sign-in", None, headers=("Location",))}
_TO_SIGN_IN = {303: Answer("without a session, to the sign-in", None, headers=("Location",))}


def _message(about: str, *also: str) -> Answer:
    """An error for a script of the console's own: `message`, a sentence for the person."""
    return Answer(about, JSON, ref("Message"), also=also)


def _page_error(about: str) -> Answer:
    return Answer(about, HTML, TEXT)


_NOT_THERE = _page_error("there is nothing here that the person may see")
_NO_ANSWER = _page_error("a service does not answer now")


def _console_page(path: str, summary: str) -> Operation:
    errors = {503: _NO_ANSWER, **({404: _NOT_THERE} if "{id}" in path else {})}
    return Operation(
        "GET", path, summary, {200: Answer("a page", HTML, TEXT), **_TO_SIGN_IN, **errors}, "session"
    )


def _question(method: str, summary: str) -> Operation:
    answers = {
        400: _message("the body is no JSON object"),
        404: _message("there is no such question, its time is over, or another page than the sign page asks"),
        410: _message("it was answered already"),
        413: _message("the answer is too large"),
        422: _message("what it is about has changed, or the answer does not count"),
        503: _message("a service does not answer now"),
    }
    if method == "GET":
        answers = {status: one for status, one in answers.items() if status not in (400, 413)}
        return Operation(method, QUESTION_PATH + "{path}", summary, {**ok(record()), **answers}, None)
    return Operation(
        method, QUESTION_PATH + "{path}", summary, {**ok(next=TEXT), **answers}, None,
        body=(JSON, record()), example={"answer": "HEADER.CLAIMS.SIGNATURE"},
    )  # fmt: skip


def _guarded(operation: Operation) -> Operation:
    """With the answers that all routes but the probes have: for other hosts, and for writes from other origins."""
    if operation.path in _PROBES:
        return operation
    answers = dict(operation.answers)
    answers[421] = Answer("`Host` is not a name of this console", PLAIN, TEXT)
    if operation.method == "POST" and not operation.path.startswith(QUESTION_PATH):
        own = answers.get(403, Answer("another site asked for it (`Origin`)", None))
        media = own.media or PLAIN
        answers[403] = replace(
            own, media=media, schema=own.schema or TEXT, also=() if media == PLAIN else (PLAIN,)
        )
    return replace(operation, answers=answers)


_OPERATIONS = (
    Operation("GET", "/healthz", "Whether the process answers.", ok(record(status=TEXT)), None),
    Operation("GET", "/readyz", "Whether the console is ready.", {**ok(ref("Ready")), 503: Answer("not ready", schema=ref("Ready"))}, None),
    replace(COMMON[2], answers={**COMMON[2].answers, 404: Answer("asked by a name that people use: metrics are not for browsers", PLAIN, TEXT)}),
    Operation(
        "GET", "/static/{name}", "Scripts and styles.",
        {200: Answer("a file", "text/css", TEXT, also=("text/javascript", "image/svg+xml"), headers=("Cache-Control",)), 404: _NOT_THERE}, None,
    ),
    Operation("GET", "/sign-in", "The page for signing in.", {200: Answer("a page", HTML, TEXT), 303: Answer("to the page of `next`, where somebody is signed in already", None, headers=("Location",)), 503: _page_error("the console has no trust bundle yet")}, None,
              query={"next": "the path to go on to", "ended": "`1`: a session ended"}),
    Operation(
        "POST", "/sign-in/find", "Whose passkey was touched. It signs the nonce.",
        {
            **ok(user_id=TEXT, kid=TEXT), 400: _message("that is no assertion of a passkey, or no JSON object"),
            404: _message("nobody who is active has this passkey"), 413: _message("the body is too large"), 503: _message("the registry does not answer now"),
        },
        None, body=(JSON, record(credential_id=TEXT, nonce=TEXT, assertion=TEXT)),
        example={"credential_id": "mNr0-Qq1W7cH3mFzqj1n2w", "nonce": "NONCE", "assertion": "ASSERTION"},
    ),
    Operation(
        "POST", "/sign-in/begin", "The statement to sign.",
        {**ok(typ=TEXT, claims=record(user_id=TEXT, console_kid=TEXT, cookie_digest=TEXT)), 400: _message("that is no name of a user, or no JSON object"), 413: _message("the body is too large")},
        None, body=(JSON, record(user_id=TEXT)), example={"user_id": "maria"},
    ),
    Operation(
        "POST", "/sign-in/finish", "Begin the session.",
        {
            **ok(user_id=TEXT), 400: _message("the body is no JSON object"), 401: _message("the registry does not accept the statement"),
            403: _message("the statement is not for this browser, or another site asked"), 413: _message("the body is too large"), 503: _message("the registry does not answer now"),
        },
        None, body=(JSON, record(statement=TEXT)), example={"statement": "HEADER.CLAIMS.SIGNATURE"},
    ),
    Operation("POST", "/sign-out", "End the session.", {303: Answer("to the sign-in", None, headers=("Location",))}, "session"),
    Operation(
        "POST", "/sign/{kind}", "Compose a question, and lead to the sign page with it.",
        {303: Answer("to the sign page; without a session to the sign-in", None, headers=("Location",)), 400: _page_error("the form is wrong; the page says what"), 404: _NOT_THERE, 413: _page_error("the form is too large"), 503: _NO_ANSWER},
        "session", body=("application/x-www-form-urlencoded", record()), body_is_required=False, example={"id": "deploy-bot"},
    ),
    Operation(
        "POST", "/offer", "Make an offer of an agent, and lead to its page.",
        {303: Answer("to the page of the offer; without a session to the sign-in", None, headers=("Location",)), 404: _NOT_THERE, 413: _page_error("the form is too large"), 503: _NO_ANSWER},
        "session", body=("application/x-www-form-urlencoded", record(id=TEXT)), example={"id": "deploy-bot"},
    ),
    _question("GET", "A question, for the sign page."),
    _question("POST", "Its answer."),
    Operation(
        "GET", "/live", "Server-sent events: `changed` when a page would look different now, `ended` when the person may not see it any more.",
        {
            200: Answer("events", "text/event-stream", TEXT), 204: Answer("there is nothing to wait for: no session, no such page, a page of older events, or too many streams", None),
            401: _message("the session has ended"), 404: _message("there is nothing here that the person may see"),
        },
        "session", query={"page": "the path of the page, with its query", "look": "the digest of what the page looks like"},
    ),
    Operation("GET", "/", "To the open approvals.", {303: Answer("to `/approvals`", None, headers=("Location",))}, None),
    Operation("GET", "/trace", "To the page of one trace.", {303: Answer("to the trace, or to `/audit`", None, headers=("Location",))}, None, query={"id": "of a request, lease, task, agent, user or run"}),
    *(_console_page(path, f"{(make.__doc__ or '').strip().splitlines()[0]}") for path, make in PAGES.items()),
)  # fmt: skip

CONSOLE_API = Api(
    "Console",
    "The web application of people: [the console](../console.md). It is for browsers, and no contract for programs.",
    CONSOLE_PORT,
    tuple(_guarded(operation) for operation in _OPERATIONS),
)
