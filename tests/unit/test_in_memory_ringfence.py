"""`ringfence.testing`: what a test of an agent sets up, does and sees."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

import ringfence
from ringfence import (
    Agent,
    CredentialOverError,
    InvalidCallError,
    NotYoursError,
    Permission,
    RefusedError,
    RequestDeniedError,
    RequestTimeoutError,
    StaleApprovalError,
    TokenGuard,
    TokenRejectedError,
    TokenVerifier,
)
from ringfence.model.requests.grants import GrantTable
from ringfence.rego.bundle import BundleError
from ringfence.testing import InMemoryRingfence, NothingPendingError, People
from tests.policy.bundles import ALLOWS, write

pytest_plugins = ["pytester"]

READ: dict[str, Any] = {"verbs": ["read"], "resources": ["env/x"], "reason": "to look"}
DEPLOY: dict[str, Any] = {**READ, "verbs": ["deploy"]}
EVERYTHING = [Permission(target="staging", verbs=("read", "deploy", "wipe"), resources=("env/**",))]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever connects to anything fails."""

    def connect(*_: object) -> None:
        raise AssertionError("an in-memory Ringfence connected to something")

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture
def broker() -> InMemoryRingfence:
    made = InMemoryRingfence()
    made.target("staging", verbs={"read": "none", "deploy": "sponsor", "wipe": "operator"})
    return made


@pytest.fixture
def agent(broker: InMemoryRingfence) -> Agent:
    return broker.agent("deploy-bot")


@pytest.fixture
def task(broker: InMemoryRingfence, agent: Agent) -> str:
    return broker.task("deploy-bot", EVERYTHING)


# --- setting up ---


def test_set_up_needs_no_event_loop(broker: InMemoryRingfence) -> None:
    broker.user("vera", roles=["auditor"])
    agent = broker.agent("deploy-bot")
    assert type(agent) is Agent
    assert agent.id == "deploy-bot"
    assert broker.agent("deploy-bot") is agent
    assert len(broker.task("deploy-bot", EVERYTHING)) == 36


async def test_the_tasks_scope_alone_is_the_limit_where_the_test_says_no_other(
    broker: InMemoryRingfence, agent: Agent, task: str
) -> None:
    assert (await agent.request(task=task, target="staging", **READ)).kind == "jwt"
    with pytest.raises(RequestDeniedError) as denied:
        await agent.request(task=task, target="staging", **{**READ, "resources": ["other"]})
    assert denied.value.code == "beyond_scope"
    assert {one.side for one in denied.value.reasons} == {
        "task", "ceiling:deploy-bot", "entitlements:uma",
    }  # fmt: skip


async def test_a_ceiling_and_entitlements_that_the_test_gives_are_kept(broker: InMemoryRingfence) -> None:
    narrow = [Permission(target="staging", verbs=("read",), resources=("env/a",))]
    broker.user("vera", entitlements=[Permission(target="staging", verbs=("read",), resources=("env/b",))])
    agent = broker.agent("deploy-bot", ceiling=narrow)
    task = broker.task("deploy-bot", EVERYTHING, on_behalf_of="vera")
    sides = []
    for resource in ("env/a", "env/b"):
        with pytest.raises(RequestDeniedError) as denied:
            await agent.request(task=task, target="staging", verbs=["read"], resources=[resource], reason="r")
        sides.append([one.side for one in denied.value.reasons])
    assert sides == [["entitlements:vera"], ["ceiling:deploy-bot"]]
    broker.agent("deploy-bot", ceiling=EVERYTHING)
    await agent.request(task=task, target="staging", verbs=["read"], resources=["env/b"], reason="r")


def test_registry_refusals_are_raised_with_their_code(broker: InMemoryRingfence) -> None:
    with pytest.raises(RefusedError) as refused:
        broker.agent("other-bot", sponsor=People.USER)
    assert refused.value.by == "registry"
    assert refused.value.code != "refused"
    with pytest.raises(InvalidCallError, match="no user nobody"):
        broker.task("deploy-bot", EVERYTHING, on_behalf_of="nobody")
    with pytest.raises(InvalidCallError, match="verbs is a list"):
        broker.target("other", verbs="read")
    with pytest.raises(InvalidCallError, match="requests is a list"):
        broker.target("other", verbs=["read"], requests="GET /")  # type: ignore[arg-type]
    with pytest.raises(InvalidCallError, match="the target"):
        broker.target("other", verbs={"read": "nobody"})  # type: ignore[dict-item]
    with pytest.raises(InvalidCallError, match=r"the target\.set"):
        broker.target("Other Target", verbs=["read"])
    with pytest.raises(RefusedError) as unknown:
        broker.target("other", verbs=["read"], kind="postgres", ssl_mode="off")
    assert unknown.value.code == "target_settings_invalid"
    with pytest.raises(InvalidCallError, match="scope is a list"):
        broker.task("deploy-bot", EVERYTHING[0])  # type: ignore[arg-type]


async def test_an_agent_may_be_entered_or_not(broker: InMemoryRingfence, task: str) -> None:
    agent = broker.agent("deploy-bot")
    for _ in range(2):
        async with agent as entered, entered.credential(task=task, target="staging", **READ) as credential:
            assert credential.value
    assert [lease.status for lease in broker.leases()] == ["released", "released"]


async def test_an_agent_that_an_administrator_registered_is_there(broker: InMemoryRingfence) -> None:
    async with broker.administrator(People.SPONSOR) as sam:
        await sam.register_agent(
            "made-by-hand", description="d", keys=[broker.key("agent/made-by-hand")], ceiling=EVERYTHING
        )
    task = broker.task("made-by-hand", EVERYTHING)
    await broker.agent("made-by-hand").request(task=task, target="staging", **READ)
    assert [lease.agent_id for lease in broker.leases(agent="made-by-hand")] == ["made-by-hand"]


async def test_environment_variables_are_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RINGFENCE_POLICY_BUNDLE", str(tmp_path / "nowhere"))
    monkeypatch.setenv("RINGFENCE_TRUST_DOMAIN", "elsewhere.example")
    monkeypatch.setenv("RINGFENCE_KAFKA", "no such address")
    broker = InMemoryRingfence()
    broker.target("staging", verbs=["read"])
    task = broker.task("deploy-bot", [Permission(target="staging", verbs=("read",), resources=("env/**",))])
    await broker.agent("deploy-bot").request(task=task, target="staging", **READ)


def test_in_memory_ringfence_works_in_consecutive_event_loops(
    broker: InMemoryRingfence, agent: Agent, task: str
) -> None:
    async def request() -> None:
        await agent.request(task=task, target="staging", **READ)

    asyncio.run(request())
    asyncio.run(request())
    assert len(broker.leases()) == 2


# --- approvals ---


async def test_a_test_approves_what_waits(broker: InMemoryRingfence, agent: Agent, task: str) -> None:
    waits: list[Any] = []
    asked = asyncio.create_task(agent.request(task=task, target="staging", **DEPLOY, on_pending=waits.append))
    pending = await broker.approve(comment="go")
    assert (pending.agent, pending.required, pending.reason) == ("deploy-bot", ("sponsor",), "to look")
    assert (await asked).scope[0].verbs == ("deploy",)
    assert [one.required for one in waits] == [("sponsor",)]
    assert broker.pending() == []


async def test_a_test_denies_what_waits(broker: InMemoryRingfence, agent: Agent, task: str) -> None:
    asked = asyncio.create_task(agent.request(task=task, target="staging", **DEPLOY))
    await broker.deny(comment="not today")
    with pytest.raises(RequestDeniedError, match="sam denied it: not today") as denied:
        await asked
    assert denied.value.code == "approval_denied"


async def test_of_several_that_wait_one_is_named(broker: InMemoryRingfence, agent: Agent, task: str) -> None:
    asked = [
        asyncio.create_task(agent.request(task=task, target="staging", **{**DEPLOY, "resources": [name]}))
        for name in ("env/a", "env/b")
    ]
    while len(broker.pending()) < 2:
        await asyncio.sleep(0)
    with pytest.raises(InvalidCallError, match="2 requests wait; say which"):
        await broker.approve()
    first, second = broker.pending()
    await broker.deny(second.request_id)
    await broker.approve(first)
    assert (await asked[0]).scope[0].resources == first.scope[0].resources
    with pytest.raises(RequestDeniedError):
        await asked[1]
    with pytest.raises(StaleApprovalError):
        await broker.approve(first)


async def test_approval_by_an_unentitled_user_is_refused(
    broker: InMemoryRingfence, agent: Agent, task: str
) -> None:
    asked = asyncio.create_task(agent.request(task=task, target="staging", **{**READ, "verbs": ["wipe"]}))
    with pytest.raises(NotYoursError):
        await broker.approve(by=People.SPONSOR)
    await broker.approve(by=People.OPERATOR)
    await asked


async def test_approve_without_a_pending_request_raises_in_time(broker: InMemoryRingfence) -> None:
    with pytest.raises(NothingPendingError, match="no request came to wait"):
        await broker.approve(within_s=0.01)


async def test_answers_may_be_given_ahead(broker: InMemoryRingfence, agent: Agent, task: str) -> None:
    broker.answer_all("approved")
    await agent.request(task=task, target="staging", **{**READ, "verbs": ["deploy", "wipe"]})
    broker.answer_all("denied", comment="never")
    with pytest.raises(RequestDeniedError, match="never"):
        await agent.request(task=task, target="staging", **DEPLOY)
    broker.answer_all(None)
    with pytest.raises(RequestTimeoutError) as late:
        await agent.request(task=task, target="staging", **DEPLOY, timeout_s=1.0)
    assert late.value.waiting_for == "the approval of the agent's sponsor"


async def test_request_given_up_by_an_agent_is_no_longer_pending(
    broker: InMemoryRingfence, agent: Agent, task: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RequestTimeoutError):
        await agent.request(task=task, target="staging", **DEPLOY, timeout_s=0.05)
    async with asyncio.timeout(5):
        while broker.pending():
            await asyncio.sleep(0)
    assert "dead-lettered" not in caplog.text


async def test_code_that_approves_by_program_is_tested_as_well(
    broker: InMemoryRingfence, agent: Agent, task: str
) -> None:
    async def approve_reads(sponsor: ringfence.Sponsor) -> None:
        async for pending in sponsor.watch():
            await sponsor.approve(pending)

    approving = asyncio.create_task(approve_reads(broker.sponsor()))
    await agent.request(task=task, target="staging", **DEPLOY)
    approving.cancel()


async def test_an_approval_that_nobody_gives_ends_with_the_time(
    broker: InMemoryRingfence, agent: Agent, task: str
) -> None:
    asked = asyncio.create_task(agent.request(task=task, target="staging", **DEPLOY))
    while not broker.pending():
        await asyncio.sleep(0)
    await broker.advance(3700)
    with pytest.raises(RequestDeniedError) as denied:
        await asked
    assert denied.value.code == "approval_expired"


def test_bundle_whose_action_rules_do_not_compile_is_refused(tmp_path: Path) -> None:
    bundle = write(tmp_path / "bundle", ALLOWS)
    (bundle / "action.rego").write_text("package ringfence.action\n\ndecision := nosuch(input)\n")
    with pytest.raises(BundleError, match="nosuch"):
        InMemoryRingfence(policy=bundle)


async def test_break_glass_takes_two_operators(tmp_path: Path) -> None:
    no = 'decision := {"allow": false, "deny": [{"code": "frozen", "message": "no"}], "approvals": [], "max_ttl_s": 0}'
    broker = InMemoryRingfence(policy=write(tmp_path / "bundle", f"{no}\n"))
    broker.target("staging", verbs=["read"])
    task = broker.task("deploy-bot", [Permission(target="staging", verbs=("read",), resources=("env/**",))])
    agent = broker.agent("deploy-bot")
    with pytest.raises(RequestDeniedError) as denied:
        await agent.request(task=task, target="staging", **READ)
    assert denied.value.code == "frozen"
    asked = asyncio.create_task(agent.request(task=task, target="staging", **READ, break_glass=True))
    assert (await broker.approve()).required == ("break_glass", "break_glass")
    await asked
    assert broker.leases()[-1].break_glass


# --- the end of leases ---


async def test_the_kill_switch_ends_what_it_names(broker: InMemoryRingfence, agent: Agent, task: str) -> None:
    server = broker.verifier("staging")
    credential = await agent.request(task=task, target="staging", **READ)
    await server.verify(credential.value)
    assert await broker.revoke(agent="deploy-bot") == 1
    with pytest.raises(TokenRejectedError) as rejected:
        await server.verify(credential.value)
    assert rejected.value.code == "inactive"
    assert [lease.status for lease in broker.leases()] == ["revoked"]
    again = await agent.request(task=task, target="staging", **READ)
    assert await broker.revoke(everything=True) == 1
    assert await broker.revoke(lease=again.lease_id) == 0
    with pytest.raises(InvalidCallError):
        await broker.revoke()


async def test_a_suspended_agent_gets_nothing(broker: InMemoryRingfence, agent: Agent, task: str) -> None:
    await agent.request(task=task, target="staging", **READ)
    async with broker.administrator(People.SPONSOR) as sam:
        await sam.suspend_agent("deploy-bot", reason="odd")
        assert [lease.status for lease in broker.leases()] == ["revoked"]
        with pytest.raises(RequestDeniedError) as denied:
            await agent.request(task=task, target="staging", **READ)
        assert denied.value.code == "agent_suspended"
        await sam.resume_agent("deploy-bot", reason="fine")
    await agent.request(task=task, target="staging", **READ)


async def test_time_passes_at_the_tests_command(broker: InMemoryRingfence, agent: Agent, task: str) -> None:
    server = broker.verifier("staging", introspect=False)
    credential = await agent.request(task=task, target="staging", **READ, ttl_s=60)
    await broker.advance(59)
    await server.verify(credential.value)
    assert credential.usable()
    await broker.advance(2)
    with pytest.raises(TokenRejectedError) as rejected:
        await server.verify(credential.value)
    assert rejected.value.code == "invalid_token"
    with pytest.raises(CredentialOverError):
        credential.usable()
    assert [lease.status for lease in broker.leases()] == ["expired"]
    await broker.advance(3600)
    with pytest.raises(RequestDeniedError) as denied:
        await agent.request(task=task, target="staging", **READ)
    assert denied.value.code == "task_ended"
    with pytest.raises(ValueError, match="forward"):
        await broker.advance(-1)


# --- resource servers ---


@pytest.mark.parametrize("dpop", [False, True], ids=["bearer", "DPoP"])
async def test_a_guarded_application_takes_its_tokens(
    broker: InMemoryRingfence, agent: Agent, dpop: bool
) -> None:
    broker.target("shop", verbs=["read", "write"], dpop=dpop)
    task = broker.task("deploy-bot", [Permission(target="shop", verbs=("read", "write"), resources=("**",))])

    async def application(scope: object, receive: object, send: object) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
        await send({"type": "http.response.body", "body": b"orders"})  # type: ignore[operator]

    guarded = TokenGuard(
        application,
        broker.verifier("shop", require_proof=dpop),
        base_url="https://shop.example",
        needs=lambda scope: ("read" if scope["method"] == "GET" else "write", scope["path"][1:]),
    )
    credential = await agent.request(
        task=task, target="shop", verbs=["read"], resources=["orders/*"], reason="to look"
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=guarded)) as http:
        auth = credential.auth()
        assert (await http.get("https://shop.example/orders/1", auth=auth)).text == "orders"
        assert (await http.get("https://shop.example/invoices/1", auth=auth)).status_code == 403
        assert (await http.post("https://shop.example/orders/1", auth=auth)).status_code == 403
        assert (await http.get("https://shop.example/orders/1")).status_code == 401


async def test_a_verifier_of_ones_own_reaches_the_issuer(
    broker: InMemoryRingfence, agent: Agent, task: str
) -> None:
    http = httpx.AsyncClient(transport=broker.transport())
    server = TokenVerifier(
        broker.issuer_url, "spiffe://ringfence.test/target/staging", http=http, clock=broker.clock
    )
    credential = await agent.request(task=task, target="staging", **READ)
    assert (await server.verify(credential.value)).task == task
    with pytest.raises(TokenRejectedError):
        await broker.verifier("staging").verify(credential.value[:-4] + "AAAA")
    with pytest.raises(InvalidCallError, match="no target nowhere"):
        broker.verifier("nowhere")


async def test_other_kinds_of_credentials_are_what_the_test_gives(broker: InMemoryRingfence) -> None:
    dsn = "postgresql://deploy@127.0.0.1/orders"
    broker.target("orders-db", verbs=["select"], kind="postgres", credential=dsn)
    broker.target("cache", verbs=["read"], kind="redis")
    scope = [
        Permission(target="orders-db", verbs=("select",), resources=("orders/public/orders",)),
        Permission(target="cache", verbs=("read",), resources=("session/*",)),
    ]
    agent, task = broker.agent("deploy-bot"), broker.task("deploy-bot", scope)
    credential = await agent.request(
        task=task, target="orders-db", verbs=["select"], resources=["orders/public/orders"], reason="to look"
    )
    assert isinstance(credential, ringfence.PostgresCredential)
    assert credential.apply() == dsn
    with pytest.raises(RequestDeniedError, match="the test gave no credential for target cache") as denied:
        await agent.request(
            task=task, target="cache", verbs=["read"], resources=["session/1"], reason="to look"
        )
    assert (denied.value.by, denied.value.code) == ("issuer", "backend_cannot")


async def test_delegated_tasks_work_in_memory(broker: InMemoryRingfence, agent: Agent, task: str) -> None:
    helper = broker.agent("helper", ceiling=EVERYTHING)
    part = [Permission(target="staging", verbs=("read",), resources=("env/a/*",))]
    handed = await agent.delegate(task=task, to="helper", purpose="look", scope=part, ends_in_s=600)
    credential = await helper.request(
        task=handed, target="staging", verbs=["read"], resources=["env/a/1"], reason="to look"
    )
    verified = await broker.verifier("staging").verify(credential.value)
    assert [one.rpartition("/")[2] for one in verified.act] == ["helper", "deploy-bot"]
    await agent.end_delegated(handed, reason="enough")
    assert [lease.status for lease in broker.leases(agent="helper")] == ["revoked"]


# --- as a plugin, and without what it needs ---


def test_the_fixture_comes_with_the_plugin(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function")
    pytester.makeconftest('pytest_plugins = ["ringfence.testing"]')
    pytester.makepyfile(
        """
        def test_first(in_memory_ringfence):
            in_memory_ringfence.target("staging", verbs=["read"])
            assert in_memory_ringfence.leases() == []

        def test_each_has_its_own(in_memory_ringfence):
            import pytest, ringfence
            with pytest.raises(ringfence.InvalidCallError):
                in_memory_ringfence.verifier("staging")
        """
    )
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=2)


CODE_UNDER_TEST = """
async def deploy(agent, task):
    async with agent.credential(
        task=task, target="staging", verbs=["deploy"], resources=["env/staging/web"], reason="release 41"
    ) as credential:
        assert credential.value
"""


def test_the_page_for_users_shows_tests_that_pass(pytester: pytest.Pytester) -> None:
    page = (Path(__file__).parents[2] / "docs/testing-agents.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    conftest, tests, *_ = blocks
    (through_gateway,) = (one for one in blocks if "gateway(task=task)" in one)
    pytester.makeini("[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function")
    pytester.makeconftest(conftest)
    pytester.makepyfile(test_agent=f"{tests}\n{CODE_UNDER_TEST}", test_gateway=through_gateway)
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=5)


@pytest.mark.parametrize("lacking", ["regorus", "starlette", "prometheus_client", "redis"])
def test_without_the_extra_it_says_what_to_install(lacking: str) -> None:
    code = f"import sys; sys.modules[{lacking!r}] = None; import ringfence.testing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "pip install 'ringfence[testing]'" in last
    assert lacking in last


def test_without_pytest_it_works() -> None:
    code = "import sys; sys.modules['pytest'] = None; import ringfence.testing as t; t.InMemoryRingfence()"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_readers_of_the_services_have_their_partitions_before_the_first_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settled: list[GrantTable] = []
    settle = GrantTable.settle

    def counted(table: GrantTable) -> None:
        settled.append(table)
        settle(table)

    monkeypatch.setattr(GrantTable, "settle", counted)
    InMemoryRingfence()
    assert len({id(table) for table in settled}) == 2  # that of policy, and that of the issuer
