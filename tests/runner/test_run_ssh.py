"""SSH from a run: one command at a target, and no way further by `ssh -W` and `-D`, nor to a target that forwards."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ringfence.dev.processes import StackError
from tests.runner import planted
from tests.runner.installation import Installation, installation, until
from tests.support.servers.ssh import SshServer, SshTarget

USERS = {
    "deploy": {
        "read": {"status": ["/bin/echo", "all is well"]},
        "may": ["shell", "terminal", "forward"],
    }
}
STATUS = "ssh -F $RINGFENCE_SSH_CONFIG {target} read status"
STDIO = "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | ssh -F $RINGFENCE_SSH_CONFIG -W 127.0.0.1:{service} {target}"
SOCKS = (
    "ssh -F $RINGFENCE_SSH_CONFIG -N -o ExitOnForwardFailure=yes -D 127.0.0.1:18471 {target} & "
    "for i in 1 2 3 4 5 6 7 8 9 10; do "
    "curl -sS -m 5 --noproxy '' --socks5 127.0.0.1:18471 http://127.0.0.1:{service}/ && break; sleep 0.3; done; kill $!"
)


@dataclass
class SshTargets:
    """Two hosts: at `files` agents run one command, at `jump` they may forward ports."""

    here: Installation
    canary: str
    service: int
    task: str
    key: Path
    """Of the agent, outside."""

    def asked(self, script: str, target: str, verbs: str, resource: str) -> list[str]:
        return [
            "request", "--task", self.task, "--allow", f"{target}:{verbs}:{resource}", "--reason", "look", "--exec",
            "--", "sh", "-c", f"{script.format(target=target, service=self.service)} 2>&1",
        ]  # fmt: skip

    def outside(self, script: str, target: str, verbs: str, resource: str) -> str:
        """As the agent does it where it has a network."""
        words = self.asked(script, target, verbs, resource)
        done = self.here.call("--identity", str(self.key), *words)
        return (done.stdout + done.stderr).decode(errors="replace")

    def inside(self, script: str, target: str, verbs: str, resource: str) -> str:
        words = self.asked(script, target, verbs, resource)
        done = self.here.run("--", "ringfence", *words, task=self.task)
        return (done.stdout + done.stderr).decode(errors="replace")


@contextlib.contextmanager
def server() -> Iterator[SshServer]:
    try:
        made = SshServer(USERS)
    except StackError as error:
        pytest.skip(f"not provable here: {error}")
    made.start()
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
async def targets(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SshTargets]:
    host = socket.gethostname()
    try:
        leads_to = {one[4][0] for one in socket.getaddrinfo(host, 22, socket.AF_INET)}
    except OSError:
        leads_to = set()
    if leads_to != {planted.LOOPBACK}:
        pytest.skip(f"not provable here: relays need a name of {planted.LOOPBACK}, and {host} is none")
    canary = f"canary-{secrets.token_hex(12)}"
    with contextlib.ExitStack() as stack:
        service = planted.Server(planted.always(canary))
        stack.callback(service.close)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ssh-targets-")))
        access, addresses = dict[str, str](), dict[str, str]()
        for name in ("files", "jump"):
            sshd = stack.enter_context(server())
            target = SshTarget(name, sshd, folder)
            target.write_secret()
            access |= target.places()
            addresses[name] = f"{host}:{sshd.port}"
        async with installation(RINGFENCE_BACKENDS_ACCESS=json.dumps(access)) as here:
            verbs = {"files": ("read",), "jump": ("read", "shell", "forward")}
            for name, address in addresses.items():
                here.say(
                    "target", "add", name, "--description", name, "--backend", "ssh", "--address", address,
                    *(word for verb in verbs[name] for word in ("--verb", verb)), "--yes", who="olga",
                )  # fmt: skip
            allowed = [f"{name}:{','.join(verbs[name])}:deploy/**" for name in verbs] + [
                "jump:shell,forward:deploy"
            ]
            here.say(
                "user", "set", "maria", *(word for one in allowed for word in ("--add", one)), "--yes", who="olga"
            )  # fmt: skip
            here.call("key", "new", "ssh-bot.json", "--id", "agent/ssh-bot")
            scope = [word for one in allowed for word in ("--allow", one)]
            here.say(
                "agent", "register", "ssh-bot", "--description", "uses SSH", "--key-file", "ssh-bot.json", *scope,
                "--selector", "runner=runner-1 life=1h",
            )  # fmt: skip
            made = here.say(
                "task", "assign", "ssh-bot", "--purpose", "look", *scope, "--for", "30m", who="maria"
            )
            targets = SshTargets(here, canary, service.port, made["task_id"], here.folder / "ssh-bot.json")
            # On a busy machine the first connection to a host may take longer than its limit; later ones keep it.
            until(
                lambda: "all is well" in targets.outside(STATUS, "files", "read", "deploy/status"),
                "an answer of files",
            )
            yield targets


def test_a_run_runs_its_one_command_by_a_relay(targets: SshTargets) -> None:
    assert "all is well" in targets.inside(STATUS, "files", "read", "deploy/status")


@pytest.mark.parametrize("script", [STDIO, SOCKS], ids=["stdio", "socks"])
def test_ports_are_forwarded_outside_and_not_from_a_run(targets: SshTargets, script: str) -> None:
    said = targets.outside(script, "jump", "shell,forward", "deploy")
    if targets.canary not in said:
        pytest.skip(f"not provable here: {said[-300:]}")
    # The server refuses it to a certificate that does not say it; the gateway relays to no target that may say it.
    said = targets.inside(script, "files", "read", "deploy/status")
    assert targets.canary not in said
    assert "administratively prohibited" in said, said
    said = targets.inside(script, "jump", "shell,forward", "deploy")
    assert targets.canary not in said

    def told() -> bool:
        done = targets.here.call("--json", "audit", "tail", "-n", "500", "--no-follow", who="ali")
        return b"forward_not_relayed" in done.stdout

    until(told, "the refusal in the trail")
    assert "all is well" not in targets.inside(STATUS, "jump", "read", "deploy/status")
