"""One believable example of every message: the golden files in `schemas/`, and samples for tests.

Signatures and keys in them are made up: the shapes are real, nothing verifies.
"""

from __future__ import annotations

from typing import Any

from ringfence.messages import audit, registry
from ringfence.messages.approval import (
    ActionApproval,
    ActionRequest,
    Approval,
    ApprovalRequest,
    BreakGlassReview,
    Grant,
    GrantWithdraw,
    ShownHeader,
)
from ringfence.messages.base import KeyRecord, Message, Permission, PublicJwk
from ringfence.messages.credential import (
    Coordinates,
    Credential,
    CredentialDecision,
    CredentialDelivery,
    CredentialRequest,
    EnvelopeHeader,
    EnvelopeRecipient,
    IssuerRefusal,
    Reason,
    ReplyContent,
    RequestWithdraw,
    Revisions,
    SealedDelivery,
    SealedReply,
)
from ringfence.messages.enrolment import AttestationSelector, InstanceEnrol, InstanceEnrolment
from ringfence.messages.lease import EndCause, Lease, LeaseEpoch, RevocationAck, RevocationRequest
from ringfence.messages.operations import (
    ActionAnswered,
    ActionDecided,
    DeadLetter,
    Destination,
    Heartbeat,
    PartitionDigest,
    RelayEnded,
    ServiceEvent,
    SignalStream,
)
from ringfence.messages.run import Mount, Run, RunExit, RunLimits, RunOrder, RunStop
from ringfence.messages.trust import OidcIssuer, OidcKey, Origin, ServiceIdentity, TrustBundle

TD = "acme.example"
AT = 1_790_000_000
AT_MS = AT * 1000 + 250
_JWS = "eyJhbGciOiJFUzI1NiJ9.eyJleGFtcGxlIjp0cnVlfQ.c2lnbmF0dXJl"
_DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
_REQUEST = "5b0a4d7e-6c0f-5d39-9b5e-0a4d7e6c0f5d"
_LEASE = "0c6f2f2e-55a3-5f0e-8f4e-2f2e55a35f0e"
_TASK = "c1a5e6f0-1b2c-5d3e-8f40-e6f01b2c5d3e"
_TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
_MARIA, _SAM, _OLGA = (f"spiffe://{TD}/user/{name}" for name in ("maria", "sam", "olga"))
_BOT = f"spiffe://{TD}/agent/deploy-bot"


def _service(role: str) -> str:
    return f"spiffe://{TD}/service/{role}"


_LIMITS = RunLimits(memory_bytes=2 * 1024**3, cpu_millis=1000, pids=256)
_JWK = PublicJwk(
    kty="EC",
    crv="P-256",
    x="f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
    y="x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
)
_KEY = KeyRecord(
    kid="oKIywvGUpTVTyxMQ3bwIIeQUudfr_CkLMjCE19ECD-U", jwk=_JWK, not_before=AT, not_after=AT + 31_536_000
)
_ENCRYPTION_KEY = KeyRecord(
    kid="u809Vppx5ixWMOohxWr2aM3m5bD0LQ67g_GPmubQus4",
    jwk=PublicJwk(kty="OKP", crv="X25519", x="hSDwCYkwp1R0i33ctD73Wg2_Og0mOBr066SpjqqbTmo"),
    not_before=AT,
    not_after=AT + 31_536_000,
)
_OIDC_KEY = OidcKey(kid="login-2026", kty="EC", alg="ES256", crv="P-256", x=_JWK.x, y=_JWK.y)
_DEPLOY = Permission(target="staging", verbs=("deploy",), resources=("env/staging/*",))
_PERMISSIONS = (_DEPLOY,)
_ENTITLEMENTS = registry.Entitlements(scope=_PERMISSIONS, source="cli", as_of=AT)
_TERMS = registry.TaskTerms(
    agent_id="deploy-bot", purpose="deploy the staging build", scope=_PERMISSIONS, not_after=AT + 3600
)
_BACKEND = registry.BackendSettings(kind="jwt", audience="https://staging.acme.example")
_VERBS = (registry.VerbFloor(verb="read"), registry.VerbFloor(verb="deploy", floor="sponsor"))
_REQUESTS = (
    registry.RequestRule(method="POST", path="/deploy/{env}", verb="deploy", resource="env/{env}/app"),
)
_REVISIONS = Revisions(agent=1, user=1, task=1, target=1, policy=_DIGEST)
_REASON = Reason(
    code="beyond_scope",
    message="entitlements:maria does not allow deploy on env/production/* at production",
    permission=Permission(target="production", verbs=("deploy",), resources=("env/production/*",)),
    side="entitlements:maria",
)


def _coordinates(what: str) -> Coordinates:
    return Coordinates(topic=f"ringfence.{what}.v1", partition=3, offset=1042, appended_at_ms=AT_MS)


def _claims(iss: str, jti: str = "b7e0c5a4-8f21-4d7a-9c3e-1f2a3b4c5d6e", **more: Any) -> dict[str, Any]:
    return {"iss": iss, "aud": TD, "iat": AT, "jti": jti, **more}


def _command(iss: str, **more: Any) -> dict[str, Any]:
    return _claims(iss, exp=AT + 300, **more)


def _record(kind: str, id: str) -> dict[str, Any]:
    command = registry.EmbeddedCommand(jws=_JWS, appended_at_ms=AT_MS)
    return _claims(_service("registry"), sub=f"spiffe://{TD}/{kind}/{id}", revision=1, commands=(command,))


_WORKLOAD = "repo:acme/deploy:ref:refs/heads/main"
_SELECTOR = AttestationSelector(
    issuer="https://token.actions.githubusercontent.com",
    claims={"sub": "repo:acme/deploy:*", "repository_id": "74", "ref": "refs/heads/main"},
    key_bound=True,
)
_INSTANCE = "3f1c7a52-9a0e-5c1b-8d2e-7a529a0e5c1b"
_AGENT_STATE = registry.AgentState(
    agent_id="deploy-bot",
    sponsor="sam",
    description="deploys builds to staging",
    keys=(_KEY,),
    ceiling=_PERMISSIONS,
    status="active",
    attestation=(_SELECTOR,),
)
_TARGET_STATE = registry.TargetState(
    target_id="staging",
    description="the staging platform",
    backend=_BACKEND,
    verbs=_VERBS,
    requests=_REQUESTS,
    max_ttl_s=3600,
    keys=(_KEY,),
    status="active",
)
_USER_STATE = registry.UserState(
    user_id="maria", name="Maria Ortiz", roles=(), keys=(_KEY,), entitlements=_ENTITLEMENTS, status="active"
)
_TASK_STATE = registry.TaskState(
    task_id=_TASK,
    agent_id="deploy-bot",
    purpose="deploy the staging build",
    scope=_PERMISSIONS,
    not_after=AT + 3600,
    on_behalf_of="maria",
    assigned_by="maria",
    status="active",
)

_DELEGATION = registry.Delegation(
    source="scim:directory",
    groups=(registry.GroupDelegation(group="Release managers", roles=("sponsor",), scope=_PERMISSIONS),),
)
_LINK = registry.GroupLink(group="Release managers", external_id="8c1f2c0e")

_ALL: tuple[Message, ...] = (
    TrustBundle(
        **_command(f"spiffe://{TD}/root"),
        version=1,
        services=(
            ServiceIdentity(id=_service("policy"), roles=("policy",), keys=(_KEY,)),
            ServiceIdentity(
                id=_service("gateway"), roles=("gateway",), keys=(_KEY,), encryption_keys=(_ENCRYPTION_KEY,)
            ),
        ),
        oidc_issuers=(
            OidcIssuer(issuer="https://login.acme.example", uses=("users",), keys=(_OIDC_KEY,)),
            OidcIssuer(
                issuer="https://token.actions.githubusercontent.com", uses=("instances",), discovery=True
            ),
        ),
        rp_id=TD,
        origins=(
            Origin(origin=f"https://sign.{TD}", use="sign", not_before=AT),
            Origin(origin=f"https://console.{TD}", use="session", not_before=AT),
        ),
    ),
    registry.UserSet(
        **_command(_OLGA),
        user_id="maria",
        name="Maria Ortiz",
        roles=(),
        keys=(_KEY,),
        entitlements=_ENTITLEMENTS,
    ),
    registry.UserDisable(**_command(_OLGA), user_id="maria", reason="left the company"),
    registry.UserAddKey(
        **_command(_OLGA), user_id="maria", key=_KEY, invitation=_JWS, possession=_JWS, endorsement=_JWS
    ),
    registry.UserEndKey(**_command(_MARIA), user_id="maria", kid=_KEY.kid, reason="lost with the laptop"),
    registry.CommandSecond(
        **_command(f"spiffe://{TD}/user/otto"),
        commands=(
            registry.SecondedCommand(
                author=f"spiffe://{TD}/user/olga", command="4f0c7a52-9a0e-4c1b-8d2e-7a529a0e5c1b",
                proposal=_DIGEST, revision=7,
            ),
        ),
    ),
    registry.CommandWithdraw(**_command(f"spiffe://{TD}/user/olga"), proposal=_DIGEST),
    registry.Proposal(
        **_claims(_service("registry")), digest=_DIGEST, sub=f"spiffe://{TD}/agent/deploy-bot", revision=7,
        command=registry.EmbeddedCommand(jws=_JWS, appended_at_ms=AT_MS), ends_at_ms=AT_MS + 86_400_000,
        status="open", at_ms=AT_MS,
    ),
    registry.UserReviewCompromise(
        **_command(_OLGA),
        user_id="maria",
        report="0a4e5e23-52a2-5d2b-9a8c-3c0f6c1d8b11",
        report_digest="0" * 64,
        outcome="lift",
        reason="the laptop was found",
    ),
    registry.ProvisionerSet(
        **_command(_OLGA),
        provisioner_id="directory",
        name="The company's directory",
        keys=(_KEY,),
        delegation=_DELEGATION,
    ),
    registry.ProvisionerLink(
        **_command(f"spiffe://{TD}/user/directory"), provisioner_id="directory", groups=(_LINK,)
    ),
    registry.AgentRegister(
        **_command(_SAM),
        agent_id="deploy-bot",
        sponsor="sam",
        description="deploys builds to staging",
        keys=(_KEY,),
        ceiling=_PERMISSIONS,
    ),
    registry.AgentSetAttestation(**_command(_SAM), agent_id="deploy-bot", attestation=(_SELECTOR,)),
    registry.AgentActivate(**_command(_SAM), agent_id="deploy-bot"),
    registry.AgentRotateKey(
        **_command(_SAM),
        agent_id="deploy-bot",
        key=_KEY,
        replaces=("u809Vppx5ixWMOohxWr2aM3m5bD0LQ67g_GPmubQus4",),
        overlap_s=3600,
        reason="once a quarter",
    ),
    registry.AgentRenewKey(**_command(_BOT), agent_id="deploy-bot", key=_KEY.jwk),
    registry.AgentReportReuse(
        **_command(f"spiffe://{TD}/service/policy"), agent_id="deploy-bot", message=_JWS
    ),
    registry.AgentSetCeiling(**_command(_SAM), agent_id="deploy-bot", ceiling=_PERMISSIONS),
    registry.AgentTransfer(**_command(_SAM), agent_id="deploy-bot", sponsor="petra"),
    registry.AgentSuspend(**_command(_SAM), agent_id="deploy-bot", reason="odd requests overnight"),
    registry.AgentResume(**_command(_SAM), agent_id="deploy-bot", reason="explained"),
    registry.AgentDecommission(**_command(_SAM), agent_id="deploy-bot", reason="replaced"),
    registry.TargetSet(
        **_command(_OLGA),
        target_id="staging",
        description="the staging platform",
        backend=_BACKEND,
        verbs=_VERBS,
        requests=_REQUESTS,
        keys=(_KEY,),
    ),
    registry.TargetRemove(**_command(_OLGA), target_id="staging", reason="moved"),
    registry.TaskAssign(**_command(_SAM), terms=_TERMS, on_behalf_of="maria", consent=_JWS),
    registry.TaskDelegate(
        **_command(_BOT),
        parent=_TASK,
        terms=_TERMS.model_copy(
            update={"agent_id": "migrate-bot", "purpose": "migrate the database first", "not_after": AT + 600}
        ),
    ),
    registry.TaskEnd(**_command(_MARIA), task_id=_TASK, reason="done"),
    registry.UserRecord(**_record("user", "maria"), state=_USER_STATE),
    registry.AgentRecord(**_record("agent", "deploy-bot"), state=_AGENT_STATE),
    registry.TargetRecord(**_record("target", "staging"), state=_TARGET_STATE),
    registry.TaskRecord(**_record("task", _TASK), state=_TASK_STATE),
    CredentialRequest(
        **_command(_BOT),
        task_id=_TASK,
        scope=_PERMISSIONS,
        ttl_s=300,
        delivery="agent",
        reason="deploy build 421",
        reply_key=_JWK,
    ),
    RequestWithdraw(**_command(_BOT), request_id=_REQUEST),
    CredentialDecision(
        **_claims(_service("policy")),
        request_id=_REQUEST,
        request=_JWS,
        source=_coordinates("credential.request"),
        outcome="allowed",
        ttl_s=300,
        delivery="agent",
        required=("sponsor",),
        approvals=(_JWS,),
        revisions=_REVISIONS,
        input={"request": {"ttl_s": 300}},
        input_digest=_DIGEST,
    ),
    ApprovalRequest(
        **_claims(_service("policy")),
        request_id=_REQUEST,
        request=_JWS,
        source=_coordinates("credential.request"),
        approver="sam",
        required=("sponsor",),
        ttl_s=300,
        delivery="agent",
        revisions=_REVISIONS,
        reasons=(Reason(code="floor", message="staging wants a sponsor's approval for deploy"),),
        expires_at=AT + 3600,
    ),
    Approval(
        **_command(_SAM),
        verdict="approved",
        request=_JWS,
        request_id=_REQUEST,
        request_digest=_DIGEST,
        ttl_s=300,
        delivery="agent",
        revisions=_REVISIONS,
        comment="build 421 is the one we tested",
    ),
    ActionRequest(
        **_claims(_service("gateway"), exp=AT + 300),
        action_id="d9428888-122b-51e1-b85c-61cd3cbb3210",
        agent_id="deploy-bot",
        task_id=_TASK,
        lease_id="0b8a1a5c-9a3e-5d57-8a2b-4a8d2f7f5b11",
        target_id="hub",
        verb="merge",
        resource="repo/shop",
        method="PUT",
        url="https://hub.example/repos/shop/pulls/7/merge",
        body_digest=_DIGEST,
        body_bytes=41,
        headers_digest=_DIGEST,
        headers=(
            ShownHeader(name="content-type", value="application/json"),
            ShownHeader(name="user-agent"),
        ),
        required="sponsor",
        revisions=_REVISIONS,
    ),
    ActionApproval(
        **_command(_SAM),
        verdict="approved",
        agent_id="deploy-bot",
        request=_JWS,
        request_digest=_DIGEST,
        comment="reviewed it myself",
    ),
    Grant(
        **_claims(_SAM, exp=AT + 7200),
        agent_id="deploy-bot",
        task_id=_TASK,
        scope=_PERMISSIONS,
        count=5,
        ttl_s=300,
        delivery="agent",
        revisions=_REVISIONS,
        comment="the deployments of release 41",
    ),
    GrantWithdraw(
        **_command(_SAM), grant_id="4f9ad2c1-70b7-5c3f-8a55-d2c170b75c3f", reason="the release is off"
    ),
    BreakGlassReview(
        **_claims(_OLGA),
        request_id=_REQUEST,
        decision_digest=_DIGEST,
        agent_id="deploy-bot",
        note="the site was down; the runbook was followed",
    ),
    SealedReply(jwe="eyJhbGciOiJFQ0RILUVTIn0..aXY.Y2lwaGVydGV4dA.dGFn"),
    ReplyContent(request_id=_REQUEST, decision=_JWS, refusal=_JWS),
    IssuerRefusal(**_claims(_service("issuer")), request_id=_REQUEST, reasons=(_REASON,)),
    SealedDelivery(
        protected="eyJlbmMiOiJBMjU2R0NNIn0",
        iv="aXY",
        ciphertext="Y2lwaGVydGV4dA",
        tag="dGFn",
        recipients=(
            EnvelopeRecipient(
                header=EnvelopeHeader(alg="ECDH-ES+A256KW", kid=_ENCRYPTION_KEY.kid, epk=_ENCRYPTION_KEY.jwk),
                encrypted_key="a2V5",
            ),
        ),
    ),
    CredentialDelivery(
        **_claims(_service("issuer")),
        request_id=_REQUEST,
        lease_id=_LEASE,
        target_id="staging",
        credential=Credential(kind="jwt", value=_JWS, token_type="Bearer", expires_at=AT + 300),  # noqa: S106
    ),
    Lease(
        **_claims(_service("revoker")),
        lease_id=_LEASE,
        seq=3,
        status="released",
        request_id=_REQUEST,
        decision_id="d5f0d3a0-8d1e-5c33-9d2b-d3a08d1e5c33",
        decision_digest=_DIGEST,
        agent_id="deploy-bot",
        act=("deploy-bot",),
        sponsor="sam",
        on_behalf_of="maria",
        task_id=_TASK,
        target_id="staging",
        backend="jwt",
        delivery="agent",
        scope=_PERMISSIONS,
        requested_at_ms=AT_MS,
        deadline=AT + 300,
        key_thumbprint=_KEY.kid,
        cause=EndCause(kind="release", at_ms=AT_MS + 60_000, by=_BOT, ref="7d1c", reason="done"),
        traceparent=_TRACE,
    ),
    InstanceEnrol(**_command(_BOT), key=_JWK, token=_JWS),
    InstanceEnrolment(
        **_claims(_service("registry")),
        sub=_BOT,
        instance_id=_INSTANCE,
        key=KeyRecord(kid=_KEY.kid, jwk=_JWK, not_before=AT - 30, not_after=AT + 3570),
        issuer=_SELECTOR.issuer,
        subject=_WORKLOAD,
        selector=_DIGEST,
        claims={"sub": _WORKLOAD, "repository_id": "74", "ref": "refs/heads/main"},
        token_digest=_DIGEST,
        key_bound=True,
        agent_revision=2,
    ),
    LeaseEpoch(**_claims(_service("revoker")), epoch="7.5f0e8f4e", partition=0),
    RevocationRequest(**_claims(_BOT), kind="release", lease_id=_LEASE, reason="done"),
    RunOrder(
        **_claims(_MARIA, exp=AT + 60),
        pool="reviews",
        agent_id="deploy-bot",
        task_id=_TASK,
        command=("python", "review.py", "--pull-request", "422"),
        image=f"sha256:{_DIGEST}",
        mounts=(Mount(name="sources"), Mount(name="reports", read_write=True)),
        limits=_LIMITS,
        ttl_s=1800,
    ),
    RunStop(
        **_claims(_MARIA, exp=AT + 60),
        run_id="9d1c2b3a-4f5e-5a6b-8c7d-2b3a4f5e5a6b",
        reason="it reviews the wrong branch",
    ),
    Run(
        **_claims(_service("runner-1")),
        run_id="9d1c2b3a-4f5e-5a6b-8c7d-2b3a4f5e5a6b",
        order_id="1b2c3d4e-5f60-5718-9a2b-3d4e5f605718",
        ordered_by=_MARIA,
        agent_id="deploy-bot",
        task_id=_TASK,
        status="ended",
        key_thumbprint=_KEY.kid,
        deadline=AT + 1800,
        backend="bubblewrap",
        limits=_LIMITS,
        policy_digest=_DIGEST,
        image_digest=f"sha256:{_DIGEST}",
        mounts=(Mount(name="sources"), Mount(name="reports", read_write=True)),
        exit=RunExit(code=0),
        remained=("reports/.git/hooks/post-checkout is executable, and was written by this run",),
        at_ms=AT_MS + 60_000,
    ),
    SignalStream(
        **_claims(_service("signals")),
        receiver="billing",
        stream_id="6ba7b811-9dad-41d1-80b4-00c04fd430c8",
        revision=2,
        status="paused",
        reason="maintenance",
        method="urn:ietf:rfc:8935",
        events_requested=("https://schemas.openid.net/secevent/caep/event-type/session-revoked",),
        removed=({"format": "uri", "uri": f"spiffe://{TD}/user/maria"},),
        since_ms=AT_MS,
    ),
    RevocationAck(**_claims(f"spiffe://{TD}/service/gateway"), revocation_id="7d1c", cut_at_ms=AT_MS),
    ServiceEvent(
        **_claims(_service("registry")),
        kind="refused",
        subject="agent.register",
        actor=_SAM,
        ref="b7e0c5a4-8f21-4d7a-9c3e-1f2a3b4c5d6e",
        source=_coordinates("registry.command"),
        reasons=(
            Reason(
                code="name_taken", message="the name deploy-bot was given before and is never given again"
            ),
        ),
        agent_id="deploy-bot",
        at_ms=AT_MS,
        traceparent=_TRACE,
    ),
    Heartbeat(
        **_claims(_service("registry")),
        at_ms=AT_MS,
        tables=(PartitionDigest(topic="ringfence.agent.v1", partition=0, count=12, digest=_DIGEST),),
    ),
    DeadLetter(
        source=_coordinates("credential.request"),
        service="policy",
        code="not_a_jws",
        reason="not a JWS in compact serialisation",
        at_ms=AT_MS,
    ),
    ActionDecided(
        action_id="d9428888-122b-51e1-b85c-61cd3cbb3210",
        gateway=_service("gateway"),
        agent_id="deploy-bot",
        task_id=_TASK,
        lease_id=_LEASE,
        target_id="staging",
        verb="deploy",
        resource="env/staging/app",
        allowed=True,
        access="write",
        method="PUT",
        request_digest=_DIGEST,
        latency_us=180,
        at_ms=AT_MS,
    ),
    ActionAnswered(
        action_id="d9428888-122b-51e1-b85c-61cd3cbb3210",
        gateway=_service("gateway"),
        agent_id="deploy-bot",
        task_id=_TASK,
        lease_id=_LEASE,
        target_id="staging",
        verb="deploy",
        resource="env/staging/app",
        answer="rpc_error",
        http_status=200,
        rpc_code=-32602,
        at_ms=AT_MS,
    ),
    RelayEnded(
        action_id="0f8fad5b-d9cb-469f-a165-70867728950e",
        gateway=_service("gateway"),
        agent_id="deploy-bot",
        task_id=_TASK,
        run_id="7c9e6679-7425-50de-944b-e07fc1f90ae7",
        lease_id=_LEASE,
        target_id="orders-db",
        destination=Destination(host="db.internal", port=5432),
        sent_bytes=1204,
        received_bytes=88_130,
        duration_ms=4_210,
        at_ms=AT_MS,
    ),
    audit.AuditEvent(
        class_uid=3003,
        category_uid=3,
        activity_id=1,
        type_uid=300301,
        severity_id=1,
        status_id=1,
        time=AT_MS,
        message="deploy-bot was issued a credential for staging: deploy on env/staging/*, on behalf of maria",
        metadata={
            "version": audit.OCSF_VERSION,
            "product": {"name": "Ringfence", "vendor_name": "Ringfence"},
            "uid": "9b2f8a57-0c2b-5a0e-8d6d-8a570c2b5a0e",
        },
        unmapped={
            "agent": "deploy-bot",
            "task": _TASK,
            "sponsor": "sam",
            "on_behalf_of": "maria",
            "lease": _LEASE,
        },
    ),
    audit.AuditIntake(
        **_claims(_service("audit")),
        entries=(
            audit.IntakeEntry(
                key="deploy-bot",
                traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
                event={"metadata": {"uid": "9b2f8a57-0c2b-5a0e-8d6d-8a570c2b5a0e"}, "unmapped": {}},
            ),
        ),
    ),
    audit.AuditCheckpoint(
        **_claims(_service("audit")), tree="0", size=1024, root=_DIGEST, peaks=(_DIGEST,), last=_DIGEST
    ),
    audit.AuditWitness(**_claims(f"spiffe://{TD}/user/ali"), tree="0", size=1024, root=_DIGEST),
)

EXAMPLES: dict[type[Message], Message] = {type(example): example for example in _ALL}
"""Every published message's class to its example."""
