"""Instances of agents enrol with tokens that a real API server made for their pods, and with no others."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import pytest

from ringfence.client.agent.credentials import TokenCredential
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.oidc import read_jwks
from ringfence.messages.enrolment import AttestationSelector
from ringfence.messages.trust import OidcIssuer
from ringfence.model.identity.attestation import audience
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.benches.attestation_bench import AttestationBench, fresh
from tests.support.servers.kubernetes import ISSUER, ApiServer
from tests.support.world import World


@dataclass
class Pods:
    """Pods of agents in a namespace of the API server, and Ringfence, whose root trusts the server's issuer."""

    server: ApiServer
    namespace: str
    bench: AttestationBench
    pod_uids: dict[str, str]

    def make(self, account: str, pod: str) -> None:
        """Make a service account, and a pod that has it."""
        accounts = f"/api/v1/namespaces/{self.namespace}/serviceaccounts"
        self.server.call("POST", accounts, {"metadata": {"name": account}})
        context = {
            "allowPrivilegeEscalation": False, "runAsNonRoot": True, "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        }  # fmt: skip
        container = {"name": "agent", "image": "registry.example/bot", "securityContext": context}
        spec = {
            "serviceAccountName": account,
            "automountServiceAccountToken": False,
            "containers": [container],
        }
        made = self.server.call(
            "POST", f"/api/v1/namespaces/{self.namespace}/pods", {"metadata": {"name": pod}, "spec": spec}
        )
        assert made.is_success, made.text
        self.pod_uids[pod] = made.json()["metadata"]["uid"]

    def token(self, account: str, pod: str, aud: str) -> str:
        """The token that a kubelet asks for, for a projected volume of the pod."""
        bound = {"kind": "Pod", "apiVersion": "v1", "name": pod, "uid": self.pod_uids[pod]}
        answer = self.server.call(
            "POST", f"/api/v1/namespaces/{self.namespace}/serviceaccounts/{account}/token",
            {"spec": {"audiences": [aud], "expirationSeconds": 3600, "boundObjectRef": bound}},
        )  # fmt: skip
        assert answer.is_success, answer.text
        return str(answer.json()["status"]["token"])

    def selector(self, **claims: str) -> AttestationSelector:
        """It accepts pods of the account `reader-bot`, and of these claims."""
        own = {"sub": f"system:serviceaccount:{self.namespace}:reader-bot"}
        return AttestationSelector(issuer=ISSUER, claims={**own, **claims})


@pytest.fixture(scope="module")
async def pods(
    api_server: ApiServer, kafka: Kafka, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Pods]:
    namespace = f"agents-{uuid.uuid4().hex[:8]}"
    api_server.namespace(namespace)
    async with (
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world,
        AttestationBench.open(world, tmp_path_factory.mktemp("tokens")) as bench,
    ):
        keys = read_jwks(api_server.call("GET", "/openid/v1/jwks").text)
        issuer = OidcIssuer(issuer=ISSUER, uses=("instances",), keys=keys)
        bundle = world.make_bundle(3).model_copy(update={"oidc_issuers": (issuer,)})
        world.trust.load(sign(bundle, world.root.key, header_jwk=True), time.time())
        await world.publish_trust(bundle)
        async with world.running("registry", "policy", "issuer", "revoker", own={"registry": bench.own}):
            made = Pods(api_server, namespace, await bench.staff(), {})
            made.make("reader-bot", "reader-bot-1")
            made.make("reader-bot", "reader-bot-2")
            made.make("other-bot", "other-bot-1")
            yield made


ASK: dict[str, Any] = {
    "target": "staging", "verbs": ["read"], "resources": ["env/a"], "reason": "a look", "timeout_s": 60,
}  # fmt: skip


async def test_projected_token_of_a_pod_gets_a_key_and_the_key_gets_a_credential(
    pods: Pods, tmp_path: Path
) -> None:
    bench = pods.bench
    agent = await bench.agent(pods.selector())
    file = tmp_path / "token"
    file.write_text(pods.token("reader-bot", "reader-bot-1", audience(bench.world.td)))
    async with bench.connected(agent, f"file:{file}") as connected:
        credential = await connected.request(task=await bench.task(agent), **ASK)
        assert isinstance(credential, TokenCredential)
        said = jwt.decode(credential.value, options={"verify_signature": False})
        assert said["instance"]["iss"] == ISSUER
        assert said["instance"]["sub"] == f"system:serviceaccount:{pods.namespace}:reader-bot"
        await connected.release(credential, timeout_s=60)


async def test_selector_of_one_pod_rejects_the_token_of_another(pods: Pods) -> None:
    agent = await pods.bench.agent(pods.selector(**{"/kubernetes.io/pod/name": "reader-bot-1"}))
    aud = audience(pods.bench.world.td)
    accepted, rejected = [
        await pods.bench.enrol(agent, pods.token("reader-bot", pod, aud), fresh(agent))
        for pod in ("reader-bot-1", "reader-bot-2")
    ]
    assert accepted.is_success, accepted.text
    assert rejected.json()["error"] == "instance_unmatched"


async def test_token_of_another_account_audience_or_signature_is_rejected(pods: Pods) -> None:
    agent, aud = await pods.bench.agent(pods.selector()), audience(pods.bench.world.td)
    right = pods.token("reader-bot", "reader-bot-1", aud)
    head, body, signature = right.split(".")
    wrong = [
        (pods.token("other-bot", "other-bot-1", aud), "instance_unmatched"),
        (pods.token("reader-bot", "reader-bot-1", ISSUER), "aud_unexpected"),
        (pods.token("reader-bot", "reader-bot-1", audience("other.example")), "aud_unexpected"),
        (f"{head}.{body}.{'A' * len(signature)}", "signature_invalid"),
    ]
    for token, code in wrong:
        answer = await pods.bench.enrol(agent, token, fresh(agent))
        assert answer.json()["error"] == code, answer.text
    assert (await pods.bench.enrol(agent, right, fresh(agent))).is_success


async def test_token_for_enrolment_is_no_token_of_the_api_server(pods: Pods) -> None:
    aud = audience(pods.bench.world.td)
    path = f"/api/v1/namespaces/{pods.namespace}/pods"
    assert (
        pods.server.call("GET", path, token=pods.token("reader-bot", "reader-bot-1", aud)).status_code == 401
    )
    own = pods.token("reader-bot", "reader-bot-1", ISSUER)
    assert pods.server.call("GET", path, token=own).status_code == 403, "known, and without rights"
