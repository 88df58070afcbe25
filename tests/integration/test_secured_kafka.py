"""The main line on an Apache Kafka that trusts nobody: TLS, a principal for each party, and the ACLs that we name.

Needs `--kafka apache`: the embedded broker knows neither TLS nor ACLs.
"""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiokafka.errors import TopicAuthorizationFailedError

from ringfence.cli.main import main
from ringfence.client.admin.administrator import Administrator
from ringfence.client.agent.agent import Agent
from ringfence.client.approvals.sponsor import Sponsor
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.errors import SettingsError, UnavailableError
from ringfence.kernel.base.settings import BusSettings, ServiceSettings
from ringfence.kernel.kafka.acls import PARTIES
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.record import Outbound
from ringfence.messages.base import ServiceRole, Topic
from ringfence.messages.registry import VerbFloor
from ringfence.messages.topics import AUDIT, CREDENTIAL_DECISION, CREDENTIAL_REQUEST, LEASE
from tests.brokers import RedisServer
from tests.brokers.secured import SecuredKafka
from tests.conftest import needed
from tests.support.benches.sdk_clients import client, first
from tests.support.world import World, scope

pytestmark = pytest.mark.apache
READ = scope("platform", ["read"], ["env/**"])
DEPLOY = scope("platform", ["deploy"], ["env/staging/*"])
VERBS = (VerbFloor(verb="read"), VerbFloor(verb="deploy", floor="sponsor"))
PASSWORD = "a-password-of-this-test"


@pytest.fixture(scope="module")
def secured(request: pytest.FixtureRequest) -> Iterator[SecuredKafka]:
    with tempfile.TemporaryDirectory(prefix="ringfence-secured-") as folder:
        kafka = SecuredKafka(Path(folder), [*PARTIES, "stranger"], {"mallory": PASSWORD})
        with needed(request):
            kafka.server.start()
        yield kafka
        kafka.server.stop()


class SecuredWorld(World):
    """A world whose services, once `kafka_security_protocol` is asked for, show Kafka certificates of their own."""

    kafka: SecuredKafka

    def settings(self, role: ServiceRole, **overrides: Any) -> ServiceSettings:
        if "kafka_security_protocol" in overrides:
            overrides = {**self.kafka.by_certificate(role), **overrides}
        return super().settings(role, **overrides)

    def outsider(self, party: str) -> ClientSettings:
        return client(self, **self.kafka.by_certificate(party))


@pytest.fixture
async def world(
    secured: SecuredKafka, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[SecuredWorld]:
    async with SecuredWorld.open(secured.server.bootstrap, redis_server.url, paced=False) as world:
        assert isinstance(world, SecuredWorld)
        world.kafka = secured
        monkeypatch.setenv("RINGFENCE_KAFKA", secured.server.bootstrap)
        monkeypatch.setenv("RINGFENCE_TOPIC_PREFIX", world.prefix)
        yield world


def grant() -> None:
    """What an operator does: the ACLs, for who each party is to this Kafka."""
    named = [part for party in PARTIES for part in ("--principal", f"{party}=User:CN={party}")]
    assert main(["topics", "acls", "--apply", *named]) == 0


async def write(settings: BusSettings, topic: Topic[Any]) -> None:
    async with Publisher(settings, "spiffe://test.example/test") as publisher:
        await (await publisher.send(topic, "test", Outbound("key", b"x", id="1")))


async def test_the_command_of_docs_operations_md_grants(world: SecuredWorld):
    page = (Path(__file__).parents[2] / "docs/operations.md").read_text()
    (command,) = re.findall(r"^\$ ringfence (topics acls --apply .+)$", page, re.MULTILINE)
    assert await asyncio.to_thread(main, shlex.split(command)) == 0


async def test_the_main_line_with_these_rights_and_no_others(world: SecuredWorld):
    await asyncio.to_thread(grant)
    sam, maria = world.party("user", "sam"), world.party("user", "maria")
    bot = world.party("agent", "bot")
    async with world.running(
        "registry", "policy", "issuer", "revoker", "audit", kafka_security_protocol="SSL"
    ):
        async with Administrator.connect(world.operator.key, world.outsider("operators")) as olga:
            await olga.set_user("sam", name="Sam", roles=["sponsor"], keys=[sam.key], entitlements=READ)
            await olga.set_user("maria", name="Maria", keys=[maria.key], entitlements=READ + DEPLOY)
        await world.target("platform", verbs=VERBS)
        users = world.outsider("users")
        async with Administrator.connect(sam.key, users) as administrator:
            await administrator.register_agent(
                "bot", description="deploys", keys=[bot.key], ceiling=READ + DEPLOY
            )
            await administrator.register_agent(
                "helper", description="looks", keys=[world.party("agent", "helper").key], ceiling=READ
            )
        async with Administrator.connect(maria.key, users) as administrator:
            task = await administrator.assign_task(
                "bot", purpose="a test", scope=READ + DEPLOY, ends_in_s=600
            )
        async with (
            Agent.connect(bot.key, world.outsider("agents")) as agent,
            Sponsor.connect(sam.key, users) as person,
        ):
            asked = asyncio.create_task(
                agent.request(
                    task=task,
                    target="platform",
                    verbs=["deploy"],
                    resources=["env/staging/web"],
                    reason="a test",
                )
            )
            await person.approve(await first(person))
            issued = await asked
            await agent.release(issued.lease_id)
            assert await agent.delegate(
                task=task, to="helper", purpose="look first", scope=READ, ends_in_s=60
            )
        await world.consume_until(
            AUDIT, lambda r: issued.lease_id.encode() in r.value and b"credential.released" in r.value
        )

        # An agent may ask. It may not decide, nor read what is decided about others.
        with pytest.raises(TopicAuthorizationFailedError):
            await write(world.outsider("agents"), CREDENTIAL_DECISION)
        # Who may write nothing at all is not even let begin.
        for party, topic in (("siem", LEASE), ("stranger", CREDENTIAL_REQUEST)):
            with pytest.raises(UnavailableError, match="ClusterAuthorizationFailedError"):
                await write(world.outsider(party), topic)


async def test_rejected_kafka_client_is_told_what_to_set(
    world: SecuredWorld, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("GOOD", PASSWORD)
    monkeypatch.setenv("WRONG", "not-the-password")
    for fields, word in [
        # Believed, but without any rights.
        (world.kafka.by_password("mallory", "env:GOOD"), "ClusterAuthorizationFailedError"),
        (world.kafka.by_password("mallory", "env:WRONG"), "RINGFENCE_KAFKA_SASL"),
        (world.kafka.by_certificate("agents", kafka_ssl_ca_file=None), "RINGFENCE_KAFKA_SSL"),
    ]:
        with pytest.raises(UnavailableError, match=word) as refused:
            await write(BusSettings(**fields), CREDENTIAL_REQUEST)
        assert "not-the-password" not in str(refused.value)
    tls, scram = world.kafka.by_certificate("agents"), world.kafka.by_password("mallory", "env:GOOD")
    clear = {"kafka": world.kafka.server.bootstrap}
    for fields, word in [
        ({"kafka": tls["kafka"]}, "takes TLS alone.*to SSL or SASL_SSL"),
        ({"kafka": scram["kafka"]}, "takes TLS alone.*RINGFENCE_KAFKA_SECURITY_PROTOCOL to SASL_SSL"),
        ({**tls, **clear}, "speaks no TLS"),
        ({**scram, **clear, "kafka_security_protocol": "SASL_PLAINTEXT"}, "knows no SASL"),
        ({**tls, "kafka": scram["kafka"]}, r"by SASL \(SCRAM-SHA-512\) who we are.* to SASL_SSL"),
        ({**scram, "kafka_sasl_mechanism": "SCRAM-SHA-256"}, "knows SCRAM-SHA-512, .*RINGFENCE_KAFKA_SASL_MECHANISM"),
        ({**tls, "kafka_ssl_cert_file": None}, r"does not let us in by SSL .*RINGFENCE_KAFKA_SSL_\*"),
    ]:  # fmt: skip
        with pytest.raises(UnavailableError, match=word):
            await write(BusSettings(**fields), CREDENTIAL_REQUEST)
    empty = tmp_path / "empty.pem"
    empty.touch()
    for fields, word in [
        (world.kafka.by_password("mallory", "env:NOT_SET"), "RINGFENCE_KAFKA_SASL_PASSWORD"),
        (world.kafka.by_certificate("agents", kafka_ssl_ca_file=empty), "RINGFENCE_KAFKA_SSL_CA_FILE"),
        (world.kafka.by_certificate("agents", kafka_ssl_cert_file=empty), "RINGFENCE_KAFKA_SSL_CERT_FILE"),
    ]:
        with pytest.raises(SettingsError, match=word):
            await write(BusSettings(**fields), CREDENTIAL_REQUEST)


def test_acls_are_there_for_programs_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("RINGFENCE_TOPIC_PREFIX", "acme")
    assert main(["topics", "acls", "--json", "--principal", "siem=User:splunk"]) == 0
    rights = json.loads(capsys.readouterr().out)["acls"]
    assert {(one["operation"], one["name"]) for one in rights if one["principal"] == "User:splunk"} == {
        ("READ", "acme.audit.v1"), ("READ", "acme.audit.checkpoint.v1"), ("READ", "acme.siem"),
    }  # fmt: skip
