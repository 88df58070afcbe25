"""Workload attestation for a running agent instance: it enrols a key of its own at the registry.

The enrolment is renewed before it ends. In a run of `ringfence run`, init has enrolled the key (`RunInstance`).

Sources of a platform's identity token for a running instance: a file, GitHub Actions, Google's metadata server.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ringfence.client.errors import EnrolmentRefusedError, IdentityError, InvalidCallError
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError, UnavailableError
from ringfence.kernel.base.http_client import service_client
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.oidc import MAX_TOKEN_BYTES
from ringfence.messages.codes import Code
from ringfence.messages.enrolment import InstanceEnrol, InstanceEnrolment
from ringfence.model.identity.attestation import bound_audience
from ringfence.model.identity.spiffe_ids import spiffe_id

if TYPE_CHECKING:
    import httpx

_TIMEOUT_S = 10.0
_GOOGLE = "http://metadata.google.internal"
SYNTAX = "file:PATH, github or gcp"


class TokenSourceError(RingfenceError):
    """Raised when the platform gave no identity token. The message says what to set up there."""

    code = Code.NO_PLATFORM_TOKEN


class TokenSource(Protocol):
    """Returns identity tokens of the platform that this process runs on."""

    async def token(self, bound_audience: str) -> str:
        """Return a token. Raises TokenSourceError.

        `bound_audience`: the audience to request where the platform lets its caller choose. The token is then valid for
        one key alone.
        """
        ...


def source_of(text: str, environ: Mapping[str, str] = os.environ) -> TokenSource:
    """Return the source that `file:PATH`, `github` or `gcp` names. Raises InvalidCallError."""
    kind, _, rest = text.partition(":")
    if kind == "file" and rest:
        return TokenFile(Path(rest))
    if text == "github":
        return GitHubActions(environ)
    if text == "gcp":
        return GoogleMetadata()
    raise InvalidCallError(f"{text!r} names no source of identity tokens; write {SYNTAX}")


@dataclass(frozen=True)
class TokenFile:
    """A token file that the platform renews: a projected Kubernetes service account token, or a JWT-SVID from a SPIFFE
    helper.

    Its audience is configured at the platform: `spiffe://TRUST-DOMAIN/enrol`.
    """

    path: Path

    async def token(self, bound_audience: str) -> str:
        """Read the token in the file. `bound_audience` is not used. Raises TokenSourceError."""
        try:
            text = await asyncio.to_thread(self.path.read_text)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise TokenSourceError(f"cannot read the platform's token in {self.path}: {reason}") from None
        return _checked_token(text, str(self.path))


@dataclass(frozen=True)
class GitHubActions:
    """The OIDC token of a GitHub Actions job, which needs `permissions: id-token: write`."""

    environ: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)

    async def token(self, bound_audience: str) -> str:
        """Request a token of this job, with the audience `bound_audience`: so it is bound to one key.

        Raises TokenSourceError.
        """
        url, secret = (self.environ.get(f"ACTIONS_ID_TOKEN_REQUEST_{name}") for name in ("URL", "TOKEN"))
        if not url or not secret:
            raise TokenSourceError(
                "this is no job of GitHub Actions that may ask for identity tokens; give it the permission "
                "id-token: write"
            )
        answer = await _get(
            url, {"audience": bound_audience}, {"Authorization": f"bearer {secret}"}, "GitHub"
        )
        try:
            return _checked_token(answer.json()["value"], "GitHub")
        except (ValueError, KeyError, TypeError):
            raise TokenSourceError("GitHub answered without a token") from None


@dataclass(frozen=True)
class GoogleMetadata:
    """The identity token of a Google Cloud machine, from its metadata server."""

    url: str = _GOOGLE

    async def token(self, bound_audience: str) -> str:
        """Request a token of this machine, with the audience `bound_audience`: so it is bound to one key.

        Raises TokenSourceError.
        """
        answer = await _get(
            f"{self.url}/computeMetadata/v1/instance/service-accounts/default/identity",
            {"audience": bound_audience, "format": "full"},
            {"Metadata-Flavor": "Google"},
            "Google's metadata server",
        )
        return _checked_token(answer.text, "Google's metadata server")


async def _get(url: str, query: dict[str, str], headers: dict[str, str], who: str) -> httpx.Response:
    import httpx

    try:
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False) as http:
            # Existing parts of the URL stay.
            answer = await http.get(httpx.URL(url).copy_merge_params(query), headers=headers)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise TokenSourceError(f"{who} does not answer ({type(error).__name__})") from None
    if answer.status_code != 200:
        raise TokenSourceError(f"{who} gave no identity token: it answered {answer.status_code}")
    return answer


def _checked_token(text: object, where: str) -> str:
    token = text.strip() if isinstance(text, str) else ""
    if token.count(".") != 2 or len(token) > MAX_TOKEN_BYTES:
        raise TokenSourceError(f"what {where} has is no JWT")
    return token


log = logging.getLogger(__name__)

RUN_KEY_FILE = "key.json"
RUN_ENROLMENT_FILE = "enrolment.jws"
"""The key and the enrolment in a run's folder (`RINGFENCE_RUN_INSTANCE`)."""
_TRIES = 4
_PAUSE_S = 0.5
_RENEWED_AFTER = 2 / 3
"""The share of its life after which an enrolment is renewed on next use."""
_LIFE_S = 60


@dataclass(frozen=True, slots=True)
class Enrolled:
    """A key and the registry's enrolment of it."""

    key: SigningKey
    enrolment: str
    """The registry's signed `instance.enrolment`. Every message that the key signs for the agent carries it."""
    instance_id: str
    begins: int
    not_after: int
    token: str
    """The digest of the platform token that was used."""


class EnrolledInstanceKey(Protocol):
    """A provider of the enrolled key of a running instance."""

    id: str
    """The SPIFFE ID of the agent."""

    async def current(self) -> Enrolled:
        """Return an enrolled key that is still valid. Raises RingfenceError if there is none."""
        ...


class RunInstance:
    """The instance of a run, whose key and enrolment the init of its sandbox has put into a folder.

    They end with the run and are never renewed.
    """

    def __init__(self, agent_id: str, folder: Path, settings: ClientSettings, clock: Clock) -> None:
        """`folder` is the value of `RINGFENCE_RUN_INSTANCE`."""
        self.id = spiffe_id(settings.trust_domain, "agent", agent_id)
        self._folder = folder
        self._clock = clock
        self._enrolled: Enrolled | None = None

    async def current(self) -> Enrolled:
        """Return the key of the run.

        Raises KeyFileError, IdentityError if the folder does not have what a run has, and EnrolmentRefusedError
        after its end.
        """
        enrolled = self._enrolled = self._enrolled or self._read()
        if self._clock.now_ms() / 1000 >= enrolled.not_after:
            raise EnrolmentRefusedError("the key of this run has ended, and is not renewed: start a new run")
        return enrolled

    def _read(self) -> Enrolled:
        key = SigningKey.load(self._folder / RUN_KEY_FILE)
        path = self._folder / RUN_ENROLMENT_FILE
        try:
            enrolment = path.read_text("ascii").strip()
            claims = parse(enrolment).unverified_claims(InstanceEnrolment)
        except (OSError, ValueError, InvalidMessageError):
            raise IdentityError(
                f"{path} holds no enrolment: RINGFENCE_RUN_INSTANCE is the folder that ringfence run makes"
            ) from None
        if not key.id == claims.sub == self.id or claims.key.kid != key.kid:
            raise IdentityError(f"{self._folder} is not of an instance of {self.id}: correct RINGFENCE_AGENT")
        return Enrolled(
            key, enrolment, claims.instance_id, claims.iat, claims.key.not_after, claims.token_digest
        )


class Attested:
    """Enrols keys for one agent. It never writes a token anywhere."""

    def __init__(
        self,
        agent_id: str,
        source: TokenSource,
        settings: ClientSettings,
        clock: Clock,
        *,
        key_file: Path | None = None,
    ) -> None:
        """`key_file`: where the key is kept, on an in-memory volume that this instance alone can read; None: in this
            process.

        A restarted process loads the key again while the platform's token is the same: a token is good for one key.
        """
        self.id = spiffe_id(settings.trust_domain, "agent", agent_id)
        self._source = source
        self._settings = settings
        self._clock = clock
        self._key_file = key_file
        self._enrolled: Enrolled | None = None
        self._lock = asyncio.Lock()

    async def current(self) -> Enrolled:
        """Return an enrolled key; enrol or renew first after two thirds of its life.

        Where renewing fails, the current key is returned until shortly before its end. Raises TokenSourceError,
        EnrolmentRefusedError or UnavailableError if no usable key can be had.
        """
        async with self._lock:
            enrolled, now_s = self._enrolled, self._clock.now_ms() / 1000
            if (
                enrolled is not None
                and now_s < enrolled.begins + (enrolled.not_after - enrolled.begins) * _RENEWED_AFTER
            ):
                return enrolled
            try:
                self._enrolled = await self._renewed(enrolled)
            except RingfenceError as error:
                if enrolled is None or now_s >= enrolled.not_after - _LIFE_S:
                    raise
                log.warning("the enrolment was not renewed yet: %s", error)
                return enrolled
            return self._enrolled

    async def _renewed(self, enrolled: Enrolled | None) -> Enrolled:
        key = self._key()
        token = await self._source.token(bound_audience(self._settings.trust_domain, key.kid))
        if enrolled is not None and enrolled.token == digest(token):
            raise UnavailableError("the platform has not renewed its token yet")
        enrolment = await self._request_enrolment(key, token)
        try:
            # Verified by those who act on it; here it only says how long it is valid.
            claims = parse(enrolment).unverified_claims(InstanceEnrolment)
        except InvalidMessageError as error:
            raise EnrolmentRefusedError(f"the registry answered without an enrolment: {error}") from None
        log.info("instance %s is enrolled until %d", claims.instance_id, claims.key.not_after)
        return Enrolled(key, enrolment, claims.instance_id, claims.iat, claims.key.not_after, digest(token))

    def _key(self) -> SigningKey:
        if self._key_file is None:
            return SigningKey.generate(self.id)
        if not self._key_file.exists():
            SigningKey.generate(self.id).save(self._key_file)
        key = SigningKey.load(self._key_file)
        if key.id != self.id:
            raise EnrolmentRefusedError(f"{self._key_file} holds a key of {key.id}; name another file")
        return key

    async def _request_enrolment(self, key: SigningKey, token: str) -> str:
        now_s = self._clock.now_ms() // 1000
        return await post_enrolment(
            self._settings, enrolment_request(key, token, self._settings.trust_domain, now_s)
        )


def enrolment_request(key: SigningKey, token: str, trust_domain: str, now_s: int) -> str:
    """Sign the `instance.enrol` that asks a registry to enrol `key`, whose `id` is the agent's SPIFFE ID.

    `token`: the platform's identity token. `now_s`: the present, in seconds.
    """
    claims = InstanceEnrol(
        iss=key.id, aud=trust_domain, iat=now_s, exp=now_s + _LIFE_S, jti=str(uuid.uuid4()), key=key.public,
        token=token,
    )  # fmt: skip
    return sign(claims, key)


async def post_enrolment(settings: ClientSettings, request: str) -> str:
    """Post an `instance.enrol` to the registry. Returns its signed `instance.enrolment`, not verified.

    Raises EnrolmentRefusedError, and UnavailableError if no registry answers.
    """
    import httpx

    url = settings.registry_url.rstrip("/") + "/v1/enrol"
    answer, failed = None, ""
    async with service_client(settings, timeout_s=_TIMEOUT_S) as http:
        for tries_left in reversed(range(_TRIES)):
            try:
                answer = await http.post(url, content=request, headers={"Content-Type": "application/jose"})
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                failed = type(error).__name__
            else:
                failed = ""
            if not failed and answer is not None and answer.status_code != 503:
                return _enrolment(answer)
            if tries_left:  # of several registry replicas one is active
                await asyncio.sleep(_PAUSE_S)
    cause = failed or (_error_text(answer) if answer is not None else "")
    raise UnavailableError(
        f"the registry at {settings.registry_url} enrols nobody now ({cause}); is it running? Its address is "
        "RINGFENCE_REGISTRY_URL"
    )


def _enrolment(answer: httpx.Response) -> str:
    try:
        body = answer.json()
    except ValueError:
        body = None
    if answer.status_code == 200 and isinstance(body, dict) and isinstance(body.get("enrolment"), str):
        return str(body["enrolment"])
    code = body.get("error") if isinstance(body, dict) else None
    raise EnrolmentRefusedError(
        f"the registry does not let this instance in: {_error_text(answer)}", code=code
    )


def _error_text(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["message"])[:1000]
    except (ValueError, KeyError, TypeError):
        return f"it answered {answer.status_code}"
