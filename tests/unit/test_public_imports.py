"""`from ringfence import ...` has what users need: what the SDK raises, takes and returns."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import ringfence
from ringfence import RingfenceError

SOURCE = Path(ringfence.__file__)
NOT_FOR_SDK_USERS = {
    "CeremonyError": "of the commands that make keys and the trust bundle",
    "ExportError": "of the command that exports the audit trail",
    "AttestationError": "of the command line, which alone verifies attestations",
    "RequestRefusedError": "of the proxy before a task's socket, which answers it itself",
    "SocketGoneError": "of the proxy before a task's socket",
}
CAUGHT = {"CommandRefusedError", "DeniedError", "JwksError", "ReplayMemoryFullError", "TokenError"}
"""What the client catches, or raises as an error that is public."""


def test_every_name_is_imported_when_it_is_asked_for() -> None:
    assert [name for name in ringfence.__all__ if getattr(ringfence, name) is None] == []
    assert sorted(ringfence.__all__) == list(ringfence.__all__)


def test_dir_lists_the_public_names_and_nothing_of_the_implementation() -> None:
    listed = [name for name in dir(ringfence) if not name.startswith("__")]
    assert listed == ringfence.__all__


def test_typed_imports_equal_the_public_names() -> None:
    tree = ast.parse(SOURCE.read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name == alias.asname
    }
    assert seen == ringfence._MODULES
    assert sorted(seen) == ringfence.__all__


def test_every_error_of_the_client_can_be_imported() -> None:
    import ringfence.client as client

    found = set()
    for module in pkgutil.walk_packages(client.__path__, "ringfence.client."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, RingfenceError):
                found.add(value.__name__)
    ours = found - CAUGHT
    missing = sorted(name for name in ours if name not in ringfence.__all__ and name not in NOT_FOR_SDK_USERS)
    assert missing == []


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Agnet'"):
        ringfence.Agnet  # noqa: B018


def test_the_package_alone_imports_none_of_the_sdk() -> None:
    code = "import ringfence, sys; sys.exit(any(n.startswith('ringfence.') for n in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
