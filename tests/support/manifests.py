"""The manifests of deploy/kubernetes: their documents, and what a test asks of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.support.compose import ROOT

FOLDER = ROOT / "deploy/kubernetes"
FOLDERS = ("services", "console", "scim", "signals")
"""What runs in the namespace of the services, and the sign page: each folder is one kustomization."""
AGENTS = "agents"
"""The gateway, and an agent as a Job."""

Document = dict[str, Any]


@cache
def documents(*folders: str) -> dict[str, Document]:
    """All documents of these folders, by kind, namespace and name."""
    found: dict[str, Document] = {}
    for folder in folders:
        for path in sorted((FOLDER / folder).glob("*.yaml")):
            if path.name == "kustomization.yaml":
                continue
            for one in yaml.safe_load_all(path.read_text()):
                metadata = one["metadata"]
                name = "/".join(
                    [
                        one["kind"],
                        *([metadata["namespace"]] if "namespace" in metadata else []),
                        metadata["name"],
                    ]
                )
                assert found.get(name, one) == one, f"{path}: {name} is in two files, and differs"
                found[name] = one
    return found


def workloads(*folders: str) -> Iterator[tuple[str, Document]]:
    """Name and document of everything that makes pods."""
    for name, one in documents(*folders).items():
        if "template" in one.get("spec", {}):
            yield name, one


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
    container = container_of(workload)
    values: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        values |= documents("services")[f"ConfigMap/ringfence/{source['configMapRef']['name']}"]["data"]
    for variable in container.get("env", ()):
        if "valueFrom" in variable:
            assert variable["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}
            values[variable["name"]] = f"{workload['metadata']['name']}-{replica}"
        else:
            values[variable["name"]] = variable["value"]
    assert all(isinstance(value, str) for value in values.values()), "Kubernetes takes texts only"
    return values


def port_of(container: Document, name: str) -> int:
    """The number of a port that probes and Services call by its name."""
    (port,) = [one["containerPort"] for one in container["ports"] if one["name"] == name]
    number: int = port
    return number


def files_of(folder: Path) -> set[str]:
    """The manifests in a folder, as its kustomization has to list them."""
    return {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
