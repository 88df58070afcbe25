"""The routes of the console: pages, sign-in, questions for the sign page, and live updates."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from ringfence.client.errors import ApiError
from ringfence.client.passkeys.questions import server_link, sign_origin
from ringfence.client.signed_messages import topic_of
from ringfence.console.assets import assets
from ringfence.console.commands import KINDS, Commands
from ringfence.console.offers import Offers
from ringfence.console.page_templates import PageDigest, PageDigests, digest_of, render
from ringfence.console.questions import MAX_ANSWER_BYTES, Question, Questions
from ringfence.console.reads import SessionReads
from ringfence.console.security import COOKIE, QUESTION_PATH, SealedValues, Session, Sessions
from ringfence.console.views.page import MakePage, Page, View
from ringfence.console.views.pages import PAGES, SECTIONS
from ringfence.kernel.base import metrics
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
_RETRY_MS: Final = 60_000
_NOTICE: Final = "notice"
"""The query by which people come back from the sign page."""
_NOTICE_S: Final = 600
_MAX_BACK: Final = 1000
_LOOK: Final = 'data-look=""'
"""Where a page says what it looks like, so that its stream begins from there."""
_NAME: Final = TypeAdapter(Name)
_TOUCH: Final = re.compile(r"[A-Za-z0-9_-]{16,6000}")
"""Credential id, nonce and assertion of a first touch: base64url each."""
_STATUS: Final = {403: "You may not see this", 404: "There is nothing here that you may see"}


@dataclass(frozen=True, slots=True)
class Console:
    """What the routes work with."""

    sessions: Sessions
    questions: Questions
    commands: Commands
    sealed: SealedValues
    offers: Offers
    trust: TrustStore
    clock: Clock
    origin: str
    trust_domain: str
    digests: PageDigests
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
                Route("/metrics", self._metrics),
                Route("/static/{name}", self._static),
                Route("/sign-in", self._sign_in),
                Route("/sign-in/find", self._find, methods=["POST"]),
                Route("/sign-in/begin", self._begin, methods=["POST"]),
                Route("/sign-in/finish", self._finish, methods=["POST"]),
                Route("/sign-out", self._sign_out, methods=["POST"]),
                Route("/sign/{kind}", self._sign, methods=["POST"]),
                Route("/offer", self._offer, methods=["POST"]),
                Route(QUESTION_PATH + "{path}", self._question, methods=["GET", "POST"]),
                Route("/live", self._live),
                Route("/", self._home),
                Route("/trace", self._trace_form),
                *(Route(path, self._page_of(path, make)) for path, make in PAGES.items()),
            ],
            exception_handlers={
                400: self._wrong_body,
                413: self._wrong_body,
                404: self._not_found,
                405: self._not_found,
                500: self._broken,
            },
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

    async def _metrics(self, request: Request) -> Response:
        """Serve metrics to whoever asks the process by another name than people do (`Guard`)."""
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    async def _static(self, request: Request) -> Response:
        for asset in assets().values():
            if asset.path == request.scope["path"]:
                return Response(asset.content, media_type=asset.media_type)
        raise HTTPException(404)

    # --- sign-in ---

    async def _sign_in(self, request: Request) -> Response:
        if self._session(request):
            return RedirectResponse(_local(request.query_params.get("next")), 303)
        try:
            bundle = self._console.trust.require()
        except RingfenceError as error:
            return self._failed(None, error)
        return self._html(
            "sign_in.html",
            None,
            title="Sign in",
            rp_id=bundle.rp_id or urlsplit(self._console.origin).hostname,
            next=_local(request.query_params.get("next")),
            ended=request.query_params.get("ended") == "1",
        )

    async def _find(self, request: Request) -> Response:
        """Whose passkey the browser just used: `{credential_id, nonce, assertion}` in, `{user_id, kid}` out."""
        said = await _json_body(request)
        touch = [said.get(name) for name in ("credential_id", "nonce", "assertion")]
        if not all(isinstance(one, str) and _TOUCH.fullmatch(one) for one in touch):
            return _problem(400, "that is no assertion of a passkey")
        try:
            return JSONResponse(await self._console.reads(None).passkey(*map(str, touch)))
        except ApiError as error:
            return _problem(error.status if error.status in (400, 404) else 503, error.message)

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
        statement, secret, sessions = (
            said.get("statement"),
            request.cookies.get(COOKIE, ""),
            self._console.sessions,
        )
        session = sessions.proposed(secret, statement) if isinstance(statement, str) else None
        cookie = sessions.cookie(secret, session) if session else None
        if cookie is None or session is None:
            return _problem(403, "this statement is not for this browser, or took too long; sign in again")
        try:
            await self._console.reads(session.statement).record("user", session.user_id)
        except ApiError as error:
            metrics.CONSOLE_SIGN_INS.labels("refused").inc()
            return _problem(error.status or 503, error.message)
        metrics.CONSOLE_SIGN_INS.labels("done").inc()
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

    def _page_of(self, path: str, make: MakePage) -> Callable[[Request], Any]:
        took = metrics.CONSOLE_PAGES.labels(path)

        async def page(request: Request) -> Response:
            session = self._session(request)
            if session is None:
                return self._to_sign_in(request)
            with took.time():
                return await answer(request, session)

        async def answer(request: Request, session: Session) -> Response:
            try:
                made = await make(self._view(session, request.query_params, request.path_params))
            except ApiError as error:
                return self._refused(request, session, error)
            return self._shown(session, made, notice=self._notice(session, request))

        return page

    def _view(self, session: Session, query: Mapping[str, str], path: Mapping[str, Any]) -> View:
        reads = self._console.reads(session.statement)
        now_ms, offers = self._console.clock.now_ms(), self._console.offers
        return View(session, reads, dict(query), now_ms, path.get("id", ""), offers)

    def _shown(self, session: Session, page: Page, status: int = 200, notice: str = "") -> Response:
        html = self._rendered(
            page.template,
            session,
            title=page.title,
            section=page.section,
            is_live=page.live,
            notice=notice,
            **page.values,
        )
        if page.section:
            html = html.replace(_LOOK, f'data-look="{digest_of(page)}"', 1)
        return HTMLResponse(html, status)

    def _notice(self, session: Session, request: Request) -> str:
        """What became of the question that the person comes back from; empty if they come from elsewhere."""
        said = self._console.sealed.open("notice", request.query_params.get(_NOTICE, "")) or {}
        now_s = self._console.clock.now_ms() // 1000
        if said.get("cookie_digest") != session.cookie_digest or now_s - said["at"] > _NOTICE_S:
            return ""
        return str(said["text"])

    def _refused(self, request: Request, session: Session, error: ApiError) -> Response:
        """Return the page for an error of a service: the sign-in if it refuses the session, else the error."""
        return self._to_sign_in(request, ended=True) if error.status == 401 else self._failed(session, error)

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
        return HTMLResponse(self._rendered(template, session, **values), http_status)

    def _rendered(self, template: str, session: Session | None, /, **values: Any) -> str:
        base: dict[str, Any] = {
            "session": session,
            "trust_domain": self._console.trust_domain,
            "sections": SECTIONS,
            "section": "",
            "is_live": True,
            "notice": "",
        }
        return render(template, **(base | values))

    def _to_sign_in(self, request: Request, *, ended: bool = False) -> Response:
        """Lead to the sign-in, and from there to what was asked for, or to the page that a form was on."""
        wanted = request.scope["path"] + (f"?{request.url.query}" if request.url.query else "")
        if request.method == "POST":
            wanted = self._back(request)
        mark = "ended=1&" if ended else ""
        response = RedirectResponse(f"/sign-in?{mark}next={quote(wanted, safe='')}", 303)
        if ended:
            self._drop_cookie(response)
        return response

    async def _not_found(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        session = self._session(request)
        return self._failed(session, ApiError("there is no such page", status=404), 404)

    async def _wrong_body(self, request: Request, error: Exception) -> Response:
        """Scripts of the sign-in read JSON; whoever sent a form sees a page."""
        assert isinstance(error, HTTPException)
        if request.scope["path"].startswith("/sign-in/"):
            return _problem(error.status_code, error.detail)
        return self._failed(self._session(request), RingfenceError(error.detail), error.status_code)

    async def _broken(self, request: Request, error: Exception) -> Response:
        log.error("could not answer %s %s", request.method, request.scope["path"], exc_info=error)
        return self._failed(
            None, RingfenceError("Something went wrong in the console. Its log says what."), 500
        )

    # --- signing ---

    async def _sign(self, request: Request) -> Response:
        """Compose a question from a form, and lead the browser to the sign page with it."""
        session = self._session(request)
        if session is None:
            return self._to_sign_in(request, ended=True)
        reads, kind = self._console.reads(session.statement), request.path_params["kind"]
        try:
            form, back = await _form_body(request), self._back(request)
            question = await self._console.commands.ask(kind, reads, session, form, back)
            url = self._question_url(self._console.questions.path_of(question))
            origin = sign_origin(self._console.trust, self._console.clock.now_ms() / 1000)
        except ApiError as error:
            return self._refused(request, session, error)
        except RingfenceError as error:
            return self._failed(session, error, 400)
        metrics.CONSOLE_QUESTIONS.labels(kind, "asked").inc()
        return RedirectResponse(server_link(origin, url), 303)

    def _back(self, request: Request) -> str:
        """The page that a form was on, without the notice of an earlier question."""
        came_from = urlsplit(request.headers.get("referer", ""))
        if f"{came_from.scheme}://{came_from.netloc}" != self._console.origin:
            return "/"
        query = urlencode([one for one in parse_qsl(came_from.query) if one[0] != _NOTICE])
        path = came_from.path
        if path.startswith("/approvals/") and request.path_params.get("kind") in ("approve", "deny", "grant"):
            path = "/approvals"  # it waits no more, so its own page is gone
        back = _local(path + (f"?{query}" if query else ""))
        return back if len(back) <= _MAX_BACK else "/"

    async def _offer(self, request: Request) -> Response:
        """Make an offer of an agent, and lead to its page, whose address is for the new sponsor."""
        session = self._session(request)
        if session is None:
            return self._to_sign_in(request, ended=True)
        reads, offers = self._console.reads(session.statement), self._console.offers
        try:
            offer = await offers.make(reads, session, (await _form_body(request)).get("id", ""))
        except ApiError as error:
            return self._refused(request, session, error)
        return RedirectResponse(f"/offers/{offers.sealed(offer)}", 303)

    async def _question(self, request: Request) -> Response:
        """GET gives the sign page a question, POST takes its answer. The page sends no cookie."""
        console = self._console
        try:
            origin = sign_origin(console.trust, console.clock.now_ms() / 1000)
        except RingfenceError:
            origin = ""
        question = console.questions.at(request.path_params["path"])
        if (
            question is None
            or not origin
            or request.headers.getlist("origin") != [origin]
            or console.sessions.is_over(question.cookie_digest)
        ):
            return _problem(404, "there is nothing here, or its time is over")
        cors = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        if console.questions.is_answered(question):
            return JSONResponse({"message": "this was answered already"}, 410, cors)
        try:
            if request.method == "GET":
                draft = await console.commands.draft(question, console.reads(question.statement))
                url = self._question_url(request.path_params["path"])
                document = console.questions.document(question, draft, url)
                return Response(document, media_type="application/json", headers=cors)
            next_url = await self._take(question, await _json_body(request, MAX_ANSWER_BYTES))
        except HTTPException as error:
            return JSONResponse({"message": error.detail}, error.status_code, cors)
        except ApiError as error:
            return JSONResponse({"message": error.message}, error.status or 503, cors)
        except RingfenceError as error:
            return JSONResponse({"message": error.message}, 422, cors)
        return JSONResponse({"next": next_url}, headers=cors)

    async def _take(self, question: Question, answer: Mapping[str, Any]) -> str:
        """Take what the sign page posts: `{"answer": JWS}` or `{"refused": true}`. Returns the next page."""
        console, kind = self._console, KINDS[question.kind]
        if answer.get("refused") is True:
            console.questions.refuse(question)
            metrics.CONSOLE_QUESTIONS.labels(question.kind, "refused").inc()
            return self._next_url(question, "Not signed")
        me = await console.reads(question.statement).signed_record("user", question.user_id)
        compact = await console.questions.answer(question, kind.model, me["record"], answer.get("answer"))
        log.info("user %s signed: %s", question.user_id, question.title)
        metrics.CONSOLE_QUESTIONS.labels(question.kind, "signed").inc()
        if topic_of(kind.model) is not None:
            return self._next_url(question, "Signed and sent")
        offer = console.offers.opened(question.form["offer"])
        taken = replace(offer, consent=compact, taken_by=question.user_id)
        return f"{console.origin}/offers/{console.offers.sealed(taken)}"

    def _next_url(self, question: Question, what: str) -> str:
        """The page of the console that a question came from, with a notice of what became of it."""
        notice = self._console.sealed.seal(
            "notice",
            {
                "text": f"{what}: {question.title}",
                "at": self._console.clock.now_ms() // 1000,
                "cookie_digest": question.cookie_digest,
            },
        )
        mark = "&" if "?" in question.back else "?"
        return f"{self._console.origin}{question.back}{mark}{_NOTICE}={notice}"

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
        asked = dict(parse_qsl(query))
        key = (session.cookie_digest, request.query_params["page"])

        async def look() -> PageDigest:
            return await self._console.digests.current(
                key, lambda: make(self._view(session, asked, path_params))
            )

        try:
            first = await look()
        except ApiError as error:
            if error.status in (401, 403, 404):
                return _problem(error.status, error.message)
            first = None
        if first is not None and not first.live:
            return Response(status_code=204)
        events = self._events(request, session, look, first)
        # Proxies that collect answers (nginx) would keep events back.
        return StreamingResponse(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    async def _events(
        self,
        request: Request,
        session: Session,
        look: Callable[[], Awaitable[PageDigest]],
        page: PageDigest | None,
    ) -> AsyncIterator[str]:
        """`page`: as it was when the stream began; None if a service did not answer."""
        before, quiet_s = request.query_params.get("look") or None, 0.0
        if self._streams[session.cookie_digest] >= MOST_STREAMS_OF_ONE:  # they came at the same time
            yield f"retry: {_RETRY_MS}\n\n"
            return
        self._streams[session.cookie_digest] += 1
        metrics.CONSOLE_STREAMS.inc()
        try:
            yield ": begins\n\n"
            while self._session(request) is not None:
                now = page.digest if page else before
                if now != before and before is not None:
                    quiet_s = 0.0
                    yield "event: changed\ndata:\n\n"
                before = now
                if quiet_s >= _KEEP_ALIVE_S:
                    quiet_s = 0.0
                    yield ": still here\n\n"
                pause_s = self._console.digests.pause_s(page)
                quiet_s += pause_s
                await asyncio.sleep(pause_s)
                try:
                    page = await look()
                except ApiError as error:
                    if error.status in (401, 403, 404):
                        break
                    page = None  # a service does not answer: look again later
            yield "event: ended\ndata:\n\n"
        finally:
            metrics.CONSOLE_STREAMS.dec()
            self._streams[session.cookie_digest] -= 1
            if not self._streams[session.cookie_digest]:
                del self._streams[session.cookie_digest]


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
