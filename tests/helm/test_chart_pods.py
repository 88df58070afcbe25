"""Each pod of the chart starts as its template says, and its probes pass: on this machine, without a cluster.

The steps are those of docs/operators/kubernetes.md. Only what an operator chooses is replaced.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from ringfence.client.admin.trust_setup import TrustFolder, make_trust
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.service.bearer_tokens import new_token
from tests.brokers import RedisServer
from tests.brokers.secured import Authority
from tests.conftest import Kafka
from tests.support.chart import documents, environment_of, pod_of, secrets_of, workloads
from tests.support.installation import THIS_CLONE, Installation, lease, organise
from tests.support.pods import Node, Pod

WITHIN_S = 60.0
ORIGINS = (
    "--sign-origin", "https://sign.acme.example", "--session-origin", "https://console.acme.example",
    "--rp-id", "acme.example",
)  # fmt: skip
WORKLOADS = {one["metadata"]["name"].removeprefix("ringfence-"): one for _, one in workloads()}
"""All pods of Ringfence, by the names of their services."""
JOBS = ("topics", "trust-bundle")
SERVING = tuple(name for name in WORKLOADS if name not in JOBS)
PLACES = {"RINGFENCE_KAFKA", "RINGFENCE_REDIS_URL", "RINGFENCE_TRUST_ROOT", "RINGFENCE_REPLICATION"}
"""Settings that an operator chooses. A pod gets each only if the chart gives it to this pod."""


@dataclass
class Cluster:
    """The installation, and its pods."""

    here: Installation
    node: Node
    given: dict[str, dict[str, bytes]]
    """The files of each Secret, and of the ConfigMap with the trust bundle."""
    of_operator: dict[str, str]
    """What the operator chose, and what keeps tests apart."""
    pods: dict[str, Pod] = field(default_factory=dict)
    unready_before: dict[str, str | None] = field(default_factory=dict)
    """What the readiness probe of each pod said before the trust bundle was published."""

    def start(
        self,
        name: str,
        replica: int = 0,
        *,
        changed: Mapping[str, str] | None = None,
        key_mode: int | None = None,
    ) -> Pod:
        """Start a pod. `changed` are variables that differ from the chart's, `key_mode` the mode of its keys."""
        own = environment_of(WORKLOADS[name], replica)
        placed = {key: value for key, value in self.of_operator.items() if key in own or key not in PLACES}
        pod = Pod(self.node, WORKLOADS[name], own | placed | dict(changed or {}), replica)
        pod.start(self.given, key_mode=key_mode)
        return pod

    def run_job(self, name: str, *, status: int = 0) -> str:
        """Run a Job to its end, and return the end of its log. Its exit status must be `status`."""
        job = self.start(name)
        assert job.child.wait(WITHIN_S) == status, job.child.log_tail()
        return job.child.log_tail()


@pytest.fixture(scope="module")
def cluster(
    kafka: Kafka, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """All pods, started in the order of the page."""
    assert shutil.which("bwrap"), "bubblewrap is missing: it makes the containers"
    folder = tmp_path_factory.mktemp("cluster")
    here = Installation(
        THIS_CLONE, folder, kafka=kafka.bootstrap, embedded_broker=kafka.embedded, redis_url=redis_server.url
    )
    here.say("init", "--operator", "olga", *ORIGINS)
    here.change(trust_root=here.trust.fingerprint())
    node = Node(folder)
    made = Cluster(here, node, files_of_secrets(here, folder), settings_of(here, kafka, redis_server))
    for name, one in documents().items():
        if name.startswith("Service/"):
            meta = one["metadata"]
            node.name(node.address(f"{meta['name']}-0"), meta["name"], f"{meta['name']}.{meta['namespace']}")
    node.name("127.0.0.1", "kafka.ringfence", "valkey.ringfence")
    here.change(
        **{
            f"{name}_url": f"http://{node.address(f'ringfence-{name}-0')}:8080"
            for name in ("registry", "policy", "issuer", "revoker", "audit", "gateway")
        }
    )
    try:
        assert "created" in made.run_job("topics")
        for name in SERVING:
            made.pods[name] = made.start(name)
        for name, pod in made.pods.items():
            await_probe(pod, "startupProbe")
            made.unready_before[name] = pod.probe("readinessProbe")
        assert "Trust bundle 1 is on Kafka now" in made.run_job("trust-bundle")
        for pod in made.pods.values():
            await_probe(pod, "readinessProbe")
        here.say("init", "--operator", "olga", "--publish")
        yield made
    finally:
        for pod in made.pods.values():
            pod.child.kill()


def await_probe(pod: Pod, kind: str) -> None:
    pod.child.wait_until(
        lambda: pod.probe(kind) is None, WITHIN_S, f"passed its {kind}", why=lambda: pod.probe(kind)
    )


def settings_of(here: Installation, kafka: Kafka, redis_server: RedisServer) -> dict[str, str]:
    """What the operator chooses. Kafka and Redis keep the names that they have in the values."""
    outside = here.environment()
    redis, (kafka_host, _, kafka_port) = urlsplit(redis_server.url), kafka.bootstrap.rpartition(":")
    settings = environment_of(WORKLOADS["issuer"])
    broker = settings["RINGFENCE_KAFKA"].partition(":")[0]
    store = urlsplit(settings["RINGFENCE_REDIS_URL"])
    by_name = kafka_host in ("127.0.0.1", "localhost") and redis.hostname in ("127.0.0.1", "localhost")
    apart = ("TOPIC_PREFIX", "REDIS_PREFIX", "EMBEDDED_BROKER", "PARTITIONS")
    return {
        "RINGFENCE_KAFKA": f"{broker}:{kafka_port}" if by_name else kafka.bootstrap,
        "RINGFENCE_REDIS_URL": (
            redis._replace(netloc=f"{store.hostname}:{redis.port}").geturl() if by_name else redis_server.url
        ),
        "RINGFENCE_TRUST_ROOT": outside["RINGFENCE_TRUST_ROOT"],
        "RINGFENCE_REPLICATION": "1",
        **{f"RINGFENCE_{name}": outside[f"RINGFENCE_{name}"] for name in apart},
        **{
            name: os.environ[name]
            for name in ("RINGFENCE_POLICY_EVALUATION_TIMEOUT_MS", "RINGFENCE_AUDIT_DETECT")
            if name in os.environ
        },
    }


def files_of_secrets(here: Installation, folder: Path) -> dict[str, dict[str, bytes]]:
    """The Secrets of the page, and those of the gateway."""
    keys = here.trust.service_key("registry").parent
    provisioner = folder / "provisioner.json"
    SigningKey.generate("spiffe://acme.example/user/acme").save(provisioner)
    receivers = '[[receiver]]\nname = "billing"\naudience = "https://billing.example"\ntargets = ["*"]\n'
    tokens = f"{new_token('billing')[1]}\n".encode()
    certificate = Authority(folder).issue("gateway", "gateway.ringfence").read_bytes()
    written = {
        "provisioner.json": provisioner.read_bytes(),
        "receivers.toml": receivers.encode(),
        "tokens": tokens,
        "tls.crt": certificate,
        "tls.key": certificate,
    }
    bundle = here.trust.bundle.read_bytes()
    given: dict[str, dict[str, bytes]] = {"ringfence-trust-bundle": {"trust-bundle.jws": bundle}}
    place = "/run/secrets/ringfence/"
    for workload in WORKLOADS.values():
        named = [
            value.removeprefix(place)
            for value in environment_of(workload).values()
            if value.startswith(place)
        ]
        for secret in secrets_of(pod_of(workload)):
            given[secret] = {
                one: written[one] if one in written else (keys / one).read_bytes()
                for one in named
                if one.startswith("tls.") == secret.endswith("-tls")
            }
    return given


@pytest.mark.parametrize("name", SERVING)
def test_probes_of_a_pod_pass(cluster: Cluster, name: str) -> None:
    pod = cluster.pods[name]
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert pod.probe(kind) is None
    for port in pod.container["ports"]:
        assert pod.listens(port["name"])


def test_a_pod_waits_for_the_trust_bundle_and_is_not_restarted_meanwhile(cluster: Cluster) -> None:
    ready = {name for name, says in cluster.unready_before.items() if says is None}
    assert ready == {"sign-page"}, "it has its trust root in its files"


def test_job_of_a_trust_bundle_that_kafka_has_publishes_nothing_and_succeeds(cluster: Cluster) -> None:
    assert "has trust bundle 1 already" in cluster.run_job("trust-bundle")


def test_job_rejects_a_trust_bundle_of_another_root(cluster: Cluster, tmp_path: Path) -> None:
    other = TrustFolder(tmp_path)
    make_trust(other, "acme.example", "eve")
    own = cluster.given["ringfence-trust-bundle"]
    cluster.given["ringfence-trust-bundle"] = {"trust-bundle.jws": other.bundle.read_bytes()}
    try:
        assert "signed by root" in cluster.run_job("trust-bundle", status=1)
    finally:
        cluster.given["ringfence-trust-bundle"] = own


def test_the_services_work_together(cluster: Cluster) -> None:
    """A credential is issued, and ended, by pods alone; the console has the bundle from the registry by its name."""
    task = organise(cluster.here)
    issued = lease(cluster.here, task, "10m")
    assert cluster.here.leases() == {issued}
    cluster.here.say("revoke", "--lease", issued, "--reason", "a test", "--yes", who="olga")
    cluster.pods["revoker"].child.wait_until(
        lambda: not cluster.here.leases(), WITHIN_S, "had ended the lease"
    )
    told = str(cluster.here.say("audit", "trace", task, who="olga"))
    assert issued in told


def test_a_second_replica_joins_and_ends_within_its_grace_period(cluster: Cluster) -> None:
    pod = cluster.start("policy", replica=1)
    try:
        await_probe(pod, "readinessProbe")
        assert pod.stop() == 0, pod.child.log_tail()
        assert pod.probe("livenessProbe") is not None
    finally:
        pod.child.kill()


@pytest.mark.parametrize(
    ("name", "changed", "says"),
    [
        pytest.param(
            "policy", {"RINGFENCE_KEY_FILE": "/run/secrets/ringfence/issuer.json"},
            "RINGFENCE_KEY_FILE: /run/secrets/ringfence/issuer.json is not there", id="a key of another's Secret",
        ),
        pytest.param(
            "audit", {"RINGFENCE_STATE_DIR": "/var/lib/ringfence"},
            "others can look into /var/lib/ringfence", id="the volume itself",
        ),
        pytest.param(
            "audit", {"RINGFENCE_STATE_DIR": "/opt/ringfence/state"},
            "Read-only file system", id="no volume",
        ),
        pytest.param("scim", {"RINGFENCE_SCIM_TOKENS": ""}, "RINGFENCE_SCIM_TOKENS", id="no tokens"),
        pytest.param("console", {"RINGFENCE_CONSOLE_ORIGIN": "console.acme.example"}, "ORIGIN", id="no origin"),
    ],
)  # fmt: skip
def test_a_pod_with_a_wrong_setting_ends_and_says_why(
    cluster: Cluster, name: str, changed: dict[str, str], says: str
) -> None:
    pod = cluster.start(name, replica=1, changed=changed)
    try:
        assert pod.child.wait(WITHIN_S) == 1
        assert says in pod.child.log_tail(40)
    finally:
        pod.child.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a file of root's, as a kubelet does")
def test_a_key_that_everybody_in_the_pod_could_read_is_refused(cluster: Cluster) -> None:
    pod = cluster.start("registry", replica=1, key_mode=0o444)
    try:
        assert pod.child.wait(WITHIN_S) == 1
        assert "can be read by others (mode 444)" in pod.child.log_tail(40)
    finally:
        pod.child.kill()


def test_a_console_that_does_not_find_the_registry_is_not_ready_and_lives(cluster: Cluster) -> None:
    wrong = {"RINGFENCE_REGISTRY_URL": "http://ringfence-registrar:8080"}
    pod = cluster.start("console", replica=1, changed=wrong)
    try:
        await_probe(pod, "livenessProbe")
        assert "trust" in str(pod.probe("readinessProbe"))
    finally:
        pod.child.kill()


def test_the_sign_page_refuses_a_probe_without_its_host(cluster: Cluster) -> None:
    assert "421" in str(cluster.pods["sign-page"].probe("readinessProbe", headers=False))


def test_the_root_of_a_container_is_read_only_and_its_user_an_ordinary_one(cluster: Cluster) -> None:
    inside = cluster.pods["audit"].process
    status = Path(f"/proc/{inside.pid}/status").read_text()
    if os.geteuid() == 0:
        assert (inside.uids().real, inside.gids().real) == (10001, 10001)
    for kind in ("CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert f"{kind}:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    mounts = [line.split() for line in Path(f"/proc/{inside.pid}/mountinfo").read_text().splitlines()]
    writable = {
        place
        for place, options in ((fields[4], fields[5].split(",")) for fields in mounts)
        if "rw" in options and not place.startswith(("/proc", "/dev"))
    }
    assert writable == {"/tmp", "/var/lib/ringfence"}
