"""The image that deploy/Dockerfile makes: small, without root, compiler or pip, and with the wheel of this clone."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.support.compose import ROOT
from tests.support.containers import Podman

MAX_ADDED_MB = 250
LOCKED_DOWN = ("run", "--rm", "--network", "none", "--read-only", "--cap-drop", "ALL")


def test_image_without_root_and_with_a_read_only_root_runs_the_command_line(
    podman: Podman, image: str
) -> None:
    assert "Usage: ringfence" in podman(*LOCKED_DOWN, image, "--help").stdout
    assert "uid=10001" in podman(*LOCKED_DOWN, "--entrypoint", "id", image).stdout


def test_image_adds_at_most_250_mb_to_its_base(podman: Podman, image: str) -> None:
    sizes = [
        json.loads(podman("image", "inspect", name).stdout)[0]["Size"] for name in (image, "python:3.11-slim")
    ]
    assert (sizes[0] - sizes[1]) / 1e6 < MAX_ADDED_MB


def test_image_has_no_compiler_and_its_environment_no_pip(podman: Podman, image: str) -> None:
    script = "command -v cc gcc c++ make go; find /opt/ringfence -name 'pip*' -path '*bin*'; true"
    assert podman(*LOCKED_DOWN, "--entrypoint", "sh", image, "-c", script).stdout == ""


def test_image_holds_the_wheel_of_this_clone(podman: Podman, image: str, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("ringfence-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (record,) = (name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
        built = archive.read(record).decode()
    show = "import importlib.metadata as m; print(m.distribution('ringfence').read_text('RECORD'))"
    installed = podman(*LOCKED_DOWN, "--entrypoint", "python", image, "-c", show).stdout
    ours = {line for line in built.splitlines() if line.startswith("ringfence/")}
    assert len(ours) > 500
    assert ours <= set(installed.splitlines())
