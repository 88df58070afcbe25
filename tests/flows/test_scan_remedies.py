"""What `ringfence scan` prints as the way out is run, word by word, by those whom it names, against all services."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.flows.test_cli import Shell, organisation, shell
from tests.support.scan_corpus import Maker, cases

__all__ = ["shell"]

_MAIN = "import sys; from ringfence.cli.main import main; sys.exit(main(sys.argv[1:]))"
_WHO = {"as an operator": "olga", "as a sponsor": "sam", "as that person": "maria"}
_UNKNOWN = {"USER": "maria", "HOST": "host.example", "ACCOUNT": "123456789012", "role/ROLE": "role/deploy"}
"""What a scan cannot know, and a person fills in."""


def findings(tmp_path: Path) -> list[dict[str, Any]]:
    """A scan of a tree with a credential of each service. In a process of its own: a scan protects its process."""
    tree = tmp_path / "tree"
    make = Maker(41)
    files = {
        ".cursor/mcp.json": json.dumps({"mcpServers": {"hub": {"env": {"TOKEN": make.crc_token("ghp")}}}}).encode(),
        ".git-credentials": f"https://m:{make.crc_token('ghp')}@github.com\n".encode(),
        ".env": "".join(
            f"{name}_URL=postgres://app:{make.token(16)}@{name.lower()}.corp.test:5432/shop\n" for name in ("DB", "OLD")
        ).encode(),
        ".netrc": f"machine api.corp.test login m password {make.token(20)}\n".encode(),
    }  # fmt: skip
    wanted = ("aws-credentials", "kubeconfig", "ssh-key", "gcp-service-account", "azure", "vault")
    files |= {one.path: one.content for one in cases(3) if one.reader in wanted and one.secrets}
    for name, content in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", _MAIN, "scan", ".", "--json", "--no-history"], cwd=tree, capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "RINGFENCE_CONFIG": os.devnull}, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)["findings"]
    assert isinstance(found, list)
    return found


@pytest.mark.timeout(300)
async def test_the_way_out_of_each_service_is_run_as_it_is_printed(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await organisation(shell)
    monkeypatch.chdir(tmp_path)
    by_target: dict[str, dict[str, Any]] = {}
    found = findings(tmp_path)
    adopted = [one for one in found if one["remedies"][0]["command"].startswith("ringfence adopt ")]
    assert [one["reader"] for one in adopted] == ["mcp-cursor"]  # tests/stack/test_adopt.py runs these
    for one in found:
        if one in adopted:
            continue
        by_target.setdefault(one["remedies"][0]["command"], one)
    services = {one["opens"].get("service") for one in by_target.values()}
    assert services >= {"GitHub", "PostgreSQL", "AWS", "Kubernetes", "SSH", "Google Cloud", "Azure", "Vault"}
    targets = set()
    for number, one in enumerate(by_target.values()):
        task = None
        for step in one["remedies"]:
            if not step.get("command", "").startswith("ringfence "):
                continue
            command = step["command"]
            for unknown, value in _UNKNOWN.items():
                command = command.replace(unknown, value)
            words = shlex.split(command)[1:]
            if words[:2] == ["agent", "register"]:  # one agent has many: for the test each has its own
                words = [
                    word.replace("my-agent", f"agent-{number}").replace("cursor", f"agent-{number}")
                    for word in words
                ]
            if words[:2] == ["task", "assign"]:
                words[2] = f"agent-{number}"
                task = await shell.json(_WHO["as that person"], *words)
            else:
                await shell(_WHO[step["purpose"].partition(",")[0]], *words)
            if words[:2] == ["target", "add"]:
                targets.add(words[2])
        assert task is not None  # one that would allow nothing is refused
    # Two hosts of one service are two targets.
    assert len(targets) == len(by_target)
    assert {
        "github-github-com",
        "postgresql-db-corp-test",
        "postgresql-old-corp-test",
        "kubernetes-prod-k8s-test",
        "ssh",
    } <= targets
