"""The real Apache Kafka, from the jars that Maven resolves: one node, KRaft, on loopback only."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ringfence.dev.kafka import kafka_answers
from ringfence.dev.processes import LOOPBACK, Child, StackError, claim_port, free_port, spawn

POM = Path(__file__).with_name("apache-jars") / "pom.xml"
SUMS = POM.with_name("jars.sha256")
"""The digest of each jar, as `sha256sum` writes it. Maven itself only compares a jar with what its repository says."""

_START_TIMEOUT_S = 60.0
_GRACE_S = 30.0
_COMPILE_QUICKLY = "-XX:TieredStopAtLevel=1"
_CLUSTER_ID = "cmluZ2ZlbmNlLXRlc3RzLQ"  # any 16 bytes in base64url; the cluster lives in a folder of its own


class ApacheKafka:
    """One broker that is its own controller. `start` and `stop` block; both may be called again.

    Its data are in a folder of its own inside `data_dir`, deleted at `stop`. `port` 0 takes a free one, once.
    `more` are further ports to listen on, each with the address that clients which come there are told to come back to.
    `adapt` changes the server's properties before its storage is formatted, with `format_options` besides.
    `answers_within_s` is how long a broker that runs may take; one that ends is not waited for.
    `restored_from` is a folder that `snapshot` made: the broker starts with what it holds, on any port.
    `long_lived` has Java compile as it does for servers: that takes more CPU than the broker, for about a minute.
    """

    def __init__(
        self,
        data_dir: Path,
        port: int = 0,
        *,
        more: Mapping[int, str] | None = None,
        adapt: Callable[[dict[str, str]], None] | None = None,
        format_options: Sequence[str] = (),
        restored_from: Path | None = None,
        long_lived: bool = False,
        answers_within_s: float = _START_TIMEOUT_S,
    ) -> None:
        self.port = port
        self._long_lived = long_lived
        self._answers_within_s = answers_within_s
        self._more = more or {}
        self._adapt = adapt
        self._format_options = format_options
        self._restored_from = restored_from
        self.java_options: Sequence[str] = ()
        """Options of Java's, for the broker alone."""
        self.child: Child | None = None
        self._controller_port = 0
        self._store = data_dir / "apache-kafka"
        self._log_path = data_dir / "apache-kafka.log"

    @property
    def bootstrap(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    def start(self) -> None:
        """Format an empty data folder and return once the broker answers.

        Raises StackError where Java or Maven is missing, the jars do not resolve or the broker does not come
        up.
        """
        if self.child is not None and self.child.alive:
            return
        jars = kafka_jars()
        shutil.rmtree(self._store, ignore_errors=True)
        self._store.mkdir(parents=True)
        if self._restored_from is not None:
            shutil.copytree(self._restored_from, self._data)
        self.port = claim_port(self.port, "Apache Kafka", "its port setting")
        self._controller_port = free_port()
        properties = server_properties(self.bootstrap, f"{LOOPBACK}:{self._controller_port}")
        properties["log.dirs"] = str(self._data)
        for name, listeners in _more_listeners(self._more).items():
            properties[name] += listeners
        if self._adapt is not None:
            self._adapt(properties)
        text = "".join(f"{name}={value}\n" for name, value in properties.items())
        self._properties.write_text(text)
        if self._restored_from is None:
            self._format(jars)
        self._launch()

    def _format(self, jars: Path) -> None:
        java = _java(jars, _COMPILE_QUICKLY)
        argv = [*java, "kafka.tools.StorageTool", "format", "-t", _CLUSTER_ID, "-c", str(self._properties)]
        argv += self._format_options
        formatting = spawn("kafka.tools.StorageTool", argv, log_path=self._log_path)
        if formatting.wait(_START_TIMEOUT_S) != 0:
            formatting.kill()
            raise StackError(f"Apache Kafka could not format its storage:\n{formatting.log_tail()}")

    def stop(self) -> None:
        """End the broker and delete its data."""
        if self.child is not None:
            self.child.kill()  # nothing is kept, so nothing needs to be written in good order
            self.child = None
        shutil.rmtree(self._store, ignore_errors=True)

    def restart(self) -> None:
        """End the broker in good order and start it again on the same port with what it held."""
        if self.child is not None:
            self.child.stop(_GRACE_S)
        self._launch()

    def snapshot(self, to: Path) -> None:
        """Copy its disk to a new folder as it is at one moment, as a snapshot of a volume does: it runs on."""
        assert self.child is not None, "start it first"
        os.kill(self.child.pid, signal.SIGSTOP)
        try:
            os.waitid(os.P_PID, self.child.pid, os.WSTOPPED | os.WNOWAIT)
            shutil.copytree(self._data, to)
        finally:
            os.kill(self.child.pid, signal.SIGCONT)

    @property
    def _data(self) -> Path:
        return self._store / "data"

    @property
    def _properties(self) -> Path:
        return self._store / "server.properties"

    def _launch(self) -> None:
        options = ["-Xmx512m"] if self._long_lived else ["-Xmx512m", _COMPILE_QUICKLY]
        options += self.java_options
        argv = [*_java(kafka_jars(), *options), "kafka.Kafka", str(self._properties)]
        self.child = spawn("Apache Kafka", argv, log_path=self._log_path)
        try:
            self.child.wait_until(
                lambda: kafka_answers(self.port),
                self._answers_within_s,
                f"answers requests on {self.bootstrap}",
            )
        except BaseException:
            self.child.kill()
            self.child = None
            raise


def server_properties(
    client_address: str, controller_address: str, listen_host: str = LOOPBACK
) -> dict[str, str]:
    """The settings of a one-node cluster; clients reach it at `client_address`. `log.dirs` is the
    caller's."""
    port = client_address.rpartition(":")[2]
    return {
        "process.roles": "broker,controller",
        "node.id": "1",
        "listeners": f"PLAINTEXT://{listen_host}:{port},CONTROLLER://{controller_address}",
        "advertised.listeners": f"PLAINTEXT://{client_address}",
        "controller.listener.names": "CONTROLLER",
        "controller.quorum.voters": f"1@{controller_address}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": "PLAINTEXT",
        "log.message.timestamp.type": "LogAppendTime",
        "auto.create.topics.enable": "false",
        "group.initial.rebalance.delay.ms": "0",
        # So that a test of a member that died need not wait the usual six seconds at least.
        "group.min.session.timeout.ms": "1000",
        # A broker that was killed comes back under its name only when its former session is over.
        "broker.session.timeout.ms": "3000",
        "broker.heartbeat.interval.ms": "500",
        # One node, and few partitions: fifty of each would be made before the first commit is answered.
        "offsets.topic.replication.factor": "1",
        "offsets.topic.num.partitions": "4",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "transaction.state.log.num.partitions": "4",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
    }


def _more_listeners(addresses: Mapping[int, str]) -> dict[str, str]:
    """What is appended to the properties that name listeners."""
    return {
        "listeners": "".join(f",L{port}://{LOOPBACK}:{port}" for port in addresses),
        "advertised.listeners": "".join(f",L{port}://{address}" for port, address in addresses.items()),
        "listener.security.protocol.map": "".join(f",L{port}:PLAINTEXT" for port in addresses),
    }


def check_jars(jars: Path) -> None:
    """Raises StackError where these are not exactly the jars that `jars.sha256` lists."""
    expected = {name: sum for sum, name in (line.split("  ", 1) for line in SUMS.read_text().splitlines())}
    found = {jar.name: hashlib.sha256(jar.read_bytes()).hexdigest() for jar in jars.iterdir()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise StackError(
            f"Maven resolved other jars than {SUMS.name} lists: {', '.join(wrong)}. Where the version of Kafka was "
            "changed on purpose, renew that list; else do not trust the repository that Maven uses."
        )


def kafka_jars() -> Path:
    """The folder with Kafka's jars, resolved by Maven the first time, outside the clone, and compared with
    `jars.sha256`."""
    namespace = {"m": "http://maven.apache.org/POM/4.0.0"}
    version = ET.parse(POM).findtext("m:properties/m:kafka.version", namespaces=namespace)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ringfence"
    jars = cache / f"kafka-{version}-{hashlib.sha256(SUMS.read_bytes()).hexdigest()[:12]}"
    if jars.is_dir():
        return jars
    maven = shutil.which("mvn")
    if maven is None:
        raise StackError(
            "Apache Kafka's jars are resolved by Maven, and there is no mvn on PATH: install Maven."
        )
    cache.mkdir(parents=True, exist_ok=True)
    # Moved into place when complete: what was broken off, or runs twice, leaves no half a cache.
    with tempfile.TemporaryDirectory(dir=cache) as half:
        command = [maven, "-q", "-B", "--strict-checksums", "-f", str(POM), "dependency:copy-dependencies"]
        done = subprocess.run(
            [*command, f"-DoutputDirectory={half}/jars"], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise StackError(
                f"Maven could not resolve Apache Kafka {version}; see whether it reaches its repository:\n"
                + "\n".join((done.stdout + done.stderr).splitlines()[-10:])
            )
        check_jars(Path(half, "jars"))
        try:
            Path(half, "jars").rename(jars)
        except OSError:
            if not jars.is_dir():
                raise
    return jars


def _java(jars: Path, *options: str) -> list[str]:
    home = os.environ.get("JAVA_HOME")
    java = shutil.which(str(Path(home, "bin", "java"))) if home else shutil.which("java")
    if java is None:
        raise StackError("Apache Kafka needs Java 17 or newer: install a JDK, or correct JAVA_HOME.")
    return [java, *options, "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-cp", f"{jars}/*"]
