"""A service that is told to stop ends, whatever is gone meanwhile."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from ringfence.client.admin.trust_setup import TrustFolder, make_trust
from ringfence.dev.stack import Stack, StackOptions

pytestmark = pytest.mark.apache

WITHIN_S = 60


def test_services_end_while_the_broker_is_gone(tmp_path: Path) -> None:
    options = StackOptions(tmp_path / "state")
    make_trust(TrustFolder(options.state), options.trust_domain, options.operator)
    with Stack(options) as stack:
        processes = {name: psutil.Process(pid) for name, pid in stack.children().items()}
        processes["kafka"].kill()
        processes["kafka"].wait(WITHIN_S)
        services = [processes[name] for name in options.services]
        for service in services:
            service.terminate()
        _, left = psutil.wait_procs(services, WITHIN_S)
        assert not left
