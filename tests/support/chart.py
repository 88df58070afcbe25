"""The chart deploy/helm/ringfence as Helm renders it: its documents, and what a test asks of them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml

from ringfence.dev.processes import StackError
from tests.support.compose import ROOT

CHART = ROOT / "deploy/helm/ringfence"
DIGEST = "sha256:" + "0" * 64
OLDEST, NEWEST = "1.30", "1.37"
VERSIONS = [f"1.{minor}" for minor in range(30, 38)]
"""Versions of Kubernetes that the chart is rendered for and validated by."""

Document = dict[str, Any]

_SHARED: Document = {
    "image": {"repository": "registry.example/ringfence", "digest": DIGEST},
    "settings": {"RINGFENCE_TRUST_DOMAIN": "acme.example", "RINGFENCE_TRUST_ROOT": "A" * 43},
}
VALUES: Document = {
    **_SHARED,
    "settings": {
        **_SHARED["settings"],
        "RINGFENCE_KAFKA": "kafka.ringfence:9092",
        "RINGFENCE_ISSUER_URL": "https://issuer.acme.example",
        "RINGFENCE_POLICY_URL": "https://policy.acme.example",
    },
    "redis": {"url": "redis://valkey.ringfence:6379/0"},
    "services": {
        "gateway": {
            "enabled": True,
            "settings": {"RINGFENCE_GATEWAY_NAMES": "gateway.ringfence:8707"},
            "clusterIP": "10.96.0.107",
        },
        "scim": {"enabled": True, "settings": {"RINGFENCE_SCIM_URL": "https://scim.acme.example/scim/v2"}},
        "signals": {"enabled": True, "settings": {"RINGFENCE_SIGNALS_URL": "https://signals.acme.example"}},
        "console": {
            "enabled": True,
            "settings": {"RINGFENCE_CONSOLE_ORIGIN": "https://console.acme.example"},
        },
    },
    "jobs": {"trustBundle": {"configMap": "ringfence-trust-bundle"}},
    "agents": {"namespace": "agents"},
    "monitoring": {"serviceMonitor": True, "alerts": True},
}
"""The release `ringfence`, in the namespace of this name, with everything that one release can have."""
SIGN_PAGE: Document = {
    **_SHARED,
    "services": {
        **{name: {"enabled": False} for name in ("registry", "policy", "issuer", "revoker", "audit")},
        "sign-page": {
            "enabled": True,
            "settings": {
                "RINGFENCE_SIGN_PAGE_ORIGIN": "https://sign.acme.example",
                "RINGFENCE_SIGN_PAGE_RP_ID": "acme.example",
                "RINGFENCE_SIGN_PAGE_SESSION_ORIGINS": '["https://console.acme.example"]',
                "RINGFENCE_SIGN_PAGE_LEAST_VERSION": "1",
            },
        },
    },
    "jobs": {"topics": False},
}
"""The release `ringfence` in the namespace `ringfence-sign-page`."""


@cache
def program(name: str) -> str:
    """The path of a program that a script of `.ci` prints. Raises StackError if it cannot be had."""
    done = subprocess.run([ROOT / ".ci" / name], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StackError(f"{name} is not to be had: {done.stderr[-2000:]}")
    return done.stdout.strip()


def helm(*arguments: str, values: Document | None = None) -> subprocess.CompletedProcess[str]:
    """Run Helm, with values from a document. The caller looks at its exit status."""
    given = [] if values is None else ["--values", "-"]
    return subprocess.run(
        [program("helm"), *arguments, *given],
        input=yaml.safe_dump(values or {}), capture_output=True, text=True, check=False,
    )  # fmt: skip


def merged(values: Document, changes: Document) -> Document:
    """Values with changes, as Helm merges them: maps key by key, everything else is replaced."""
    result = dict(values)
    for key, value in changes.items():
        both_maps = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both_maps else value
    return result


def rendered(values: Document, namespace: str = "ringfence", version: str = NEWEST) -> list[Document]:
    """The documents of the release `ringfence`. Raises StackError with what Helm says."""
    done = helm(
        "template", "ringfence", str(CHART), "--namespace", namespace, "--kube-version", version, values=values
    )  # fmt: skip
    if done.returncode != 0:
        raise StackError(done.stderr)
    return [one for one in yaml.safe_load_all(done.stdout) if one is not None]


def name_of(document: Document) -> str:
    """Kind, namespace and name."""
    metadata = document["metadata"]
    return f"{document['kind']}/{metadata['namespace']}/{metadata['name']}"


@cache
def documents(version: str = NEWEST) -> dict[str, Document]:
    """All that the chart can make, the sign page too, by kind, namespace and name."""
    all_of = [*rendered(VALUES, version=version), *rendered(SIGN_PAGE, "ringfence-sign-page", version)]
    found = {name_of(one): one for one in all_of}
    assert len(found) == len(all_of), "two objects have one name"
    return found


def workloads() -> Iterator[tuple[str, Document]]:
    """Name and document of everything that makes pods."""
    for name, one in documents().items():
        if "template" in one.get("spec", {}):
            yield name, one


@cache
def services() -> dict[str, Document]:
    """By what `ringfence serve` is asked for: the workload that runs it."""
    return {
        name: one
        for _, one in workloads()
        if (args := container_of(one)["args"])[0] == "serve"
        for name in args[1:]
    }


def pod_of(workload: Document) -> Document:
    """The specification of the pods of a workload."""
    pod: Document = workload["spec"]["template"]["spec"]
    return pod


def labels_of(workload: Document) -> dict[str, str]:
    """The labels of the pods of a workload."""
    labels: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return labels


def container_of(workload: Document) -> Document:
    """The one container of its pods."""
    (container,) = pod_of(workload)["containers"]
    found: Document = container
    return found


def environment_of(workload: Document, replica: int = 0) -> dict[str, str]:
    """The environment of its container. The pod's name is that of this replica in a StatefulSet."""
    values: dict[str, str] = {}
    for variable in container_of(workload).get("env", ()):
        assert variable["name"] not in values, "a variable is there twice"
        if "valueFrom" in variable:
            assert variable["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}
            values[variable["name"]] = f"{workload['metadata']['name']}-{replica}"
        else:
            values[variable["name"]] = variable["value"]
    assert all(isinstance(value, str) for value in values.values()), "Kubernetes takes texts only"
    return values


def secrets_of(pod: Document) -> list[str]:
    """The names of the Secrets whose files a pod has."""
    return [
        source["secret"]["name"]
        for volume in pod["volumes"]
        for source in volume.get("projected", {}).get("sources", ())
        if "secret" in source
    ]


def port_of(container: Document, name: str) -> int:
    """The number of a port that probes and Services call by its name."""
    (port,) = [one["containerPort"] for one in container["ports"] if one["name"] == name]
    number: int = port
    return number
