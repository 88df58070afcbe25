"""The interface between data planes and the decision core. Every data plane uses it, embedded or external.

identity = PresentedIdentity(...)                 who sends the request, as its connection and its headers show
attempt  = Attempt(...)                           the request, exactly as it would go to the target
verdict  = await gate.decide(identity, attempt)
if verdict.allowed: headers = await gate.headers_to_inject(verdict)
elif verdict.observed: forward it as it came, with nothing injected
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ringfence.messages.codes import AnyCode
from ringfence.messages.credential import Reason
from ringfence.messages.lease import Lease
from ringfence.messages.operations import AnswerKind, Destination
from ringfence.messages.registry import TargetState
from ringfence.model.git.endpoints import GitEndpoint
from ringfence.model.git.push import CommandList
from ringfence.model.http_targets import Action
from ringfence.model.mcp.results import Grants
from ringfence.model.verdict import Allowed, Refused

Headers = tuple[tuple[str, str], ...]
"""Names in lower case with `-` for `_`, and values without surrounding white space. Each byte is one character."""


@dataclass(frozen=True, slots=True)
class PresentedIdentity:
    """The evidence of the sender of a request. The gate trusts exactly one of these, and no claim without proof."""

    task_id: str | None = None
    """The task of the unix socket that the request came through. Only that task can open the socket."""
    certificate: str | None = None
    """The SPIFFE ID in the client's verified certificate (mTLS)."""
    handle: str | None = None
    """The lease id that the request shows: `Authorization: DPoP LEASE`, or the user of a proxy URL."""
    proof: str | None = None
    """The `DPoP` header (RFC 9449)."""
    htu: str | None = None
    """The external URL that the proof must be for: scheme, authority and path as the agent wrote them."""
    address: str | None = field(default=None, compare=False)
    """The peer address, if it is the agent's own. It does not identify the sender; it only tells several users of a key
    apart.
    """
    header_names: frozenset[str] = frozenset()
    """The names, in lower case, of the agent's headers, without the one that shows its handle. Where none are known,
    observe mode forwards nothing.
    """
    run_id: str | None = None
    """The run whose own unix socket the request came through, besides its task. Only that run's instance counts."""


@dataclass(frozen=True, slots=True)
class McpHeaders:
    """The headers that belong to an MCP message. Each may come only once."""

    content_type: str | None = None
    """`Content-Type`."""
    content_encoding: str | None = None
    """`Content-Encoding`, in lower case."""
    session_id: str | None = None
    """`Mcp-Session-Id`."""
    resumes_stream: bool = False
    """Whether there is a `Last-Event-ID`."""
    mcp_fields: tuple[tuple[str, str], ...] = ()
    """All other headers that start with `Mcp-`, except the protocol version. Names in lower case."""
    versions: tuple[str, ...] = ()
    """`MCP-Protocol-Version`, each time that it comes."""


@dataclass(frozen=True, slots=True)
class GitRequest:
    """A request to a Git server, as the data plane read it. Exactly that is forwarded."""

    endpoint: GitEndpoint
    commands: CommandList | None = None
    """Of a push; None for every other request."""

    @property
    def reads(self) -> bool:
        """Whether it changes nothing."""
        return self.commands is None or not self.commands.updates


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request, undecoded. The bytes that are decided on are the bytes that are sent."""

    authority: str | None
    """Host and port that the request is for, if the target is found by host; None if `target_id` names it."""
    scheme: Literal["http", "https"]
    method: str
    target: str
    """Path and query in origin-form, as they go to the target."""
    target_id: str | None = None
    """The target of a reverse-proxy request, `/<target>/...`."""
    body: bytes | None = None
    """The whole body; None if it was not read. See `Gate.reads_body`."""
    json: bool = False
    """Whether the head says that the body is JSON (`request_reader.is_json`). Otherwise no rule looks into it."""
    label: str | None = None
    """The origin of the request, as the sender's tooling names it. Used only in reports."""
    mcp_headers: McpHeaders | None = None
    """None from data planes that cannot filter the target's responses: MCP is refused there."""
    git: GitRequest | None = None
    """Set for requests to Git servers. None from data planes that cannot read them: Git is refused there."""
    sent_by_gateway: bool = False
    """Whether the gateway forwards the request itself. Then it needs the target's URL."""
    headers: Callable[[], Headers | None] | None = field(default=None, repr=False, compare=False)
    """All headers that are forwarded, in order, without those of the credential. None, or a call that returns None,
    if a data plane cannot list them all. Then no person is asked for approval.
    """


@dataclass(frozen=True, slots=True)
class BlockedRequest:
    """A request that a data plane refused before a decision: it could not be parsed, or a limit was exceeded."""

    code: AnyCode
    message: str
    presented: PresentedIdentity = PresentedIdentity()
    """The evidence of the connection alone."""
    attempt: Attempt | None = None
    """The request, as far as it could be parsed."""
    method: str | None = None
    destination: Destination | None = None
    """The destination of the request, if there is no attempt."""
    agent_id: str | None = None
    """The agent that sent it, if the request itself proved that."""
    unparsed: bool = False
    """Whether the head could not be parsed for certain: then its effect is unknown."""


@dataclass(frozen=True, slots=True)
class RpcErrorReply:
    """The refusal is sent as a JSON-RPC error."""

    id: str | int | None
    """The id of the refused request; None if it has none that could be read."""
    stateless: bool = False
    """Whether the request is of revision 2026-07-28, which has codes and statuses of its own for some errors."""
    requested: str | None = None
    """The revision that the request stated in `_meta`."""
    request_state: str | None = field(default=None, repr=False)
    """Set while a person is asked: the client is told to retry with this state, and gets no error."""


@dataclass(slots=True)
class McpOutcome:
    """The outcome of one request to an MCP endpoint. Errors of transport, JSON-RPC and tool are kept apart."""

    kind: AnswerKind = "none"
    status: int | None = None
    code: int | None = None
    """The code of the JSON-RPC error."""


@dataclass(frozen=True, slots=True)
class McpExchange:
    """An allowed request to an MCP endpoint, for the data plane that forwards it."""

    method: str | None
    """The method of the posted message; None if the request opens a stream, or ends a session."""
    id: str | int | None
    """The id of the posted request."""
    opens_session: bool
    """Whether a session in the response is new."""
    grants: Grants
    """What the sender may see of the answers."""
    bind_session: Callable[[str], bool]
    """Bind a session to this lease. False if it is another lease's, and must not reach the agent."""
    record_outcome: Callable[[McpOutcome], None]
    """Record the outcome, once, at the end."""
    revision: str | None = None
    """The revision that the request stated."""


class UsageMeter(Protocol):
    """Measures what an allowed request to a language model uses, by its answer. No method raises."""

    @property
    def reserves(self) -> bool:
        """Whether the task pays a reservation unless the answer is seen: then a request is sent once."""
        ...

    def on_sent(self) -> None:
        """The request goes to the target now."""
        ...

    def on_response_head(self, status: int, media_type: bytes) -> None: ...

    def feed(self, piece: bytes, *, done: bool) -> None:
        """A piece of the answer's body, decoded from its framing. `done`: it was the last one."""
        ...

    def finish(self) -> None:
        """The exchange is over, or never began. Later calls do nothing."""
        ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision on one attempt. It has been recorded before a data plane gets it."""

    action_id: str
    allowed: bool
    status: int
    """The HTTP status of a denial: 401, 403, 413, 429, or 503 if nothing can be decided; for MCP also 400, 404."""
    reasons: tuple[Reason, ...] = ()
    lease: Lease | None = None
    """The lease that decided. Its credential is injected."""
    target: TargetState | None = None
    action: Action | None = None
    nonce: str | None = None
    """The `DPoP-Nonce` to answer with, if the sender needs one."""
    retry_after_s: int | None = None
    task_id: str | None = None
    """The task that the request counted for, if known."""
    mcp: McpExchange | None = None
    """Set if the request was allowed at an MCP endpoint."""
    meter: UsageMeter | None = field(default=None, repr=False, compare=False)
    """Set if the request was allowed and is one to a language model. Whoever gets the verdict calls `finish`."""
    rpc: RpcErrorReply | None = None
    """Set if the request was posted to an MCP endpoint and refused."""
    git: GitRequest | None = None
    """Set if the request was for a Git server and refused: the answer is one that Git shows."""
    observed: bool = False
    """It is not allowed, but forwarded to `target` as the agent sent it (observe mode): with its own `Authorization`,
    without the headers of its handle and proof. Nothing is injected, and no lease is involved.
    """
    headers: Headers | None = field(default=None, repr=False, compare=False)
    """Set if a person approved the request: only these headers and the credential are forwarded."""
    body: bytes | None = field(default=None, repr=False, compare=False)
    """Set if the forwarded body is not the one that was sent: an MCP message, or a request to a model with limits,
    that was built anew."""
    injected: Mapping[str, str] | None = field(default=None, repr=False, compare=False)
    """For the core alone: data planes call `Gate.headers_to_inject`."""


ReportBlocked = Callable[[BlockedRequest], None]
"""Called for each blocked request before its sender gets the answer. Never raises."""

RateCheck = Callable[[str], Allowed | Refused]
"""The data plane's own limits: whether the agent may send one more request now. Called with the agent id once that is
known, before anything else is decided.
"""


class HoldableRequest(Protocol):
    """A request that can be held while a person is asked for approval. A data plane passes it with the attempt."""

    async def read_body(self) -> bytes | None:
        """Read the whole body, bounded. None if it is not available. Called at most once, and only if no body was
        read.
        """
        ...

    def on_disconnect(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` once when the client disconnects. Returns a function that unsubscribes."""
        ...


class CachedAllowance(Protocol):
    """A cached decision on one request, for as long as nothing that it rests on has changed.

    The object itself allows nothing: `allow` checks for each request everything that may change at any moment.
    """

    @property
    def lease(self) -> Lease: ...

    @property
    def target(self) -> TargetState: ...

    def is_valid(self) -> bool:
        """Whether `Gate.cached_allowance` would return the same now."""
        ...

    def allow(
        self, rate_check: RateCheck, on_recorded: Callable[[bool], None]
    ) -> tuple[str, Mapping[str, str]] | None:
        """Allow the request without an await: the id of the action and the headers to inject.

        Its event is written together with those of other requests in this turn of the event loop. `on_recorded` is
        called later in this turn, with whether the event was written. Nothing may be forwarded before that, and nothing
        if it was not. None for everything else, and where this is no longer valid: ask `Gate.decide` then.
        """
        ...

    def verdict(self, action_id: str, injected: Mapping[str, str]) -> Verdict:
        """The verdict on the allowed request, for a data plane that continues with `Gate.headers_to_inject`."""
        ...


class Gate(Protocol):
    """The decision core (policy decision point), as data planes see it."""

    def reads_body(self, attempt: Attempt) -> bool:
        """Whether the target's map reads the body of such a request. Then the data plane must read all of it first."""
        ...

    def git_endpoint(self, attempt: Attempt) -> GitEndpoint | None:
        """The endpoint of a Git server that the request is for. Then the data plane must set `Attempt.git` first."""
        ...

    async def decide(
        self,
        presented: PresentedIdentity,
        attempt: Attempt,
        rate_check: RateCheck | None = None,
        holdable: HoldableRequest | None = None,
    ) -> Verdict:
        """Decide, and record the decision. Never raises: what cannot be decided is denied.

        An allowed request is ready to be forwarded: `rate_check` has passed, and the credential is available.
        If the bundle requires approval, this waits for a person, for a bounded time. Without `holdable`, only a request
        that came with its body can wait, since an approval also covers the body.
        """
        ...

    def cached_allowance(self, presented: PresentedIdentity, attempt: Attempt) -> CachedAllowance | None:
        """The cached decision on such a request, if there is one that needs no await; None otherwise: ask `decide`.

        A decision that was made on a body counts only for that body.
        """
        ...

    async def headers_to_inject(self, verdict: Verdict) -> Mapping[str, str]:
        """The headers that carry the credential of the lease that decided.

        Raises UnavailableError if the lease has ended since the decision: then nothing may be forwarded.
        """
        ...

    def upstream(self, target: TargetState) -> str:
        """Scheme and authority of the target, `https://host[:port]`. Raises UnavailableError if its record has none."""
        ...

    def on_lease_end(self, lease_id: str, on_ended: Callable[[], None]) -> Callable[[], None]:
        """Call `on_ended` once when the lease can no longer be used: cut, past its deadline, or the gateway's view is
        stale.

        It is called at once if that is so already. Returns a function that unsubscribes.
        """
        ...

    def watch(self, lease_id: str, on_ended: Callable[[], None]) -> None:
        """As `on_lease_end`, for a lease that was found usable just now, until `unwatch`."""
        ...

    def unwatch(self, lease_id: str, on_ended: Callable[[], None]) -> None:
        """Stop calling `on_ended`."""
        ...

    def check_view(self) -> Allowed | Refused:
        """Check that this gateway can tell that a lease which it stopped using has ended. Refused if its view is stale,
        a revoker has halted, or its clock is ahead.
        """
        ...

    def view_expired(self) -> bool:
        """Whether this process was suspended for so long that its view is stale, and no watcher has been notified yet.

        Data that arrived meanwhile waits in the sockets, so ask this before forwarding any. The call is cheap.
        """
        ...


# --- byte relays of runs, to targets whose protocol is not HTTP -------------------------------------------------------


class RelayPermit(Protocol):
    """A relay that was allowed just now, and recorded."""

    def watch(self, on_ended: Callable[[], None]) -> Callable[[], None]:
        """Call `on_ended` when a lease of the run at the target can no longer be used, maybe now; at least once then.

        Returns a function that unsubscribes.
        """
        ...

    def check(self) -> Allowed | Refused:
        """Check that more may be relayed. Cheap while no record changes: ask before each piece."""
        ...

    def ended(self, sent_bytes: int, received_bytes: int, reason: Reason | None) -> None:
        """Record the end of the relay, once. `reason`: why the gateway ended it, or could not begin it."""
        ...


class RelayGate(Protocol):
    """The part of the decision core that decides on relays."""

    def may_be_at(self, host: str, port: int) -> bool:
        """Whether a target that relays go to may be at this address. Nothing is verified."""
        ...

    async def decide(
        self, presented: PresentedIdentity, authority: str, host: str, port: int, rate_check: RateCheck
    ) -> tuple[Verdict, RelayPermit | None]:
        """Decide on a relay to this address, and record the decision. Never raises. A permit if it is allowed."""
        ...


@dataclass(frozen=True, slots=True)
class DecisionCore:
    """The decision core, as the embedded data plane uses it."""

    gate: Gate
    is_target_host: Callable[[str], bool]
    """Whether a canonical `host[:port]` is a target's. Others are denied before any TLS."""
    report_blocked: ReportBlocked = lambda _: None
    """Called for each request that is blocked before a decision."""
    relays: RelayGate | None = None
    """Decides on byte relays for runs. Without it there are none."""


# --- HTTP access for agents: the gateway answers these requests itself ------------------------------------------------

Answer = tuple[int, Mapping[str, str], bytes]
"""Status, headers and body of an answer of the gateway's own."""


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """One request of an agent to the gateway itself."""

    sender: str
    """The sender whose limits count: a task, a client certificate, or an address."""
    presented: PresentedIdentity
    method: str
    path: str
    """From `/v1/` on, without the query."""
    query: str
    base: str
    """What stands before the path in URLs that the agent uses: nothing, or `/ringfence`."""
    content_type: str | None
    length: int | None
    """The announced length of the body, in bytes; None if it is chunked, or if there is none."""
    traceparent: str | None
    check_agent: RateCheck
    read_body: Callable[[int], Awaitable[bytes]] = field(repr=False)
    """Reads the body, up to so many bytes and a little more. Raises RequestRefusedError."""
    release_slot: Callable[[], None] = field(repr=False)
    """Ends the request for the limits of the data plane, before a wait that has limits of its own."""
    on_disconnect: Callable[[Callable[[], None]], Callable[[], None]] = field(repr=False)
    """See `HoldableRequest.on_disconnect`."""


class AgentApi(Protocol):
    """The HTTP API for agents, as the data plane sees it."""

    async def answer(self, request: ApiRequest) -> Answer:
        """Answer one request. Raises RequestRefusedError for a request that is refused, and reported as blocked."""
        ...


AnswerVerdict = Callable[[Verdict], tuple[int, Mapping[str, str], bytes]]
"""Returns status, headers and body of the answer to a verdict that does not allow."""
