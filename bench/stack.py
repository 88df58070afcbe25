"""The stack that benchmarks run against: the embedded one, or the same services on a real Apache Kafka."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ringfence.cli.dev import client_settings
from ringfence.client.ceremony import SERVICE_ROLES, TrustFolder, make_trust
from ringfence.client.settings import ClientSettings
from ringfence.dev.stack import Stack, StackOptions
from ringfence.messages.trust import ServiceRole
from tests.brokers.apache import ApacheKafka

KEEP_BYTES = 3 * 1024 * 1024
"""Of each partition, on the embedded broker alone: what it costs to write everything again is not measured. At
saturation audit is behind by some 2 MiB of it, which must not be dropped before it is chained."""

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
) -> Iterator[tuple[Stack, ClientSettings, dict[str, int]]]:
    """A fresh stack; yields it, a client's settings, and the pids of all its processes by name.

    `gateways`: whom the trust bundle names as such; none of them is started.
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
            services=services,
        )  # fmt: skip
        make_trust(TrustFolder(options.state), options.trust_domain, options.operator, gateways=gateways)
        stack = cleanup.enter_context(Stack(options))
        yield stack, client_settings(stack.environment()), pids | stack.children()
