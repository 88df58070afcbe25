"""The stack that benchmarks run against: the embedded one, or the same services on a real Apache Kafka."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import httpx

from ringfence.cli.commands.dev import client_settings
from ringfence.client.admin.trust_setup import SERVICE_ROLES, TrustFolder, make_trust
from ringfence.client.settings import ClientSettings
from ringfence.dev.processes import LOOPBACK, Child, free_port, spawn
from ringfence.dev.stack import READY_WITHIN_S, Stack, StackOptions
from ringfence.messages.base import ServiceRole
from tests.brokers.apache import ApacheKafka

KEEP_BYTES = 4 * 1024 * 1024
"""Of each partition, on the embedded broker alone: what it costs to write everything again is not measured. At
saturation readers are behind by some 2 MiB of it, which must not be dropped before."""

WITHOUT_LIMITS = {
    f"RINGFENCE_{name}": "0"
    for name in (
        "POLICY_AGENT_REQUESTS_PER_MINUTE",
        "POLICY_SPONSOR_REQUESTS_PER_MINUTE",
        "ISSUER_AGENT_LEASES",
        "ISSUER_SPONSOR_LEASES",
    )
}

WITHOUT_GATEWAY = tuple(role for role in SERVICE_ROLES if role != "gateway")
"""What issues and ends credentials. Gateways have benchmarks of their own."""


@contextlib.contextmanager
def running(
    kafka: str,
    services: Sequence[ServiceRole] = WITHOUT_GATEWAY,
    *,
    gateways: Sequence[str] = ("gateway",),
    keep_bytes: int = KEEP_BYTES,
    runner: str | None = None,
) -> Iterator[tuple[Stack, ClientSettings, dict[str, int]]]:
    """A fresh stack; yields it, a client's settings, and the pids of all its processes by name.

    `gateways`: whom the trust bundle names as such; none of them is started. `runner`: a runner to have a key for.
    """
    with tempfile.TemporaryDirectory(prefix="ringfence-bench-") as folder, contextlib.ExitStack() as cleanup:
        bootstrap: str | None = None
        pids: dict[str, int] = {}
        if kafka == "apache":
            broker = ApacheKafka(Path(folder) / "apache", long_lived=True)
            broker.start()
            cleanup.callback(broker.stop)
            bootstrap = broker.bootstrap
            if broker.child is not None:
                pids["kafka"] = broker.child.pid
        options = StackOptions(
            Path(folder) / "state", kafka=bootstrap, keep_bytes=keep_bytes, environment=WITHOUT_LIMITS,
            services=services, runner=runner,
        )  # fmt: skip
        make_trust(TrustFolder(options.state), options.trust_domain, options.operator, gateways=gateways)
        stack = cleanup.enter_context(Stack(options))
        yield stack, client_settings(stack.environment()), pids | stack.children()


@contextlib.contextmanager
def more_of(stack: Stack, role: ServiceRole, count: int) -> Iterator[dict[str, int]]:
    """So many more processes of a service, once they are ready; yields their pids by name."""
    children: dict[str, Child] = {}
    try:
        for number in range(2, count + 2):
            name, http = f"{role}-{number}", f"{LOOPBACK}:{free_port()}"
            of_its_own = {
                "RINGFENCE_CONFIG": os.devnull,
                "RINGFENCE_HTTP": http,
                "RINGFENCE_INSTANCE": name,
                "RINGFENCE_KEY_FILE": str(stack.trust.service_key(role)),
                "RINGFENCE_KEY_DIR": str(stack.options.state / "keys"),
            }
            children[name] = spawn(
                name,
                [sys.executable, "-m", "ringfence.cli.main", "serve", role],
                env={**os.environ, **stack.environment(), **of_its_own, **stack.options.environment},
                log_path=stack.options.state / "logs" / f"{name}.log",
            )
            children[name].wait_until(partial(_is_ready, http), READY_WITHIN_S, "was ready")
        yield {name: child.pid for name, child in children.items()}
    finally:
        for child in children.values():
            child.terminate()
        for child in children.values():
            child.stop()


def _is_ready(http: str) -> bool:
    try:
        return httpx.get(f"http://{http}/readyz", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
