"""The commands of docs/gateway-external.md: the gateway's port for decisions, and each program's check of its files."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringfence.dev.processes import LOOPBACK, free_port
from tests.brokers.secured import Authority
from tests.conftest import needed
from tests.gateway_external.agent import HOST
from tests.gateway_external.programs import PROGRAMS, Places, folders, rendered
from tests.site.dev_folder import dev_running, inherited
from tests.site.page_commands import ROOT, run_page


def until_it_answers(url: str) -> str:
    """What a reader does beside a program that goes on: look whether it answers, and end it."""
    return f"& while kill -0 $! && ! curl -sk -o /dev/null {url}; do sleep 0.1; done; kill $! && wait $!"


@pytest.mark.timeout(300)
def test_the_commands_of_the_page(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    decision, http, port = free_port(), free_port(), free_port()
    places = Places(authority.issue("gateway", HOST), authority.file, decision, free_port())
    with needed(request):
        path = folders()
    for name in PROGRAMS:
        folder = tmp_path / "deploy/gateway" / name
        folder.mkdir(parents=True)
        rendered(name, places, port, folder)
    replaced = {
        "RINGFENCE_GATEWAY_AUTHZ=8716": f"RINGFENCE_GATEWAY_AUTHZ={decision}",
        "ringfence serve gateway": f"ringfence serve gateway {until_it_answers(f'http://{LOOPBACK}:{decision}/')}",
        "/etc/ringfence/haproxy.cfg": "deploy/gateway/haproxy/haproxy.cfg",
        "traefik --configFile=/etc/ringfence/traefik.yaml": "traefik --configFile=deploy/gateway/traefik/traefik.yaml "
        + until_it_answers(f"https://{LOOPBACK}:{port}/"),
    }
    with dev_running(tmp_path):
        environment = inherited() | {
            "RINGFENCE_CONFIG": ".ringfence/ringfence.toml",
            "RINGFENCE_KEY_DIR": ".ringfence/keys",
            "RINGFENCE_HTTP": f"{LOOPBACK}:{http}",
            "RINGFENCE_GATEWAY_SPOOL": str(tmp_path / "spool"),
            "HOME": str(tmp_path),
        }
        environment["PATH"] = f"{environment['PATH']}:{path}"
        printed = run_page(ROOT / "docs/gateway-external.md", tmp_path, environment, replaced)
    assert "syntax is ok" in printed
    assert "Valid configuration" in printed
