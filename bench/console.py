"""The time to the console's first page with very many agents and pending requests, for a sponsor and for an operator.

All services that the console reads run, and everything is signed as in life: people's commands, agents' requests,
policy's decisions. One agent in ten has a task, and two or three requests that wait. A software authenticator signs in.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import httpx

from bench.inventory import AT_WORK, READY_WITHIN_S, SPONSORS, Organisation, Record, publish
from bench.machine import cpu_s
from bench.stack import KEEP_BYTES, WITHOUT_LIMITS
from ringfence.cli.commands.dev import client_settings
from ringfence.client.admin.administrator import Administrator
from ringfence.client.reports.read_api import ReadApi
from ringfence.client.settings import ClientSettings
from ringfence.dev.stack import Stack, StackOptions
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.producer import Publisher
from ringfence.messages.base import Permission, ServiceRole
from ringfence.messages.credential import Coordinates, CredentialDecision, CredentialRequest, Revisions
from ringfence.messages.registry import (
    BackendSettings,
    KeyPossession,
    SessionStatement,
    UserInvite,
    VerbFloor,
)
from ringfence.messages.topics import CREDENTIAL_DECISION, CREDENTIAL_REQUEST
from tests.support.passkeys import SoftwarePasskey

AGENTS: Final = 100_000
AIM_S: Final = 1.0
_SERVICES: Final[tuple[ServiceRole, ...]] = ("registry", "policy", "revoker", "audit", "console")
_SPONSOR: Final = 10
"""One whose agents are at work."""
_TIMES: Final = 7
_WAIT_S: Final = 6 * 3600
_QUIET_S: Final = 5.0
_IDLE: Final = 0.2
"""The share of a core that a service without work takes at most. Policy looks at all that waits twice a second."""
_CALM_TIMES: Final = 3
_CALM_WITHIN_S: Final = 900.0
_OPERATOR_BEFORE_S: Final = 25
"""The operator's commands are dated 20 s before they are written: by then the operator has to be there."""
_PAGES: Final = ("/approvals", "/approvals?show=others", "/agents", "/leases", "/tasks", "/audit")


class _WaitingOrganisation(Organisation):
    """An organisation whose agents at work wait for approvals."""

    def __init__(self, stack: Stack, policy_revision: str) -> None:
        super().__init__(stack)
        self._policy = SigningKey.load(stack.trust.service_key("policy"))
        self._revision = policy_revision
        self._topic = CREDENTIAL_REQUEST.name(stack.options.topic_prefix)
        self.pending = self._asked = 0

    def _waiting(self, key: SigningKey, agent_id: str, task_id: str) -> Iterator[Record]:
        self._asked += 1
        # The sponsor who looks has a passkey besides, so another revision.
        user = 2 if int(agent_id.removeprefix("agent-")) % SPONSORS == _SPONSOR else 1
        for _ in range(2 + self._asked % 2):
            resource = f"env/staging/service-{self.pending}"
            scope = (Permission(target="platform", verbs=("deploy",), resources=(resource,)),)
            request: CredentialRequest = self._command(
                CredentialRequest, key, task_id=task_id, scope=scope, ttl_s=300, delivery="agent",
                reason=f"deploy build {self.pending}", reply_key=key.public,
            )  # fmt: skip
            request = request.model_copy(update={"exp": self._now_s + _WAIT_S})
            id = message_id(request.iss, request.jti)
            decision = CredentialDecision(
                iss=self._policy.id, aud=self._td, iat=self._now_s, jti=str(uuid.uuid4()), request_id=id,
                request=sign(request, key), outcome="approval_required", ttl_s=300, delivery="agent",
                source=Coordinates(
                    topic=self._topic, partition=0, offset=self.pending, appended_at_ms=self._now_s * 1000
                ),
                required=("sponsor",), expires_at=self._now_s + _WAIT_S + self.pending % 600,
                revisions=Revisions(agent=1, user=user, task=1, target=1, policy=self._revision),
            )  # fmt: skip
            self.pending += 1
            yield Record(CREDENTIAL_DECISION, agent_id, sign(decision, self._policy))


class _Visitor:
    """Somebody signed in at the console."""

    def __init__(self, http: httpx.AsyncClient, origin: str, passkey: SoftwarePasskey, user_id: str) -> None:
        self._http = http
        self._origin = origin
        self._passkey = passkey.but(origin=origin)
        self._user_id = user_id
        self._cookie = ""

    async def sign_in(self) -> None:
        """Do what the page of the console does in a browser."""
        begun = await self._post("/sign-in/begin", {"user_id": self._user_id})
        self._cookie = begun.cookies["__Host-ringfence"]
        statement = SessionStatement.model_validate_json(begun.content.split(b'"claims":')[1][:-1])
        finished = await self._post("/sign-in/finish", {"statement": sign(statement, self._passkey)})
        self._cookie = finished.cookies["__Host-ringfence"]

    async def _post(self, path: str, body: dict[str, str]) -> httpx.Response:
        headers = {"Origin": self._origin, "Cookie": f"__Host-ringfence={self._cookie}"}
        answer = await self._http.post(self._origin + path, json=body, headers=headers)
        return answer.raise_for_status()

    async def look(self, path: str) -> tuple[float, int]:
        """Seconds until a page was there as a whole, and its bytes; endless where a service did not answer in time."""
        began = time.perf_counter()
        answer = await self._http.get(
            self._origin + path, headers={"Cookie": f"__Host-ringfence={self._cookie}"}
        )
        took = time.perf_counter() - began
        return took if answer.status_code == 200 else math.inf, len(answer.content)


async def _set_up(stack: Stack, settings: ClientSettings) -> str:
    """The target, and the revision of the policy bundle."""
    key = stack.trust.user_key(stack.options.operator)
    async with Administrator.connect(key, settings) as olga, ReadApi(key, settings) as api:
        await olga.set_target(
            "platform", description="the platform", backend=BackendSettings(kind="jwt"),
            verbs=[VerbFloor(verb="read"), VerbFloor(verb="deploy", floor="sponsor")],
        )  # fmt: skip
        return str((await api.get("policy", "bundle"))["revision"])


async def _fill(organisation: _WaitingOrganisation, stack: Stack, agents: int) -> int:
    async with Publisher(stack.settings(), "spiffe://bench/registry") as publisher:
        # The first operator is there: the registry of the stack published them.
        size = await publish(publisher, itertools.islice(organisation.people(), 1, None))
        return size + await publish(publisher, organisation.agents(0, agents))


async def _passkey(
    key: SigningKey | Path, settings: ClientSettings, user_id: str, origin: str
) -> SoftwarePasskey:
    """A passkey that somebody adds by their key file."""
    async with Administrator.connect(key, settings) as person:
        own = person.connection.key
        passkey = SoftwarePasskey.make(own.id, origin=origin)
        stamp = person.connection.stamp
        invitation = UserInvite(**stamp(300), user_id=user_id)
        possession = KeyPossession(
            **stamp(300), user_id=user_id, jwk=passkey.public, invitation=invitation.jti
        )
        await person.add_user_key(
            user_id, passkey.record(int(time.time()) + 86_400),
            invitation=sign(invitation, own), possession=sign(possession, passkey),
        )  # fmt: skip
        return passkey


async def _calm(pids: dict[str, int]) -> float:
    """Wait until the services have done what they do after a start. Returns how long that took, in seconds."""
    began, calm = time.perf_counter(), 0
    while calm < _CALM_TIMES and time.perf_counter() - began < _CALM_WITHIN_S:
        before = cpu_s(pids)
        await asyncio.sleep(_QUIET_S)
        busiest = max(now - before[name] for name, now in cpu_s(pids).items())
        calm = calm + 1 if busiest < _IDLE * _QUIET_S else 0
    return time.perf_counter() - began


@asynccontextmanager
async def _signed_in(
    stack: Stack, http: httpx.AsyncClient, key: SigningKey | Path, user_id: str, settings: ClientSettings
) -> AsyncIterator[_Visitor]:
    passkey = await _passkey(key, settings, user_id, stack.origins["sign"])
    visitor = _Visitor(http, stack.origins["session"], passkey, user_id)
    for _ in range(50):  # until each service has read the new key
        try:
            await visitor.sign_in()
            if (await visitor.look("/approvals"))[0] < math.inf:
                break
        except httpx.HTTPStatusError:
            pass
        await asyncio.sleep(0.2)
    else:
        raise RuntimeError(f"{user_id} could not sign in and see a page: nothing can be measured")
    yield visitor


async def _measure(stack: Stack, settings: ClientSettings, organisation: _WaitingOrganisation) -> None:
    pids: dict[str, int] = {name: pid for name, pid in stack.children().items() if name in _SERVICES}
    print(f"    the services were done with their start after {await _calm(pids):.0f} s more")
    operator = stack.options.operator
    people: dict[str, tuple[SigningKey | Path, str]] = {
        "a sponsor": (organisation.sponsor(_SPONSOR), f"sponsor-{_SPONSOR}"),
        "an operator": (stack.trust.user_key(operator), operator),
    }
    async with httpx.AsyncClient(timeout=120) as http:
        for who, (key, user_id) in people.items():
            async with _signed_in(stack, http, key, user_id, settings) as visitor:
                for path in _PAGES:
                    before = cpu_s(pids)
                    looks = [await visitor.look(path) for _ in range(_TIMES)]
                    used = {name: (now - before[name]) / _TIMES for name, now in cpu_s(pids).items()}
                    took = [seconds for seconds, _ in looks]
                    mark = "" if statistics.median(took) <= AIM_S else "  MISSED"
                    print(
                        f"    {who:12} {path:24} {statistics.median(took) * 1000:7,.0f} ms "
                        f"(first {took[0] * 1000:,.0f}, at most {max(took) * 1000:,.0f}), "
                        f"{looks[-1][1] / 1000:,.0f} kB, CPU ms: "
                        + ", ".join(f"{name} {ms * 1000:.0f}" for name, ms in used.items() if ms >= 0.001)
                        + mark
                    )


def run(kafka: str, agents: int) -> None:
    """Print it."""
    if kafka != "embedded":
        print("  on the embedded broker alone")
        return
    with tempfile.TemporaryDirectory(prefix="ringfence-bench-") as folder:
        options = StackOptions(
            Path(folder) / "state", keep_bytes=max(16 * KEEP_BYTES, 600 * agents), environment=WITHOUT_LIMITS,
            services=_SERVICES,
        )  # fmt: skip
        with Stack(options) as stack:
            settings = client_settings(stack.environment())
            revision = asyncio.run(_set_up(stack, settings))
            time.sleep(_OPERATOR_BEFORE_S)
            organisation = _WaitingOrganisation(stack, revision)
            for role in reversed(_SERVICES):
                stack.child(role).stop()
            size = asyncio.run(_fill(organisation, stack, agents))
            began = time.perf_counter()
            for role in _SERVICES:
                stack.start_service(role)
            for role in _SERVICES:
                url = stack.url(role) if role != "console" else stack.origins["session"]
                stack.child(role).wait_until(partial(_ready, url), READY_WITHIN_S, "was ready")
            print(
                f"  {agents:,} agents, {organisation.pending:,} pending requests, one in {AT_WORK} agents at work "
                f"({size / 1e6:,.0f} MB on Kafka): all services ready after {time.perf_counter() - began:.0f} s"
            )
            asyncio.run(_measure(stack, settings, organisation))


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
