"""What commands import. A package that a command does not use costs each call of it processor time.

`python -m bench cli` measures that; these tests only say what is not loaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ringfence.kernel.crypto.keys import SigningKey

KAFKA, HTTP = "aiokafka", "httpx"
HEAVY = (
    KAFKA, HTTP, "asyncpg", "asyncssh", "faststream", "httpcore", "joserfc", "jwt", "opentelemetry",
    "prometheus_client", "redis", "regorus", "scim2_models", "starlette", "structlog", "uvicorn",
    "uvloop", "yaml",
)  # fmt: skip
NOWHERE = "127.0.0.1:1"
_RUN = """
import json, sys
from ringfence.cli.main import main
heavy, found = set(json.loads(sys.argv[1])), {}
for words in json.loads(sys.argv[2]):
    status = main(words)
    loaded = {name.partition(".")[0] for name, module in sys.modules.items() if module}
    found[" ".join(words)] = [status, sorted(loaded & heavy)]
sys.stderr.write("\\n" + json.dumps(found))
"""
_LOAD = """
import json, sys
from ringfence.cli.main import COMMANDS, load
heavy, found = set(json.loads(sys.argv[1])), {}
for name, entry in COMMANDS.items():
    load(name, entry)
    if loaded := heavy & {module.partition(".")[0] for module in sys.modules}:
        found[name] = sorted(loaded)
        heavy -= loaded
sys.stderr.write("\\n" + json.dumps(found))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """No settings of whoever runs the tests; an identity, and services that nobody reaches."""
    SigningKey.generate("spiffe://ringfence.local/user/sam").save(tmp_path / "sam.json")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("RINGFENCE_")},
        "RINGFENCE_CONFIG": os.devnull,
        "RINGFENCE_IDENTITY": str(tmp_path / "sam.json"),
        "RINGFENCE_TRUST_ROOT": "9-4CSVnbJ0bIEZYyJjmZ0-3fQPWrAqSyOqVVF1jwN1g",
        "RINGFENCE_KAFKA": NOWHERE,
        **{
            f"RINGFENCE_{name}_URL": f"http://{NOWHERE}"
            for name in ("REGISTRY", "POLICY", "REVOKER", "AUDIT")
        },
    }


def run(code: str, environment: dict[str, str], *more: str) -> Any:
    """Run code in a fresh interpreter, with the heavy packages and more arguments. Returns what it wrote last."""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(HEAVY), *more],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return json.loads(done.stderr.rpartition("\n")[2])


def loaded(environment: dict[str, str], *lines: str, code: str = _RUN) -> list[Any]:
    """Run commands one after another in one interpreter. Returns the status of each, and what was loaded after it,
    each different result once.
    """
    found: list[Any] = []
    for result in run(code, environment, json.dumps([line.split() for line in lines])).values():
        if result not in found:
            found.append(result)
    return found


def test_no_command_loads_more_than_it_declares(environment: dict[str, str]) -> None:
    assert run(_LOAD, environment) == {}


def test_offline_commands_import_no_client(environment: dict[str, str], tmp_path: Path) -> None:
    assert loaded(
        environment, "--help", "lease --help", "agent --help", "audit --help", "approvals --help", "policy --help",
        "request --help", "serve --help", "doctor --help", f"key show {environment['RINGFENCE_IDENTITY']}",
        "config show", "topics acls", f"sign-page build {tmp_path / 'page'} --origin http://localhost:1",
    ) == [[0, []]]  # fmt: skip


def test_api_commands_import_no_kafka_client(environment: dict[str, str]) -> None:
    assert loaded(
        environment, "user list", "agent list", "agent show deploy-bot", "target list", "task list", "lease list",
        "inventory", "gateway stats", "audit trace deploy-bot", "audit who --target platform", "audit coverage",
        "audit export", "policy explain 5f0c0e6e-0000-4000-8000-000000000000", "break-glass list", "provisioner list",
        "approvals grants",
    ) == [[1, sorted((HTTP, "httpcore"))]]  # fmt: skip


def test_kafka_commands_import_no_http_client(environment: dict[str, str]) -> None:
    assert loaded(environment, "approvals list", "topics check", "audit verify") == [[1, [KAFKA]]]


def test_scan_imports_no_client_and_leaves_yaml_to_its_workers(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("DEBUG=true\n")
    assert loaded(environment, f"scan --no-history {tmp_path}") == [[0, []]]
    (tmp_path / "compose.yml").write_text("services: {}\n")
    assert loaded(environment, f"scan --no-history {tmp_path}") == [[0, []]]


def test_httpx_comes_without_its_own_command_line(environment: dict[str, str]) -> None:
    code = "import json, sys\nsys.argv[1] = json.dumps(['click'])\n" + _RUN
    assert loaded(environment, "lease list", code=code) == [[1, []]]
