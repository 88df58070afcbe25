"""Releases of the chart on a real API server: install, upgrade, roll back, uninstall.

No controller runs, so no pod starts, and a test ends the Jobs that Helm waits for. What the server does is real: it
validates and stores every object, and its Pod Security admission judges every pod.
"""

from __future__ import annotations

import copy
import json
import uuid
from typing import Any

import pytest

from tests.support.chart import (
    CHART,
    SIGN_PAGE,
    VALUES,
    Document,
    container_of,
    merged,
    pod_of,
    rendered,
)
from tests.support.servers.kubernetes import ApiServer

HERE = merged(
    VALUES,
    {
        # The resources of the Prometheus operator are not in this cluster.
        "monitoring": {"serviceMonitor": False, "alerts": False},
        # An address can be taken once, and each test has a release of its own.
        "services": {"gateway": {"clusterIP": ""}},
    },
)
PATHS = {
    "Service": "api/v1/namespaces/{}/services",
    "ServiceAccount": "api/v1/namespaces/{}/serviceaccounts",
    "StatefulSet": "apis/apps/v1/namespaces/{}/statefulsets",
    "Deployment": "apis/apps/v1/namespaces/{}/deployments",
    "PodDisruptionBudget": "apis/policy/v1/namespaces/{}/poddisruptionbudgets",
    "NetworkPolicy": "apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
    "Job": "apis/batch/v1/namespaces/{}/jobs",
}


class Release:
    """The release `ringfence` in a namespace of a test."""

    def __init__(self, server: ApiServer) -> None:
        self.server = server
        self.namespace = f"ringfence-{uuid.uuid4().hex[:8]}"
        server.namespace(self.namespace)
        self.agents = f"agents-{uuid.uuid4().hex[:8]}"
        server.namespace(self.agents)
        self.values = merged(HERE, {"agents": {"namespace": self.agents}})

    def helm(self, command: str, *more: str, changes: Document | None = None) -> str:
        """Run a command of Helm for the release, and return what it printed."""
        chart = [str(CHART)] if command in ("install", "upgrade") else []
        done = self.server.helm(
            command, "ringfence", *chart, *more, "--namespace", self.namespace, "--timeout", "60s",
            values=merged(self.values, changes or {}) if chart else None,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def install(self) -> list[str]:
        """Install it, and return the names of the Jobs in the order in which Helm let them run."""
        with self.server.controllers(self.namespace) as ended:
            self.helm("install")
        return [one["metadata"]["name"] for one in ended]

    def objects(self) -> dict[str, Document]:
        """All objects in its namespaces, by kind and name, but for what a cluster makes."""
        found: dict[str, Document] = {}
        for kind, path in PATHS.items():
            for namespace in (self.namespace, self.agents):
                answer = self.server.call("GET", f"/{path.format(namespace)}")
                found |= {f"{kind}/{one['metadata']['name']}": one for one in answer.json()["items"]}
        return {name: one for name, one in found.items() if name != "ServiceAccount/default"}

    def workload(self, kind: str, name: str) -> Document:
        found: Document = self.server.call(
            "GET", f"/{PATHS[kind].format(self.namespace)}/ringfence-{name}"
        ).json()
        return found


@pytest.fixture
def release(api_server: ApiServer) -> Release:
    return Release(api_server)


def test_installation_makes_every_object_after_its_jobs(release: Release) -> None:
    assert release.install() == ["ringfence-topics", "ringfence-trust-bundle"]
    expected = {
        f"{one['kind']}/{one['metadata']['name']}"
        for one in rendered(release.values, release.namespace)
        if one["kind"] != "Job"
    }
    assert release.objects().keys() == expected, "a Job that succeeded is deleted"


def test_server_keeps_every_field_of_a_workload(release: Release) -> None:
    """A field that the server does not know would be lost silently."""
    release.install()
    for one in rendered(release.values, release.namespace):
        if one["kind"] in ("StatefulSet", "Deployment", "NetworkPolicy", "PodDisruptionBudget"):
            stored = release.objects()[f"{one['kind']}/{one['metadata']['name']}"]
            assert lost(one["spec"], stored["spec"]) == [], one["metadata"]["name"]


def lost(wanted: Any, stored: Any, place: str = "") -> list[str]:
    """The places of what was wanted and is not stored. The server adds defaults."""
    if isinstance(wanted, dict):
        inner = [
            (value, stored.get(key) if isinstance(stored, dict) else None, key)
            for key, value in wanted.items()
        ]
    elif isinstance(wanted, list) and isinstance(stored, list) and len(wanted) == len(stored):
        inner = [(one, other, str(at)) for at, (one, other) in enumerate(zip(wanted, stored, strict=True))]
    else:
        return [] if wanted == stored else [f"{place}: {wanted} is {stored}"]
    return [entry for one, other, key in inner for entry in lost(one, other, f"{place}/{key}")]


def pod(workload: Document) -> Document:
    """A pod as a controller makes it of a workload."""
    made: Document = copy.deepcopy(workload["spec"]["template"])
    claims = [one["metadata"]["name"] for one in workload["spec"].get("volumeClaimTemplates", ())]
    made["spec"]["volumes"] += [
        {"name": one, "persistentVolumeClaim": {"claimName": f"{one}-0"}} for one in claims
    ]
    return made | {"metadata": {**made["metadata"], "name": "probe"}}


@pytest.mark.parametrize("values", [HERE, SIGN_PAGE], ids=["services", "sign page"])
def test_pod_of_each_template_is_admitted_under_the_restricted_standard(
    release: Release, values: Document
) -> None:
    documents = rendered(values, release.namespace)
    for one in documents:
        if one["kind"] == "ServiceAccount":
            release.server.call("POST", f"/{PATHS['ServiceAccount'].format(release.namespace)}", one)
    workloads = [one for one in documents if "template" in one.get("spec", {})]
    assert workloads
    for one in workloads:
        assert release.server.admits(release.namespace, pod(one)) is None, one["metadata"]["name"]


@pytest.mark.parametrize(
    ("context", "says"),
    [
        ({"allowPrivilegeEscalation": True}, "allowPrivilegeEscalation != false"),
        ({"capabilities": {"drop": []}}, "unrestricted capabilities"),
        ({"runAsUser": 0}, "runAsUser=0"),
    ],
)
def test_pod_with_more_privileges_is_refused(release: Release, context: Document, says: str) -> None:
    release.install()
    wider = pod(release.workload("StatefulSet", "policy"))
    wider["spec"]["containers"][0]["securityContext"] |= context
    assert says in str(release.server.admits(release.namespace, wider))


def test_upgrade_changes_replicas_and_image_and_rollback_takes_them_back(release: Release) -> None:
    release.install()
    before = release.workload("StatefulSet", "policy")["spec"]
    following = {"services": {"policy": {"replicas": 3}}, "image": {"digest": "", "tag": "0.1.1"}}
    with release.server.controllers(release.namespace) as ended:
        release.helm("upgrade", changes=following)
    assert [container_of(job)["image"] for job in ended] == ["registry.example/ringfence:0.1.1"] * 2
    policy = release.workload("StatefulSet", "policy")
    assert (policy["spec"]["replicas"], container_of(policy)["image"]) == (
        3,
        "registry.example/ringfence:0.1.1",
    )
    console = container_of(release.workload("Deployment", "console"))
    assert console["image"] == "registry.example/ringfence:0.1.1"
    release.helm("rollback", "1")
    assert release.workload("StatefulSet", "policy")["spec"] == before
    history = json.loads(
        release.server.helm(
            "history", "ringfence", "--namespace", release.namespace, "--output", "json"
        ).stdout
    )
    assert [(one["revision"], one["status"]) for one in history][-1] == (3, "deployed")


def test_upgrade_of_one_service_leaves_the_others_alone(release: Release) -> None:
    release.install()
    before = {
        name: one["metadata"]["generation"]
        for name, one in release.objects().items()
        if "StatefulSet" in name
    }
    with release.server.controllers(release.namespace):
        release.helm("upgrade", changes={"services": {"audit": {"image": {"tag": "0.1.1"}}}})
    after = {
        name: one["metadata"]["generation"]
        for name, one in release.objects().items()
        if "StatefulSet" in name
    }
    assert {name for name, generation in after.items() if generation != before[name]} == {
        "StatefulSet/ringfence-audit"
    }


def test_failed_job_stops_the_upgrade_and_stays_with_its_log(release: Release) -> None:
    release.install()
    before = release.workload("StatefulSet", "policy")["metadata"]["generation"]
    with release.server.controllers(release.namespace, failing="ringfence-topics") as ended:
        done = release.server.helm(
            "upgrade", "ringfence", str(CHART), "--namespace", release.namespace, "--timeout", "60s",
            values=merged(release.values, {"image": {"digest": "", "tag": "0.1.1"}}),
        )  # fmt: skip
    assert done.returncode != 0
    assert "pre-upgrade hooks failed" in done.stderr
    assert [one["metadata"]["name"] for one in ended] == ["ringfence-topics"], "the next Job is not begun"
    assert release.workload("StatefulSet", "policy")["metadata"]["generation"] == before
    assert "Job/ringfence-topics" in release.objects()
    with release.server.controllers(release.namespace):
        release.helm("upgrade", changes={"image": {"digest": "", "tag": "0.1.1"}})
    assert "Job/ringfence-topics" not in release.objects()


def test_uninstalled_release_leaves_nothing(release: Release) -> None:
    release.install()
    release.helm("uninstall")
    assert release.objects() == {}


def test_service_that_is_switched_off_later_is_removed(release: Release) -> None:
    release.install()
    with release.server.controllers(release.namespace):
        release.helm("upgrade", changes={"services": {"console": {"enabled": False}}})
    assert not [name for name in release.objects() if name.endswith("/ringfence-console")]


def test_notes_name_the_next_commands(release: Release) -> None:
    with release.server.controllers(release.namespace):
        printed = release.helm("install")
        again = release.helm("upgrade")
    assert "ringfence init --publish" in printed
    assert "ringfence init --publish" not in again
    for printed_part in ("statefulset/ringfence-policy", "deployment/ringfence-console"):
        assert printed_part in printed
    assert f"kubectl -n {release.namespace} rollout status" in again


def test_pods_have_no_token_of_the_server(release: Release) -> None:
    """The admission of service accounts adds a token to each pod that does not refuse it."""
    release.install()
    for kind, name in (("StatefulSet", "policy"), ("Deployment", "console")):
        made = release.server.call(
            "POST",
            f"/api/v1/namespaces/{release.namespace}/pods",
            pod(release.workload(kind, name)),
            dryRun="All",
        ).json()
        sources = [
            source
            for one in made["spec"]["volumes"]
            for source in one.get("projected", {}).get("sources", ())
        ]
        assert all("secret" in source for source in sources)
        assert pod_of(release.workload(kind, name))["automountServiceAccountToken"] is False
