"""A real API server of Kubernetes with etcd, without controllers: it admits and stores objects, and no pod runs."""

from __future__ import annotations

import contextlib
import json
import os
import ssl
import subprocess
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from ringfence.dev.processes import LOOPBACK, StackError, free_port, spawn
from tests.brokers.secured import Authority
from tests.support.chart import Document, program

WITHIN_S = 60.0
ISSUER = "https://kubernetes.default.svc.cluster.local"
"""The `iss` of its service account tokens, as clusters have it by default."""
_ADMIN = "admin-of-the-test"
_RESTRICTED = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}


@dataclass
class ApiServer:
    """An API server, and programs that talk to it."""

    url: str
    authority: Path
    kubeconfig: Path
    log: Path

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str = _ADMIN,
        patch: str = "merge",
        **query: str,
    ) -> httpx.Response:
        """What it answers, to an administrator unless `token` is another's."""
        kind = f"application/{patch}-patch+json" if method == "PATCH" else "application/json"
        return httpx.request(
            method, f"{self.url}{path}", params=query, content=None if body is None else json.dumps(body),
            headers={"Authorization": f"Bearer {token}", "Content-Type": kind},
            verify=ssl.create_default_context(cafile=str(self.authority)), trust_env=False, timeout=WITHIN_S,
        )  # fmt: skip

    def namespace(self, name: str) -> None:
        """Make a namespace that enforces the restricted Pod Security Standard, with the account that a controller of a
        cluster makes. Raises httpx.HTTPStatusError.
        """
        metadata = {"name": name, "labels": _RESTRICTED}
        self.call("POST", "/api/v1/namespaces", {"metadata": metadata}).raise_for_status()
        account = {"metadata": {"name": "default"}}
        self.call("POST", f"/api/v1/namespaces/{name}/serviceaccounts", account).raise_for_status()

    def admits(self, namespace: str, pod: Document) -> str | None:
        """Ask for a pod without making it. Returns why it is refused; None if it would be made."""
        answer = self.call("POST", f"/api/v1/namespaces/{namespace}/pods", pod, dryRun="All")
        return None if answer.is_success else str(answer.json()["message"])

    def helm(self, *arguments: str, values: Document | None = None) -> subprocess.CompletedProcess[str]:
        """Run Helm against it. The caller looks at its exit status."""
        return self._run([program("helm"), *arguments], values)

    def kubectl(self, *arguments: str) -> str:
        """Run kubectl, and return what it printed. Raises StackError."""
        done = self._run([program("kubectl"), *arguments], None)
        if done.returncode != 0:
            raise StackError(f"kubectl {' '.join(arguments)}: {done.stderr}")
        return done.stdout

    def _run(self, argv: list[str], values: Document | None) -> subprocess.CompletedProcess[str]:
        given = [] if values is None else ["--values", "-"]
        return subprocess.run(
            [*argv, *given, "--kubeconfig", str(self.kubeconfig)], input=yaml.safe_dump(values or {}),
            capture_output=True, text=True, check=False, timeout=4 * WITHIN_S,
        )  # fmt: skip

    @contextlib.contextmanager
    def controllers(self, *namespaces: str, failing: str = "") -> Iterator[list[Document]]:
        """Report, in the place of a cluster's controllers, that pods did what they are for, in these namespaces.

        Each Job succeeds, unless it has the name `failing`, and each StatefulSet and Deployment is rolled out. Yields
        the Jobs that ended so far.
        """
        ended: list[Document] = []
        stop = threading.Event()

        def work() -> None:
            while not stop.wait(0.1):
                for namespace in namespaces:
                    ended.extend(
                        self._end_jobs(namespace, failing, {one["metadata"]["uid"] for one in ended})
                    )
                    self._roll_out(namespace)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield ended
        finally:
            stop.set()
            thread.join()

    def _end_jobs(self, namespace: str, failing: str, before: set[str]) -> Iterator[Document]:
        jobs = f"/apis/batch/v1/namespaces/{namespace}/jobs"
        for job in self.call("GET", jobs).json()["items"]:
            name = job["metadata"]["name"]
            if job["metadata"]["uid"] in before:
                continue
            status = {"status": ended_status(success=name != failing)}
            if self.call("PATCH", f"{jobs}/{name}/status", status).is_success:
                yield job

    def _roll_out(self, namespace: str) -> None:
        for kind in ("statefulsets", "deployments"):
            path = f"/apis/apps/v1/namespaces/{namespace}/{kind}"
            for one in self.call("GET", path).json()["items"]:
                generation, replicas = one["metadata"]["generation"], one["spec"]["replicas"]
                if one["status"].get("observedGeneration") == generation:
                    continue
                names = ("replicas", "readyReplicas", "availableReplicas", "updatedReplicas")
                status: Document = {"observedGeneration": generation, **dict.fromkeys(names, replicas)}
                if kind == "statefulsets":
                    status |= {"currentReplicas": replicas, "currentRevision": "1", "updateRevision": "1"}
                else:
                    status["conditions"] = [
                        _condition("Available", "MinimumReplicasAvailable"),
                        _condition("Progressing", "NewReplicaSetAvailable"),
                    ]
                self.call("PATCH", f"{path}/{one['metadata']['name']}/status", {"status": status})


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _condition(kind: str, reason: str) -> dict[str, str]:
    return {"type": kind, "status": "True", "reason": reason, "lastTransitionTime": _now()}


def ended_status(*, success: bool) -> Document:
    """The status of a Job that ended, as the server accepts it of a controller."""
    now = _now()
    kinds = ("SuccessCriteriaMet", "Complete") if success else ("FailureTarget", "Failed")
    conditions = [_condition(kind, "Test") for kind in kinds]
    if success:
        return {"startTime": now, "completionTime": now, "succeeded": 1, "conditions": conditions}
    return {"startTime": now, "failed": 1, "conditions": conditions}


@contextlib.contextmanager
def running_api_server(
    folder: Path, *flags: str, environment: Mapping[str, str] | None = None
) -> Iterator[ApiServer]:
    """Start etcd and the API server at ports of their own. Raises StackError where they cannot start.

    `flags` are more flags of the server, `environment` more variables.
    """
    authority = Authority(folder)
    certificate = authority.issue("apiserver")
    signing = folder / "accounts.pem"
    key = rsa.generate_private_key(65537, 2048)
    signing.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    tokens = folder / "tokens.csv"
    tokens.write_text(f"{_ADMIN},admin,admin,system:masters\n")
    client, peer, port = (free_port() for _ in range(3))
    store = f"http://{LOOPBACK}:{client}"
    server = ApiServer(
        f"https://{LOOPBACK}:{port}", authority.file, folder / "kubeconfig.yaml", folder / "apiserver.log"
    )
    server.kubeconfig.write_text(json.dumps(_kubeconfig(server)))
    etcd = spawn(
        "etcd",
        ["etcd", "--data-dir", str(folder / "etcd"), "--unsafe-no-fsync", "--listen-client-urls", store,
         "--advertise-client-urls", store, "--listen-peer-urls", f"http://{LOOPBACK}:{peer}"],
        log_path=folder / "etcd.log",
    )  # fmt: skip
    try:
        etcd.wait_until(lambda: _answers(f"{store}/health"), WITHIN_S, f"answered at {store}")
        api = spawn(
            "kube-apiserver",
            [program("kube-apiserver"), "--etcd-servers", store, "--bind-address", LOOPBACK, "--secure-port", str(port),
             "--tls-cert-file", str(certificate), "--tls-private-key-file", str(certificate),
             "--token-auth-file", str(tokens), "--authorization-mode", "RBAC", "--endpoint-reconciler-type", "none",
             "--service-account-issuer", ISSUER, "--service-account-key-file", str(signing),
             "--service-account-signing-key-file", str(signing), "--service-cluster-ip-range", "10.96.0.0/16",
             "--cert-dir", str(folder / "certificates"), *flags],
            log_path=server.log, env={**os.environ, **(environment or {})},
        )  # fmt: skip
        try:
            api.wait_until(lambda: _ready(server), 2 * WITHIN_S, f"was ready at {server.url}")
            yield server
        finally:
            api.stop(20)
    finally:
        etcd.stop()


def _kubeconfig(server: ApiServer) -> Document:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [
            {
                "name": "test",
                "cluster": {"server": server.url, "certificate-authority": str(server.authority)},
            }
        ],
        "users": [{"name": "admin", "user": {"token": _ADMIN}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
    }


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False, timeout=5).is_success
    except httpx.TransportError:
        return False


def _ready(server: ApiServer) -> bool:
    try:
        return server.call("GET", "/readyz").is_success
    except httpx.TransportError:
        return False
