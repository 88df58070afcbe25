"""What a data plane hands to the decision core, and what it gets back. Every plane, embedded or external, speaks this.

presented = Presented(...)                        the connection, and what the request shows of its sender
attempt   = Attempt(...)                          the request, exactly as it would go to the target
verdict   = await gate.decide(presented, attempt)
if verdict.allowed: headers = await gate.injected(verdict)
elif verdict.observed: forward it as it came, with nothing injected
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ringfence.messages.credential import Reason
from ringfence.messages.lease import Lease
from ringfence.messages.operations import AnswerKind, Destination
from ringfence.messages.registry import TargetState
from ringfence.model.http_targets.request_map import Action

Headers = tuple[tuple[str, str], ...]
"""Names in lower case, with `-` for `_`, and values without white space around them; each byte is one character."""


@dataclass(frozen=True, slots=True)
class PresentedIdentity:
    """What tells who sends a request. Exactly one of these ways is believed, and none of what the agent only says."""

    task_id: str | None = None
    """Of the unix socket that the request came through: one task's, which nobody else can open."""
    certificate: str | None = None
    """The SPIFFE ID in the client's verified certificate (mTLS)."""
    handle: str | None = None
    """The lease id that the request shows: `Authorization: DPoP LEASE`, or the user of a proxy URL."""
    proof: str | None = None
    """The `DPoP` header (RFC 9449)."""
    htu: str | None = None
    """The external URL that the proof must be for: scheme, authority and path as the agent wrote them."""
    address: str | None = field(default=None, compare=False)
    """Where the connection came from, where it is the agent's own. It says nothing of who sends, only of how many."""
    header_names: frozenset[str] = frozenset()
    """Names, in lower case, of the headers that the agent sent, without the one in which it showed its handle. Where
    none is told of, nothing is forwarded in observe mode."""


@dataclass(frozen=True, slots=True)
class McpHeaders:
    """What the head of a request says of a message of MCP: headers that come once at most."""

    content_type: str | None = None
    """`Content-Type`."""
    content_encoding: str | None = None
    """`Content-Encoding`, in lower case."""
    session_id: str | None = None
    """`McpExchange-Session-Id`."""
    resumes_stream: bool = False
    """Whether there is a `Last-Event-ID`."""
    mcp_fields: tuple[tuple[str, str], ...] = ()
    """All other headers `McpExchange-...` but the protocol's version, names in lower case."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request, undecoded. What was decided on and what is sent are the same bytes."""

    authority: str | None
    """Host and port that the request is for (forward proxy, by host); None where `target_id` says it."""
    scheme: Literal["http", "https"]
    method: str
    target: str
    """Path and query in origin-form, as they go to the target."""
    target_id: str | None = None
    """Of a reverse request, `/<target>/...`."""
    body: bytes | None = None
    """All of it, or None where it was not seen. See `Gate.reads_body`."""
    json: bool = False
    """Whether its head says that the body is JSON (`content_type.says_json`): else no rule sees anything in it."""
    label: str | None = None
    """What the sender's tooling says about where the request came from, for the report alone."""
    mcp_headers: McpHeaders | None = None
    """None from data planes that do not show the answers of targets: MCP is not spoken through these."""
    sent_by_gateway: bool = False
    """Whether it is the gateway that sends it on: then it has to know where to."""
    headers: Callable[[], Headers | None] | None = field(default=None, repr=False, compare=False)
    """All headers that go on, in their order, but for those of the credential. None, or a call that says None, where a
    data plane does not show all: no person is asked about what may carry others."""


@dataclass(frozen=True, slots=True)
class BlockedRequest:
    """What a data plane refuses by itself, before anything can be decided: it cannot be read, or there is too much."""

    code: str
    message: str
    presented: PresentedIdentity = PresentedIdentity()
    """The connection that it came through."""
    attempt: Attempt | None = None
    """What it asked for, as far as that could be read."""
    method: str | None = None
    destination: Destination | None = None
    """Where it was going, where there is no attempt."""
    unparsed: bool = False
    """Whether its head could not be read for certain: then nobody knows what it would do."""


@dataclass(frozen=True, slots=True)
class RpcErrorReply:
    """A refusal is told as a JSON-RPC error."""

    id: str | int | None
    """Of the request that it answers; None where it is none, or could not be read."""


@dataclass(slots=True)
class McpOutcome:
    """What came of one request to an endpoint of MCP: the three ways to fail are kept apart."""

    kind: AnswerKind = "none"
    status: int | None = None
    """Of HTTP."""
    code: int | None = None
    """Of the JSON-RPC error."""


@dataclass(frozen=True, slots=True)
class McpExchange:
    """An allowed request to an endpoint of MCP, for the data plane that forwards it."""

    method: str | None
    """Of the message that was posted; None where a stream is opened, or a session ended."""
    id: str | int | None
    """Of the request that was posted."""
    opens_session: bool
    """Whether a session in the answer is new."""
    is_visible: Callable[[str, str], bool]
    """Whether a lease may allow some use, given the method by which it is used, and its name."""
    bind_session: Callable[[str], bool]
    """Keep that the session is this lease's; False where it is another's, and must not be told."""
    record_outcome: Callable[[McpOutcome], None]
    """Record what came of it, once, at its end."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision on one attempt. It is recorded already when a plane gets it."""

    action_id: str
    allowed: bool
    status: int
    """What to answer where it was not allowed: 401, 403, 413, 429, or 503 where nothing can be decided now."""
    reasons: tuple[Reason, ...] = ()
    lease: Lease | None = None
    """The one lease that decided; the same one is injected."""
    target: TargetState | None = None
    action: Action | None = None
    nonce: str | None = None
    """The `DPoP-Nonce` to answer with, where one is needed."""
    retry_after_s: int | None = None
    task_id: str | None = None
    """The task that it counted for, where that is known."""
    mcp: McpExchange | None = None
    """Where it was allowed, to an endpoint of MCP."""
    rpc: RpcErrorReply | None = None
    """Where it was not, and was posted to one."""
    observed: bool = False
    """It is not allowed, and goes on to `target` all the same, exactly as the agent sent it: its own `Authorization`
    kept, the headers of its handle and proof taken out, nothing injected, and bound to no lease (observe mode)."""
    headers: Headers | None = field(default=None, repr=False, compare=False)
    """Where a person approved it: what goes on are these headers and the credential, and no other of the agent's."""
    injected: Mapping[str, str] | None = field(default=None, repr=False, compare=False)
    """The core's own: planes ask `Gate.injected`."""


ReportBlocked = Callable[[BlockedRequest], None]
"""Told of each that is blocked so, before its sender is. Never raises."""

RateCheck = Callable[[str], Reason | None]
"""Asked with the agent, once it is known who sends a request and before anything else is decided: why it may not have
one more now, or None."""


class HoldableRequest(Protocol):
    """A request that can wait for a person: a data plane that has it hands it over with the attempt."""

    async def read_body(self) -> bytes | None:
        """All of the body, bounded, as it will go on; None where it cannot be had. Asked once, where none was seen."""
        ...

    def on_disconnect(self, told: Callable[[], None]) -> Callable[[], None]:
        """Call `told` once when whoever sent it is gone. Returns what unsubscribes."""
        ...


class CachedAllowance(Protocol):
    """What the very same request comes to each time, for as long as nothing that it rests on changed.

    Nothing is allowed by having it: what may be another from one moment to the next is asked by `allow`.
    """

    @property
    def lease(self) -> Lease:
        """By which it goes."""
        ...

    @property
    def target(self) -> TargetState:
        """To which it goes."""
        ...

    def is_valid(self) -> bool:
        """Whether `Gate.standing` would find the same now."""
        ...

    def allow(
        self, rate_check: RateCheck, on_recorded: Callable[[bool], None]
    ) -> tuple[str, Mapping[str, str]] | None:
        """The id of the action and what it injects, where it is allowed and nothing has to be waited for.

        Its event is written together with those of other requests in this turn of the event loop. `on_recorded` is
        called later in this turn, with whether the event was written. Nothing may be forwarded before that, and nothing
        if it was not. None for everything else, and where this is no longer valid: ask `Gate.decide` then.
        """
        ...

    def verdict(self, action_id: str, injected: Mapping[str, str]) -> Verdict:
        """What was allowed, for who goes on with it by `Gate.injected`."""
        ...


class Gate(Protocol):
    """The decision core, as data planes know it."""

    def reads_body(self, attempt: Attempt) -> bool:
        """Whether the map of the target looks at the body of such a request: then it must be seen whole first."""
        ...

    async def decide(
        self,
        presented: PresentedIdentity,
        attempt: Attempt,
        rate_check: RateCheck | None = None,
        holdable: HoldableRequest | None = None,
    ) -> Verdict:
        """Decide, and record the decision. Never raises: what cannot be decided is denied.

        What is allowed can be forwarded: the plane's own limits were asked (`rate_check`), and the credential is there.
        Where the bundle wants a person's word this waits for it, bounded. Without `holdable`, only what came with its
        body can: an approval is over that too.
        """
        ...

    def cached_allowance(self, presented: PresentedIdentity, attempt: Attempt) -> CachedAllowance | None:
        """What such a request comes to, where that needs no waiting; None for everything else: ask `decide`.

        One with a body that was seen is the same again only with the same body.
        """
        ...

    async def headers_to_inject(self, verdict: Verdict) -> Mapping[str, str]:
        """The headers that carry the credential of the lease that decided.

        Raises UnavailableError where it may be used no more since it was decided: nothing may be forwarded.
        """
        ...

    def upstream(self, target: TargetState) -> str:
        """Scheme and authority of the target, `https://host[:port]`. Raises UnavailableError where it says none."""
        ...

    def on_lease_end(self, lease_id: str, on_ended: Callable[[], None]) -> Callable[[], None]:
        """Call `on_ended` once when the lease may be used no more: cut, past its deadline, or the gateway's view stale.

        At once where that is so already. Returns what unsubscribes.
        """
        ...

    def watch(self, lease_id: str, on_ended: Callable[[], None]) -> None:
        """The same for what was allowed just now, until `unwatch`."""
        ...

    def unwatch(self, lease_id: str, on_ended: Callable[[], None]) -> None:
        """Call `on_ended` no more."""
        ...

    def view_problem(self) -> Reason | None:
        """Why nobody can tell here whether a lease has ended that goes no further: the gateway's view is too old to go
        by, a revoker has halted, or this clock is ahead; or None.
        """
        ...

    def view_expired(self) -> bool:
        """Whether this process stood still for so long that its view is too old, and nobody was told yet.

        What came meanwhile waits in its sockets: ask before it goes on. It costs next to nothing.
        """
        ...
