"""Passkeys in records of people: what they command, wherever signatures of people are verified, and after a rebuild."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ringfence.audit.settings import AuditSettings
from ringfence.audit.verification import OutdatedError, RecordVerifier
from ringfence.gateway.decision.approvals import Approvals
from ringfence.issuer.domain import _RefusedError, _verified_answer
from ringfence.kernel.base.errors import InvalidMessageError, SignatureError
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.claims import ExpiredError
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.webauthn import MAX_AGE_S
from ringfence.messages.api import ApiToken, api_audience
from ringfence.messages.approval import ActionApproval, Approval, BreakGlassReview, Grant, GrantWithdraw
from ringfence.messages.base import Claims, ExpiringClaims
from ringfence.messages.lease import RevocationRequest, Selector
from ringfence.messages.registry import (
    AgentDecommission,
    AgentResume,
    AgentRotateKey,
    AgentSetCeiling,
    AgentSuspend,
    SessionStatement,
    TargetRemove,
    TaskConsent,
    TaskEnd,
    UserDisable,
    UserRecord,
)
from ringfence.messages.run import RunLimits, RunOrder
from ringfence.messages.topics import APPROVAL_RESPONSE, REGISTRY_COMMAND, REVOCATION_REQUEST
from ringfence.messages.trust import Origin
from ringfence.model.leases.revocations import verify_revocation
from ringfence.model.lifecycle import CommandRefusedError
from ringfence.model.records.api_access import Authenticator, UnauthenticatedError
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.requests.grants import GrantTable
from ringfence.model.requests.run_orders import verified_order
from ringfence.policy.incoming.admission import MessageVerifier
from tests.support.in_memory_registry import START_MS, TD, InMemoryRegistry, permission
from tests.support.passkeys import ORIGINS, SESSION_ORIGIN, SoftwarePasskey
from tests.support.user_keys import add_key, end_key, new_key, new_passkey
from tools.schemas.examples import EXAMPLES


class Organisation(InMemoryRegistry):
    """sam sponsors bot and helper; sam, suzy, uma and olga have added passkeys themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.organisation()
        self.give(self.target_set("olga", "staging"))
        self.passkeys: dict[str, SoftwarePasskey] = {}
        for name in ("sam", "suzy", "uma", "olga"):
            self.passkeys[name] = new_passkey(name)
            self.give(add_key(self, name, name, self.passkeys[name]))
        for agent in ("bot", "helper"):
            self.give(self.register("sam", agent, "sam", ceiling=(permission("env/**"),)))
        self.task = self.made(self.assign("sam", "bot"))

    def made(self, claims: Any) -> str:
        change = self.give(claims)
        assert change is not None
        return str(cast(Any, change.state).task_id)

    def touch(self, claims: Any, **how: Any) -> Any:
        """Hand in a command that its `iss` signs by their passkey."""
        return self.give(claims, self.passkeys[claims.iss.rpartition("/")[2]].but(**how))

    def change_origins(self, *origins: Origin, version: int = 2) -> None:
        bundle = self.trust.require().model_copy(update={"version": version, "origins": origins})
        assert self.trust.load(sign(bundle, self.root, header_jwk=True), self.clock.ms / 1000)

    def read_anew(self) -> Directory:
        """Another reader, which starts now."""
        reader = self.reader()
        for kind in ("user", "target", "agent", "task"):
            for id in list(self.directory._slots[kind]):
                record = cast(Any, self.directory.unverified(kind, id))
                compact = self.sign_record(record.state, record.commands, record.revision)
                assert self.admit(compact, reader) is None
        return reader


@pytest.fixture
def office() -> Organisation:
    return Organisation()


def passkey_commands(office: Organisation) -> Iterator[ExpiringClaims]:
    """One of each command that a passkey may sign, each valid after those before it."""
    claims = office.claims
    yield claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=(permission("env/**"), permission("a")))
    yield claims(AgentSuspend, "sam", agent_id="bot", reason="look")
    yield claims(AgentResume, "sam", agent_id="bot", reason="looked")
    terms = office.terms("bot")
    consent = sign(parse(office.consent("uma", terms)).unverified_claims(TaskConsent), office.passkeys["uma"])
    yield office.assign("sam", "bot", terms=terms, on_behalf_of="uma", consent=consent)
    yield claims(TaskEnd, "sam", task_id=office.task, reason="done")
    yield office.transfer(
        "sam", "helper", "suzy", consent=office.transfer_consent("suzy", "helper", office.passkeys["suzy"])
    )
    yield end_key(office, "olga", "olga", office.key("olga").kid)


def test_a_passkey_gives_these_commands_and_a_reader_who_starts_later_believes_them(
    office: Organisation,
) -> None:
    typs = []
    for command in passkey_commands(office):
        assert office.touch(command) is not None, command.typ
        typs.append(command.typ)
    assert sorted(typs) == [
        "agent.resume", "agent.set-ceiling", "agent.suspend", "agent.transfer", "task.assign", "task.end",
        "user.end-key",
    ]  # fmt: skip
    reader = office.read_anew()
    for kind in ("user", "target", "agent", "task"):
        assert [one.state for one in reader.entries(kind)] == [
            one.state for one in office.directory.entries(kind)
        ]


def test_passkey_commands_are_rejected_late_twice_or_on_a_session_origin(office: Organisation) -> None:
    for command in passkey_commands(office):
        for how in ({"origin": SESSION_ORIGIN}, {"flags": 1}, {"rp_id": "evil.example"}):
            with pytest.raises(SignatureError) as refused:
                office.touch(command, **how)
            assert refused.value.code == "signature_invalid"
        by = office.passkeys[command.iss.rpartition("/")[2]]
        late = command.model_copy(update={"iat": command.iat - MAX_AGE_S - 1, "jti": f"{command.jti}-late"})
        with pytest.raises(ExpiredError) as too_late:
            office.give(late, by)
        assert too_late.value.code == "passkey_too_late"
        with pytest.raises(SignatureError):
            office.give(command, by.plain())
        assert office.give(command, by, passing_ms=1) is not None
        office.clock.ms += 999
        try:
            again = office.give(command, by)
        except (CommandRefusedError, SignatureError):  # the last one ends the key that signed others before
            continue
        assert again is None, f"{command.typ} counted twice"


def test_other_commands_take_a_key_file(office: Organisation) -> None:
    key = office.key_record(new_key("x"))
    for command in (
        office.user_set("olga", "nina"),
        office.claims(UserDisable, "olga", user_id="uma", reason="left"),
        add_key(office, "sam", "sam", new_passkey("sam")),
        add_key(office, "olga", "uma", new_passkey("uma")),
        office.register("sam", "third", "sam"),
        office.claims(AgentRotateKey, "sam", agent_id="bot", key=key),
        office.claims(AgentDecommission, "sam", agent_id="bot", reason="over"),
        office.target_set("olga", "other"),
        office.claims(TargetRemove, "olga", target_id="staging", reason="moved"),
    ):
        with pytest.raises(SignatureError) as refused:
            office.touch(command)
        assert refused.value.code == "passkey_not_allowed", command.typ


def test_a_consent_by_a_passkey_lasts_ten_minutes(office: Organisation) -> None:
    def consented(age_s: int, **how: Any) -> Any:
        terms = office.terms("bot")
        iat = office.clock.ms // 1000 - age_s
        claims = parse(office.consent("uma", terms, iat=iat)).unverified_claims(TaskConsent)
        consent = sign(claims, office.passkeys["uma"].but(**how))
        return office.assign("sam", "bot", terms=terms, on_behalf_of="uma", consent=consent)

    assert office.give(consented(MAX_AGE_S)) is not None
    for command in (consented(MAX_AGE_S + 1), consented(0, origin=SESSION_ORIGIN)):
        with pytest.raises(CommandRefusedError):
            office.give(command)


def test_a_transfer_consent_by_a_passkey_lasts_ten_minutes(office: Organisation) -> None:
    def consented(age_s: int) -> Any:
        iat = office.clock.ms // 1000 - age_s
        consent = office.transfer_consent("suzy", "helper", office.passkeys["suzy"], iat=iat)
        return office.transfer("sam", "helper", "suzy", consent=consent)

    with pytest.raises(CommandRefusedError):
        office.give(consented(MAX_AGE_S + 1))
    assert office.give(consented(MAX_AGE_S)) is not None


# --- what ends leaves what rests on it --------------------------------------------------------------------------------


def ended(origin: Origin, at_s: int) -> Origin:
    return origin.model_copy(update={"not_after": at_s})


def test_ending_an_origin_leaves_what_rests_on_it_valid_and_signs_nothing_new(office: Organisation) -> None:
    for command in passkey_commands(office):
        office.touch(command)
    sign_origin, session_origin = ORIGINS
    office.change_origins(ended(sign_origin, office.clock.ms // 1000), session_origin)
    reader = office.read_anew()
    agent = reader.agent("bot")
    assert agent is not None
    assert agent.state == cast(Any, office.directory.agent("bot")).state
    assert len(list(reader.entries("task"))) == 2
    suspend = office.claims(AgentSuspend, "sam", agent_id="bot", reason="look")
    with pytest.raises(SignatureError, match="no sign origin"):
        office.touch(suspend)
    assert office.give(suspend) is not None, "a key file goes on"


def test_an_origin_that_began_later_made_nothing_before(office: Organisation) -> None:
    later_s = office.clock.ms // 1000 + 10
    moved = "https://sign.acme.example"
    office.change_origins(*ORIGINS, Origin(origin=moved, use="sign", not_before=later_s))
    with pytest.raises(SignatureError, match="no sign origin"):
        office.touch(office.claims(AgentSuspend, "sam", agent_id="bot", reason="x"), origin=moved)
    office.clock.ms = later_s * 1000
    assert office.touch(office.claims(AgentSuspend, "sam", agent_id="bot", reason="x"), origin=moved)


def test_an_origin_that_left_the_bundle_would_break_what_rests_on_it(office: Organisation) -> None:
    """Why none ever leaves: the record counts for nothing then."""
    office.touch(office.claims(AgentSuspend, "sam", agent_id="bot", reason="look"))
    office.change_origins(ORIGINS[1])
    with pytest.raises(ChainError):
        office.read_anew().agent("bot")
    with pytest.raises(ChainError):
        office.directory.agent("bot")


def test_ending_a_key_leaves_what_rests_on_it_valid_and_signs_nothing_new(office: Organisation) -> None:
    office.touch(office.claims(AgentSuspend, "sam", agent_id="bot", reason="look"))
    office.give(end_key(office, "sam", "sam", office.passkeys["sam"].kid, compromised=True))
    reader = office.read_anew()
    agent, user = reader.agent("bot"), reader.user("sam")
    assert agent is not None
    assert agent.state.status == "suspended"
    assert user is not None
    assert office.passkeys["sam"].kid in {key.kid for key in user.state.keys}
    with pytest.raises(SignatureError) as refused:
        office.touch(office.claims(AgentResume, "sam", agent_id="bot", reason="x"))
    assert refused.value.code == "key_unknown"


@pytest.mark.parametrize("kind", ["passkey", "key file"])
def test_signature_made_while_a_key_was_ended_stays_void_after_its_return(
    office: Organisation, kind: str
) -> None:
    """The attack: a thief appends a grant with a key that was ended as lost. Its owner finds the device, and the key is
    added again. Whoever starts now, and reads the topic from the beginning, must not take the thief's grant.
    """
    key: SigningKey = office.passkeys["sam"]
    if kind == "key file":
        key = new_key("sam")
        office.give(add_key(office, "sam", "sam", key))

    def grant() -> tuple[str, int]:
        return sign(message(office, Grant), key), office.clock.ms

    given = {"before": grant()}
    assert by_issuers_table(office, *given["before"])
    office.clock.ms += 1000
    office.give(end_key(office, "sam", "sam", key.kid))
    office.clock.ms += 1000
    given["while it had ended"] = grant()
    with pytest.raises(InvalidMessageError):
        by_issuers_table(office, *given["while it had ended"])
    office.clock.ms += 1000
    office.give(add_key(office, "sam", "sam", key))
    for reads in (by_issuers_table, by_policy(Grant), by_issuer(Grant)):
        for compact, at_ms in given.values():
            with pytest.raises(InvalidMessageError):
                reads(office, compact, at_ms)
        assert reads(office, *grant())
    # Audit says of each moment what counted then.
    assert office.directory.chains.user_key(key.id, key.kid, given["before"][1]) is not None
    assert office.directory.chains.user_key(key.id, key.kid, given["while it had ended"][1]) is None


def test_a_dishonest_registry_cannot_bring_a_late_command_into_a_record(office: Organisation) -> None:
    """It says when a command came; the command says when it was signed, and that is ten minutes before at the most."""
    suspend = office.claims(
        AgentSuspend, "sam", agent_id="bot", reason="look", exp=office.clock.ms // 1000 + 7200
    )
    agent = office.directory.agent("bot")
    assert agent is not None
    state = agent.state.model_copy(update={"status": "suspended"})
    for late_ms, counts in ((MAX_AGE_S * 1000, True), (MAX_AGE_S * 1000 + 1, False)):
        at_ms = (office.clock.ms // 1000) * 1000 + late_ms
        commands = (*agent.record.commands, office.embed(suspend, at_ms, office.passkeys["sam"]))
        reader = office.read_anew()
        assert office.admit(office.sign_record(state, commands, 2), reader) is None
        if counts:
            assert reader.agent("bot") is not None
            continue
        with pytest.raises(ChainError):
            reader.agent("bot")


# --- wherever a person's signature is verified ------------------------------------------------------------------------


def message(office: Organisation, model: type[Claims]) -> Any:
    """A message of sam's that has this shape, signed now."""
    now_s = office.clock.ms // 1000
    given: dict[type[Claims], dict[str, Any]] = {
        AgentSuspend: {"agent_id": "bot", "reason": "look"},
        RevocationRequest: {"kind": "revocation", "selector": Selector(agent_id="bot"), "reason": "x"},
    }
    fields = given.get(model)
    if fields is None:
        example = cast(Any, EXAMPLES[model])
        fields = {
            name: getattr(example, name)
            for name in type(example).model_fields
            if name not in ("iss", "aud", "iat", "jti", "exp")
        }
    claims = office.claims(model, "sam", **fields)
    return claims.model_copy(update={"exp": now_s + 7200}) if hasattr(claims, "exp") else claims


def by_registry(office: Organisation, compact: str, at_ms: int) -> Any:
    return office.directory.chains.authorise(parse(compact), at_ms).claims


def by_policy(model: type[Claims]) -> Callable[[Organisation, str, int], Any]:
    """Policy's own verifier; only what it waits for if a key is unknown is left out."""

    def reads(office: Organisation, compact: str, at_ms: int) -> Any:
        async def caught_up(within_s: float) -> bool:
            return True

        settings = SimpleNamespace(trust_domain=TD, grace_s=1.0)
        runtime = cast(Any, SimpleNamespace(settings=settings, tables_caught_up=caught_up))
        verifier = MessageVerifier(runtime, office.directory)
        way = {Approval: verifier.approval, Grant: verifier.grant, GrantWithdraw: verifier.withdrawal}[model]
        reading = cast(Any, way)(office.received(APPROVAL_RESPONSE, "deploy-bot", compact, at_ms))
        try:
            reading.send(None)
        except StopIteration as done:
            signed, late = done.value
            if late is not None:
                raise late from None
            return signed.claims
        raise AssertionError("it waited")

    return reads


def by_issuers_table(office: Organisation, compact: str, at_ms: int) -> Any:
    table = GrantTable(office.directory, TD)
    table.settle()
    table.on_records([office.received(APPROVAL_RESPONSE, "deploy-bot", compact, at_ms)])
    found = list(table.all())
    if not found:
        raise InvalidMessageError("ignored")
    return found[0].claims


def by_revoker_and_gateway(office: Organisation, compact: str, at_ms: int) -> Any:
    record = office.received(REVOCATION_REQUEST, "bot", compact, at_ms)
    return verify_revocation(record, office.directory, office.trust).claims


def by_audit(model: type[Claims]) -> Callable[[Organisation, str, int], Any]:
    def reads(office: Organisation, compact: str, at_ms: int) -> Any:
        verifier = RecordVerifier(office.trust, office.directory, AuditSettings())
        topic = {AgentSuspend: REGISTRY_COMMAND, RevocationRequest: REVOCATION_REQUEST}.get(
            cast(Any, model), APPROVAL_RESPONSE
        )
        record = office.received(topic, "bot", compact, at_ms)
        if model is AgentSuspend:
            return verifier.command(record)[0].claims
        if model is RevocationRequest:
            return verifier.by_anyone(record, model).claims
        return verifier.by_user(record, model).claims

    return reads


def by_gateway(office: Organisation, compact: str, at_ms: int) -> Any:
    """A gateway's verifier of answers to its questions; only what it waits for if a key is unknown is left out."""

    async def caught_up(within_s: float) -> bool:
        return True

    settings = SimpleNamespace(trust_domain=TD, grace_s=1.0)
    runtime = cast(Any, SimpleNamespace(settings=settings, tables_caught_up=caught_up))
    approvals = Approvals(runtime, office.directory, cast(Any, None), cast(Any, None), wait_s=1, life_s=1)
    record = office.received(APPROVAL_RESPONSE, "deploy-bot", compact, at_ms)
    reading = cast(Any, approvals._verify(parse(compact), record))
    try:
        reading.send(None)
    except StopIteration as done:
        return done.value.claims
    raise AssertionError("it waited")


def by_issuer(model: type[Any]) -> Callable[[Organisation, str, int], Any]:
    """The issuer's verifier of what a decision embeds, which was appended at the same time."""

    def reads(office: Organisation, compact: str, at_ms: int) -> Any:
        claims = SimpleNamespace(answers_at_ms={digest(compact): at_ms}, aud=TD)
        decision = cast(Any, SimpleNamespace(claims=claims, at=SimpleNamespace(appended_at_ms=at_ms)))
        try:
            return _verified_answer(compact, model, decision, office.directory).claims
        except _RefusedError as error:
            raise InvalidMessageError(error.reasons[0].message) from None

    return reads


PLACES: dict[str, tuple[type[Claims], Callable[[Organisation, str, int], Any]]] = {
    "registry": (AgentSuspend, by_registry),
    "policy, approvals": (Approval, by_policy(Approval)),
    "policy, grants": (Grant, by_policy(Grant)),
    "policy, withdrawals": (GrantWithdraw, by_policy(GrantWithdraw)),
    "issuer, grants": (Grant, by_issuers_table),
    "issuer, approvals in decisions": (Approval, by_issuer(Approval)),
    "issuer, grants in decisions": (Grant, by_issuer(Grant)),
    "gateway, answers to its questions": (ActionApproval, by_gateway),
    "revoker and gateway": (RevocationRequest, by_revoker_and_gateway),
    **{
        f"audit, {model.typ}": (model, by_audit(model))
        for model in (
            AgentSuspend, RevocationRequest, Approval, ActionApproval, Grant, GrantWithdraw, BreakGlassReview,
        )
    },
}  # fmt: skip


@pytest.fixture(params=list(PLACES))
def place(request: pytest.FixtureRequest) -> tuple[type[Claims], Callable[[Organisation, str, int], Any]]:
    return PLACES[request.param]


def test_a_passkey_and_a_key_file_are_worth_the_same(office: Organisation, place: Any) -> None:
    model, reads = place
    for key in (office.key("sam"), office.passkeys["sam"]):
        claims = message(office, model)
        assert reads(office, sign(claims, key), office.clock.ms) == claims


def test_signature_on_a_session_origin_is_rejected_everywhere(office: Organisation, place: Any) -> None:
    """The attack: code on the console's origin, with real touches, and write access to every topic."""
    model, reads = place
    passkey = office.passkeys["sam"].but(origin=SESSION_ORIGIN)
    statement = office.claims(SessionStatement, "sam", user_id="sam", console_kid="k", cookie_digest="0" * 64)
    head, body, _ = sign(message(office, model), office.passkeys["sam"]).split(".")
    touched = sign(statement, passkey)
    for compact in (
        sign(message(office, model), passkey),
        touched,
        f"{head}.{body}.{touched.rpartition('.')[2]}",
        f"{head}.{touched.split('.')[1]}.{touched.rpartition('.')[2]}",
    ):
        with pytest.raises((InvalidMessageError, ChainError)):
            reads(office, compact, office.clock.ms)


def test_signature_appended_too_late_is_rejected(office: Organisation, place: Any) -> None:
    model, reads = place
    claims = message(office, model)
    compact = sign(claims, office.passkeys["sam"])
    limit_ms = claims.iat * 1000 + MAX_AGE_S * 1000
    assert reads(office, compact, limit_ms) == claims
    with pytest.raises((ExpiredError, OutdatedError, InvalidMessageError)) as refused:
        reads(office, compact, limit_ms + 1)
    assert refused.value.code in ("passkey_too_late", "message_invalid")
    file_signed = sign(claims, office.key("sam"))
    assert reads(office, file_signed, limit_ms + 1) == claims, "a key file has until exp"


def test_plain_message_under_a_passkey_is_rejected(office: Organisation, place: Any) -> None:
    model, reads = place
    with pytest.raises(InvalidMessageError):
        reads(office, sign(message(office, model), office.passkeys["sam"].plain()), office.clock.ms)


def test_passkey_format_under_a_key_file_is_rejected(office: Organisation, place: Any) -> None:
    model, reads = place
    file = office.key("sam")
    odd = office.passkeys["sam"].but(public=file.public, kid=file.kid, _key=file._key)
    with pytest.raises(InvalidMessageError):
        reads(office, sign(message(office, model), odd), office.clock.ms)


def test_ended_key_or_origin_is_rejected(office: Organisation, place: Any) -> None:
    model, reads = place
    before = message(office, model)
    compact, at_ms = sign(before, office.passkeys["sam"]), office.clock.ms
    sign_origin, session_origin = ORIGINS
    office.clock.ms += 2000
    office.change_origins(ended(sign_origin, office.clock.ms // 1000), session_origin)
    assert reads(office, compact, at_ms) == before, "what came before the end counts"
    with pytest.raises(InvalidMessageError):
        reads(office, sign(message(office, model), office.passkeys["sam"]), office.clock.ms)
    office.change_origins(*ORIGINS, version=3)
    assert reads(office, sign(message(office, model), office.passkeys["sam"]), office.clock.ms)
    office.give(end_key(office, "sam", "sam", office.passkeys["sam"].kid))
    assert reads(office, compact, at_ms) == before
    with pytest.raises(InvalidMessageError):
        reads(office, sign(message(office, model), office.passkeys["sam"]), office.clock.ms)


def test_a_passkey_signs_neither_orders_of_runs_nor_tokens_of_apis(office: Organisation) -> None:
    order = office.claims(
        RunOrder, "sam", pool="reviews", agent_id="bot", task_id=office.task, command=("true",), ttl_s=60,
        limits=RunLimits(memory_bytes=1, cpu_millis=1, pids=1),
    )  # fmt: skip
    assert verified_order(sign(order, office.key("sam")), office.directory, office.clock.ms).claims == order
    with pytest.raises(SignatureError) as refused:
        verified_order(sign(order, office.passkeys["sam"]), office.directory, office.clock.ms)
    assert refused.value.code == "passkey_not_allowed"
    now_s = office.clock.ms // 1000
    for key, counts in ((office.key("sam"), True), (office.passkeys["sam"], False)):
        token = office.claims(ApiToken, "sam", aud=api_audience(TD, "policy"), exp=now_s + 60)
        authenticator = Authenticator(office.directory, "policy", office.clock)
        if counts:
            assert authenticator.user(f"Bearer {sign(token, key)}").user.user_id == "sam"
            continue
        with pytest.raises(UnauthenticatedError, match="no passkey may sign api"):
            authenticator.user(f"Bearer {sign(token, key)}")


def test_agents_and_services_have_no_passkeys(office: Organisation) -> None:
    """A record of one that has a passkey is no record of a key."""
    passkey = SoftwarePasskey.make(office.key("bot", "agent").id)
    record = passkey.record(START_MS // 1000 + 86_400)
    with pytest.raises(CommandRefusedError, match="only people have passkeys"):
        office.give(office.register("sam", "fourth", "sam", keys=(record,)))
    key = office.registry
    assert isinstance(key, SigningKey)
    service = office.trust.require().services[0]
    with_passkey = service.model_copy(update={"keys": (*service.keys, record)})
    bundle = office.trust.require().model_copy(update={"version": 9, "services": (with_passkey,)})
    office.trust.load(sign(bundle, office.root, header_jwk=True), START_MS / 1000)
    assert office.trust.service_key(service.id, passkey.kid, ("registry",), START_MS / 1000) is None
    assert office.trust.service_key(service.id, key.kid, ("registry",), START_MS / 1000) is not None


def test_records_without_passkeys_are_what_they_were(office: Organisation) -> None:
    """Fields that are not there are not written: a record of before folds to the state that it has."""
    entry = office.directory.user("adam")
    assert entry is not None
    assert isinstance(entry.record, UserRecord)
    text = entry.record.model_dump_json(exclude_none=True)
    for field in ("use", "credential_id", "rp_id", "aaguid", "backup_eligible", "attested"):
        assert f'"{field}"' not in text
