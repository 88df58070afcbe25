"""What every pod of the Kubernetes manifests has to be."""

from __future__ import annotations

from typing import Any


def check_unprivileged(pod: dict[str, Any]) -> None:
    """Check that the specification of a pod gives it no privilege, no token and no path of its host."""
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False, "variables of Kubernetes look like settings"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for one in pod["containers"]:
        assert one["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "@sha256:" in one["image"]
        assert one["resources"]["limits"]["memory"]
    assert not any("hostPath" in volume for volume in pod["volumes"])
