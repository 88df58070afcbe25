"""Signing with a passkey: composes a question for the sign page, serves it on loopback, and verifies the answer.

Anybody may compose a question. The page verifies the evidence up to its pinned root, and shows only that. Any page in
the person's browser, and any local user, can connect to the question server's port. So the path is random, the `Host`
is that of this port, and the `Origin` is the sign page's. These checks prove nothing about an answer: the caller's
`accept` verifies it. The answer has to be exactly what was asked, besides what the page stamps, and by a passkey of
that person. The services verify the same; here a fault is found at once, and nothing else is published.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import re
import secrets
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar
from urllib.parse import quote

from ringfence.client.errors import InvalidCallError
from ringfence.client.signed_messages import (
    Subject,
    approval_subjects_of,
    evidence_of,
    subjects_of,
    unstamped,
)
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.strict_json import json_object
from ringfence.kernel.crypto.jws import Signed, parse, verify
from ringfence.kernel.crypto.keys import b64decode, b64encode
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.crypto.webauthn import WEBAUTHN_ALG
from ringfence.kernel.http1.body import request_body
from ringfence.kernel.http1.head import RequestHead, RequestRefusedError, parse_request, take_head
from ringfence.messages.base import Claims
from ringfence.messages.codes import Code
from ringfence.messages.lease import RevocationRequest
from ringfence.model.records.directory import Directory

if TYPE_CHECKING:
    from ringfence.kernel.base.clock import Clock
    from ringfence.model.records.directory import Directory


WAIT_S = 600.0
"""How long to wait for a signature. It counts for ten minutes, so a page that stands open longer signs in vain."""
LIFE_S = 900
"""`exp` of a command from the time of the question: the person takes their time before they sign."""


@dataclass(frozen=True, slots=True)
class PasskeyUser:
    """A person who signs with a passkey: in the place of a key file, for `Sponsor.connect` and the like.

    ```python
    async with Sponsor.connect(PasskeyUser("maria", print)) as maria:
        await maria.approve(pending)  # prints the link to the sign page, and waits
    ```
    """

    user_id: str
    show: Callable[[str], None]
    """Shows the person the link to the sign page."""
    wait_s: float = WAIT_S


BEGIN: Final = "\x01"
END: Final = "\x02"
"""Around what is unwrapped. JSON has no such character: it would be written as an escape."""
_BASE64URL: Final = re.compile(r"eyJ[A-Za-z0-9_-]+")
"""Base64url of what begins like a JSON object."""


def compose(
    user_id: str,
    claims: Claims,
    directory: Directory,
    trust: TrustStore,
    *,
    evidence: Mapping[str, str],
    return_to: str | None = None,
) -> bytes:
    """Compose the question whether `user_id` signs `claims`.

    Args:
        claims: the message; what the page stamps is left out.
        evidence: further signed messages by name, as the page wants them for this message.
        return_to: the URL that takes the answer; None: the person copies it.

    Returns JSON. Raises InvalidCallError if no passkey signs such a message here, or a record is missing;
    UnavailableError if there is no trust bundle.
    """
    if claims.passkey_use != "sign":
        raise InvalidCallError(f"no passkey signs {claims.typ}: it needs a key file")
    subjects = list(subjects_of(claims))
    if isinstance(claims, RevocationRequest):
        subjects = [one for one in subjects if directory.entry(*one)]
    subjects = [("user", user_id), *subjects, *approval_subjects_of(claims, directory)]
    question = {
        "user": user_id,
        "message": {"typ": claims.typ, "claims": unstamped(claims)},
        "evidence": {**evidence_of(directory, trust, subjects), **evidence},
    }
    return _json(question | ({"return_to": return_to} if return_to else {}))


def invitation_question(
    invitation: str,
    user_id: str,
    signer_id: str,
    directory: Directory,
    trust: TrustStore,
    return_to: str | None = None,
) -> bytes:
    """The question of an invitation (`user.invite`, signed by `signer_id`) for a user, as JSON. Raises as `compose`.

    `return_to`: where the page posts the passkey; without, the person gets it as text and file.
    """
    subjects: list[Subject] = [("user", signer_id)]
    if directory.user(user_id) is not None:
        subjects.append(("user", user_id))
    question = {"invitation": invitation, "evidence": evidence_of(directory, trust, subjects)}
    return _json(question | ({"return_to": return_to} if return_to else {}))


def question_link(origin: str, question: bytes) -> str:
    """The link that opens the sign page at `origin` with a question in it. The part after `#` reaches no server."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = unwrapped(question.decode()).encode()
    return f"{origin}/#p={b64encode(packer.compress(packed) + packer.flush())}"


def unwrapped(text: str) -> str:
    """JSON whose base64url of JSON, such as the parts of a JWS, is written out between `BEGIN` and `END`, at any depth.

    Text compresses far better than its base64url. The page writes it back as it was (`exchange.js`), so it verifies the
    very bytes that were signed: no signature depends on this form.
    """
    return _BASE64URL.sub(lambda run: _unwrapped_run(run[0]), text)


def _unwrapped_run(run: str) -> str:
    try:
        text = b64decode(run).decode()  # canonical base64url and UTF-8 alone: one text for each, both ways
    except ValueError:
        return run
    if not text.startswith("{") or BEGIN in text or END in text:
        return run
    return f"{BEGIN}{unwrapped(text)}{END}"


def server_link(origin: str, url: str) -> str:
    """The link that opens the sign page at `origin` with the question of a question server, which is at `url`."""
    return f"{origin}/#from={quote(url, safe='')}"


def sign_origin(trust: TrustStore, at_s: float) -> str:
    """The origin where people sign now, by the trust bundle. Raises InvalidCallError if it names none."""
    trust.require(at_s)
    for origin in trust.origins(at_s):
        if origin.use == "sign":
            return origin.origin
    raise InvalidCallError(
        "the trust bundle names no sign page, so nobody signs with passkeys here; see: ringfence init --sign-origin"
    )


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


LOOPBACK: Final = "127.0.0.1"
MAX_ANSWER_BYTES: Final = 1024 * 1024
_READ_S: Final = 10.0
_READ_BYTES: Final = 65_536
_MAX_CONNECTIONS: Final = 16

A = TypeVar("A")


class NotSignedError(RingfenceError):
    """The person signed nothing: they refused, or no answer came in time."""

    code = Code.NOT_SIGNED


class QuestionServer(Generic[A]):
    """Serves one question. An async context manager; `answer` waits for what `accept` made of the answer."""

    def __init__(self, origin: str, accept: Callable[[Mapping[str, Any]], A]) -> None:
        """Args:
            origin: the sign page's; no other page is answered.
            accept: verifies an answer. A RingfenceError that it raises is told to the page, and the server waits on.
        """  # fmt: skip
        self._origin = origin
        self._accept = accept
        self._question = b""
        self._path = "/" + secrets.token_urlsafe(32)
        self._port = 0
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._answer: asyncio.Future[A] = asyncio.get_running_loop().create_future()

    @property
    def url(self) -> str:
        """Where the page gets the question, and posts the answer."""
        return f"http://{LOOPBACK}:{self._port}{self._path}"

    async def start(self) -> None:
        """Listen at a free port of the loopback interface."""
        self._server = await asyncio.start_server(self._connected, LOOPBACK, 0)
        self._port = self._server.sockets[0].getsockname()[1]

    def ask(self, question: bytes) -> None:
        """Set the question, as JSON. Before, the page gets none."""
        self._question = question

    async def answer(self, timeout_s: float) -> A:
        """Wait for the answer. Raises NotSignedError."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._answer
        except TimeoutError:
            raise NotSignedError(f"nothing was signed within {timeout_s:g} s; ask again") from None

    async def close(self) -> None:
        """Stop listening, and drop all connections."""
        if self._server is not None:
            self._server.close()
        for task in tuple(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self._answer.cancel()

    async def __aenter__(self) -> QuestionServer[A]:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --- connections, each with one request ---

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= _MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._connections.add(task)
        try:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(_READ_S):
                    writer.write(await self._respond(reader))
                    await writer.drain()
        finally:
            writer.close()
            self._connections.discard(task)

    async def _respond(self, reader: asyncio.StreamReader) -> bytes:
        try:
            request, body = await _read_request(reader)
        except RequestRefusedError as error:
            return _response(error.status, {"message": str(error)})
        if not self._is_for_us(request):
            return _response(404, {"message": "there is nothing here"})
        cors = {"Access-Control-Allow-Origin": self._origin, "Vary": "Origin"}
        if request.method == "OPTIONS":
            # Chrome asks before it lets a page of the internet connect to this machine.
            cors |= {
                "Access-Control-Allow-Methods": "GET, POST",
                "Access-Control-Allow-Headers": "Content-Type",
                "Access-Control-Allow-Private-Network": "true",
                "Access-Control-Allow-Local-Network": "true",
            }
            return _response(204, None, cors)
        if self._answer.done():
            return _response(410, {"message": "this was answered already"}, cors)
        if request.method == "GET":
            return _response(200, self._question, cors)
        if request.method != "POST":
            return _response(405, {"message": "GET or POST"}, cors)
        try:
            answer = json_object(body)
            if answer.get("refused") is True:
                self._answer.set_exception(
                    NotSignedError("nothing was signed: it was refused on the sign page")
                )
            else:
                self._answer.set_result(self._accept(answer))
        except ValueError as error:
            return _response(400, {"message": f"the answer is no JSON that is understood: {error}"}, cors)
        except RingfenceError as error:
            return _response(422, {"message": error.message}, cors)
        return _response(200, {}, cors)

    def _is_for_us(self, request: RequestHead) -> bool:
        """Whether the sign page sent this, to this server. Nobody else learns whether the path was right."""
        path = hmac.compare_digest(request.target.encode(), self._path.encode())
        host = request.values.get(b"host") == f"{LOOPBACK}:{self._port}".encode()
        origins = [line.partition(b":")[2].strip() for name, line in request.fields if name == b"origin"]
        return path and host and origins == [self._origin.encode()]


async def _read_request(reader: asyncio.StreamReader) -> tuple[RequestHead, bytes]:
    """Read one request. Raises RequestRefusedError; OSError if the peer ends before."""
    buffer, searched = bytearray(), 0
    while (head := take_head(buffer, searched)) is None:
        searched = len(buffer)
        buffer += await _more(reader)
    request = parse_request(head)
    body, content = request_body(request), bytearray()
    while True:
        content += body.take(buffer)
        if len(content) > MAX_ANSWER_BYTES:
            raise RequestRefusedError(Code.TOO_LARGE, "the answer is too large")
        if body.done:
            return request, bytes(content)
        buffer += await _more(reader)


async def _more(reader: asyncio.StreamReader) -> bytes:
    if data := await reader.read(_READ_BYTES):
        return data
    raise ConnectionError


def _response(
    status: int, body: Mapping[str, Any] | bytes | None, headers: Mapping[str, str] | None = None
) -> bytes:
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    lines = [
        f"HTTP/1.1 {status} {'OK' if status < 300 else 'Refused'}",
        f"Content-Length: {len(content)}",
        "Content-Type: application/json",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + content


C = TypeVar("C", bound=Claims)


async def sign_with_passkey(
    person: PasskeyUser, claims: C, evidence: Mapping[str, str], directory: Directory, clock: Clock
) -> Signed[C]:
    """Ask the person to sign a message on the sign page, and wait for the signature.

    Args:
        claims: the message. What the page stamps differs in what is returned.
        evidence: further signed messages that the page shows it by (`questions.compose`).

    Raises NotSignedError; InvalidCallError, UnavailableError if it cannot be asked.
    """
    trust = directory.trust
    origin = sign_origin(trust, clock.now_ms() / 1000)

    def accept(answer: Mapping[str, Any]) -> Signed[C]:
        return check_answer(
            claims,
            answer.get("answer"),
            directory,
            trust_domain=trust.trust_domain,
            now_ms=clock.now_ms(),
        )

    async with QuestionServer(origin, accept) as server:
        server.ask(compose(person.user_id, claims, directory, trust, evidence=evidence, return_to=server.url))
        person.show(server_link(origin, server.url))
        return await server.answer(person.wait_s)


def check_answer(
    asked: C, answer: object, directory: Directory, *, trust_domain: str, now_ms: int
) -> Signed[C]:
    """Verify that `answer` is the compact JWS of `asked` by a passkey of `asked.iss`, as of now.

    Raises InvalidCallError if it says something else; SignatureError and others as `verify` does.
    """
    if not isinstance(answer, str):
        raise InvalidCallError("the sign page sent no signature")
    jws = parse(answer)
    if jws.header.alg != WEBAUTHN_ALG:
        raise InvalidCallError("the answer is not signed by a passkey")
    signed = verify(
        jws,
        type(asked),
        lambda iss, kid: directory.user_key(iss, kid, now_ms / 1000),
        audience=trust_domain,
        appended_at_ms=now_ms,
    )
    if unstamped(signed.claims) != unstamped(asked) or signed.claims.iss != asked.iss:
        raise InvalidCallError("the sign page signed something else than was asked; nothing was sent")
    return signed
