"""Backends that other packages bring by the entry point group `ringfence.backends`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from ringfence.backends import BackendContext, BackendError, all_backends, built_in, existing_of
from ringfence.messages.registry import TargetRecord
from tools.schemas.examples import EXAMPLES

MATERIAL = BackendContext("acme.example", "https://issuer.acme.example")
TARGET = cast(TargetRecord, EXAMPLES[TargetRecord]).state
MODULE = """
class Paper:
    kind, enforced_by, own_expiry, stateless = "paper", "target", "none", False

    def __init__(self, material):
        self.trust_domain = material.trust_domain

    def revocability(self, target):
        return "ttl"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where packages are installed, for one test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("paper_backend", None)


def install(folder: Path, module: str, *points: str) -> None:
    """As an installer leaves a distribution behind."""
    (folder / "paper_backend.py").write_text(module)
    info = folder / "paper_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: paper-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join(["[ringfence.backends]", *points, ""]))


def test_an_installed_package_brings_a_backend(folder: Path) -> None:
    install(folder, MODULE, "paper = paper_backend:Paper")
    backends = all_backends(MATERIAL)
    assert backends.keys() == {*built_in(MATERIAL), "paper"}
    assert backends["paper"].revocability(TARGET) == "ttl"
    assert vars(backends["paper"]) == {"trust_domain": "acme.example"}


@pytest.mark.parametrize(
    ("module", "point"),
    [
        (MODULE, "redis = paper_backend:Paper"),
        (MODULE.replace('"paper"', '"redis"'), "redis = paper_backend:Paper"),
        (MODULE, "other = paper_backend:Paper"),
        (MODULE, "paper = paper_backend:Nothing"),
        ("raise RuntimeError('broken')", "paper = paper_backend:Paper"),
        ("def Paper(material): raise ValueError('x')", "paper = paper_backend:Paper"),
    ],
)
def test_invalid_plugin_stops_the_start(folder: Path, module: str, point: str) -> None:
    install(folder, module, point)
    with pytest.raises(BackendError, match="backend"):
        all_backends(MATERIAL)


@pytest.mark.parametrize("name", ["existing", "standing"])
async def test_plugin_may_name_its_list_of_credentials_existing_or_standing(folder: Path, name: str) -> None:
    defined = f"\n    async def {name}(self, target_id):\n        return frozenset([target_id])\n"
    install(folder, MODULE + defined, "paper = paper_backend:Paper")
    assert await existing_of(all_backends(MATERIAL)["paper"], "vault") == {"vault"}


def test_plugin_without_a_required_declaration_is_rejected(folder: Path) -> None:
    install(folder, MODULE.replace("enforced_by", "_enforced_by"), "paper = paper_backend:Paper")
    with pytest.raises(BackendError, match="does not say its enforced_by"):
        all_backends(MATERIAL)
