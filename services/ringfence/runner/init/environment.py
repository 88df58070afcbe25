"""The command's environment: the sandbox's variables, proxy, certificates, settings of the SDK, and the run's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ringfence.client.task_proxy.environment import proxy_environment
from ringfence.runner.control.messages import StartCommand
from ringfence.runner.init.instance import CA_FILE, PROGRAMS, TRUST_STORE_FILE, TRUST_STORE_PASSWORD
from ringfence.runner.sandbox.backend import INSTANCE, SOCKET

_OF_INIT: Final = ("LD_LIBRARY_PATH",)
"""Variables that init itself was started with."""
_LOOPBACK: Final = "127.0.0.1"


def command_environment(own: Mapping[str, str], command: StartCommand, proxy_port: int) -> dict[str, str]:
    """Build the command's environment. `own`: that of init. The variables of the run override all others."""
    ca_file = None if command.ca_pem is None else Path(INSTANCE, CA_FILE)
    variables = {name: value for name, value in own.items() if name not in _OF_INIT}
    variables |= proxy_environment(f"http://{_LOOPBACK}:{proxy_port}", ca_file)
    variables["NO_PROXY"] = variables["no_proxy"] = ",".join(("localhost", "127.0.0.0/8", "127.0.0.1", "::1"))
    # Without it, Node.js (22.21, 24 and later) knows no proxy.
    variables["NODE_USE_ENV_PROXY"] = "1"
    variables["JAVA_TOOL_OPTIONS"] = " ".join(_java_options(proxy_port, ca_file is not None))
    variables |= {
        "PATH": f"{variables.get('PATH', os.defpath)}:{INSTANCE}/{PROGRAMS}",
        "RINGFENCE_DOOR": f"unix:{SOCKET}",
        "RINGFENCE_RUN_INSTANCE": INSTANCE,
        "RINGFENCE_AGENT": command.agent_id,
        "RINGFENCE_TASK": command.task_id,
        "RINGFENCE_TRUST_ROOT": command.trust_root,
        "RINGFENCE_TRUST_DOMAIN": command.trust_domain,
    }
    return {**variables, **command.environment}


def _java_options(proxy_port: int, with_ca: bool) -> list[str]:
    """The options for Java, which reads no variable for proxies or certificates (Networking Properties; JSSE Guide)."""
    options = []
    for scheme in ("http", "https"):
        options += [f"-D{scheme}.proxyHost={_LOOPBACK}", f"-D{scheme}.proxyPort={proxy_port}"]
    options.append("-Dhttp.nonProxyHosts=localhost|127.*|[::1]")
    if with_ca:
        options += [
            f"-Djavax.net.ssl.trustStore={INSTANCE}/{TRUST_STORE_FILE}",
            "-Djavax.net.ssl.trustStoreType=PKCS12",
            f"-Djavax.net.ssl.trustStorePassword={TRUST_STORE_PASSWORD}",
        ]
    return options
