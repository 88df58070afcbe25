"""Registry commands, which change users, agents, targets and tasks, and the records of the resulting states.

The person who gives a command signs it. The registry signs records, and embeds in each record all commands that its
state follows from. So a reader can fold the commands again, and trusts the people instead of the registry.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from ringfence.messages.base import (
    Claims,
    Digest,
    ExpiringClaims,
    Jws,
    KeyRecord,
    Message,
    Millis,
    Name,
    NonEmpty,
    PublicJwk,
    Scope,
    Seconds,
    SpiffeId,
    TargetId,
    TtlSeconds,
    Uuid,
    Verb,
)
from ringfence.messages.enrolment import AttestationSelector

Role = Literal["sponsor", "operator", "auditor"]
ActionClass = Literal["sponsor", "second_person", "operator"]
"""Whose word one action can wait for."""
ApprovalClass = Literal["none", "sponsor", "second_person", "operator"]
"""Who must approve, by a target's floor or a rule of the bundle: nobody; the agent's sponsor; a second person, who is a
sponsor; or an operator. The last two neither are nor were the agent's sponsor, and are not the user for whom it
acts."""
FloorKey = Literal["attested", "file"]
"""The kind of key that a target's floor can demand of approvers: a passkey with a verified attestation, or a key file.
"""
MAX_KEYS = 16
"""The most keys of one user that have not ended."""
MAX_OVERLAP_S = 7 * 24 * 3600
"""How long a key of an agent may count on beside the one that takes its place."""
AGENT_KEY_S = 30 * 24 * 3600
"""How long a key of an agent lives unless its sponsor says otherwise."""
MAX_AGENT_KEY_S = 90 * 24 * 3600
"""The longest life of a key that an agent made by a renewal, and of one that the command line registers."""


# --- users ------------------------------------------------------------------------------------------------------------


class Entitlements(Message):
    """What a user may do, with source and time.

    Entitlements that are too old do not count, nor do those with an unknown field.
    """

    scope: Scope = ()
    source: NonEmpty
    as_of: Seconds


GroupName = Annotated[str, Field(min_length=1, max_length=256)]
"""A group of the directory that users come from, by its display name there."""


class Mail(Message):
    """An address of a user, as their directory has it."""

    value: NonEmpty
    type: str | None = None
    primary: bool | None = None


class Provisioning(Message):
    """Facts about a provisioned user: the groups behind roles and scope, and the directory's names."""

    groups: Annotated[tuple[GroupName, ...], Field(max_length=64)] = ()
    """Roles and entitlements are within what an operator delegated to these."""
    active: bool = True
    """Whether they may act: the directory also describes those who may not (any more)."""
    user_name: NonEmpty | None = None
    external_id: NonEmpty | None = None
    display_name: NonEmpty | None = None
    formatted_name: NonEmpty | None = None
    given_name: NonEmpty | None = None
    family_name: NonEmpty | None = None
    emails: Annotated[tuple[Mail, ...], Field(max_length=8)] = ()


class Provisioned(Provisioning):
    """The part of a record that is about a user's directory."""

    by: Name
    """The provisioner that made them, and alone may change them, besides operators."""
    blocked: bool = False
    """An operator disabled them: the provisioner does not undo that."""
    gone: bool = False
    """The provisioner said that the person left for ever, and never sets them again."""


class WholeStateCommand(ExpiringClaims):
    """A command that replaces what it does not repeat."""

    revision: Annotated[int, Field(ge=0)] | None = None
    """Of the record that it replaces, as its signer saw it, without renewals of keys. 0: there was none. If the record
    has changed since, the command is refused where it widens (`revision_stale`). None: the signer saw none.
    """


class UserSet(WholeStateCommand):
    """Create or replace a user. Signed by an operator, or by the root for the first one; or by a provisioner, within
    what an operator delegated to it.
    """

    typ: ClassVar[str] = "user.set"

    user_id: Name
    name: NonEmpty
    roles: tuple[Role, ...] = ()
    keys: Annotated[tuple[KeyRecord, ...], Field(max_length=MAX_KEYS)]
    """All that count from now on; others end. A key that the user did not have counts for approvals only later: see
    `ringfence.model.lifecycle.key_history`. Passkeys are added by `UserAddKey` alone."""
    entitlements: Entitlements
    provisioned: Provisioning | None = None
    """Of a provisioner, always, and `keys` are none: it leaves them as they are. An operator who gives it leaves the
    user to their provisioner; one who does not takes them over.
    """


class UserDisable(ExpiringClaims):
    """The user may no longer act; their agents become orphans. Signed by an operator, or by their provisioner."""

    typ: ClassVar[str] = "user.disable"

    user_id: Name
    reason: NonEmpty
    gone: bool = False
    """Set by a provisioner: the person left for ever. A later person with the same name is somebody else."""


class GroupDelegation(Message):
    """The most that membership in one group may give: nothing, with a field that its reader does not know."""

    group: GroupName
    roles: tuple[Role, ...] = ()
    scope: Scope = ()


class Delegation(Message):
    """What an operator lets a provisioner do: make users whose entitlements have this source, within these groups."""

    source: NonEmpty
    groups: Annotated[tuple[GroupDelegation, ...], Field(max_length=64)]


class GroupLink(Message):
    """A delegated group that the directory has reported."""

    group: GroupName
    external_id: NonEmpty | None = None


class ProvisionerSet(WholeStateCommand):
    """Create or replace a provisioner: a key that sets users within named groups, and does nothing else. Signed by an
    operator.
    """

    typ: ClassVar[str] = "provisioner.set"

    provisioner_id: Name
    """Among the ids of users, as it signs like one."""
    name: NonEmpty
    keys: Annotated[tuple[KeyRecord, ...], Field(min_length=1, max_length=16)]
    delegation: Delegation


class ProvisionerLink(ExpiringClaims):
    """Which of the delegated groups the directory has. Signed by the provisioner itself; it gives nobody access."""

    typ: ClassVar[str] = "provisioner.link"

    provisioner_id: Name
    groups: Annotated[tuple[GroupLink, ...], Field(max_length=64)]


class UserInvite(ExpiringClaims):
    """Invites a user to enrol a key of their own. Signed by an operator, or with a key file of that user.

    Embedded in `UserAddKey`, never on a topic. It adds nothing by itself, and counts once.
    """

    typ: ClassVar[str] = "user.invite"

    user_id: Name


class KeyPossession(ExpiringClaims):
    """The new key's own signature: who made it, and on which invitation. Embedded in `UserAddKey`, never on a topic.

    `iss` is the user; the signature is by `jwk`.
    """

    typ: ClassVar[str] = "key.possession"
    passkey_use = "sign"

    user_id: Name
    jwk: PublicJwk
    invitation: NonEmpty
    """The `jti` of the `UserInvite`."""


class KeyEndorsement(ExpiringClaims):
    """A second operator's signature under a key: it counts for approvals at once then. Embedded, never on a topic."""

    typ: ClassVar[str] = "key.endorsement"

    user_id: Name
    kid: NonEmpty
    possession_digest: Digest
    """SHA-256 of the `KeyPossession` (compact JWS)."""


class UserAddKey(ExpiringClaims):
    """Add one key to a user, and change nothing else. Signed by an operator, or with a key file of that user."""

    typ: ClassVar[str] = "user.add-key"

    user_id: Name
    key: KeyRecord
    invitation: Jws | None = None
    """The `UserInvite` that the possession answers. Always set: without it the command is refused."""
    possession: Jws | None = None
    """A `KeyPossession` by this key. Always set: without it the command is refused."""
    endorsement: Jws | None = None
    """A `KeyEndorsement` by another operator."""


HoldPart = Annotated[
    str,
    Field(
        pattern=r"^(roles|entitlements|delegation|ceiling|attestation|sponsor|status|target|task|key:[A-Za-z0-9_-]{43})$"
    ),
]
"""What of a record rests on a compromised key. A key does alone; every other part holds the whole subject."""
MAX_HELD = 32
"""The most subjects that one command holds: each of their records embeds the command."""


class HeldSubject(Message):
    """A subject that rests on a compromised key, as the signer saw its record."""

    kind: Literal["user", "agent", "target", "task"]
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    revision: Annotated[int, Field(ge=1)]
    digest: Digest
    """SHA-256 of the last command in the record (compact JWS)."""
    parts: Annotated[tuple[HoldPart, ...], Field(min_length=1, max_length=64)]


class UserEndKey(ExpiringClaims):
    """End one key of a user. Signed by that user, or by an operator. Of a compromised key, it also holds what rests on
    the key elsewhere.
    """

    typ: ClassVar[str] = "user.end-key"
    passkey_use = "sign"

    user_id: Name
    kid: NonEmpty
    reason: NonEmpty
    compromised: Literal[True] | None = None
    """Whether the key is compromised: then the keys that it added end as well."""
    since_ms: Millis | None = None
    """Of a compromised key, and then always set: the append time since which it may have been in other hands. What it
    gave to others before stays. Signed by no operator, the append time of this command counts instead."""
    holds: Annotated[tuple[HeldSubject, ...], Field(min_length=1, max_length=MAX_HELD)] | None = None
    """What else rests on a compromised key: nothing more is issued on it until somebody entitled sets it anew. Signed
    by an operator or the root. The registry skips what no longer rests on the key."""

    @model_validator(mode="after")
    def _since_when_of_each_compromised_key(self) -> UserEndKey:
        if (self.since_ms is None) == bool(self.compromised):
            raise ValueError(
                "a compromised key has since_ms, and no other key: since when was it in other hands?"
            )
        if self.holds and not self.compromised:
            raise ValueError("only the report of a compromised key holds what rests on it")
        return self


class UserReviewCompromise(ExpiringClaims):
    """Confirm or lift what a `user.end-key` of a compromised key holds. Signed by the root, or by an operator who is
    neither its signer nor the key's user, and rests on neither.
    """

    typ: ClassVar[str] = "user.review-compromise"

    user_id: Name
    """Whose key was ended."""
    report: Uuid
    """The UUIDv5 of the (`iss`, `jti`) of the `user.end-key`."""
    report_digest: Digest
    """SHA-256 of that command (compact JWS), and so of its list."""
    outcome: Literal["void", "lift"]
    """`void`: it was compromised. `lift`: it was not, and what it gave before its end counts again."""
    reason: NonEmpty


HoldStatus = Literal["proposed", "held", "void"]


class Hold(Message):
    """What one report of a compromised key holds of a record, until it is set anew or the report is lifted."""

    report: Uuid
    report_digest: Digest
    by: Name | None = None
    """The operator who signed the report; None: the root."""
    by_kid: NonEmpty
    user_id: Name
    """Whose key is compromised."""
    kid: NonEmpty
    parts: tuple[HoldPart, ...] = ()
    """Often none in the record of the key's own user, whose keys end at once."""
    at_ms: Millis
    """The append time of the report."""
    status: HoldStatus
    """`proposed`: a second operator has to report the same key before anything happens. `void`: confirmed."""
    since_ms: Millis


MAX_SESSION_S = 8 * 3600
"""The longest session at the console."""


class SessionStatement(ExpiringClaims):
    """A person's word at sign-in that a console may read for them. It is embedded in the console's tokens, and never
    appended to a topic.
    """

    typ: ClassVar[str] = "session.statement"
    passkey_use = "session"

    user_id: Name
    console_kid: NonEmpty
    """The thumbprint of the key by which the console signs its tokens."""
    cookie_digest: Digest
    """SHA-256 of the session's cookie."""

    @model_validator(mode="after")
    def _no_longer_than_a_day_of_work(self) -> SessionStatement:
        if self.exp - self.iat > MAX_SESSION_S:
            raise ValueError(f"a session lasts {MAX_SESSION_S} s at most")
        return self


class UserState(Message):
    """A user as of one revision. `keys` holds old keys too, each with its end."""

    user_id: Name
    name: NonEmpty
    roles: tuple[Role, ...]
    keys: tuple[KeyRecord, ...]
    entitlements: Entitlements
    status: Literal["active", "disabled"]
    compromised: dict[NonEmpty, Millis] | None = None
    """The thumbprints of keys that were ended as compromised, each with the append time since which it may have been in
    other hands. None of them is ever given again."""
    provisioned: Provisioned | None = None
    """Of a user who comes from a directory."""
    delegation: Delegation | None = None
    """Set for a provisioner, which is no person: it has neither roles nor entitlements."""
    linked: tuple[GroupLink, ...] = ()
    """Set for a provisioner: the groups that its directory has reported."""
    holds: tuple[Hold, ...] = ()


# --- limits of models ---

MAX_LIMIT = 10**15
"""The greatest limit. Redis adds up numbers as exactly as JSON has them."""


class ModelLimits(Message):
    """The most that one task may use of language models, with all parts of it that were handed on.

    Of a ceiling: the most that each task of the agent may use. A limit that is not given is none. With an unknown
    field, no request to a model is allowed.
    """

    tokens: Annotated[int, Field(ge=1, le=MAX_LIMIT)] | None = None
    """Of requests and answers together."""
    requests: Annotated[int, Field(ge=1, le=MAX_LIMIT)] | None = None


# --- agents -----------------------------------------------------------------------------------------------------------


class AgentRegister(ExpiringClaims):
    """Register an agent. Signed by its sponsor, or by an operator who names the sponsor."""

    typ: ClassVar[str] = "agent.register"

    agent_id: Name
    sponsor: Name
    description: NonEmpty
    keys: Annotated[tuple[KeyRecord, ...], Field(max_length=16)]
    """None where its instances enrol keys of their own."""
    ceiling: Scope
    limits: ModelLimits | None = None
    """Part of the ceiling."""
    attestation: Annotated[tuple[AttestationSelector, ...], Field(max_length=32)] = ()
    inactive: Literal[True] | None = None
    """Set where nothing is to be issued before the sponsor has taken it on (`agent.activate`)."""


class AgentActivate(ExpiringClaims):
    """Activate an agent that was registered as inactive. Signed by its sponsor, and by nobody else."""

    typ: ClassVar[str] = "agent.activate"

    agent_id: Name


class AgentSetAttestation(WholeStateCommand):
    """Replace the selectors; keys of other instances no longer count. Signed by its sponsor or an operator."""

    typ: ClassVar[str] = "agent.set-attestation"

    agent_id: Name
    attestation: Annotated[tuple[AttestationSelector, ...], Field(max_length=32)]


class AgentSetCeiling(WholeStateCommand):
    """Replace the most the agent may ever hold. Signed by its sponsor or an operator."""

    typ: ClassVar[str] = "agent.set-ceiling"
    passkey_use = "sign"

    agent_id: Name
    ceiling: Scope
    limits: ModelLimits | None = None
    """Part of the ceiling: None removes all limits."""


class AgentTransferConsent(ExpiringClaims):
    """Take an agent over: signed by the new sponsor (`iss`). Embedded in the transfer, never on a topic."""

    typ: ClassVar[str] = "agent.transfer-consent"
    passkey_use = "sign"

    agent_id: Name
    from_sponsor: Name
    """Its sponsor until then."""
    revision: Annotated[int, Field(ge=1)]
    """Of the agent's record, as the new sponsor saw it. Each transfer makes another, so a consent counts once."""


class AgentTransfer(ExpiringClaims):
    """Make another sponsor accountable. Signed by the present one, with the new one's consent; or by an operator."""

    typ: ClassVar[str] = "agent.transfer"
    passkey_use = "sign"

    agent_id: Name
    sponsor: Name
    consent: Jws | None = None
    """An `AgentTransferConsent` of the new sponsor. Not needed if the new sponsor signs the transfer."""
    without_consent: Literal[True] | None = None
    """Set by an operator who transfers without the new sponsor's consent."""


class AgentRotateKey(ExpiringClaims):
    """Replace keys of the agent by a key that nobody had before, or by none. Signed by its sponsor or an operator."""

    typ: ClassVar[str] = "agent.rotate-key"

    agent_id: Name
    key: KeyRecord | None = None
    """None, for compromised keys alone: they end, and nothing takes their place."""
    replaces: Annotated[tuple[NonEmpty, ...], Field(min_length=1, max_length=256)] | None = None
    """The thumbprints of the keys that it takes the place of; None: of all that there are."""
    overlap_s: Annotated[int, Field(ge=0, le=MAX_OVERLAP_S)] = 0
    """How long the replaced keys still count, from the append time of this command, unless they end earlier."""
    compromised: Literal[True] | None = None
    """Whether they are compromised: then what they requested ends, and nothing more of it is issued."""
    reason: NonEmpty | None = None

    @model_validator(mode="after")
    def _no_overlap_with_a_thief(self) -> AgentRotateKey:
        if self.compromised and self.overlap_s:
            raise ValueError("a compromised key ends at once: overlap_s is 0 then")
        if self.key is None and not self.compromised:
            raise ValueError("only compromised keys end without another in their place: give a key")
        return self


class AgentRenewKey(ExpiringClaims):
    """Replace the key that signs this by a new one, which lives as long as the first key of the line was given.

    Signed by the agent, with the key that it replaces. The same again, with another `jti`, changes nothing.
    """

    typ: ClassVar[str] = "agent.renew-key"

    agent_id: Name
    key: PublicJwk


class AgentReportReuse(ExpiringClaims):
    """Report a message that a renewed key signed. The message is the proof: the signer's word adds nothing to it."""

    typ: ClassVar[str] = "agent.report-reuse"
    signed_by = ("policy", "gateway")

    agent_id: Name
    message: Annotated[Jws, Field(max_length=64 * 1024)]


class AgentSuspend(ExpiringClaims):
    """Stop the agent for now: nothing is issued, its leases end. Signed by its sponsor or an operator."""

    typ: ClassVar[str] = "agent.suspend"
    passkey_use = "sign"

    agent_id: Name
    reason: NonEmpty


class AgentResume(ExpiringClaims):
    """Let a suspended agent go on. What an operator suspended only an operator resumes."""

    typ: ClassVar[str] = "agent.resume"
    passkey_use = "sign"

    agent_id: Name
    reason: NonEmpty


class AgentDecommission(ExpiringClaims):
    """End the agent for ever; its name is never reused. Signed by its sponsor or an operator."""

    typ: ClassVar[str] = "agent.decommission"

    agent_id: Name
    reason: NonEmpty


class RenewedKey(Message):
    """A key of an agent that a renewal ended. It signs no requests, and proves its leases until they end."""

    kid: NonEmpty
    successor: NonEmpty
    """The thumbprint of the key that took its place."""
    at: Seconds
    """The append time of the renewal."""
    first_not_after: Seconds
    """The end that it had before. Until then a message that it signs shows that somebody else has it."""


class AgentState(Message):
    """An agent as of one revision."""

    agent_id: Name
    sponsor: Name
    without_consent: Literal[True] | None = None
    """Set where an operator made this sponsor accountable, and the sponsor has not consented."""
    description: NonEmpty
    keys: tuple[KeyRecord, ...]
    ceiling: Scope
    limits: ModelLimits | None = None
    """Part of the ceiling."""
    status: Literal["registered", "active", "suspended", "decommissioned"]
    """`registered`: its sponsor has not taken it on yet."""
    suspended_by_operator: bool = False
    attestation: tuple[AttestationSelector, ...] = ()
    """Which of its running instances may enrol a key of their own."""
    replaced: tuple[NonEmpty, ...] = ()
    """The thumbprints of keys that another took the place of, though they may count for a while yet."""
    compromised: tuple[NonEmpty, ...] = ()
    """Those of them that may be in other hands: nothing that they asked for is issued, whenever that was."""
    renewed: tuple[RenewedKey, ...] = ()
    """Those that the agent renewed itself."""
    holds: tuple[Hold, ...] = ()


# --- targets ----------------------------------------------------------------------------------------------------------


class VerbFloor(Message):
    """One verb of a target, and the approvals that no policy can go below.

    With an unknown field, nobody is given the verb.
    """

    verb: Verb
    floor: ApprovalClass = "none"
    """For a credential."""
    ask: ActionClass | None = None
    """For each single action through a gateway: whose word it waits for."""
    key: FloorKey | None = None
    """The only kind of key by which approvals, grants and action approvals of this verb count, also for break glass."""


Condition = dict[NonEmpty, Annotated[tuple[str, ...], Field(min_length=1, max_length=64)]]
"""By name, the values that will do."""


class McpRule(Message):
    """Which messages of the Model Context Protocol, in requests that post them; see `RequestRule.mcp`.

    An unknown field counts as one of the rule around it.
    """

    method: Annotated[str, Field(pattern=r"^(notifications/\*|[A-Za-z$_][A-Za-z0-9$_/-]{0,63})$")]
    """The JSON-RPC method, exactly; `notifications/*` for all of those, `response` for what answers the server."""
    name: NonEmpty | None = None
    """Which tool or prompt (`params.name`), resource (`params.uri`), task (`params.taskId`), or what is completed
    (`params.ref`): a template, in which `{name}` captures what has no slash, and `{name*}` at its end all that is left.
    Every one where none is given."""
    arguments: Annotated[Condition, Field(max_length=16)] | None = None
    """Members of `params.arguments` that must come with one of these values. `true`, `false`, `null` and whole numbers
    are those of JSON, and not texts that look so. A value of another type, or one that lenient readers take for one of
    these, makes the message match no rule."""


ModelApi = Literal["openai", "anthropic"]
"""Whose API a request to a language model has the shape of."""


class ModelRule(Message):
    """Which requests to a language model; see `RequestRule.model`.

    An unknown field counts as one of the rule around it.
    """

    api: ModelApi
    server_tools: bool = False
    """Whether a request may have the provider run tools, fetch URLs, use what it stores, or do what is not known here.
    If not, such requests do not match the rule."""


GitOperation = Literal["fetch", "push", "delete", "tag", "push-other"]
"""What a request does to a Git repository: read it, or set refs: `push` those under `refs/heads`, `tag` those under
`refs/tags`, `push-other` all others; `delete` any."""


class GitRule(Message):
    """Which requests to a Git server; see `RequestRule.git`.

    An unknown field counts as one of the rule around it.
    """

    operation: GitOperation


class RequestRule(Message):
    """Maps requests to a verb. The first matching rule counts; a request without a match has no verb.

    Put conditions on the rule of the weaker verb, and a rule without them, for the stronger verb, after it. Of a
    stronger verb, the floor or the approval of single actions is higher, and neither is lower. With an unknown field,
    the requests that match its known conditions are denied.
    """

    method: Annotated[str, Field(pattern=r"^[A-Z]{1,16}$")]
    path: NonEmpty
    """A path template: `{name}` captures one segment, `{name*}` the rest, of one segment or more."""
    query: Annotated[Condition, Field(max_length=16)] | None = None
    """Parameters of the query that must come, once, with one of these values."""
    body: Annotated[Condition, Field(max_length=16)] | None = None
    """Members of the body, a JSON object, that must be one of these strings. With another string, or none, the rule
    does not match. With another value the request matches no rule."""
    mcp: McpRule | None = None
    """If set, the path is an endpoint of the Model Context Protocol, and only rules with this field decide what is
    posted there. `method` is then `MCP`, which no request has, so that an older reader does not apply the rule as a
    plain one. There are neither `query` nor `body`."""
    model: ModelRule | None = None
    """If set, the body of the POST is a request to a language model, with exactly one `model`. `{model*}` in the
    resource is its name. There are neither `query` nor `body`. A request that is ambiguous matches no rule."""
    git: GitRule | None = None
    """If set, the path is that of repositories at a Git server that speaks smart HTTP, without `.git` at the end.
    `method` is then `GIT`, which no request has. `{ref*}` in the resource of a push is the ref without `refs/`."""
    verb: Verb
    resource: NonEmpty
    """The resource name, with the captures of `path` in braces, written as there. With `mcp` also those of its name.
    `{arguments.NAME}` is a text or whole number that is one segment; `{arguments.NAME*}`, at the end, several."""


class BackendSettings(Message):
    """How credentials for a target are made. Further fields belong to the kind."""

    kind: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
    audience: str | None = None
    """The `aud` of its tokens; the target's SPIFFE ID where none is given."""


Delivery = Literal["agent", "gateway"]
"""To whom a credential goes: to the agent, or to gateways, which inject it."""


class TargetSet(WholeStateCommand):
    """Create or replace a target. Signed by an operator."""

    typ: ClassVar[str] = "target.set"

    target_id: TargetId
    description: NonEmpty
    backend: BackendSettings
    verbs: Annotated[tuple[VerbFloor, ...], Field(min_length=1, max_length=256)]
    requests: Annotated[tuple[RequestRule, ...], Field(max_length=1024)] = ()
    max_ttl_s: TtlSeconds = 3600
    delivery: Delivery | None = None
    """As in the state. None: `gateway` if `requests` is given and a gateway can inject the credential, or if the
    credential is a static secret; else `agent`."""
    keys: Annotated[tuple[KeyRecord, ...], Field(max_length=16)] = ()
    """The resource server's own keys: with them it signs its calls to introspection."""


class TargetRemove(ExpiringClaims):
    """Nothing more is issued for the target, and its leases end. Signed by an operator."""

    typ: ClassVar[str] = "target.remove"

    target_id: TargetId
    reason: NonEmpty


class TargetState(Message):
    """A target as of one revision."""

    target_id: TargetId
    description: NonEmpty
    backend: BackendSettings
    verbs: tuple[VerbFloor, ...]
    requests: tuple[RequestRule, ...]
    max_ttl_s: TtlSeconds
    delivery: Delivery = "agent"
    """`gateway` is a floor: no credential goes to an agent. Requests that name no delivery take this one."""
    keys: tuple[KeyRecord, ...]
    status: Literal["active", "removed"]
    holds: tuple[Hold, ...] = ()


# --- tasks ------------------------------------------------------------------------------------------------------------


class TaskTerms(Message):
    """The terms of a task, to which the user on whose behalf it is consents."""

    agent_id: Name
    purpose: NonEmpty
    scope: Scope
    not_after: Seconds
    """The end of the task, and the latest end of every lease in it."""
    limits: ModelLimits | None = None


class TaskConsent(ExpiringClaims):
    """Signed by the user whom a task is on behalf of, where somebody else assigns it. Embedded, never on a topic."""

    typ: ClassVar[str] = "task.consent"
    passkey_use = "sign"

    terms: TaskTerms


class TaskAssign(ExpiringClaims):
    """Assign a task. Its id is the UUIDv5 of (`iss`, `jti`). On behalf of the signer, or of who signed `consent`, or
    whom `id_token` is of.
    """

    typ: ClassVar[str] = "task.assign"
    passkey_use = "sign"

    terms: TaskTerms
    on_behalf_of: Name
    consent: Jws | None = None
    id_token: Annotated[Jws, Field(max_length=16 * 1024)] | None = None
    """In place of `consent`: an OIDC ID token whose `nonce` is the digest of `terms`, by an issuer that is pinned in
    the trust bundle. It is for this trust domain and these terms alone, and worth nothing anywhere else.
    """


class TaskDelegate(ExpiringClaims):
    """Hand part of a task to another agent, as a task of its own. Its id is the UUIDv5 of (`iss`, `jti`).

    Signed by the agent of the task `parent`, on behalf of the same user: no wider, and no longer. Ends with `parent`.
    """

    typ: ClassVar[str] = "task.delegate"

    parent: Uuid
    terms: TaskTerms


class TaskEnd(ExpiringClaims):
    """End a task: its leases end, and those of all that was handed on of it.

    By its assigner, the user it is on behalf of, the sponsor, an operator, or an agent that handed it on.
    """

    typ: ClassVar[str] = "task.end"
    passkey_use = "sign"

    task_id: Uuid
    reason: NonEmpty


class TaskState(Message):
    """A task as of one revision."""

    task_id: Uuid
    agent_id: Name
    purpose: NonEmpty
    scope: Scope
    limits: ModelLimits | None = None
    not_after: Seconds
    on_behalf_of: Name
    assigned_by: Name
    """The user who did; of a task that was handed on, the one who assigned the first of its chain."""
    status: Literal["active", "ended"]
    parent: Uuid | None = None
    """The task that this one is a part of, where an agent handed it on."""
    act: Annotated[tuple[Name, ...], Field(min_length=2)] | None = None
    """The agents then: the task's own first, the one that a user chose last."""
    holds: tuple[Hold, ...] = ()


# --- records ----------------------------------------------------------------------------------------------------------


MAX_PROPOSAL_S = 24 * 3600
"""How long a widening command waits for a second person."""
MAX_PROPOSALS = 20
"""The most open proposals of one author besides the next one."""


MAX_SECONDED = 100
"""The most widening commands of one second signature. Lists are of users and keys only (`user.set`, `user.add-key`)."""


class SecondedCommand(Message):
    """One widening command that a second person names."""

    author: SpiffeId
    """The `iss` of the command."""
    command: NonEmpty
    """The `jti` of the command."""
    proposal: Digest
    """SHA-256 of the command's JWS Signing Input (RFC 7515, 5.1): what its author signed, whatever the signature."""
    revision: Annotated[int, Field(ge=0)]
    """Of the record of the command's subject, as the second person saw it. 0: there is none."""


class CommandSecond(ExpiringClaims):
    """Second widening commands of others, which take effect with this: all of them, or none. Signed by an operator;
    about an agent, also by a sponsor who neither is nor was the agent's and for whom it does not work.
    """

    typ: ClassVar[str] = "command.second"
    passkey_use = "sign"

    commands: Annotated[tuple[SecondedCommand, ...], Field(min_length=1, max_length=MAX_SECONDED)]
    """More than one: only of users and keys."""

    @property
    def proposal(self) -> str:
        """The digest of the first proposal: the key on the topic."""
        return self.commands[0].proposal

    def names(self, iss: str, jti: str, digest: str) -> SecondedCommand | None:
        """Return what the second person signed about a command, or None."""
        wanted = (iss, jti, digest)
        return next((o for o in self.commands if (o.author, o.command, o.proposal) == wanted), None)


class CommandWithdraw(ExpiringClaims):
    """Withdraw an own widening command that waits for a second person. Signed by its author."""

    typ: ClassVar[str] = "command.withdraw"
    passkey_use = "sign"

    proposal: Digest
    """As in `SecondedCommand`."""


class SecondSignature(Message):
    """The second person's signature of a widening command, as a record embeds it."""

    jws: Jws
    """The `CommandSecond`."""
    proposed_at_ms: Millis
    """The broker's append time of the command itself, by which its `exp` was judged."""


class EmbeddedCommand(Message):
    """A command as received: its JWS, and the broker's append time, by which its `exp` was judged."""

    jws: Jws
    appended_at_ms: Millis
    """Of a command with a second person: the append time of the second signature. It takes effect then."""
    second: SecondSignature | None = None


ProposalStatus = Literal["open", "seconded", "withdrawn", "lapsed"]


class Proposal(Claims):
    """A widening command that waits for a second person, on the topic `proposal`; or what became of it."""

    typ: ClassVar[str] = "proposal"
    signed_by = ("registry",)

    digest: Digest
    """SHA-256 of the command's JWS Signing Input: the key on the topic."""
    command: EmbeddedCommand
    sub: SpiffeId
    """The subject of the command."""
    revision: Annotated[int, Field(ge=0)]
    """Of the subject's record, when the command was proposed. 0: there was none."""
    ends_at_ms: Millis
    """It lapses unless somebody seconds it before."""
    status: ProposalStatus
    by: SpiffeId | None = None
    """Who seconded or withdrew it. None: nobody."""
    code: NonEmpty | None = None
    """Why it ended, where nobody ended it: an error code."""
    at_ms: Millis
    """The append time of what led to the status."""


class Record(Claims):
    """The fields of a record besides its state. `sub` is the SPIFFE ID of its subject."""

    signed_by = ("registry",)

    sub: SpiffeId
    revision: Annotated[int, Field(ge=1)]
    commands: Annotated[tuple[EmbeddedCommand, ...], Field(min_length=1)]
    """The commands that the state follows from, oldest first."""


class UserRecord(Record):
    """A user, on the topic `user`."""

    typ: ClassVar[str] = "user"
    state: UserState
    minor: Annotated[int, Field(ge=0)] = 0
    """How many of its revisions changed only names, `as_of` and added keys. What people sign names a revision without
    these."""


class AgentRecord(Record):
    """An agent, on the topic `agent`."""

    typ: ClassVar[str] = "agent"
    state: AgentState


class TargetRecord(Record):
    """A target, on the topic `target`."""

    typ: ClassVar[str] = "target"
    state: TargetState


class TaskRecord(Record):
    """A task, on the topic `task`."""

    typ: ClassVar[str] = "task"
    state: TaskState


Command = (
    UserSet
    | UserDisable
    | UserAddKey
    | UserEndKey
    | UserReviewCompromise
    | ProvisionerSet
    | ProvisionerLink
    | AgentRegister
    | AgentActivate
    | AgentSetCeiling
    | AgentSetAttestation
    | AgentTransfer
    | AgentRotateKey
    | AgentRenewKey
    | AgentReportReuse
    | AgentSuspend
    | AgentResume
    | AgentDecommission
    | TargetSet
    | TargetRemove
    | TaskAssign
    | TaskDelegate
    | TaskEnd
)
COMMANDS: tuple[type[ExpiringClaims], ...] = get_args(Command)
PROPOSAL_COMMANDS: tuple[type[ExpiringClaims], ...] = (CommandSecond, CommandWithdraw)
"""Commands about a command. No record is folded from them."""
AnyState = UserState | AgentState | TargetState | TaskState
AnyRecord = UserRecord | AgentRecord | TargetRecord | TaskRecord
