"""The alert rules, by Prometheus' own tool: they are valid, and fire when they should and not otherwise."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

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
