"""The NetworkPolicies of the chart: a service reaches what it needs, and is reached by those who call it."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest

from ringfence.cli.commands.serve import SERVED
from ringfence.messages.api import GATEWAY_PORT
from tests.support.chart import (
    VALUES,
    Document,
    documents,
    environment_of,
    labels_of,
    merged,
    rendered,
    services,
    workloads,
)
from tests.support.compose import ROOT

CHARTED = sorted(set(SERVED) - {"runner"})


class Peer(NamedTuple):
    """The other side of a connection: labels of pods, or of the namespace in which any pod may be the one."""

    of: str
    labels: tuple[tuple[str, str], ...]
    port: int | None


def policy_of(workload: Document) -> Document:
    """The specification of the one NetworkPolicy that selects the pods of a workload."""
    (found,) = [
        one["spec"]
        for one in documents().values()
        if one["kind"] == "NetworkPolicy"
        and one["metadata"]["namespace"] == workload["metadata"]["namespace"]
        and one["spec"]["podSelector"]["matchLabels"].items() <= labels_of(workload).items()
    ]
    assert found["policyTypes"] == ["Ingress", "Egress"], "all is allowed in the other direction"
    policy: Document = found
    return policy


def peers(workload: Document, direction: str) -> set[Peer]:
    """From whom, or to whom, connections of a pod are allowed. Everything else is refused to it."""
    key = {"ingress": "from", "egress": "to"}[direction]
    return {
        peer_of(peer, port["port"])
        for rule in policy_of(workload).get(direction) or ()
        for peer in rule[key]
        for port in rule.get("ports", [{"port": None}])
    }


def peer_of(peer: dict[str, Any], port: int | None) -> Peer:
    labels = [pair for selector in peer.values() for pair in selector["matchLabels"].items()]
    return Peer("+".join(sorted(peer)), tuple(sorted(labels)), port)


def pod_peer(port: int, **labels: str) -> Peer:
    named = {f"app.kubernetes.io/{key}": value for key, value in labels.items()}
    return Peer("podSelector", tuple(sorted(named.items())), port)


def service_peer(name: str) -> Peer:
    return pod_peer(8080, name="ringfence", component=name)


def namespace_peer(label: str, port: int | None, value: str = "true") -> Peer:
    return Peer("namespaceSelector", ((label, value),), port)


PROXY = namespace_peer("ringfence.io/reads", 8080)
DNS = namespace_peer("kubernetes.io/metadata.name", 53, "kube-system")
KAFKA, REDIS = pod_peer(9092, name="kafka"), pod_peer(6379, name="valkey")


def called(name: str) -> set[str]:
    """The services that a service calls, by the URLs in its settings."""
    return set(
        re.findall(r"http://ringfence-([a-z]+):8080", " ".join(environment_of(services()[name]).values()))
    )


def has_redis(name: str) -> bool:
    return "LeaseStore(" in (ROOT / f"services/ringfence/{name.replace('-', '_')}/app.py").read_text()


@pytest.mark.parametrize("name", sorted(set(CHARTED) - {"gateway"}))
def test_service_reaches_what_it_needs_and_nothing_else(name: str) -> None:
    expected = {service_peer(other) for other in called(name)}
    if name != "sign-page":
        expected |= {DNS, KAFKA}
    if has_redis(name):
        expected |= {REDIS}
    if name in ("issuer", "revoker"):
        expected |= {namespace_peer("ringfence.io/targets", None)}
    if name == "signals":
        expected |= {namespace_peer("ringfence.io/receivers", 443)}
    assert peers(services()[name], "egress") == expected


@pytest.mark.parametrize("name", CHARTED)
def test_service_is_reached_by_the_proxy_and_by_its_callers(name: str) -> None:
    callers = {service_peer(other) for other in CHARTED if name in called(other)}
    allowed = peers(services()[name], "ingress")
    if name == "registry":
        callers |= {
            pod_peer(8080, name="ringfence-registry-tls")
        }  # the operator's, through which agents enrol
    if name == "gateway":
        agents = (("kubernetes.io/metadata.name", "agents"), ("ringfence.io/role", "agent"))
        assert Peer("namespaceSelector+podSelector", agents, GATEWAY_PORT) in allowed
        allowed = {one for one in allowed if one.port != GATEWAY_PORT}
    assert allowed == callers | {PROXY}


@pytest.mark.parametrize("name", ["topics", "trust-bundle"])
def test_job_reaches_kafka_alone(name: str) -> None:
    job = documents()[f"Job/ringfence/ringfence-{name}"]
    assert (peers(job, "egress"), peers(job, "ingress")) == ({DNS, KAFKA}, set())


def test_gateway_reaches_targets_everywhere() -> None:
    assert policy_of(services()["gateway"])["egress"] == [{}]


def test_issuer_revoker_and_gateway_are_the_services_with_redis() -> None:
    assert {name for name in CHARTED if has_redis(name)} == {"issuer", "revoker"}
    assert {name for name in CHARTED if "RINGFENCE_REDIS_URL" in environment_of(services()[name])} == {
        "gateway",
        "issuer",
        "revoker",
    }


def test_pods_are_closed_by_one_policy_each_with_named_peers() -> None:
    for _, workload in workloads():
        for rule in policy_of(workload).get("ingress") or ():
            assert rule["from"]


def test_rules_of_the_operator_are_added_to_those_of_the_service() -> None:
    vault = {"to": [{"ipBlock": {"cidr": "192.0.2.7/32"}}], "ports": [{"protocol": "TCP", "port": 8200}]}
    proxy = {"podSelector": {"matchLabels": {"app": "proxy"}}}
    changed = merged(VALUES, {"services": {"issuer": {"to": [vault], "from": [proxy]}}})
    (policy,) = [
        one["spec"]
        for one in rendered(changed)
        if one["kind"] == "NetworkPolicy" and one["metadata"]["name"] == "ringfence-issuer"
    ]
    assert policy["egress"] == [*policy_of(services()["issuer"])["egress"], vault]
    assert proxy in policy["ingress"][0]["from"]
