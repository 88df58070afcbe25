"""deploy/kubernetes/services: valid for several versions of Kubernetes, closed, complete, and of one piece."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from ringfence.cli.shared.settings_check import known_settings
from tests.support.compose import ROOT
from tests.support.pods import check_unprivileged

FOLDER = ROOT / "deploy/kubernetes/services"
VERSIONS = ["1.30", "1.33", "1.37"]
SERVICES = ("registry", "policy", "issuer", "revoker", "audit")


def documents(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one is not None]


ALL = {
    f"{one['kind']}/{one['metadata']['name']}": one
    for path in sorted(FOLDER.glob("*.yaml"))
    if path.name != "kustomization.yaml"
    for one in documents(path)
}


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and specification of each pod template."""
    for name, one in ALL.items():
        if template := one.get("spec", {}).get("template"):
            yield name, template["spec"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ALL)
def test_it_follows_the_schema_of_kubernetes(name: str, version: str) -> None:
    kubernetes_validate.validate(ALL[name], version, strict=True)


def test_a_mistake_would_be_found() -> None:
    right = ALL["StatefulSet/ringfence-policy"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            {**right, "spec": {**right["spec"], "replica": 2}}, VERSIONS[-1], strict=True
        )


def test_the_kustomization_has_every_file() -> None:
    (kustomization,) = documents(FOLDER / "kustomization.yaml")
    assert set(kustomization["resources"]) == {path.name for path in FOLDER.glob("*.yaml")} - {
        "kustomization.yaml"
    }


def test_every_service_has_two_replicas_and_one_is_always_there() -> None:
    for service in SERVICES:
        workload = ALL[f"StatefulSet/ringfence-{service}"]
        assert workload["spec"]["replicas"] == 2
        labels = workload["spec"]["template"]["metadata"]["labels"]
        selector = workload["spec"]["selector"]["matchLabels"]
        assert selector.items() <= labels.items()
        assert ALL[f"Service/ringfence-{service}"]["spec"]["selector"] == selector
        assert ALL[f"PodDisruptionBudget/ringfence-{service}"]["spec"]["selector"]["matchLabels"] == selector
        (container,) = workload["spec"]["template"]["spec"]["containers"]
        assert container["args"] == ["serve", service]


@pytest.mark.parametrize(("name", "pod"), list(pods()), ids=lambda value: str(value)[:40])
def test_a_pod_has_no_privilege_and_no_token(name: str, pod: dict[str, Any]) -> None:
    check_unprivileged(pod)


def test_each_service_gets_its_own_keys_and_no_others() -> None:
    for service in SERVICES:
        pod = ALL[f"StatefulSet/ringfence-{service}"]["spec"]["template"]["spec"]
        secrets = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
        # yaml reads 0400 as an octal number.
        assert secrets == [{"secretName": f"ringfence-{service}-keys", "defaultMode": 0o400}]
        variables = {one["name"]: one.get("value", "") for one in pod["containers"][0]["env"]}
        assert variables["RINGFENCE_KEY_FILE"] == f"/run/secrets/ringfence/{service}.json"


def test_settings_are_ones_that_are_read() -> None:
    names = set(ALL["ConfigMap/ringfence-settings"]["data"])
    for _, pod in pods():
        names |= {variable["name"] for one in pod["containers"] for variable in one.get("env", ())}
    assert {name for name in names if name.startswith("RINGFENCE_")} <= known_settings()


def test_nothing_is_open_that_is_not_named() -> None:
    nothing = ALL["NetworkPolicy/nothing"]["spec"]
    assert nothing["policyTypes"] == ["Ingress", "Egress"]
    assert set(nothing) == {"podSelector", "policyTypes"}
    selected = nothing["podSelector"]["matchLabels"].items()
    for name, one in ALL.items():
        if template := one["spec"].get("template") if "spec" in one else None:
            assert selected <= template["metadata"]["labels"].items(), name
    for name, one in ALL.items():
        for rule in one.get("spec", {}).get("ingress", []) if one["kind"] == "NetworkPolicy" else []:
            assert rule["from"], name
