"""A record of everything that audit reads, in every shape that makes another event: names for test reports."""

from __future__ import annotations

import uuid
from typing import Any

from ringfence.kernel.base.ids import derived_id, digest, message_id
from ringfence.kernel.crypto.jwe import EncryptionKey, enclose, seal
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.approval import ActionApproval, Approval, BreakGlassReview, Grant, GrantWithdraw
from ringfence.messages.base import ExpiringClaims, Topic
from ringfence.messages.credential import Reason, RequestWithdraw
from ringfence.messages.enrolment import AttestationSelector, EnrolledInstance
from ringfence.messages.lease import EndCause, RevocationAck, RevocationRequest, Selector
from ringfence.messages.operations import Destination, ModelUsage
from ringfence.messages.registry import (
    AgentActivate,
    AgentDecommission,
    AgentRegister,
    AgentRenewKey,
    AgentReportReuse,
    AgentResume,
    AgentRotateKey,
    AgentSetAttestation,
    AgentSetCeiling,
    AgentSuspend,
    AgentTransfer,
    BackendSettings,
    CommandSecond,
    CommandWithdraw,
    Entitlements,
    GroupLink,
    KeyPossession,
    ProvisionerLink,
    ProvisionerSet,
    SecondedCommand,
    TargetRemove,
    TargetSet,
    TargetState,
    TaskAssign,
    TaskConsent,
    TaskDelegate,
    TaskEnd,
    TaskTerms,
    UserAddKey,
    UserDisable,
    UserEndKey,
    UserInvite,
    UserReviewCompromise,
    UserSet,
    VerbFloor,
)
from ringfence.messages.run import Mount, Run, RunExit, RunLimits, RunOrder, RunStop
from ringfence.messages.topics import (
    AGENT,
    APPROVAL_REQUEST,
    APPROVAL_RESPONSE,
    AUDITED,
    CREDENTIAL_REPLY,
    CREDENTIAL_REQUEST,
    LEASE,
    REGISTRY_COMMAND,
    REVOCATION_ACK,
    REVOCATION_REQUEST,
    RUN,
    RUN_ORDER,
    TARGET,
    TASK,
    TRUST,
    USER,
)
from ringfence.model.records.runs import run_id_of
from tests.support.audit_fixtures import BUNDLE, REPLY_KEY, TD, AuditFixtures

_SELECTOR = AttestationSelector(
    issuer="https://token.actions.githubusercontent.com", claims={"repository_id": "74"}
)


def every_record(office: AuditFixtures) -> dict[str, Received]:
    """A record of everything that audit reads, in every shape that makes another event; names for test reports."""
    found: dict[str, Received] = {f"record {i} {r.topic.what}": r for i, r in enumerate(office.staff())}
    found |= {f"command {typ}": record for typ, record in commands(office).items()}
    for end in ("released", "revoked", "expired"):
        story = office.credential(end)
        found |= {f"{end} {i} {r.topic.what}": r for i, r in enumerate(story.all)}
    story = office.credential(approved=False)
    found["unapproved request"] = story.request
    found["unapproved decision"] = story.allowed
    issuer, sam = office.key("service", "issuer"), office.key("user", "sam")
    beyond = Reason(
        code="beyond_scope", message="entitlements:maria does not allow it", permission=office.scope[0],
        side="entitlements:maria",
    )  # fmt: skip
    denied = office.credential(approved=False)
    found["denied request"] = denied.request
    found["denied decision"] = denied.decision("denied", ttl_s=None, reasons=(beyond,))
    bot = office.key("agent", "deploy-bot")
    for name, request_id in (("request", denied.request_id), ("unknown request", str(uuid.uuid4()))):
        given_up = office.claims(RequestWithdraw, bot, request_id=request_id)
        found[f"{name} given up"] = office.signed(CREDENTIAL_REQUEST, given_up, bot)
    found["decision without records"] = denied.decision(
        "denied", ttl_s=None, revisions=None, input_digest=None
    )
    no = office.claims(
        Approval, sam, verdict="denied", request=denied.request_jws, request_id=denied.request_id,
        request_digest=digest(denied.request_jws), ttl_s=300, delivery="agent", revisions=denied.revisions,
    )  # fmt: skip
    found["denied approval"] = office.signed(APPROVAL_RESPONSE, no, sam)
    grant = office.claims(
        Grant, sam, agent_id="deploy-bot", task_id=office.task, scope=office.scope, count=5, ttl_s=300,
        delivery="agent", revisions=denied.revisions, comment="release 41",
    )  # fmt: skip
    found["grant"] = office.signed(APPROVAL_RESPONSE, grant, sam)
    granted = office.credential(approved=False)
    found["granted request"] = granted.request
    found["granted decision"] = granted.decision("allowed", grants=(sign(grant, sam),))
    found["granted lease"] = granted.lease("active", 1, issuer, grants=(message_id(sam.id, grant.jti),))
    for name, grant_id in (("grant", message_id(sam.id, grant.jti)), ("unknown grant", str(uuid.uuid4()))):
        back = office.claims(GrantWithdraw, sam, grant_id=grant_id, reason="the release is off")
        found[f"{name} withdrawn"] = office.signed(APPROVAL_RESPONSE, back, sam)
    for status in ("minting", "ending", "aborted"):
        found[f"lease {status}"] = story.lease(
            status, 3, issuer, cause=EndCause(kind="mint_failed", at_ms=office.now_ms)
        )
    found["lease epoch"] = office.epoch("2.bbbbbbbb")
    found["lease void"] = story.lease("expired", 2, office.key("service", "revoker"), epoch="1.aaaaaaaa")
    found["lease tombstone"] = office.received(LEASE, b"", key=story.lease_id)
    seal_key = EncryptionKey.generate("spiffe://acme.example/service/gateway").record(2**40)
    for name, request_id in (("known", story.request_id), ("unknown", str(uuid.uuid4()))):
        found[f"delivery of {name} request"] = office.received(
            CREDENTIAL_REPLY, enclose(b"{}", [seal_key], about=request_id), key="deploy-bot"
        )
    found["reply to an unknown request"] = office.received(
        CREDENTIAL_REPLY, seal(b"{}", REPLY_KEY.public, kid=str(uuid.uuid4()))
    )
    for selector in (
        Selector(agent_id="deploy-bot"), Selector(task_id=office.task), Selector(sponsor="sam"),
        Selector(target_id="staging"), Selector(user_id="maria"), Selector(all=True),
    ):  # fmt: skip
        olga = office.key("user", "olga")
        ask = office.claims(RevocationRequest, olga, kind="revocation", selector=selector, reason="incident")
        found[f"revocation {selector.model_dump(exclude_defaults=True)}"] = office.signed(
            REVOCATION_REQUEST, ask, olga
        )
    ask = office.claims(RevocationRequest, sam, kind="revocation", lease_id=str(uuid.uuid4()), reason="x")
    found["revocation of an unknown lease"] = office.signed(REVOCATION_REQUEST, ask, sam)
    by_revoker = office.key("service", "revoker")
    ask = office.claims(
        RevocationRequest, by_revoker, kind="task_ended", selector=Selector(task_id=office.task), reason="x"
    )
    found["revocation by a service"] = office.signed(REVOCATION_REQUEST, ask, by_revoker)
    gateway = office.key("service", "gateway")
    for what, id in (
        ("the last order", derived_id("revocation", ask.iss, ask.jti)),
        ("an unknown order", "x"),
    ):
        ack = office.claims(RevocationAck, gateway, revocation_id=id, cut_at_ms=office.now_ms)
        found[f"ack of {what}"] = office.signed(REVOCATION_ACK, ack, gateway)
    reason = (Reason(code="name_taken", message="the name was given before"),)
    about: dict[str, Any] = {"actor": sam.id, "ref": "j1", "source": office.coordinates(REGISTRY_COMMAND)}
    for subject in ("agent.register", "user.set", "target.set", "task.assign"):
        agent = "deploy-bot" if subject.startswith(("agent", "task")) else None
        found[f"refused {subject}"] = office.service_event(
            "refused", subject, reasons=reason, agent_id=agent, **about
        )
        found[f"accepted {subject}"] = office.service_event(
            "accepted", subject, result="x", agent_id="deploy-bot", **about
        )
    found["refused request"] = office.service_event(
        "refused", "credential.request", "policy", reasons=reason, request_id=story.request_id, **about
    )
    found["issuer refused"] = office.service_event(
        "refused", "credential.decision", "issuer", reasons=reason, request_id=story.request_id, **about
    )
    found["refused release"] = office.service_event(
        "refused", "revocation.request", "revoker", reasons=reason, lease_id=story.lease_id, **about
    )
    found["accepted release"] = office.service_event(
        "accepted", "revocation.request", "revoker", lease_id=story.lease_id, **about
    )
    found["signed in"] = office.service_event(
        "accepted", "session.statement", "registry", actor=sam.id, ref="a-session"
    )
    for kind in ("proposed", "withdrawn", "lapsed", "widened"):
        found[f"ceiling {kind}"] = office.service_event(
            kind, "agent.set-ceiling", agent_id="deploy-bot", ref=f"ceiling {kind}", actor=sam.id
        )
    why = (Reason(code="widened_by_root", message="the root alone widened agent deploy-bot"),)
    found["ceiling widened by the root"] = office.service_event(
        "widened", "agent.set-ceiling", agent_id="deploy-bot", ref="ceiling by the root", reasons=why
    )
    found["service started"] = office.service_event("started", "policy", "policy")
    found["service stopped"] = office.service_event("stopped", "policy", "policy")
    found["replay told"] = office.service_event(
        "replayed", "credential.request", "policy", request_id=story.request_id, agent_id="deploy-bot", **about
    )  # fmt: skip
    ending = (Reason(code="key_ending", message="for sam, the sponsor: a key ends soon"),)
    found["key that ends"] = office.service_event(
        "finding", "key", reasons=ending, agent_id="deploy-bot", sponsor="sam"
    )
    added = (Reason(code="key_added", message="for sam: a key was added to you by olga"),)
    found["key that was added"] = office.service_event(
        "finding", "key", reasons=added, ref="kid", result=office.key("user", "sam").id
    )
    found["finding"] = office.service_event(
        "finding", "record", "policy", reasons=reason, result=office.key("agent", "deploy-bot").id
    )
    detections = ("key_reused", "key_reused_late", "key_shared", "key_taken", "token_replayed")
    for code in (*detections, "ceiling_combination", "one_person"):
        why = (Reason(code=code, message="two at once"),)
        found[code] = office.service_event("finding", "x", "policy", reasons=why, agent_id="deploy-bot")
    enrolled = EnrolledInstance(
        instance_id=str(uuid.uuid4()), issuer=_SELECTOR.issuer, subject="repo:acme/deploy", selector="0" * 64,
        not_after=1, kid="k", token_digest="1" * 64, enrolled_at=1,
    )  # fmt: skip
    found["instance enrolled"] = office.service_event(
        "accepted", "instance.enrol", agent_id="deploy-bot", enrolled=enrolled, **about
    )
    found["dead letter"] = office.dead_letter()
    found |= actions(office, story.lease_id)
    found |= asked(office, story.lease_id)
    found |= broken_glass(office)
    found |= unbelievable(office)
    found |= trusted(office)
    found |= changes(office)
    found |= runs(office)
    return found


def runs(office: AuditFixtures) -> dict[str, Received]:
    """An order of a run, what its runner says of it, and what another runner says of it."""
    sam, runner = office.key("user", "sam"), office.key("service", "runner")
    limits = RunLimits(memory_bytes=2**31, cpu_millis=1000, pids=256)
    about: dict[str, Any] = {"agent_id": "deploy-bot", "task_id": office.task, "limits": limits}
    order = office.claims(
        RunOrder, sam, pool="reviews", command=("review", "422"), ttl_s=600,
        mounts=(Mount(name="sources"),), **about,
    )  # fmt: skip
    found = {"run order": office.signed(RUN_ORDER, order, sam)}
    order_id, deadline = message_id(sam.id, order.jti), office.now_ms // 1000 + 600
    of_order = {"order_id": order_id, "ordered_by": sam.id}

    def told(name: str, status: str, origin: dict[str, Any], **more: Any) -> None:
        run_id = run_id_of(runner.id, order_id=origin.get("order_id"), nonce=origin.get("nonce"))
        run = office.claims(
            Run, runner, run_id=run_id, status=status, key_thumbprint=None if status == "claimed" else "k",
            deadline=deadline, backend="bubblewrap", at_ms=office.now_ms, **about, **origin, **more,
        )  # fmt: skip
        record = office.signed(RUN, run, runner, key=run_id)
        office.directory.on_records([record])
        found[name] = record

    told("run claimed", "claimed", of_order)
    told("run started", "started", of_order)
    told("run ended", "ended", of_order, exit=RunExit(code=0))
    stop = office.claims(RunStop, sam, run_id=run_id_of("", order_id=order_id), reason="enough")
    found["run stop"] = office.signed(RUN_ORDER, stop, sam)
    told("run claimed again", "claimed", of_order)
    for name, status, more in (
        (
            "local run ended",
            "ended",
            {"remained": ("a process",), "exit": RunExit(signal=9, reason="stopped")},
        ),
        ("local run lost", "lost", {}),
    ):
        told(name, status, {"nonce": name}, **more)
    refused = Reason(code="mount_not_in_pool", message="pool reviews has no mount secrets")
    told(
        "run not started",
        "ended",
        {"order_id": message_id(sam.id, "no"), "ordered_by": sam.id},
        refused=refused,
    )
    return found


def commands(office: AuditFixtures) -> dict[str, Received]:
    """One record of every command, by its typ."""
    sam, maria, olga = (office.key("user", name) for name in ("sam", "maria", "olga"))
    key = office.key("user", "newcomer").record(office.now_ms // 1000 + 86_400)
    terms = TaskTerms(
        agent_id="deploy-bot", purpose="x", scope=office.scope, not_after=office.now_ms // 1000 + 60
    )
    consent = sign(office.claims(TaskConsent, maria, terms=terms), maria)
    bot = {"agent_id": "deploy-bot"}
    given: list[tuple[type[ExpiringClaims], SigningKey, dict[str, Any]]] = [
        (UserSet, olga, {
            "user_id": "newcomer", "name": "New", "keys": (key,), "roles": ("sponsor",),
            "entitlements": Entitlements(scope=office.scope, source="cli", as_of=1),
        }),
        (UserDisable, olga, {"user_id": "maria", "reason": "left"}),
        (UserAddKey, olga, {"user_id": "maria", "key": key}),
        (UserEndKey, olga, {"user_id": "maria", "kid": key.kid, "reason": "lost"}),
        (UserReviewCompromise, olga, {
            "user_id": "maria", "report": "00000000-0000-5000-8000-000000000000", "report_digest": "0" * 64,
            "outcome": "lift", "reason": "found",
        }),
        (ProvisionerSet, olga, {
            "provisioner_id": "scim", "name": "Directory", "keys": (key,), "delegation": office.delegation(),
        }),
        (AgentRegister, sam, {
            "agent_id": "second", "sponsor": "sam", "description": "x", "keys": (key,), "ceiling": office.scope,
        }),
        (AgentSetAttestation, sam, {**bot, "attestation": (_SELECTOR,)}),
        (AgentActivate, sam, bot),
        (AgentRotateKey, sam, {**bot, "key": key, "overlap_s": 60}),
        (AgentRenewKey, office.key("agent", "deploy-bot"), {**bot, "key": key.jwk}),
        (AgentReportReuse, office.key("service", "policy"), {
            **bot, "message": sign(office.request(), office.key("agent", "deploy-bot")),
        }),
        (AgentSetCeiling, sam, {**bot, "ceiling": office.scope}),
        (AgentTransfer, sam, {**bot, "sponsor": "maria", "consent": office.transfer_consent("maria")}),
        (AgentTransfer, olga, {**bot, "sponsor": "maria", "without_consent": True}),
        (AgentSuspend, sam, {**bot, "reason": "odd requests overnight"}),
        (AgentResume, sam, {**bot, "reason": "explained"}),
        (AgentDecommission, sam, {**bot, "reason": "replaced"}),
        (TargetSet, olga, {
            "target_id": "other", "description": "x", "backend": BackendSettings(kind="jwt"),
            "verbs": (VerbFloor(verb="read"),),
        }),
        (TargetRemove, olga, {"target_id": "staging", "reason": "moved"}),
        (TaskAssign, sam, {"terms": terms, "on_behalf_of": "maria", "consent": consent}),
        (TaskDelegate, office.key("agent", "deploy-bot"), {"parent": office.task, "terms": terms}),
        (TaskEnd, maria, {"task_id": office.task, "reason": "done"}),
        (CommandSecond, olga, {"commands": (
            SecondedCommand(author=sam.id, command="x", proposal="0" * 64, revision=1),
            SecondedCommand(author=sam.id, command="y", proposal="1" * 64, revision=0),
        )}),
        (CommandWithdraw, sam, {"proposal": "0" * 64}),
    ]  # fmt: skip
    return {
        model.typ: office.signed(REGISTRY_COMMAND, office.claims(model, by, **more), by)
        for model, by, more in given
    }


def trusted(office: AuditFixtures) -> dict[str, Received]:
    """Bundles that come into force, stand there again, are older, or no root's; after garbage on the same topic."""
    stranger = SigningKey.generate(office.root.id)
    first, second = office.trust_bundle(1), office.trust_bundle(2)
    fewer = office.trust_bundle(3, services=office.bundle.services[1:])
    return {
        "first bundle": first,
        "second bundle": second,
        "bundle without a service": fewer,
        "bundle again": office.received(TRUST, fewer.value, key="3"),
        "bundle of before": office.trust_bundle(2),
        "bundle of another root": office.trust_bundle(4, stranger),
        "deleted bundle": office.received(TRUST, b"", key="3"),
    }


def broken_glass(office: AuditFixtures) -> dict[str, Received]:
    """Asked for, used, reviewed, and reviewed by somebody who had a part in it."""
    why = (
        Reason(code="break_glass", message="two operators"),
        Reason(code="frozen", message="no changes now"),
    )
    story = office.credential(break_glass=True)
    olga = office.key("user", "olga")
    use = story.decision("allowed", reasons=why, approvals=(story.approval_jws,))
    found = {
        "break glass request": story.request,
        "break glass asked": story.decision("approval_required", reasons=why, required=("break_glass",) * 2),
        "break glass used": use,
        "break glass issued": story.lease("active", 1, office.key("service", "issuer"), break_glass=True),
    }
    given = {
        "request_id": story.request_id,
        "decision_digest": digest(use.value.decode()),
        "agent_id": "deploy-bot",
        "note": "the runbook was followed",
    }
    office.uses[story.request_id] = {
        "decision_digest": given["decision_digest"], "approvers": ["sam"], "agent": "deploy-bot",
        "act": ["deploy-bot"], "task": office.task, "on_behalf_of": "maria", "sponsor": "sam",
        "request_digest": digest(story.request_jws), "policy_revision": BUNDLE,
    }  # fmt: skip
    for name, by in (("reviewed", olga), ("review refused", office.key("user", "sam"))):
        review = office.claims(BreakGlassReview, by, **given)
        found[f"break glass {name}"] = office.signed(APPROVAL_RESPONSE, review, by, key="deploy-bot")
    return found


def changes(office: AuditFixtures) -> dict[str, Received]:
    """Records of everything that can become of users, agents, targets and tasks after they were made."""
    sam, maria, olga = (office.key("user", name) for name in ("sam", "maria", "olga"))
    office.user("petra", "sponsor")
    target = office.states[TARGET, "staging"][1]
    assert isinstance(target, TargetState)
    bot, first = {"agent_id": "deploy-bot"}, office.record_of(AGENT, "deploy-bot")
    ends_s = office.now_ms // 1000 + 86_400
    keys = [SigningKey.generate(f"spiffe://{TD}/agent/deploy-bot").record(ends_s) for _ in range(2)]
    sleeper = {"agent_id": "sleeper", "sponsor": "sam", "description": "x", "keys": (keys[0],), "ceiling": ()}
    register = office.claims(AgentRegister, olga, **sleeper, inactive=True)
    office.carry_out(AGENT, "sleeper", register, olga)
    stolen = {**bot, "key": keys[1], "compromised": True, "reason": "it was in a log"}
    _, handed_on = office.hand_on()
    orders: list[tuple[Topic[Any], str, type[ExpiringClaims], SigningKey, dict[str, Any]]] = [
        (AGENT, "deploy-bot", AgentSuspend, sam, {**bot, "reason": "odd"}),
        (AGENT, "deploy-bot", AgentResume, sam, {**bot, "reason": "explained"}),
        (AGENT, "deploy-bot", AgentSetAttestation, sam, {**bot, "attestation": (_SELECTOR,)}),
        (AGENT, "deploy-bot", AgentRotateKey, sam, {**bot, "key": keys[0], "overlap_s": 60}),
        (AGENT, "deploy-bot", AgentSetCeiling, sam, {**bot, "ceiling": ()}),
        (AGENT, "deploy-bot", AgentTransfer, sam, {
            **bot, "sponsor": "petra", "consent": office.transfer_consent("petra"),
        }),
        (AGENT, "deploy-bot", AgentTransfer, olga, {**bot, "sponsor": "sam", "without_consent": True}),
        (AGENT, "sleeper", AgentActivate, sam, {"agent_id": "sleeper"}),
        (AGENT, "deploy-bot", AgentDecommission, olga, {**bot, "reason": "replaced"}),
        (TASK, office.task, TaskEnd, maria, {"task_id": office.task, "reason": "done"}),
        (TARGET, "staging", TargetSet, olga, {
            "target_id": "staging", "description": "x", "backend": target.backend, "verbs": target.verbs,
        }),
        (TARGET, "staging", TargetRemove, olga, {"target_id": "staging", "reason": "moved"}),
    ]  # fmt: skip
    compromised = office.carry_out(AGENT, "deploy-bot", office.claims(AgentRotateKey, sam, **stolen), sam)
    found = {
        f"changed by {model.typ}": office.carry_out(topic, id, office.claims(model, by, **fields), by)
        for topic, id, model, by, fields in orders
    }
    found["compromised"] = compromised
    found |= renewals(office)
    found["changed by task.delegate"] = handed_on
    found["changed by user.set"] = office.user("maria", "sponsor")
    found |= keys_of_people(office)
    disable = office.claims(UserDisable, olga, user_id="maria", reason="left")
    found["changed by user.disable"] = office.carry_out(USER, "maria", disable, olga)
    scim = office.key("user", "scim")
    key = scim.record(office.now_ms // 1000 + 86_400)
    given = {"provisioner_id": "scim", "name": "Directory", "keys": (key,), "delegation": office.delegation()}
    for name in ("created", "changed"):
        command = office.claims(ProvisionerSet, olga, **given)
        found[f"provisioner {name}"] = office.carry_out(USER, "scim", command, olga)
        given["name"] = "Another directory"
    link = office.claims(ProvisionerLink, scim, provisioner_id="scim", groups=(GroupLink(group="Leads"),))
    found["command provisioner.link"] = office.signed(REGISTRY_COMMAND, link, scim)
    found["changed by provisioner.link"] = office.carry_out(USER, "scim", link, scim)
    found["first record again"] = office.received(AGENT, first.value, key="deploy-bot")
    return found


def renewals(office: AuditFixtures) -> dict[str, Received]:
    """An agent renews its key, and then its former key signs again: a request, and a renewal."""
    found: dict[str, Received] = {}
    sam = office.key("user", "sam")
    for name in ("renewer", "copied"):
        first = office.key("agent", name)
        bot = {"agent_id": name}
        given = {"sponsor": "sam", "description": "x", "ceiling": ()}
        record = first.record(office.now_ms // 1000 + 86_400)
        office.carry_out(AGENT, name, office.claims(AgentRegister, sam, **bot, **given, keys=(record,)), sam)
        keys = [SigningKey.generate(first.id).public for _ in range(2)]
        renewal = office.claims(AgentRenewKey, first, **bot, key=keys[0])
        found["changed by agent.renew-key"] = office.carry_out(AGENT, name, renewal, first)
        office.now_ms += 600_000
        if name == "renewer":
            again = office.claims(AgentRenewKey, first, **bot, key=keys[1])
            found["a key renewed twice"] = office.carry_out(AGENT, name, again, first)
            continue
        policy = office.key("service", "policy")
        release = office.claims(
            RevocationRequest, first, kind="release", lease_id=str(uuid.uuid4()), reason="x"
        )
        report = office.claims(AgentReportReuse, policy, **bot, message=sign(release, first))
        found["changed by agent.report-reuse"] = office.carry_out(AGENT, name, report, policy)
    return found


def keys_of_people(office: AuditFixtures) -> dict[str, Received]:
    """Records of a person to whom keys are added, and of whom keys are ended."""
    olga, found = office.key("user", "olga"), {}
    for compromised in (None, True):
        new = SigningKey.generate(f"spiffe://{TD}/user/maria")
        invited = office.claims(UserInvite, olga, user_id="maria")
        possessed = office.claims(KeyPossession, new, user_id="maria", jwk=new.public, invitation=invited.jti)
        add = office.claims(
            UserAddKey, olga, user_id="maria", key=new.record(office.now_ms // 1000 + 86_400),
            invitation=sign(invited, olga), possession=sign(possessed, new),
        )  # fmt: skip
        found["changed by user.add-key"] = office.carry_out(USER, "maria", add, olga)
        end = office.claims(
            UserEndKey, olga, user_id="maria", kid=new.kid, reason="lost", compromised=compromised,
            since_ms=office.now_ms if compromised else None,
        )  # fmt: skip
        name = "key of a user compromised" if compromised else "changed by user.end-key"
        found[name] = office.carry_out(USER, "maria", end, olga)
    report = office.states[USER, "maria"][2][-1].jws
    reported = parse(report).unverified_claims(UserEndKey)
    review = office.claims(
        UserReviewCompromise, office.root, user_id="maria", report=message_id(reported.iss, reported.jti),
        report_digest=digest(report), outcome="lift", reason="found",
    )  # fmt: skip
    found["changed by user.review-compromise"] = office.carry_out(USER, "maria", review, office.root)
    return found


def unbelievable(office: AuditFixtures) -> dict[str, Received]:
    """Records that nobody is to be believed for, and those that count for nothing though their signature holds."""
    thief = SigningKey.generate(f"spiffe://{TD}/agent/deploy-bot")
    stolen = SigningKey.generate(f"spiffe://{TD}/service/registry")
    found: dict[str, Received] = {
        f"garbage on {topic.what}": office.received(topic, b"\x00\xffno message") for topic in AUDITED
    }
    request = office.request()
    found["forged request"] = office.signed(CREDENTIAL_REQUEST, request, thief)
    found["forged record"] = office.record_of(AGENT, "deploy-bot", stolen, revision=9, jti="forged")
    found["record of a lying registry"] = office.record_of(
        AGENT, "deploy-bot", revision=9, jti="lie",
        state=office.states[AGENT, "deploy-bot"][1].model_copy(update={"sponsor": "maria"}),
    )  # fmt: skip
    found["deleted record"] = office.received(AGENT, b"", key="deploy-bot")
    old = office.request(iat=office.now_ms // 1000 - 900, exp=office.now_ms // 1000 - 600)
    found["expired request"] = office.signed(CREDENTIAL_REQUEST, old, office.key("agent", "deploy-bot"))
    first = office.credential()
    found["replayed: first"] = first.request
    found["replayed: again"] = office.received(CREDENTIAL_REQUEST, first.request_jws, key="deploy-bot")
    found["repeated: first"] = first.ended
    found["repeated: again"] = office.received(LEASE, first.ended.value, key=first.lease_id)
    return found


def asked(office: AuditFixtures, lease_id: str) -> dict[str, Received]:
    """A gateway asks about one action, and people answer; also what no gateway asked."""
    gateway, sam = office.key("service", "gateway"), office.key("user", "sam")
    question = office.question(lease_id)
    compact = sign(question, gateway)
    other = sign(question, office.key("service", "policy"))

    def answer(request: str, **fields: Any) -> Received:
        given = {
            "verdict": "approved",
            "agent_id": "deploy-bot",
            "request": request,
            "request_digest": digest(request),
        }
        claims = office.claims(ActionApproval, sam, **{**given, **fields})
        return office.signed(APPROVAL_RESPONSE, claims, sam, key="deploy-bot")

    return {
        "action asked about": office.received(APPROVAL_REQUEST, compact, key="sam"),
        "action approved": answer(compact, comment="reviewed it"),
        "action denied by a person": answer(compact, verdict="denied"),
        "action that no gateway asked about": answer(other),
        "another action than that of its digest": answer(compact, request_digest="0" * 64),
    }


def actions(office: AuditFixtures, lease_id: str) -> dict[str, Received]:
    """What gateways say of requests, in every shape that makes another event."""
    why = Reason(
        code="beyond_lease", message="no live lease allows it", permission=office.scope[0], side="lease"
    )
    stolen = Reason(code="handle_other_agent", message="the handle is a lease of another agent")
    no = {"allowed": False, "reasons": (why,)}
    word = {"request_id": str(uuid.uuid4()), "request_digest": "ab" * 32, "waited_ms": 5000}
    every: dict[str, dict[str, Any]] = {
        "allowed": {"lease_id": lease_id},
        "read": {"method": "GET", "access": "read", "lease_id": lease_id},
        "created": {"method": "POST", "label": "pull-request", "lease_id": lease_id},
        "deleted": {"method": "DELETE", "lease_id": lease_id},
        "with a method of its own": {"method": "PURGE", "lease_id": lease_id},
        "denied": no,
        "denied to a run": {**no, "run_id": str(uuid.uuid4())},
        "observed": {**no, "observed": True},
        "approved": {"asked": {**word, "by": "sam"}, "lease_id": lease_id},
        "not answered": {**no, "asked": word},
        "with a stolen handle": {**no, "reasons": (stolen,), "lease_id": lease_id},
        "by nobody known": {
            "agent_id": None, "task_id": None, "target_id": None, "verb": None, "resource": None, "method": None,
            **no,
        },
        "to a host that is no target": {
            **no, "target_id": None, "verb": None, "resource": None,
            "destination": Destination(scheme="https", host="api.example", port=8443, path="/v1/charges"),
        },
        "to an address that is no target": {
            **no, "target_id": None, "method": "CONNECT", "access": None,
            "destination": Destination(scheme="https", host="2001:db8::1", port=443),
        },
        "that could not be read": {
            **no, "target_id": None, "verb": None, "resource": None, "access": None, "method": "POST",
            "destination": Destination(host="gateway", port=80, path="/forge/a"),
        },
        "to a page at an address": {
            **no, "target_id": None, "destination": Destination(scheme="http", host="192.0.2.7", port=80, path="/a"),
        },
        "to a page at an IPv6 address": {
            **no, "target_id": None, "destination": Destination(scheme="http", host="2001:db8::1", port=80, path="/a"),
        },
        "to what is no host": {
            **no, "target_id": None, "method": "G?T",
            "destination": Destination(host="h??31mub_.example", port=80, path="/?/hvs.0123456789abcdefghijklmn"),
        },
        "that were never decided": {
            "verb": None, "resource": None, "access": None, "method": None, "request_digest": None,
            "latency_us": None, **no, "count": 999,
        },
    }  # fmt: skip
    answers: dict[str, dict[str, Any]] = {
        "with a result": {"lease_id": lease_id},
        "that it was heard": {"answer": "accepted", "lease_id": lease_id},
        "with a tool's error": {"answer": "tool_error"},
        "that says too little of its usage": {
            "resource": "model/gpt-5",
            "usage": ModelUsage(input_tokens=0, output_tokens=0, tokens=40, counted="estimate"),
        },
        "with an error of JSON-RPC": {"answer": "rpc_error", "rpc_code": -32602},
        "with an error of HTTP": {"answer": "transport_error", "http_status": 502},
        "by nobody known": {"answer": "none", "http_status": None, "agent_id": None, "task_id": None},
    }
    ends: dict[str, dict[str, Any]] = {
        "by a side": {},
        "at an address": {"destination": Destination(host="2001:db8::1", port=22)},
        "by the gateway": {"reason": Reason(code="lease_ended", message="the lease has ended")},
    }
    return {
        **{f"action {name}": office.action(**fields) for name, fields in every.items()},
        **{f"answer {name}": office.answer(**fields) for name, fields in answers.items()},
        **{f"relay ended {name}": office.relay_end(lease_id, **fields) for name, fields in ends.items()},
    }
