"""All services on a Kafka that lets in nobody unknown, with the settings of `docs/operators/kafka-and-redis.md`.

Needs `--kafka apache`: the embedded broker knows neither TLS nor SASL nor ACLs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from ringfence.kernel.kafka.acls import PARTIES
from tests.brokers import RedisServer
from tests.brokers.secured import ADMIN, AUDIENCE, SecuredKafka
from tests.conftest import needed
from tests.site.page_commands import ROOT, Block, run_page, section_of
from tests.support.installation import STARTED, THIS_CLONE, WITHIN_S, Installation, lease, organise
from tests.support.oidc_tokens import TokenIssuer
from tests.support.token_endpoint import private

PAGE = ROOT / "docs/operators/kafka-and-redis.md"
TLS, SASL = "TLS with a certificate for each party", "SASL with a name and a password"
TOKENS = "SASL with OAuth tokens"
ISSUER = TokenIssuer("https://login.acme.example")
PASSWORD = "a-password-of-this-test"
TOPICS = "secured"
NOTHING: Mapping[str, str] = {}

pytestmark = [pytest.mark.apache, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def secured(request: pytest.FixtureRequest) -> Iterator[SecuredKafka]:
    with tempfile.TemporaryDirectory(prefix="ringfence-secured-") as folder:
        users = dict.fromkeys((ADMIN, *(f"{TOPICS}-{party}" for party in STARTED)), PASSWORD)
        kafka = SecuredKafka(Path(folder), [*PARTIES, ADMIN], users, ISSUER)
        with needed(request):
            kafka.server.start()
        yield kafka
        kafka.server.stop()


@pytest.fixture
def here(secured: SecuredKafka, redis_server: RedisServer, tmp_path: Path) -> Iterator[Installation]:
    """People and agents come by the open port, where everybody may do everything; services do not."""
    made = Installation(
        THIS_CLONE, tmp_path, kafka=secured.server.bootstrap, embedded_broker=False, redis_url=redis_server.url
    )  # fmt: skip
    made.change(topic_prefix=TOPICS)
    (tmp_path / "kafka-password").touch(0o600)
    (tmp_path / "kafka-password").write_text(PASSWORD)
    yield made
    made.end()


def exported(
    here: Installation, secured: SecuredKafka, party: str, block: Block, before: Mapping[str, str] = NOTHING
) -> Mapping[str, str]:
    """The settings of Kafka after a block of the page, with the files and the name of a party in place of policy's.

    `before` has those of the blocks before it.
    """
    tls, admin, scram = (
        secured.by_certificate(party),
        secured.by_certificate(ADMIN),
        secured.by_password("", ""),
    )
    replaced = {
        "kafka-1.acme.example:9093,kafka-2.acme.example:9093": tls["kafka"],
        "kafka-1.acme.example:9094,kafka-2.acme.example:9094": scram["kafka"],
        "kafka-1.acme.example:9095,kafka-2.acme.example:9095": secured.by_token("")["kafka"],
        "/etc/ringfence/kafka-ca.pem": str(tls["kafka_ssl_ca_file"]),
        "/run/secrets/kafka-admin-password": str(here.folder / "kafka-password"),
        "/run/secrets/kafka-password": str(here.folder / "kafka-password"),
        "/run/secrets/kafka-admin-token": str(here.folder / f"{ADMIN}-token"),
        "/run/secrets/kafka-token": str(here.folder / f"{party}-token"),
        "ringfence-policy": f"{TOPICS}-{party}",
    }
    for name, settings in (("policy", tls), (ADMIN, admin)):
        file = str(settings["kafka_ssl_cert_file"])
        replaced |= {f"/etc/ringfence/{name}.pem": file, f"/etc/ringfence/{name}.key": file}
    dump = Block(0, "sh", "env -0 > exported\n")
    run_page(PAGE, here.folder, {**here.environment("olga"), **before}, replaced, blocks=[block, dump])
    variables = dict(one.split("=", 1) for one in (here.folder / "exported").read_text().split("\0") if one)
    return {name: value for name, value in variables.items() if name.startswith("RINGFENCE_KAFKA")}


def all_start(here: Installation, settings: Mapping[str, Mapping[str, str]]) -> None:
    for name in STARTED:
        here.launch(name, settings[name])
    for name in STARTED:
        here.await_ready(name)


def test_all_services_with_the_settings_of_the_page(here: Installation, secured: SecuredKafka) -> None:
    (admin_tls, own_tls), (admin_sasl, own_sasl) = section_of(PAGE, TLS), section_of(PAGE, SASL)
    here.say("init", "--operator", "olga")
    here.change(trust_root=here.trust.fingerprint())
    admin = exported(here, secured, ADMIN, admin_tls)
    tls = {name: exported(here, secured, name, own_tls, admin) for name in (*STARTED, "agents")}
    here.say("init", "--operator", "olga", "--publish")
    assert {one["RINGFENCE_KAFKA_SECURITY_PROTOCOL"] for one in tls.values()} == {"SSL"}

    all_start(here, tls)
    task = organise(here)
    held = lease(here, task, "10m")

    # With the certificate of a party that has other rights, a service does nothing.
    here.stop("policy")
    child = here.launch("policy", tls["agents"])
    child.wait_until(
        lambda: "is not authorized for this client" in here.log("policy").read_text(), WITHIN_S, "was refused"
    )
    child.kill()
    here.stop(*(name for name in STARTED if name != "policy"))

    admin = exported(here, secured, ADMIN, admin_sasl)
    sasl = {name: exported(here, secured, name, own_sasl, admin) for name in STARTED}
    assert {one["RINGFENCE_KAFKA_SECURITY_PROTOCOL"] for one in sasl.values()} == {"SASL_SSL"}
    all_start(here, sasl)
    here.say("release", held, who="bot")
    assert lease(here, task, "10m")


def test_all_services_with_tokens_as_the_page_says(here: Installation, secured: SecuredKafka) -> None:
    topics = "tokens"
    here.change(topic_prefix=topics)
    for name in (ADMIN, *STARTED):
        claims = ISSUER.claims(AUDIENCE, sub=name if name == ADMIN else f"{topics}-{name}")
        private(here.folder / f"{name}-token", ISSUER.token(claims))
    admin_block, own_block = section_of(PAGE, TOKENS)
    here.say("init", "--operator", "olga")
    here.change(trust_root=here.trust.fingerprint())
    admin = exported(here, secured, ADMIN, admin_block)
    tokens = {name: exported(here, secured, name, own_block, admin) for name in STARTED}
    here.say("init", "--operator", "olga", "--publish")
    assert {one["RINGFENCE_KAFKA_SASL_MECHANISM"] for one in tokens.values()} == {"OAUTHBEARER"}
    all_start(here, tokens)
    assert lease(here, organise(here), "10m")

    # A service whose token is for another audience says so at its start.
    here.stop("policy")
    private(here.folder / "policy-token", ISSUER.token(ISSUER.claims("another", sub=f"{topics}-policy")))
    child = here.launch("policy", tokens["policy"])
    refusal = "the broker refused the token (invalid_token); see that the token has the issuer, the audience"
    child.wait_until(lambda: refusal in here.log("policy").read_text(), WITHIN_S, "says what was refused")
    child.kill()
