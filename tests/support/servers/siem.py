"""The sinks of `deploy/siem/` as processes of the test, and what stands in the file that they write."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

from ringfence.dev.processes import Child, spawn
from ringfence.model.audit_log.chain import Tip, event_of

DEPLOY = Path(__file__).parents[3] / "deploy" / "siem"
GRACE_S = 20.0
NOBODY = 65534


class Sink:
    """A program that reads the trail from Kafka into a file. It may be stopped and started again."""

    name = ""

    def __init__(self, folder: Path, bootstrap: str, topic: str) -> None:
        self.file = folder / "audit.json"
        self._folder, self._bootstrap, self._topic = folder, bootstrap, topic
        self._child: Child | None = None

    def start(self) -> None:
        """Raises StackError where the program is not there."""
        self._child = spawn(self.name, self._argv(), log_path=self._folder / "log")

    def keep_running(self) -> None:
        """Fails the test where it ended by itself."""
        assert self._child is not None
        assert self._child.alive, f"{self.name} ended:\n{self._child.log_tail()}"

    def stop(self) -> None:
        """End it in good order; what ended already is left alone."""
        if self._child is not None:
            self._child.stop(GRACE_S)
            self._child = None

    def kill(self) -> None:
        """End it by SIGKILL."""
        assert self._child is not None
        self._child.kill()
        self._child = None

    def pause(self) -> None:
        """Let it hang, by SIGSTOP."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """After `pause`."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._child is not None
        os.kill(self._child.pid, number)

    def lines(self) -> list[bytes]:
        """What is in the file, line by line; a last line that is not complete is not there yet."""
        if not self.file.is_file():
            return []
        return [
            line[:-1] for line in self.file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")
        ]

    def log(self) -> str:
        """What it said, from its first start on."""
        return (self._folder / "log").read_text()

    def _argv(self) -> list[str]:
        raise NotImplementedError

    def _adapted(self, text: str, replaced: dict[str, str]) -> str:
        """A configuration as it is published, with the names of this test in it."""
        for published, own in ({"ringfence.audit.v1": self._topic} | replaced).items():
            assert published in text, published
            text = text.replace(published, own)
        return text


class Rsyslog(Sink):
    """Debian's rsyslogd with a configuration, a pid file and a user (nobody, where the tests are root's) of its own."""

    name = "rsyslogd"

    def _argv(self) -> list[str]:
        program = shutil.which("rsyslogd", path=f"{os.environ['PATH']}:/usr/sbin")
        config = self._folder / "rsyslog.conf"
        places = {"127.0.0.1:9092": self._bootstrap, "/var/log/ringfence/audit.json": str(self.file)}
        config.write_text(self._adapted((DEPLOY / "rsyslog.conf").read_text(), places))
        argv = [program or "rsyslogd", "-n", "-f", str(config), "-i", str(self._folder / "rsyslog.pid")]
        if os.geteuid() != 0:
            return argv
        os.chown(self._folder, NOBODY, NOBODY)
        # A change of user forgets whose death ends it, so it is said once more.
        user = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--pdeathsig=KILL"]
        return ["setpriv", *user, *argv]


class Kcat(Sink):
    """kcat, started by the published script, and again where it ends, as a supervisor would."""

    name = "kcat"

    def keep_running(self) -> None:
        if self._child is not None and not self._child.alive:
            self.start()

    def _argv(self) -> list[str]:
        script = self._folder / "kcat.sh"
        script.write_text(self._adapted((DEPLOY / "kcat.sh").read_text(), {}))
        return ["env", f"RINGFENCE_KAFKA={self._bootstrap}", "sh", str(script), str(self.file)]


def once_each(lines: list[bytes]) -> list[bytes]:
    """Events without those that came again: counted by `metadata.uid`, the first of each."""
    by_uid: dict[str, bytes] = {}
    for line in lines:
        by_uid.setdefault(json.loads(line)["metadata"]["uid"], line)
    return list(by_uid.values())


def broken_links(lines: list[bytes]) -> list[dict[str, Any]]:
    """Events that are not linked to the one before in their chain, which begins with the file."""
    tips: dict[str, Tip] = {}
    broken = []
    for line in lines:
        event = event_of(line)
        assert event is not None
        assert event.link is not None
        tip = tips.get(event.link.tree, Tip())
        if not tip.fits(event.link, event.link.tree):
            broken.append(event.link.model_dump())
        tips[event.link.tree] = tip.followed_by(line)
    return broken
