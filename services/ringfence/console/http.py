"""The routes of the console: pages, sign-in, questions for the sign page, and live updates."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qsl, quote, urlsplit

from pydantic import TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from ringfence.client.errors import ApiError
from ringfence.client.passkeys.questions import server_link, sign_origin
from ringfence.console.assets import assets
from ringfence.console.commands import Commands
from ringfence.console.page_templates import render
from ringfence.console.questions import MAX_ANSWER_BYTES, Questions
from ringfence.console.reads import SessionReads
from ringfence.console.security import QUESTION_PATH
from ringfence.console.session import COOKIE, Session, Sessions
from ringfence.console.views.page import MakePage, Page, View
from ringfence.console.views.pages import PAGES, SECTIONS
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.strict_json import json_object
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.base import Name

log = logging.getLogger(__name__)

MAX_FORM_BYTES: Final = 64 * 1024
MOST_STREAMS_OF_ONE: Final = 12
"""Live updates of one session at a time: about as many as open tabs."""
_KEEP_ALIVE_S: Final = 15.0
_COSTLY: Final = 5
"""So much more seldom a page is compared for which services count much."""
_NAME: Final = TypeAdapter(Name)
_STATUS: Final = {403: "You may not see this", 404: "There is nothing here that you may see"}


@dataclass(frozen=True, slots=True)
class Console:
    """What the routes work with."""

    sessions: Sessions
    questions: Questions
    commands: Commands
    trust: TrustStore
    clock: Clock
    origin: str
    trust_domain: str
    refresh_ms: int
    reads: Callable[[str | None], SessionReads]
    """Reads for a session statement, or for the console itself."""
    unready: Callable[[], list[str]]


class Site:
    """The application."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._streams: Counter[str] = Counter()

    def application(self) -> Starlette:
        """The ASGI application, without the guard around it."""
        made = Starlette(
            routes=[
                Route("/healthz", self._healthz),
                Route("/readyz", self._readyz),
                Route("/static/{name}", self._static),
                Route("/sign-in", self._sign_in),
                Route("/sign-in/find", self._find, methods=["POST"]),
                Route("/sign-in/begin", self._begin, methods=["POST"]),
                Route("/sign-in/finish", self._finish, methods=["POST"]),
                Route("/sign-out", self._sign_out, methods=["POST"]),
                Route("/sign/{kind}", self._sign, methods=["POST"]),
                Route(QUESTION_PATH + "{path}", self._question, methods=["GET", "POST"]),
                Route("/live", self._live),
                Route("/", self._home),
                Route("/trace", self._trace_form),
                *(Route(path, self._page_of(make)) for path, make in PAGES.items()),
            ],
            exception_handlers={404: self._not_found, 405: self._not_found, 500: self._broken},
        )
        made.router.redirect_slashes = False
        return made

    # --- probes and files ---

    async def _healthz(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _readyz(self, _: Request) -> Response:
        reasons = self._console.unready()
        return JSONResponse(
            {"status": "unready" if reasons else "ready", "reasons": reasons, "denies": []},
            status_code=503 if reasons else 200,
        )

    async def _static(self, request: Request) -> Response:
        for asset in assets().values():
            if asset.path == request.url.path:
                return Response(asset.content, media_type=asset.media_type)
        raise HTTPException(404)

    # --- sign-in ---

    async def _sign_in(self, request: Request) -> Response:
        if self._session(request):
            return RedirectResponse(_local(request.query_params.get("next")), 303)
        bundle = self._console.trust.require()
        return self._html(
            "sign_in.html",
            None,
            title="Sign in",
            rp_id=bundle.rp_id or urlsplit(self._console.origin).hostname,
            next=_local(request.query_params.get("next")),
            ended=request.query_params.get("ended") == "1",
        )

    async def _find(self, request: Request) -> Response:
        """Whose passkey it is that the browser just used: `{credential_id}` in, `{user_id, kid}` out."""
        said = await _json_body(request)
        credential_id = said.get("credential_id")
        if not isinstance(credential_id, str) or not 16 <= len(credential_id) <= 1400:
            return _problem(400, "that is no credential id")
        try:
            return JSONResponse(await self._console.reads(None).passkey(credential_id))
        except ApiError as error:
            return _problem(404 if error.status == 404 else 503, error.message)

    async def _begin(self, request: Request) -> Response:
        """The statement to sign, and the cookie that it is for: `{user_id}` in, `{typ, claims}` out."""
        said = await _json_body(request)
        try:
            user_id = _NAME.validate_python(said.get("user_id"))
        except ValidationError:
            return _problem(400, "that is no name of a user")
        secret, statement = self._console.sessions.begin(user_id)
        claims = statement.model_dump(mode="json", exclude_none=True)
        response = JSONResponse({"typ": statement.typ, "claims": claims})
        self._set_cookie(response, secret, 600)
        return response

    async def _finish(self, request: Request) -> Response:
        """Begin the session if the registry accepts the statement: `{statement}` in."""
        said = await _json_body(request)
        statement, secret = said.get("statement"), request.cookies.get(COOKIE, "").partition(".")[0]
        cookie = self._console.sessions.cookie(secret, statement) if isinstance(statement, str) else None
        session = self._console.sessions.of(cookie)
        if cookie is None or session is None:
            return _problem(403, "this statement is not for this browser, or took too long; sign in again")
        try:
            await self._console.reads(session.statement).record("user", session.user_id)
        except ApiError as error:
            return _problem(error.status or 503, error.message)
        log.info("user %s signed in until %d", session.user_id, session.ends_at)
        response = JSONResponse({"user_id": session.user_id})
        self._set_cookie(response, cookie, session.ends_at - self._console.clock.now_ms() // 1000)
        return response

    async def _sign_out(self, request: Request) -> Response:
        if session := self._session(request):
            self._console.sessions.end(session)
        response = RedirectResponse("/sign-in", 303)
        self._drop_cookie(response)
        return response

    def _set_cookie(self, response: Response, value: str, max_age_s: int) -> None:
        response.set_cookie(
            COOKIE, value, max_age=max_age_s, path="/", secure=True, httponly=True, samesite="strict"
        )

    def _drop_cookie(self, response: Response) -> None:
        response.delete_cookie(COOKIE, path="/", secure=True, httponly=True, samesite="strict")

    def _session(self, request: Request) -> Session | None:
        return self._console.sessions.of(request.cookies.get(COOKIE))

    # --- pages ---

    async def _home(self, _: Request) -> Response:
        return RedirectResponse("/approvals", 303)

    async def _trace_form(self, request: Request) -> Response:
        """Lead from the form to the page of one trace, whose address can be shared."""
        id = request.query_params.get("id", "").strip()
        return RedirectResponse(f"/trace/{quote(id, safe='')}" if id else "/audit", 303)

    def _page_of(self, make: MakePage) -> Callable[[Request], Any]:
        async def page(request: Request) -> Response:
            session = self._session(request)
            if session is None:
                return self._to_sign_in(request)
            try:
                made = await make(self._view(session, request.query_params, request.path_params))
            except ApiError as error:
                if error.status == 401:
                    return self._to_sign_in(request, ended=True)
                return self._failed(session, error)
            return self._shown(session, made)

        return page

    def _view(self, session: Session, query: Mapping[str, str], path: Mapping[str, Any]) -> View:
        reads = self._console.reads(session.statement)
        return View(session, reads, dict(query), self._console.clock.now_ms(), path.get("id", ""))

    def _shown(self, session: Session, page: Page, status: int = 200) -> Response:
        return self._html(
            page.template, session, status, title=page.title, section=page.section, **page.values
        )

    def _failed(self, session: Session | None, error: RingfenceError, status: int | None = None) -> Response:
        known = status or (error.status if isinstance(error, ApiError) else None) or 503
        title = _STATUS.get(known, "This cannot be shown now" if known >= 500 else "That did not work")
        page = Page("problem.html", title, {"message": error.message})
        if session is None:
            return self._html(page.template, None, known, title=title, **page.values)
        return self._shown(session, page, known)

    def _html(
        self, template: str, session: Session | None, http_status: int = 200, /, **values: Any
    ) -> Response:
        questions = self._console.questions.of_session(session.cookie_digest) if session else []
        base: dict[str, Any] = {
            "session": session,
            "trust_domain": self._console.trust_domain,
            "sections": SECTIONS,
            "section": "",
            "questions": questions[:5],
        }
        return HTMLResponse(render(template, **(base | values)), http_status)

    def _to_sign_in(self, request: Request, *, ended: bool = False) -> Response:
        wanted = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        mark = "ended=1&" if ended else ""
        response = RedirectResponse(f"/sign-in?{mark}next={quote(wanted, safe='')}", 303)
        if ended:
            self._drop_cookie(response)
        return response

    async def _not_found(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        session = self._session(request)
        return self._failed(session, ApiError("there is no such page", status=404), 404)

    async def _broken(self, request: Request, error: Exception) -> Response:
        log.error("could not answer %s %s", request.method, request.url.path, exc_info=error)
        return self._failed(
            None, RingfenceError("Something went wrong in the console. Its log says what."), 500
        )

    # --- signing ---

    async def _sign(self, request: Request) -> Response:
        """Compose a question from a form, and lead the browser to the sign page with it."""
        session = self._session(request)
        if session is None:
            return RedirectResponse("/sign-in", 303)
        reads = self._console.reads(session.statement)
        try:
            form = await _form_body(request)
            question = await self._console.commands.ask(request.path_params["kind"], reads, session, form)
            origin = sign_origin(self._console.trust, self._console.clock.now_ms() / 1000)
        except ApiError as error:
            return self._failed(session, error)
        except RingfenceError as error:
            return self._failed(session, error, 400)
        return RedirectResponse(server_link(origin, self._question_url(question.path)), 303)

    async def _question(self, request: Request) -> Response:
        """GET gives the sign page a question, POST takes its answer. The page sends no cookie."""
        console = self._console
        try:
            origin = sign_origin(console.trust, console.clock.now_ms() / 1000)
        except RingfenceError:
            origin = ""
        question = console.questions.at(request.path_params["path"])
        if question is None or not origin or request.headers.getlist("origin") != [origin]:
            return _problem(404, "there is nothing here, or its time is over")
        cors = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        if request.method == "GET":
            if question.state != "open":
                return JSONResponse({"message": "this was answered already"}, 410, cors)
            document = question.document(self._question_url(question.path))
            return Response(document, media_type="application/json", headers=cors)
        try:
            await console.questions.answer(question, await _json_body(request, MAX_ANSWER_BYTES))
        except HTTPException as error:
            return JSONResponse({"message": error.detail}, error.status_code, cors)
        except RingfenceError as error:
            return JSONResponse({"message": error.message}, 422, cors)
        log.info("user %s: %s: %s", question.user_id, question.state, question.title)
        return JSONResponse({}, headers=cors)

    def _question_url(self, path: str) -> str:
        return f"{self._console.origin}{QUESTION_PATH}{path}"

    # --- live updates ---

    async def _live(self, request: Request) -> Response:
        """Server-sent events: `changed` when the page of the query would look different now, `ended` when the person
        may not see it any more. Each look has a token of its own, so services judge the person each time.
        """
        session = self._session(request)
        path, _, query = request.query_params.get("page", "").partition("?")
        found = _page_at(path)
        if session is None or found is None:
            return Response(status_code=204)  # tells browsers not to try again
        if self._streams[session.cookie_digest] >= MOST_STREAMS_OF_ONE:
            return Response(status_code=204)
        make, path_params = found
        events = self._events(request, session, make, dict(parse_qsl(query)), path_params)
        return StreamingResponse(events, media_type="text/event-stream")

    async def _events(
        self,
        request: Request,
        session: Session,
        make: MakePage,
        query: Mapping[str, str],
        path_params: Mapping[str, str],
    ) -> AsyncIterator[str]:
        before, quiet_s, pause_s = None, 0.0, self._console.refresh_ms / 1000
        self._streams[session.cookie_digest] += 1
        try:
            yield ": begins\n\n"
            while self._session(request) is not None:
                try:
                    page = await make(self._view(session, query, path_params))
                except ApiError as error:
                    if error.status in (401, 403, 404):
                        break
                    page = None  # a service does not answer: look again later
                now = self._fingerprint(session, page) if page else before
                pause_s = self._console.refresh_ms / 1000 * (_COSTLY if page and page.costly else 1)
                if now != before and before is not None:
                    quiet_s = 0.0
                    yield "event: changed\ndata:\n\n"
                before = now
                quiet_s += pause_s
                if quiet_s >= _KEEP_ALIVE_S:
                    quiet_s = 0.0
                    yield ": still here\n\n"
                await asyncio.sleep(pause_s)
            yield "event: ended\ndata:\n\n"
        finally:
            self._streams[session.cookie_digest] -= 1
            if not self._streams[session.cookie_digest]:
                del self._streams[session.cookie_digest]

    def _fingerprint(self, session: Session, page: Page) -> bytes:
        response = self._shown(session, page)
        return hashlib.sha256(bytes(response.body)).digest()


def _page_at(path: str) -> tuple[MakePage, dict[str, str]] | None:
    """The page at a path of this site, with what the path says."""
    for pattern, make in PAGES.items():
        prefix, variable, _ = pattern.partition("{id}")
        if not variable and path == pattern:
            return make, {}
        if variable and path.startswith(prefix) and (id := path.removeprefix(prefix)) and "/" not in id:
            return make, {"id": id}
    return None


def _local(path: str | None) -> str:
    """A path of this site to go on to; anything else leads home."""
    if path and path.startswith("/") and not path.startswith(("//", "/\\")) and path.isprintable():
        return path
    return "/"


def _problem(status: int, message: str) -> Response:
    return JSONResponse({"message": message}, status)


async def _body(request: Request, most: int) -> bytes:
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > most:
            raise HTTPException(413, "that is too large")
    return bytes(content)


async def _json_body(request: Request, most: int = MAX_FORM_BYTES) -> dict[str, Any]:
    try:
        return json_object(await _body(request, most))
    except (ValueError, json.JSONDecodeError):
        raise HTTPException(400, "that is no JSON object") from None


async def _form_body(request: Request) -> dict[str, str]:
    text = (await _body(request, MAX_FORM_BYTES)).decode("utf-8", "replace")
    return dict(parse_qsl(text, keep_blank_values=True, max_num_fields=50))
