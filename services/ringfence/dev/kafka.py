"""Embedded Kafka broker for development and tests, from the `noida-db` wheel, on loopback only.

Differences from Apache Kafka, measured with 0.2.3:
- It answers a fetch without data at once, whatever the consumer requested. Pace its consumers with
  `ringfence.kernel.kafka.embedded_broker`.
- All data is in memory. About every two seconds in which something changed it writes all of it as one JSON
  file. So a kill loses the records acknowledged since then, and every megabyte it holds costs CPU. Bound topics by
  `retention.ms` and `retention.bytes`, which it honours. It accepts `cleanup.policy=compact` but does not compact.
  Here its writing thread yields to all others: under load it took a sixth of two cores, and delayed every answer.
  Where nobody keeps the data, it writes once a minute at most: writing was two thirds of the broker's CPU in the tests.
- It writes no request log, and its wrapper script leaves the server behind when killed. So the binary
  inside the package is started directly.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import struct
from pathlib import Path

from ringfence.dev.processes import LOOPBACK, PRIVATE, EmbeddedServer, StackError, claim_port, spawn
from ringfence.kernel.base.private_files import make_private_folder

_ANSWER_TIMEOUT_S = 10.0
_START_TIMEOUT_S = 20.0

_WRITER = "autosave"
_PAUSE_S = 60
"""How much longer it waits before it writes data that nobody keeps."""
_METADATA, _ALTER_CONFIGS = 3, 33  # api keys of the Kafka protocol
_BROKER_RESOURCE = 4
_NODE_ID = "1"


class EmbeddedKafka(EmbeddedServer):
    """One embedded broker. `log_path` is `data_dir/kafka.log` by default. Naming a topic does not create it."""

    grace_s = 30.0  # with `keep`, it writes all data before it ends

    def __init__(
        self, data_dir: Path, port: int = 0, log_path: Path | None = None, *, keep: bool = False
    ) -> None:
        super().__init__(data_dir / "noida-db", port, log_path or data_dir / "kafka.log", keep=keep)

    @property
    def bootstrap(self) -> str:
        """`127.0.0.1:port`, for `bootstrap_servers`."""
        return f"{LOOPBACK}:{self.port}"

    def _launch(self) -> None:
        binary = program()
        self.port = claim_port(self.port, "The embedded Kafka broker", "--free-ports")
        make_private_folder(self._store)
        argv = [str(binary), "start", "--data-dir", str(self._store), "--host", LOOPBACK]
        argv += ["--only", "kafka", "--kafka-port", str(self.port)]
        self.child = spawn("kafka (noida-db)", argv, log_path=self._log_path, umask=PRIVATE)
        try:
            self.child.wait_until(
                lambda: kafka_answers(self.port) and _refuses_unknown_topics(self.port),
                _START_TIMEOUT_S,
                f"answers Kafka requests on {self.bootstrap}",
            )
            self.child.stand_back(_WRITER)
            if not self._keep:
                self.child.lengthen_pauses(_WRITER, _PAUSE_S)
        except BaseException:
            self.child.kill()
            self.child = None
            raise


def kafka_answers(port: int, host: str = LOOPBACK) -> bool:
    """Whether a Kafka broker answers a metadata request there (plaintext) and knows of a live broker."""
    try:
        # Version 1 with an empty list of topics asks for the brokers alone.
        answer = _call((host, port), _METADATA, 1, struct.pack(">i", 0))
    except (OSError, StackError):
        return False
    return len(answer) >= 4 and int(struct.unpack_from(">i", answer)[0]) > 0


def _refuses_unknown_topics(port: int) -> bool:
    """Turn off `auto.create.topics.enable`, which this broker has on and offers no option for. False without an answer.

    Raises StackError if the broker refuses.
    """
    resource = struct.pack(">b", _BROKER_RESOURCE) + _string(_NODE_ID)
    configs = struct.pack(">i", 1) + _string("auto.create.topics.enable") + _string("false")
    body = struct.pack(">i", 1) + resource + configs + struct.pack(">b", 0)
    try:
        answer = _call((LOOPBACK, port), _ALTER_CONFIGS, 0, body)
    except OSError:
        return False
    _, count, code = struct.unpack_from(">iih", answer)
    if count != 1 or code != 0:
        raise StackError(
            f"The embedded Kafka broker refused auto.create.topics.enable=false (error {code}): "
            "install the version of noida-db that requirements.lock names."
        )
    return True


def _call(address: tuple[str, int], api_key: int, version: int, body: bytes) -> bytes:
    """Send one request of the Kafka protocol, and return the answer without header. Raises OSError or StackError."""
    correlation_id = 7
    header = struct.pack(">hhi", api_key, version, correlation_id) + _string("ringfence")
    with socket.create_connection(address, _ANSWER_TIMEOUT_S) as connection:
        connection.sendall(struct.pack(">i", len(header) + len(body)) + header + body)
        with connection.makefile("rb") as stream:
            head = stream.read(8)
            if len(head) < 8:
                raise ConnectionResetError("closed before an answer")
            size, correlated = struct.unpack(">ii", head)
            if correlated != correlation_id or not 4 <= size < 1_000_000:
                raise StackError(
                    f"What listens on {address[0]}:{address[1]} does not speak Kafka: choose another port."
                )
            return stream.read(size - 4)


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack(">h", len(encoded)) + encoded


def program() -> Path:
    """Return the path of the broker's binary. Raises StackError with a remedy if it is not installed."""
    package = importlib.util.find_spec("noida_db")
    if package is None or package.origin is None:
        raise StackError(
            "The embedded Kafka broker is not installed; it comes with the extra `dev` (ringfence[dev]): "
            "pip install '.[dev]'"
        )
    binary = Path(package.origin).with_name("noida-db")
    if not binary.is_file():
        raise StackError(
            f"The noida-db package has no broker for this machine ({binary} is missing): give the address of a "
            "Kafka broker instead."
        )
    if not os.access(binary, os.X_OK):  # some installers drop the bit
        binary.chmod(0o755)
    return binary
