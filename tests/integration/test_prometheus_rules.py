"""The alert rules, by Prometheus' own tool: they are valid, and fire when they should and not otherwise."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ringfence.client.admin.trust_setup import SERVICE_ROLES
from ringfence.messages.api import PORTS

RULES = Path(__file__).parents[2] / "deploy/prometheus"


@pytest.mark.tools
@pytest.mark.parametrize("command", [("check", "alerts.yml"), ("test", "alerts_test.yml")])
def test_the_alert_rules_hold(command: tuple[str, str]) -> None:
    promtool = shutil.which("promtool")
    assert promtool, "promtool is not installed; on Debian: apt-get install prometheus"
    what, file = command
    done = subprocess.run(
        [promtool, what, "rules", str(RULES / file)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.tools
def test_the_configuration_on_the_page_of_runbooks_is_valid(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    assert promtool, "promtool is not installed; on Debian: apt-get install prometheus"
    page = (RULES.parents[1] / "docs/operators/runbooks.md").read_text()
    (block,) = re.findall(r'^```yaml title="prometheus.yml"\n(.*?)^```', page, re.MULTILINE | re.DOTALL)
    file = tmp_path / "prometheus.yml"
    installed = "/etc/prometheus/ringfence/alerts.yml"
    assert installed in block
    file.write_text(block.replace(installed, str(RULES / "alerts.yml")))
    done = subprocess.run(
        [promtool, "check", "config", str(file)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    targets = re.findall(r"(\w+)-1:(\d+)", block)
    assert targets == [(name, str(PORTS[name])) for name in SERVICE_ROLES]
    down = next(line for line in (RULES / "alerts.yml").read_text().splitlines() if "up{job=" in line)
    (job,) = re.findall(r'job="(\w+)"', down)
    assert f"job_name: {job}  #" in block
