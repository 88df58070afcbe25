"""deploy/kubernetes: valid for several versions of Kubernetes, closed, and of one piece."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from ringfence.client.settings import ClientSettings
from ringfence.gateway.settings import GatewaySettings
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.messages.api import GATEWAY_PORT
from tests.support.compose import ROOT
from tests.support.pods import check_unprivileged

FOLDER = ROOT / "deploy/kubernetes/agents"
VERSIONS = ["1.30", "1.33", "1.37"]


def documents(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one is not None]


ALL = {
    f"{one['kind']}/{one['metadata']['name']}/{path.name}": one
    for path in sorted(FOLDER.glob("*.yaml"))
    if path.name != "kustomization.yaml"
    for one in documents(path)
}


def pods() -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """Name, specification and labels of each pod template."""
    for name, one in ALL.items():
        if template := one.get("spec", {}).get("template"):
            yield name, template["spec"], template["metadata"]["labels"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ALL)
def test_manifest_follows_the_schema_of_kubernetes(name: str, version: str) -> None:
    kubernetes_validate.validate(ALL[name], version, strict=True)


def test_a_mistake_would_be_found() -> None:
    name = next(name for name in ALL if name.startswith("Job/"))
    wrong = {**ALL[name], "spec": {**ALL[name]["spec"], "activeDeadlineSecond": 5}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_the_kustomization_has_every_file() -> None:
    (kustomization,) = documents(FOLDER / "kustomization.yaml")
    there = {path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == there


@pytest.mark.parametrize(("name", "pod", "labels"), list(pods()), ids=lambda value: str(value)[:40])
def test_a_pod_has_no_privilege_and_no_token(name: str, pod: dict[str, Any], labels: dict[str, str]) -> None:
    check_unprivileged(pod)


def test_the_agent_is_closed() -> None:
    ((_, pod, labels),) = [one for one in pods() if one[2].get("ringfence.io/role") == "agent"]
    assert (
        pod["runtimeClassName"] == ALL["RuntimeClass/ringfence-agents/runtime-class.yaml"]["metadata"]["name"]
    )
    assert (pod["hostUsers"], pod["dnsPolicy"]) == (False, "None")
    on_disk = [
        one for one in pod["volumes"] if "emptyDir" in one and one["emptyDir"].get("medium") != "Memory"
    ]
    assert on_disk == []
    (token,) = [one["projected"]["sources"] for one in pod["volumes"] if "projected" in one]
    assert [one["serviceAccountToken"]["audience"] for one in token] == ["spiffe://acme.example/enrol"]
    policies = [one for one in ALL.values() if one["kind"] == "NetworkPolicy"]
    (nothing,) = [one for one in policies if one["spec"]["podSelector"] == {}]
    assert nothing["metadata"]["namespace"] == "agents"
    assert (set(nothing["spec"]), nothing["spec"]["policyTypes"]) == (
        {"podSelector", "policyTypes"},
        ["Ingress", "Egress"],
    )
    (own,) = [one for one in policies if one["spec"]["podSelector"].get("matchLabels") == labels]
    # The proxy before the registry is no endpoint of the registry's Service.
    (proxy,) = [one for one in policies if one["metadata"]["name"] == "agents-to-registry-tls"]
    assert proxy["spec"]["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "ringfence-registry-tls"}
    assert proxy["spec"]["ingress"][0]["ports"] == [{"protocol": "TCP", "port": 8443}]
    assert "ingress" not in own["spec"]
    reached = {
        (to["podSelector"]["matchLabels"]["app.kubernetes.io/name"], rule["ports"][0]["port"])
        for rule in own["spec"]["egress"]
        for to in rule["to"]
    }
    assert reached == {("ringfence-gateway", GATEWAY_PORT), ("ringfence-registry-tls", 8443)}
    aliases = {one["hostnames"][0]: one["ip"] for one in pod["hostAliases"]}
    service = ALL["Service/ringfence-gateway/gateway.yaml"]["spec"]
    assert aliases["gateway.ringfence"] == service["clusterIP"]


def test_settings_are_ones_that_are_read() -> None:
    known = {
        f"RINGFENCE_{prefix}{field}".upper()
        for prefix, kind in (("", ClientSettings), ("", ServiceSettings), ("GATEWAY_", GatewaySettings))
        for field in kind.model_fields
    }
    for _, pod, _ in pods():
        for one in pod["containers"]:
            names = {variable["name"] for variable in one["env"]}
            assert {name for name in names if name.startswith("RINGFENCE_")} <= known
