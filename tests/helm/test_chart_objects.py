"""What the chart makes: valid for each version of Kubernetes, unprivileged, of one piece with Compose."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml

from ringfence.cli.commands.serve import SERVED
from ringfence.cli.shared.settings_check import known_settings
from tests.support.chart import (
    NEWEST,
    VERSIONS,
    Document,
    container_of,
    documents,
    environment_of,
    labels_of,
    name_of,
    pod_of,
    port_of,
    secrets_of,
    services,
    workloads,
)
from tests.support.compose import ROOT
from tests.support.compose import loaded as compose_loaded
from tests.support.pods import check_unprivileged

PAGE = (ROOT / "docs/operators/kubernetes.md").read_text()
ON_MACHINES = {"runner": "a runner needs a machine of its own"}
"""Services that the chart has not, and the sentence of the page that says why."""
KEYS = "/run/secrets/ringfence/"
OF_PROMETHEUS = ("ServiceMonitor", "PrometheusRule")
"""Kubernetes has no schema of these: they are resources of the Prometheus operator."""


@pytest.mark.parametrize("version", VERSIONS)
def test_objects_follow_the_schemas_of_kubernetes(version: str) -> None:
    checked = [one for one in documents(version).values() if one["kind"] not in OF_PROMETHEUS]
    assert len(checked) > 40
    for one in checked:
        try:
            kubernetes_validate.validate(one, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            pytest.fail(f"{name_of(one)}: {error.message}")


def test_misspelt_field_is_found_by_the_schema() -> None:
    right = documents()["StatefulSet/ringfence/ringfence-policy"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**right, "spec": {**right["spec"], "replica": 2}}, NEWEST, strict=True)


def test_service_has_a_template_or_a_reason() -> None:
    assert {*services(), *ON_MACHINES} == set(SERVED)
    assert not services().keys() & ON_MACHINES.keys()
    for name, sentence in ON_MACHINES.items():
        assert sentence in PAGE.replace("\n", " "), name


@pytest.mark.parametrize("name", sorted(set(SERVED) - {"runner"}))
def test_selectors_agree_and_hold_nothing_that_an_upgrade_changes(name: str) -> None:
    workload = services()[name]
    place = f"{workload['metadata']['namespace']}/ringfence-{name}"
    selector = workload["spec"]["selector"]["matchLabels"]
    assert selector == {
        "app.kubernetes.io/name": "ringfence",
        "app.kubernetes.io/instance": "ringfence",
        "app.kubernetes.io/component": name,
    }
    assert selector.items() <= labels_of(workload).items()
    assert documents()[f"Service/{place}"]["spec"]["selector"] == selector
    assert documents()[f"PodDisruptionBudget/{place}"]["spec"] == {
        "maxUnavailable": 1,
        "selector": {"matchLabels": selector},
    }
    (spread,) = pod_of(workload)["affinity"]["podAntiAffinity"][
        "preferredDuringSchedulingIgnoredDuringExecution"
    ]
    assert spread["podAffinityTerm"]["labelSelector"]["matchLabels"] == selector


@pytest.mark.parametrize("name", sorted(set(SERVED) - {"runner"}))
def test_update_of_a_deployment_keeps_all_replicas_and_a_stateful_set_replaces_one(name: str) -> None:
    spec = services()[name]["spec"]
    assert spec["replicas"] == (1 if name == "gateway" else 2)
    if name in ("console", "sign-page"):
        assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    else:
        assert spec["updateStrategy"] == {"type": "RollingUpdate"}


def test_pods_have_no_privilege_and_no_token() -> None:
    for name, workload in workloads():
        check_unprivileged(pod_of(workload))
        account = pod_of(workload).get("serviceAccountName")
        if workload["kind"] != "Job":
            place = f"{workload['metadata']['namespace']}/{account}"
            assert documents()[f"ServiceAccount/{place}"]["automountServiceAccountToken"] is False, name


@pytest.mark.parametrize("name", sorted(set(SERVED) - {"runner"}))
def test_service_listens_where_probes_and_service_connect(name: str) -> None:
    workload = services()[name]
    container, environment = container_of(workload), environment_of(workload)
    listens = environment["RINGFENCE_SIGN_PAGE_HTTP" if name == "sign-page" else "RINGFENCE_HTTP"]
    assert listens == f"0.0.0.0:{port_of(container, 'http')}"
    for probe in ("readinessProbe", "livenessProbe", "startupProbe"):
        assert container[probe]["httpGet"]["port"] == "http"
    place = f"{workload['metadata']['namespace']}/{workload['metadata']['name']}"
    for port in documents()[f"Service/{place}"]["spec"]["ports"]:
        assert port["port"] == port_of(container, port["targetPort"]), (
            "clients use the number that it listens at"
        )


def test_probes_of_the_sign_page_name_the_host_of_its_origin() -> None:
    container = container_of(services()["sign-page"])
    origin = environment_of(services()["sign-page"])["RINGFENCE_SIGN_PAGE_ORIGIN"]
    for probe in ("readinessProbe", "livenessProbe", "startupProbe"):
        assert container[probe]["httpGet"]["httpHeaders"] == [
            {"name": "Host", "value": urlsplit(origin).netloc}
        ]


@pytest.mark.parametrize("name", sorted(set(SERVED) - {"runner"}))
def test_service_has_its_own_secrets_and_no_others(name: str) -> None:
    workload = services()[name]
    named = [value for value in environment_of(workload).values() if value.startswith(KEYS)]
    if name == "sign-page":
        assert (secrets_of(pod_of(workload)), named) == ([], [])
        return
    tls = ["ringfence-gateway-tls"] if name == "gateway" else []
    assert secrets_of(pod_of(workload)) == [f"ringfence-{name}-keys", *tls]
    assert environment_of(workload)["RINGFENCE_KEY_FILE"] == f"{KEYS}{name}.json"
    (volume,) = [one for one in pod_of(workload)["volumes"] if "projected" in one]
    assert volume["projected"]["defaultMode"] == 0o400  # yaml reads 0400 as an octal number


def test_settings_are_ones_that_are_read() -> None:
    for name, workload in workloads():
        own = {name for name in environment_of(workload) if name.startswith("RINGFENCE_")}
        assert own <= known_settings(), name


LEFT_TO_OPERATORS = {"RINGFENCE_SCIM_MAIL_DOMAIN", "RINGFENCE_GATEWAY_TARGETS_CA_FILE"}
"""Compose passes these on from outside, if they are set there."""
# In a cluster agents are in other pods and come by TLS, so there is no socket of a task.
NOT_OF_A_POD = {"gateway": {"RINGFENCE_GATEWAY_SOCKETS", "RINGFENCE_GATEWAY_CA_FILE"}}


@pytest.mark.parametrize("name", sorted(set(SERVED) - {"runner", "sign-page"}))
def test_pod_has_the_settings_that_compose_gives_the_service(name: str) -> None:
    compose = set(compose_loaded("docker-compose.yml")["services"][name]["environment"])
    missing = compose - environment_of(services()[name]).keys() - LEFT_TO_OPERATORS
    # Only services that have leases or budgets in Redis get its address.
    without_redis = set() if name in ("gateway", "issuer", "revoker") else {"RINGFENCE_REDIS_URL"}
    assert missing == NOT_OF_A_POD.get(name, set()) | without_redis


def hook(job: str) -> dict[str, Any]:
    annotations: dict[str, Any] = documents()[f"Job/ringfence/ringfence-{job}"]["metadata"]["annotations"]
    return annotations


def test_jobs_run_before_installation_and_upgrade_topics_first_and_failed_ones_stay() -> None:
    for job in ("topics", "trust-bundle"):
        assert hook(job)["helm.sh/hook"] == "pre-install,pre-upgrade"
        assert hook(job)["helm.sh/hook-delete-policy"] == "before-hook-creation,hook-succeeded"
    assert int(hook("topics")["helm.sh/hook-weight"]) < int(hook("trust-bundle")["helm.sh/hook-weight"])


def test_jobs_need_no_object_of_the_chart() -> None:
    """Helm makes all else after the hooks of an installation."""
    for job in ("topics", "trust-bundle"):
        pod = pod_of(documents()[f"Job/ringfence/ringfence-{job}"])
        assert "serviceAccountName" not in pod
        made = {one["metadata"]["name"] for one in documents().values() if one["kind"] == "ConfigMap"}
        assert not made


def test_trust_bundle_comes_from_the_config_map_of_the_operator() -> None:
    job = documents()["Job/ringfence/ringfence-trust-bundle"]
    (volume,) = [one for one in pod_of(job)["volumes"] if "configMap" in one]
    assert volume["configMap"] == {"name": "ringfence-trust-bundle"}
    (mount,) = [one for one in container_of(job)["volumeMounts"] if one["name"] == volume["name"]]
    assert container_of(job)["args"] == ["trust", "publish", f"{mount['mountPath']}/trust-bundle.jws"]


def test_alerts_are_those_of_prometheus() -> None:
    alerts = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
    assert documents()["PrometheusRule/ringfence/ringfence"]["spec"] == alerts


def test_service_monitor_selects_each_service_with_metrics() -> None:
    selector = documents()["ServiceMonitor/ringfence/ringfence"]["spec"]["selector"]
    (expression,) = selector["matchExpressions"]
    chosen = {
        one["metadata"]["labels"][expression["key"]]
        for one in documents().values()
        if one["kind"] == "Service"
        and selector["matchLabels"].items() <= one["metadata"]["labels"].items()
        and one["metadata"]["labels"][expression["key"]] not in expression["values"]
    }
    assert chosen == services().keys() - {"sign-page"}


def test_agents_in_their_namespace_reach_gateway_and_proxy_alone() -> None:
    def spec(name: str) -> Document:
        found: Document = documents()[f"NetworkPolicy/agents/ringfence-{name}"]["spec"]
        return found

    assert spec("nothing") == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert spec("agents")["podSelector"] == {"matchLabels": {"ringfence.io/role": "agent"}}
    assert "ingress" not in spec("agents")
    reached = {
        (tuple(sorted(to["podSelector"]["matchLabels"].values())), rule["ports"][0]["port"])
        for rule in spec("agents")["egress"]
        for to in rule["to"]
    }
    assert reached == {(("gateway", "ringfence"), 8707), (("ringfence-registry-tls",), 8443)}
