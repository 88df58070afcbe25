"""deploy/kubernetes: valid for several versions of Kubernetes, closed, complete, and of one piece with compose."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml

from ringfence.cli.commands.serve import SERVED
from ringfence.cli.shared.settings_check import known_settings
from ringfence.messages.api import GATEWAY_PORT
from tests.support.compose import ROOT
from tests.support.compose import environment_of as compose_environment_of
from tests.support.compose import loaded as compose_loaded
from tests.support.manifests import (
    AGENTS,
    FOLDER,
    FOLDERS,
    Document,
    container_of,
    documents,
    environment_of,
    files_of,
    labels_of,
    pod_of,
    port_of,
    workloads,
)
from tests.support.pods import check_unprivileged

VERSIONS = ["1.30", "1.33", "1.37"]
ALL = documents(*FOLDERS)
PAGE = (ROOT / "docs/operators/kubernetes.md").read_text()
ON_MACHINES = {"runner": "a runner needs a machine of its own"}
"""Services without a manifest, and the sentence of the page that says why."""
KEYS = "/run/secrets/ringfence/"

SERVICES = {
    name: one
    for folder in (*FOLDERS, AGENTS)
    for _, one in workloads(folder)
    if (args := container_of(one).get("args", [""]))[0] == "serve"
    for name in args[1:]
}
"""By what `ringfence serve` is asked for: the workload that runs it."""


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ALL)
def test_service_manifest_follows_the_schema_of_kubernetes(name: str, version: str) -> None:
    kubernetes_validate.validate(ALL[name], version, strict=True)


def test_a_mistake_would_be_found() -> None:
    right = ALL["StatefulSet/ringfence/ringfence-policy"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            {**right, "spec": {**right["spec"], "replica": 2}}, VERSIONS[-1], strict=True
        )


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_kustomization_has_every_file(folder: str) -> None:
    kustomization = yaml.safe_load((FOLDER / folder / "kustomization.yaml").read_text())
    assert set(kustomization["resources"]) == files_of(FOLDER / folder)
    assert f"`deploy/kubernetes/{folder}`" in PAGE


def test_every_service_has_a_manifest_or_a_reason() -> None:
    assert {*SERVICES, *ON_MACHINES} == set(SERVED)
    assert not SERVICES.keys() & ON_MACHINES.keys()
    for name, sentence in ON_MACHINES.items():
        assert sentence in PAGE.replace("\n", " "), name


@pytest.mark.parametrize("name", sorted(SERVICES.keys() - {"gateway"}))
def test_every_service_has_two_replicas_and_one_is_always_there(name: str) -> None:
    workload = SERVICES[name]
    place = f"{workload['metadata']['namespace']}/ringfence-{name}"
    assert workload["metadata"]["name"] == f"ringfence-{name}"
    assert workload["spec"]["replicas"] == 2
    selector = workload["spec"]["selector"]["matchLabels"]
    assert selector.items() <= labels_of(workload).items()
    assert ALL[f"Service/{place}"]["spec"]["selector"] == selector
    assert ALL[f"PodDisruptionBudget/{place}"]["spec"] == {
        "minAvailable": 1,
        "selector": {"matchLabels": selector},
    }
    (spread,) = pod_of(workload)["affinity"]["podAntiAffinity"][
        "preferredDuringSchedulingIgnoredDuringExecution"
    ]
    assert spread["podAffinityTerm"]["labelSelector"]["matchLabels"] == selector


@pytest.mark.parametrize(("name", "workload"), list(workloads(*FOLDERS)), ids=lambda value: str(value)[:60])
def test_a_pod_has_no_privilege_and_no_token(name: str, workload: Document) -> None:
    check_unprivileged(pod_of(workload))


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_service_listens_where_probes_and_service_connect(name: str) -> None:
    workload = SERVICES[name]
    container, environment = container_of(workload), environment_of(workload)
    listens = environment["RINGFENCE_SIGN_PAGE_HTTP" if name == "sign-page" else "RINGFENCE_HTTP"]
    assert listens == f"0.0.0.0:{port_of(container, 'http')}"
    probes = {"readinessProbe", "livenessProbe", "startupProbe"}
    assert probes <= container.keys()
    for probe in probes:
        assert container[probe]["httpGet"]["port"] == "http"
    place = f"{workload['metadata']['namespace']}/{workload['metadata']['name']}"
    for port in documents(*FOLDERS, AGENTS)[f"Service/{place}"]["spec"]["ports"]:
        assert port["port"] == port_of(container, port["targetPort"]), (
            "clients use the number that it listens at"
        )


def test_the_probes_of_the_sign_page_name_the_host_of_its_origin() -> None:
    container = container_of(SERVICES["sign-page"])
    origin = environment_of(SERVICES["sign-page"])["RINGFENCE_SIGN_PAGE_ORIGIN"]
    for probe in ("readinessProbe", "livenessProbe", "startupProbe"):
        assert container[probe]["httpGet"]["httpHeaders"] == [
            {"name": "Host", "value": urlsplit(origin).netloc}
        ]


def test_the_origins_of_console_and_sign_page_are_those_of_the_page() -> None:
    console, page = environment_of(SERVICES["console"]), environment_of(SERVICES["sign-page"])
    assert page["RINGFENCE_SIGN_PAGE_SESSION_ORIGINS"] == f'["{console["RINGFENCE_CONSOLE_ORIGIN"]}"]'
    for option, origin in (
        ("--sign-origin", page["RINGFENCE_SIGN_PAGE_ORIGIN"]),
        ("--session-origin", console["RINGFENCE_CONSOLE_ORIGIN"]),
        ("--rp-id", page["RINGFENCE_SIGN_PAGE_RP_ID"]),
    ):
        assert f"{option} {origin}" in PAGE


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_each_service_gets_its_own_keys_and_no_others(name: str) -> None:
    workload = SERVICES[name]
    volumes = {
        volume["name"]: volume["secret"] for volume in pod_of(workload)["volumes"] if "secret" in volume
    }
    named = [value for value in environment_of(workload).values() if value.startswith(KEYS)]
    if name == "sign-page":
        assert (volumes, named) == ({}, [])
        return
    # yaml reads 0400 as an octal number.
    assert volumes["keys"] == {"secretName": f"ringfence-{name}-keys", "defaultMode": 0o400}
    assert environment_of(workload)["RINGFENCE_KEY_FILE"] == f"{KEYS}{name}.json"
    made = " ".join(f"--from-file={value.removeprefix(KEYS)}" for value in named)
    command = f"kubectl -n ringfence create secret generic ringfence-{name}-keys {made}\n"
    assert command in (FOLDER / _file_of(name)).read_text()
    # The page has the same command, or makes all Secrets of one key file in a loop.
    (loop,) = re.findall(
        r"^    \$ for name in ([a-z ]+); do kubectl .*--from-file=\"\$name\.json\"; done$", PAGE, re.M
    )
    if name in loop.split():
        assert len(named) == 1
    else:
        assert command in PAGE or name == "gateway"


def _file_of(name: str) -> str:
    (found,) = [
        f"{folder}/{path.name}"
        for folder in (*FOLDERS, AGENTS)
        for path in (FOLDER / folder).glob(f"{name}.yaml")
        if path.name in files_of(FOLDER / folder)
    ]
    return found


def test_settings_are_ones_that_are_read() -> None:
    for name, workload in workloads(*FOLDERS, AGENTS):
        own = {name for name in environment_of(workload) if name.startswith("RINGFENCE_")}
        assert own <= known_settings(), name


LEFT_TO_OPERATORS = {"RINGFENCE_SCIM_MAIL_DOMAIN", "RINGFENCE_GATEWAY_TARGETS_CA_FILE"}
"""Compose passes these on from outside, if they are set there."""
NOT_OF_A_POD = {
    "gateway": {
        # In a cluster agents are in other pods and come by TLS, so there is no socket of a task.
        "RINGFENCE_GATEWAY_SOCKETS",
        "RINGFENCE_GATEWAY_CA_FILE",
        # It makes no tokens, and has no Redis.
        "RINGFENCE_ISSUER_URL",
        "RINGFENCE_REDIS_URL",
    },
    "sign-page": set(),
}


@pytest.mark.parametrize("name", sorted(SERVICES.keys() - {"sign-page"}))
def test_pod_has_the_settings_that_compose_gives_the_service(name: str) -> None:
    compose = set(compose_loaded("docker-compose.yml")["services"][name]["environment"])
    missing = compose - environment_of(SERVICES[name]).keys() - LEFT_TO_OPERATORS
    assert missing == NOT_OF_A_POD.get(name, set())
    assert compose_environment_of(name, {"RINGFENCE_TRUST_ROOT": ""})["RINGFENCE_KEY_FILE"]


# --- NetworkPolicies ---


class Peer(NamedTuple):
    """The other side of a connection: labels of pods, or of the namespace in which any pod may be the one."""

    of: str
    labels: tuple[tuple[str, str], ...]
    port: int | None


def selected(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector (of `matchLabels` and `In`) selects something with these labels."""
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    for one in selector.get("matchExpressions", ()):
        assert one["operator"] == "In"
        if labels.get(one["key"]) not in one["values"]:
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


def policies_of(workload: Document) -> Iterator[Document]:
    for name, one in documents(*FOLDERS, AGENTS).items():
        if name.startswith("NetworkPolicy/"):
            same = one["metadata"]["namespace"] == workload["metadata"]["namespace"]
            if same and selected(one["spec"]["podSelector"], labels_of(workload)):
                yield one


def peers(workload: Document, direction: str) -> set[Peer]:
    """From whom, or to whom, the policies allow connections of a pod. Everything else is refused to it."""
    key = {"ingress": "from", "egress": "to"}[direction]
    applied = list(policies_of(workload))
    assert any(direction.title() in one["spec"]["policyTypes"] for one in applied), "all is allowed"
    found = set()
    for one in applied:
        for rule in one["spec"].get(direction, ()):
            for peer in rule[key]:
                fixed = [pair for one in peer.values() for pair in one.get("matchLabels", {}).items()]
                alternatives = [fixed]
                for expression in (e for one in peer.values() for e in one.get("matchExpressions", ())):
                    assert expression["operator"] == "In"
                    alternatives = [
                        [*before, (expression["key"], value)]
                        for before in alternatives
                        for value in expression["values"]
                    ]
                for pairs in alternatives:
                    for port in rule.get("ports", [{"port": None}]):
                        found.add(Peer("+".join(sorted(peer)), tuple(sorted(pairs)), port["port"]))
    return found


def pod_peer(name: str, port: int) -> Peer:
    return Peer("podSelector", (("app.kubernetes.io/name", name),), port)


def namespace_peer(label: str, port: int | None, value: str = "true") -> Peer:
    return Peer("namespaceSelector", ((label, value),), port)


PROXY = namespace_peer("ringfence.io/reads", 8080)
DNS = namespace_peer("kubernetes.io/metadata.name", 53, "kube-system")
KAFKA, REDIS = pod_peer("kafka", 9092), pod_peer("valkey", 6379)


def called(name: str) -> set[Peer]:
    """The services that a service calls, by the URLs in its settings."""
    values = environment_of(SERVICES[name]).values()
    found = re.findall(r"http://(ringfence-[a-z]+)(?:\.ringfence)?:(\d+)", " ".join(values))
    return {pod_peer(host, int(port)) for host, port in found}


def has_redis(name: str) -> bool:
    return "LeaseStore(" in (ROOT / f"services/ringfence/{name.replace('-', '_')}/app.py").read_text()


@pytest.mark.parametrize("name", sorted(SERVICES.keys() - {"gateway"}))
def test_a_service_reaches_what_it_needs_and_nothing_else(name: str) -> None:
    expected = called(name)
    if name != "sign-page":
        expected |= {DNS, KAFKA}
    if has_redis(name):
        expected |= {REDIS}
    if name in ("issuer", "revoker"):
        expected |= {namespace_peer("ringfence.io/targets", None)}
    if name == "signals":
        expected |= {namespace_peer("ringfence.io/receivers", 443)}
    assert peers(SERVICES[name], "egress") == expected


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_service_is_reached_by_the_proxy_and_by_those_who_call_it(name: str) -> None:
    callers = {
        pod_peer(f"ringfence-{other}", 8080)
        for other in SERVICES
        if pod_peer(f"ringfence-{name}", 8080) in called(other)
    }
    allowed = peers(SERVICES[name], "ingress")
    if name == "registry":
        callers |= {pod_peer("ringfence-registry-tls", 8080)}  # the operator's, through which agents enrol
    if name == "gateway":
        agents = (("kubernetes.io/metadata.name", "agents"), ("ringfence.io/role", "agent"))
        assert Peer("namespaceSelector+podSelector", agents, GATEWAY_PORT) in allowed
        allowed = {one for one in allowed if one.port != GATEWAY_PORT}
    assert allowed == callers | {PROXY}


def test_the_job_of_topics_reaches_kafka_alone() -> None:
    job = ALL["Job/ringfence/ringfence-topics"]
    assert (peers(job, "egress"), peers(job, "ingress")) == ({DNS, KAFKA}, set())


def test_issuer_and_revoker_are_those_with_redis() -> None:
    assert {name for name in SERVICES if has_redis(name)} == {"issuer", "revoker"}


def test_network_policies_allow_only_named_peers() -> None:
    nothing = ALL["NetworkPolicy/ringfence/nothing"]["spec"]
    assert nothing["policyTypes"] == ["Ingress", "Egress"]
    assert set(nothing) == {"podSelector", "policyTypes"}
    for name, workload in workloads(*FOLDERS):
        if workload["metadata"]["namespace"] == "ringfence":
            assert selected(nothing["podSelector"], labels_of(workload)), name
    for name, one in ALL.items():
        for rule in one["spec"].get("ingress", []) if one["kind"] == "NetworkPolicy" else []:
            assert rule["from"], name
