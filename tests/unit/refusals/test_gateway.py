"""Why the gateway refuses a request, a row for each code: heads of requests, senders, leases, targets, MCP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

from ringfence.client.agent.dpop import proof
from ringfence.client.resource_server.dpop_proofs import Nonces, ProofChecker, ProofsInMemory
from ringfence.gateway.agent_api.api import (
    AgentRequestsApi,
    AwaitedReplies,
    CallerProofs,
    PostedMessages,
    _read_query,
)
from ringfence.gateway.agent_api.publications import PostedMessage, Publications
from ringfence.gateway.agent_api.replies import WaitingRequests
from ringfence.gateway.contract import ApiRequest, Attempt, McpHeaders, PresentedIdentity
from ringfence.gateway.dataplane.connection import connect_authority
from ringfence.gateway.dataplane.limits import Allowance, SenderLimits, SenderUsage
from ringfence.gateway.dataplane.request_reader import ListenerContext, check_body, read_request
from ringfence.gateway.dataplane.run_relays import RunRelays
from ringfence.gateway.decision.mcp import McpRequests
from ringfence.gateway.decision.sender import SenderAuthenticator
from ringfence.gateway.decision.targets import CompiledTarget, Targets
from ringfence.gateway.domain import ChosenLease, Sender, authorize
from ringfence.gateway.events.spool import Spool
from ringfence.gateway.hosts import origin_of
from ringfence.gateway.state.leases import LeaseTable
from ringfence.kernel.crypto.jwe import ReplyKey
from ringfence.kernel.crypto.jws import Signed, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.http1.head import parse_request
from ringfence.messages.codes import Code
from ringfence.messages.credential import CredentialRequest
from ringfence.messages.enrolment import InstanceRef, RunRef
from ringfence.messages.lease import Lease
from ringfence.messages.registry import BackendSettings, VerbFloor
from ringfence.model.git.fetch import read_fetch
from ringfence.model.http_targets import Action, RequestMap
from ringfence.model.mcp.headers import STATELESS
from ringfence.model.mcp.messages import CAPABILITIES_KEY, VERSION_KEY
from ringfence.model.mcp.request_state import RequestState, RequestStates
from tests.support import leases
from tests.support.in_memory_registry import TD, InMemoryRegistry, permission
from tests.support.verdicts import refusal_code

KEY: Final = SigningKey.generate("spiffe://acme.example/service/gateway")
NOTHING: Final[Any] = None
"""A part that no row reaches."""
META: Final = {VERSION_KEY: STATELESS, CAPABILITIES_KEY: {}}
NO_SUCH: Final = "00000000-0000-5000-8000-000000000000"
NO_CLIENT: Final[Any] = SimpleNamespace(buffer=b"")
GATEWAY: Final = "gateway.example"
LISTENER: Final = ListenerContext("task", "http", frozenset({GATEWAY}))


def reads(
    *lines: str, target: str = "/staging/x", host: str = GATEWAY, listener: ListenerContext = LISTENER
) -> object:
    """Read the head of a request."""
    head = "\r\n".join((f"GET {target} HTTP/1.1", f"Host: {host}", *lines, ""))
    return read_request(parse_request(head.encode()), listener, lambda authority: False)


def enter(place: AbstractContextManager[object]) -> None:
    with place:
        pass


def calls(
    method: str = "GET", path: str = "/v1/requests", query: str = "", content_type: str | None = None
) -> object:
    """Call the gateway's own API."""
    posted = PostedMessages(NOTHING, NOTHING, NOTHING)
    replies, proofs = AwaitedReplies(NOTHING, NOTHING), CallerProofs(NOTHING, NOTHING)
    api = AgentRequestsApi(NOTHING, NOTHING, NOTHING, posted, replies, proofs, NOTHING)
    request = ApiRequest(
        "task",
        PresentedIdentity(),
        method,
        path,
        query,
        "",
        content_type,
        None,
        None,
        NOTHING,
        NOTHING,
        NOTHING,
        NOTHING,
    )
    return asyncio.run(api.answer(request))


HEADS: Final[dict[Code, Callable[[], object]]] = {
    Code.HOST_DISAGREES: lambda: reads(target="http://other.example/x"),
    Code.HOST_UNKNOWN: lambda: reads(host="other.example"),
    Code.HOST_INVALID: lambda: reads(host="127.1"),
    Code.TARGET_MISSING: lambda: reads(target="/"),
    Code.MALFORMED_HTTP: lambda: reads(target="x"),
    Code.HANDLE_TWICE: lambda: reads("Authorization: DPoP h", "X-Ringfence-Handle: h"),
    Code.PROXY_AUTHORIZATION_INVALID: lambda: reads("Proxy-Authorization: Basic ?"),
    Code.BODY_REFUSED: lambda: check_body(
        parse_request(b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n"), read_by_map=False
    ),
    Code.TARGET_MISCONFIGURED: lambda: origin_of("ftp://staging.example"),
    Code.CONNECT_REFUSED: lambda: connect_authority(
        parse_request(b"CONNECT hub.example HTTP/1.1\r\nHost: hub.example\r\n"), LISTENER, NO_CLIENT
    ),
    # Places
    Code.TOO_MANY_REQUESTS: lambda: SenderLimits(Allowance(concurrent_each=0), lambda: 0)._begin(
        SenderUsage(1, 0)
    ),
    Code.SPOOL_UNUSABLE: lambda: Spool(Path("/dev/null/spool"), max_bytes=1),
    Code.WAITING_LIMIT: lambda: enter(
        WaitingRequests(per_agent=0, per_sender=1, in_total=1).place("bot", "task")
    ),
    Code.RELAYS_LIMIT: lambda: enter(RunRelays(NOTHING, NOTHING, NOTHING, per_run=0).place("run")),
    # The gateway's own API
    Code.API_PATH_UNKNOWN: lambda: calls(path="/v1/other"),
    Code.METHOD_UNEXPECTED: lambda: calls("DELETE"),
    Code.CONTENT_TYPE_UNEXPECTED: lambda: calls("POST", content_type="text/plain"),
    Code.QUERY_INVALID: lambda: _read_query("other=1"),
}


@pytest.mark.parametrize(("code", "ask"), HEADS.items(), ids=HEADS)
def test_head_is_refused(code: Code, ask: Callable[[], object]) -> None:
    assert reads()
    assert refusal_code(ask) == code


# --- leases -----------------------------------------------------------------------------------------------------------

TARGETS: Final = ("staging", "other")
WIDE: Final = tuple(permission("env/**", target=target, verbs=("read", "deploy")) for target in TARGETS)
READ: Final = Action("read", "env/staging/web")


URL: Final = "https://hub.example/x"


def attempt(authority: str | None = None, **fields: Any) -> Attempt:
    return Attempt(authority, "https", "GET", "/x", **fields)


class Place:
    """uma gave bot a task, and bot has a lease at staging. idle is another agent of sam."""

    def __init__(self) -> None:
        self.ledger = ledger = InMemoryRegistry()
        self.table = LeaseTable(ledger.clock)
        self.targets = Targets(ledger.directory)
        self.nonces = Nonces()
        proofs = ProofChecker(nonces=self.nonces, clock=ledger.clock, memory=ProofsInMemory(0))
        self.senders = SenderAuthenticator(
            TD, ledger.directory, self.table, proofs, ledger.clock, lambda *use: None
        )
        ledger.organisation()
        ledger.give(ledger.user_set("olga", "uma", entitlements=ledger.entitlements(*WIDE)))
        verbs = (VerbFloor(verb="read"), VerbFloor(verb="deploy"))
        backend = BackendSettings.model_validate({"kind": "jwt", "url": "https://hub.example"})
        for target in TARGETS:
            ledger.give(ledger.target_set("olga", target, verbs=verbs, backend=backend))
        broken = BackendSettings.model_validate({"kind": "jwt", "nonsense": 1})
        ledger.give_as_before(ledger.target_set("olga", "broken", backend=broken))
        for agent in ("bot", "idle"):
            ledger.give(ledger.register("sam", agent, "sam", ceiling=WIDE))
        change = ledger.give(ledger.assign("uma", "bot", terms=ledger.terms("bot", scope=WIDE)))
        self.task: str = change.state.task_id  # type: ignore[union-attr]
        self.lease = self.leased()
        self.to_agent = self.leased(delivery="agent")
        posted = PostedMessages(NOTHING, NOTHING, NOTHING)
        self.api = AgentRequestsApi(
            ledger.directory, self.table, ledger.trust, posted, AwaitedReplies(NOTHING, NOTHING),
            CallerProofs(NOTHING, NOTHING), ledger.clock,
        )  # fmt: skip
        self.mcp = McpRequests(self.table, ledger.clock, lambda: KEY)

    def leased(self, **fields: Any) -> Lease:
        given = {
            "agent_id": "bot", "act": ("bot",), "task_id": self.task, "target_id": "staging", "backend": "jwt",
            "key_thumbprint": None,
            "delivery": "gateway", "deadline": self.ledger.clock.ms // 1000 + 600,
            "scope": (permission("env/staging/*", verbs=("read",)),), "requested_at_ms": self.ledger.clock.ms,
            **fields,
        }  # fmt: skip
        lease = leases.lease(**given).claims
        self.table.apply(lease)
        return lease

    def ask(self, *, target: str = "staging", action: Action = READ, **sender: Any) -> object:
        entry = self.ledger.directory.target(target)
        assert entry is not None
        given = {"agent_id": "bot", "task_id": self.task, "lease_id": self.lease.lease_id, **sender}
        return authorize(
            Sender(**given), entry.state, action, self.table, self.ledger.directory,
            now_s=self.ledger.clock.ms / 1000, entitlements_max_age_s=30 * 86_400,
        )  # fmt: skip

    def with_lease(self, **fields: Any) -> object:
        """Ask by another lease."""
        return self.ask(lease_id=self.leased(**fields).lease_id)

    def instance(self) -> InstanceRef:
        """The instance of a run."""
        run = RunRef(run_id=NO_SUCH, task_id=self.task)
        return InstanceRef(
            instance_id=NO_SUCH, issuer="https://platform.example", subject="x", selector="0" * 64,
            not_after=2**40, run=run,
        )  # fmt: skip

    def sends(self, **presented: Any) -> object:
        """Authenticate a sender."""
        return asyncio.run(self.senders.authenticate(PresentedIdentity(**presented), attempt("hub.example")))

    def proves(
        self, key: SigningKey | None = None, lease: Lease | None = None, *, nonce: bool = False
    ) -> object:
        """Authenticate a sender by a DPoP proof, where there is no room to remember it."""
        now_s = self.ledger.clock.ms // 1000
        handle = (lease or self.lease).lease_id
        signed = proof(
            key or self.ledger.key("bot", "agent"), access_token=handle, now_s=now_s,
            nonce=self.nonces.fresh(now_s) if nonce else None, method="GET", url=URL,
        )  # fmt: skip
        return self.sends(handle=handle, proof=signed, htu=URL)

    def posted(self, agent: str = "bot", **fields: Any) -> PostedMessage:
        """A request for a credential, as an agent posts it."""
        key = self.ledger.key(agent, "agent")
        given: dict[str, Any] = {
            "iss": key.id, "jti": "j", "task_id": self.task, "scope": WIDE[:1], "ttl_s": 60, "reason": "a test",
            "reply_key": ReplyKey().public, **fields,
        }  # fmt: skip
        claims = self.ledger.claims(CredentialRequest, agent, **given)
        return PostedMessage(Signed(claims, sign(claims, key)), "m", agent, key.kid, None)

    def publishes(self, first: PostedMessage, second: PostedMessage) -> object:
        """Publish two messages, which have the same id."""
        publications = Publications(NOTHING)
        publications._remember(first)
        return asyncio.run(publications.publish(second, None))

    def bound(self, what: Any, *, of: str | None = None, **sender: Any) -> object:
        """Ask by a session, task or state of the MCP server, which belongs to the lease `of`."""
        given = {"agent_id": "bot", **sender}
        return self.mcp._restricted(Sender(**given), of or self.lease.lease_id, what)

    def sealed(self, call: str) -> str:
        """A state that the server gave out in answer to this call."""
        lease, ends_ms = self.lease, self.lease.deadline * 1000
        state = RequestState("server", "bot", lease.task_id, lease.lease_id, "staging", call, ends_ms, None)
        return self.mcp._states.seal(state)

    def calls_tool(self, **params: Any) -> object:
        """Call a tool in the revision without sessions."""
        given = {"name": "deploy", "arguments": {}, "_meta": META, **params}
        call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": given}
        fields = (("mcp-method", "tools/call"), ("mcp-name", "deploy"))
        return self.posts(json.dumps(call).encode(), versions=(STATELESS,), mcp_fields=fields)

    def posts(
        self, body: bytes | None = b"{}", method: str = "POST", *, plane: bool = True, **headers: Any
    ) -> object:
        """Read a request to the MCP server."""
        entry = self.ledger.directory.target("staging")
        assert entry is not None
        carried = McpHeaders(**{"content_type": "application/json", **headers})
        attempt = Attempt(
            None, "https", method, "/mcp", "staging", body=body, mcp_headers=carried if plane else None
        )
        return self.mcp.read(
            attempt, CompiledTarget(entry.state, entry.record, RequestMap(()), None), Sender("bot")
        )


LEASES: Final[dict[Code, Callable[[Place], object]]] = {
    Code.HANDLE_UNKNOWN: lambda place: place.ask(lease_id=NO_SUCH),
    Code.HANDLE_OTHER_AGENT: lambda place: place.ask(agent_id="idle"),
    Code.HANDLE_OTHER_TASK: lambda place: place.ask(task_id=NO_SUCH),
    Code.HANDLE_OTHER_TARGET: lambda place: place.ask(target="other"),
    Code.SOCKET_OTHER_RUN: lambda place: place.ask(run_id=NO_SUCH),
    Code.LEASE_NOT_FOR_GATEWAYS: lambda place: place.ask(lease_id=place.to_agent.lease_id),
    Code.NOT_INJECTABLE: lambda place: place.with_lease(backend="postgres"),
    Code.LEASE_OUTDATED: lambda place: place.with_lease(backend="http"),
    Code.BEYOND_LEASE: lambda place: place.ask(action=Action("deploy", "env/staging/web")),
    Code.NO_LEASE: lambda place: place.ask(lease_id=None, target="other"),
    Code.LEASE_OF_RUN: lambda place: place.with_lease(instance=place.instance()),
    # Senders
    Code.NO_CREDENTIALS: lambda place: place.sends(),
    Code.HANDLE_MALFORMED: lambda place: place.sends(handle="x"),
    Code.PROOF_MISSING: lambda place: place.sends(handle=place.lease.lease_id),
    Code.INVALID_DPOP_PROOF: lambda place: place.sends(handle=place.lease.lease_id, proof="x", htu=URL),
    Code.CERTIFICATE_UNKNOWN: lambda place: place.sends(certificate=f"spiffe://{TD}/user/sam"),
    Code.TASK_UNKNOWN: lambda place: place.sends(task_id=NO_SUCH),
    Code.RUN_ENDED: lambda place: place.sends(task_id=place.task, run_id=NO_SUCH),
    Code.PROOF_BY_STRANGER: lambda place: place.proves(
        SigningKey.generate("spiffe://acme.example/agent/bot")
    ),
    Code.PROOF_OTHER_KEY: lambda place: place.proves(lease=place.leased(key_thumbprint="other")),
    Code.PROOFS_FULL: lambda place: place.proves(nonce=True),
    Code.USE_DPOP_NONCE: lambda place: place.proves(),
    # Senders of messages to the gateway's own API
    Code.SOCKET_OTHER_AGENT: lambda place: place.api._require_task(place.task, place.posted(agent="idle")),
    Code.SOCKET_OTHER_TASK: lambda place: place.api._require_task(place.task, place.posted(task_id=NO_SUCH)),
    Code.CERTIFICATE_OTHER_AGENT: lambda place: place.api._require_certificate_of(
        "bot", PresentedIdentity(certificate=f"spiffe://{TD}/agent/idle")
    ),
    Code.ID_TAKEN: lambda place: place.publishes(place.posted(), place.posted(reason="another")),
    # Targets
    Code.TARGET_UNKNOWN: lambda place: place.targets.find(attempt(target_id="nowhere")),
    Code.TARGET_AMBIGUOUS: lambda place: place.targets.find(attempt("hub.example")),
    # Of the MCP server
    Code.MCP_SESSION_UNKNOWN: lambda place: place.bound("session", of=NO_SUCH),
    Code.MCP_SESSION_OTHER_AGENT: lambda place: place.bound("session", agent_id="idle"),
    Code.MCP_SESSION_OTHER_TASK: lambda place: place.bound("session", task_id=NO_SUCH),
    Code.MCP_SESSION_OTHER_LEASE: lambda place: place.bound("session", lease_id=place.to_agent.lease_id),
    Code.MCP_TASK_UNKNOWN: lambda place: place.bound("task", of=NO_SUCH),
    Code.MCP_TASK_OTHER_AGENT: lambda place: place.bound("task", agent_id="idle"),
    Code.MCP_TASK_OTHER_TASK: lambda place: place.bound("task", task_id=NO_SUCH),
    Code.MCP_TASK_OTHER_LEASE: lambda place: place.bound("task", lease_id=place.to_agent.lease_id),
    Code.MCP_STATE_UNKNOWN: lambda place: place.bound("state", of=NO_SUCH),
    Code.MCP_STATE_OTHER_AGENT: lambda place: place.bound("state", agent_id="idle"),
    Code.MCP_STATE_OTHER_TASK: lambda place: place.bound("state", task_id=NO_SUCH),
    Code.MCP_STATE_OTHER_LEASE: lambda place: place.bound("state", lease_id=place.to_agent.lease_id),
    Code.TARGET_INVALID: lambda place: place.targets.find(attempt(target_id="broken")),
    # Requests to Git servers
    Code.GIT_REQUEST_INVALID: lambda place: read_fetch(b"0004", ""),
    # Messages to the MCP server
    Code.MCP_COMPRESSED: lambda place: place.posts(content_encoding="gzip"),
    Code.MCP_MEDIA_TYPE: lambda place: place.posts(content_type="text/plain"),
    Code.BODY_UNSEEN: lambda place: place.posts(None),
    Code.MCP_NEEDS_PLANE: lambda place: place.posts(None, plane=False),
    Code.MCP_RESUME_UNBOUND: lambda place: place.posts(None, "GET", resumes_stream=True),
    Code.MCP_STATE_OTHER_CALL: lambda place: place.calls_tool(requestState=place.sealed("another call")),
    Code.MCP_STATE_MISSING: lambda place: place.calls_tool(inputResponses={"a": {"action": "accept"}}),
    Code.MCP_STATE_INVALID: lambda place: RequestStates(lambda: KEY).open("x"),
}


@pytest.fixture(scope="module")
def place() -> Place:
    """A question changes nothing, so all rows share it."""
    return Place()


@pytest.mark.parametrize(("code", "ask"), LEASES.items(), ids=LEASES)
def test_sender_is_refused(code: Code, ask: Callable[[Place], object], place: Place) -> None:
    assert isinstance(place.ask(), ChosenLease)
    assert refusal_code(lambda: ask(place)) == code
