"""The commands of the pages about Kubernetes, on a real API server. The test plays the controllers of a cluster."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from ringfence.cli.shared.settings_check import known_settings
from ringfence.messages.api import GATEWAY_PORT
from tests.brokers.secured import Authority
from tests.conftest import Kafka, needed
from tests.site.dev_folder import dev_running, inherited
from tests.site.page_commands import ROOT, blocks_of, run_page
from tests.support.chart import CHART, VALUES, VERSIONS, Document, container_of, labels_of, pod_of, program
from tests.support.pods import check_unprivileged
from tests.support.servers.kubernetes import ApiServer, running_api_server

pytestmark = pytest.mark.timeout(600)
DOCS = ROOT / "docs"


@pytest.fixture
def own_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ApiServer]:
    """A server of the page's own, whose namespaces have fixed names."""
    with needed(request), running_api_server(tmp_path_factory.mktemp("cluster")) as server:
        yield server


def environment(server: ApiServer, folder: Path) -> dict[str, str]:
    """With Helm and kubectl, and the clone's `deploy`, as somebody in a clone has them."""
    (folder / "deploy").symlink_to(ROOT / "deploy")
    programs = [str(Path(program(name)).parent) for name in ("helm", "kubectl")]
    found = inherited()
    return found | {
        "PATH": os.pathsep.join([*programs, found["PATH"]]),
        "KUBECONFIG": str(server.kubeconfig),
    }


def test_commands_of_operators_kubernetes_md(own_server: ApiServer, kafka: Kafka, tmp_path: Path) -> None:
    own = environment(own_server, tmp_path) | {
        "RINGFENCE_TOPIC_PREFIX": "kubernetes",
        "RINGFENCE_EMBEDDED_BROKER": str(kafka.embedded).lower(),
    }
    replaced = {"kafka.acme.example:9093": kafka.bootstrap}
    # The Job does that in a cluster.
    topics = f"RINGFENCE_KAFKA={kafka.bootstrap} ringfence topics apply\n"
    with own_server.controllers("ringfence", "ringfence-sign-page") as ended:
        run_page(DOCS / "operators/kubernetes.md", tmp_path, own, replaced, topics)
    names = [one["metadata"]["name"] for one in ended]
    assert names.count("ringfence-topics") == 11, "each of the page's upgrades came to its end"
    assert "ringfence-trust-bundle" in names


AGENT = (
    "source .ringfence/dev.sh\nringfence key new reader-bot.json --id agent/reader-bot\n"
    "ringfence agent register reader-bot --description reads --key-file reader-bot.json "
    "--allow 'platform:read:env/*'\n"
)
"""What the page takes for done, by the stack of a developer."""


def test_commands_of_kubernetes_md(own_server: ApiServer, tmp_path: Path) -> None:
    own_server.namespace("ringfence")
    with dev_running(tmp_path) as folder, own_server.controllers("ringfence"):
        own = environment(own_server, folder)
        of_operator = {key: VALUES[key] for key in ("image", "settings", "redis")}
        (folder / "ringfence.yaml").write_text(yaml.safe_dump(of_operator))
        authority = Authority(folder, "ca")
        for name in ("gateway", "second"):
            certificate = authority.issue(name, f"{name}.ringfence")
            for suffix in ("crt", "key"):
                shutil.copy(certificate, folder / f"{name}.{suffix}")
        done = own_server.helm(
            "install", "ringfence", str(CHART), "--namespace", "ringfence", values=of_operator
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        run_page(DOCS / "kubernetes.md", folder, own, {}, AGENT)
    job = own_server.call("GET", "/apis/batch/v1/namespaces/agents/jobs/reader-bot").json()
    pod = {"metadata": {"name": "probe", "labels": labels_of(job)}, "spec": pod_of(job)}
    assert own_server.admits("agents", pod) is None
    check_unprivileged(pod_of(job))


def saved(title: str) -> list[Document]:
    """The documents of a file that the page about agents lets its readers save."""
    (body,) = [block.body for block in blocks_of(DOCS / "kubernetes.md") if block.title == title]
    return list(yaml.safe_load_all(body))


def test_pod_of_an_agent_is_closed() -> None:
    runtime, account, job = saved("agent.yaml")
    pod = pod_of(job)
    assert account["automountServiceAccountToken"] is False
    assert pod["serviceAccountName"] == account["metadata"]["name"]
    assert pod["runtimeClassName"] == runtime["metadata"]["name"]
    assert (pod["hostUsers"], pod["dnsPolicy"]) == (False, "None")
    on_disk = [
        one for one in pod["volumes"] if "emptyDir" in one and one["emptyDir"].get("medium") != "Memory"
    ]
    assert on_disk == []
    (sources,) = [one["projected"]["sources"] for one in pod["volumes"] if "projected" in one]
    assert [one["serviceAccountToken"]["audience"] for one in sources] == ["spiffe://acme.example/enrol"]
    assert labels_of(job) == {"ringfence.io/role": "agent"}, "by which NetworkPolicies select it"
    names = {one["name"] for one in container_of(job)["env"] if one["name"].startswith("RINGFENCE_")}
    assert names <= known_settings()


def test_agent_finds_the_gateway_at_the_address_of_its_service() -> None:
    (values,) = saved("gateway.yaml")
    aliases = {one["hostnames"][0]: one["ip"] for one in pod_of(saved("agent.yaml")[-1])["hostAliases"]}
    gateway = values["services"]["gateway"]
    name, _, port = gateway["settings"]["RINGFENCE_GATEWAY_NAMES"].partition(":")
    assert (aliases[name], int(port)) == (gateway["clusterIP"], GATEWAY_PORT)


@pytest.mark.parametrize("version", VERSIONS)
def test_files_of_an_agent_follow_the_schemas_of_kubernetes(version: str) -> None:
    for one in saved("agent.yaml"):
        kubernetes_validate.validate(one, version, strict=True)
