"""Pods of the Helm chart in the image, by Podman: the Jobs end well, and a service becomes ready.

Podman reads the pod as the chart renders it: image, user, arguments, environment, limits, security context. Only its
volumes differ, because Podman 4 knows no projected ones: folders of this machine with the same files and rights. The
test asks as the chart's probes do.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from ringfence.dev.processes import StackError
from tests.support.chart import VALUES, Document, container_of, merged, pod_of, rendered
from tests.support.containers import WITHIN_S, Compose, Podman

pytestmark = pytest.mark.timeout(600)

NETWORK = "ringfence_default"
GROUP = 10001
"""The `fsGroup` of all pods."""


@dataclass
class ChartPods:
    """Pods of the chart beside the Kafka and the Valkey of docker-compose.yml."""

    podman: Podman
    compose: Compose
    workloads: dict[str, Document]

    def play(self, name: str) -> str:
        """Start a pod of a workload, and return the name of its container."""
        workload = self.workloads[name]
        spec = copy.deepcopy(pod_of(workload))
        for volume in spec["volumes"]:
            folder = self.compose.folder / f"{name}-{volume['name']}"
            self._fill(folder, volume)
            for kind in volume.keys() - {"name"}:
                del volume[kind]
            volume["hostPath"] = {"path": str(folder), "type": "Directory"}
        # Podman would publish each port at this machine's, and probe with a curl that the image has not got.
        for field in ("ports", "startupProbe", "readinessProbe", "livenessProbe"):
            spec["containers"][0].pop(field, None)
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"chart-{name}"}, "spec": spec}
        file = self.compose.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(pod))
        self.podman("kube", "play", "--network", NETWORK, str(file))
        return f"chart-{name}-{container_of(workload)['name']}"

    def _fill(self, folder: Path, volume: Document) -> None:
        """Make the folder of a volume, with the rights that a kubelet gives."""
        folder.mkdir()
        os.chown(folder, 0, GROUP)
        folder.chmod(0o2775 if "emptyDir" in volume else 0o755)
        files = {}
        keys = self.compose.folder / ".ringfence"
        if "projected" in volume:
            (name,) = [source["secret"]["name"] for source in volume["projected"]["sources"]]
            service = name.removeprefix("ringfence-").removesuffix("-keys")
            files = {path.name: path for path in (keys / "keys").glob(f"{service}*.json")}
        elif "configMap" in volume:
            files = {"trust-bundle.jws": keys / "trust-bundle.jws"}
        for name, source in files.items():
            shutil.copy(source, folder / name)
            os.chown(folder / name, 0, GROUP)
            (folder / name).chmod(0o440)

    def ended(self, name: str) -> str:
        """Run a Job's pod to its end, and return its output. Raises StackError unless it succeeded."""
        container = self.play(name)
        status = self.podman("wait", container).stdout.strip()
        done = self.podman("logs", container)
        if status != "0":
            raise StackError(f"{name} ended with {status}: {done.stdout}{done.stderr}")
        return done.stdout

    def probe(self, name: str, container: str, kind: str) -> str:
        """Ask as a probe of the chart does, inside of the pod. Returns why it fails; nothing if it succeeds."""
        path = container_of(self.workloads[name])[kind]["httpGet"]["path"]
        ask = f"import urllib.request as u; u.urlopen('http://127.0.0.1:8080{path}', timeout=3)"
        done = self.podman("exec", container, "python", "-c", ask, check=False)
        return "" if done.returncode == 0 else done.stderr[-300:]

    def remove(self, name: str) -> None:
        self.podman("pod", "rm", "--force", "--time", "30", f"chart-{name}", check=False)


@pytest.fixture(scope="module")
def chart(podman: Podman, image: str) -> Iterator[ChartPods]:
    """With Kafka and Valkey, and nothing else yet."""
    folder = tempfile.mkdtemp(prefix="rf-")
    made = Compose(podman, Path(folder))
    repository, _, tag = image.partition(":")
    values = merged(
        VALUES,
        {
            "image": {"repository": repository, "tag": tag, "digest": ""},
            "settings": {
                "RINGFENCE_KAFKA": "kafka:9092",
                "RINGFENCE_REPLICATION": "1",
                "RINGFENCE_TRUST_DOMAIN": "ringfence.local",
                "RINGFENCE_TRUST_ROOT": made.environment["RINGFENCE_TRUST_ROOT"],
            },
            "redis": {"url": "redis://valkey:6379/0"},
        },
    )
    names = {
        one["metadata"]["name"].removeprefix("ringfence-"): one
        for one in rendered(values)
        if "template" in one.get("spec", {})
    }
    pods = ChartPods(podman, made, names)
    try:
        made.up("kafka", "valkey")
        yield pods
    finally:
        for name in names:
            pods.remove(name)
        made.down("--volumes")
        shutil.rmtree(folder)


def test_jobs_make_topics_and_publish_the_bundle_and_services_become_ready(chart: ChartPods) -> None:
    assert "created ringfence." in chart.ended("topics")
    assert "Trust bundle 1 is on Kafka now" in chart.ended("trust-bundle")
    # The issuer is ready once it hears of a revoker.
    containers = {name: chart.play(name) for name in ("registry", "policy", "issuer", "revoker")}
    for name, container in containers.items():
        deadline = time.monotonic() + WITHIN_S
        while why := chart.probe(name, container, "readinessProbe"):
            log = chart.podman("logs", container, check=False).stderr
            assert time.monotonic() < deadline, f"{name}: {why}{log[-2000:]}"
            time.sleep(0.5)
        assert chart.probe(name, container, "livenessProbe") == ""
        status = chart.podman("exec", container, "cat", "/proc/1/status").stdout
        assert "CapEff:\t0000000000000000" in status
        assert "NoNewPrivs:\t1" in status
        assert "Uid:\t10001" in status
        assert chart.podman("exec", container, "touch", "/opt/ringfence/x", check=False).returncode != 0
