"""Brokers whose disk is copied, and that begin with such a copy: Kafka was lost, and is restored."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Protocol

from ringfence.dev.kafka import EmbeddedKafka
from tests.brokers import KafkaServer
from tests.brokers.apache import ApacheKafka


class RestorableKafka(KafkaServer, Protocol):
    def snapshot(self, to: Path) -> None:
        """Copy its disk to a new folder, as it is at one moment."""
        ...


class KeptKafka(EmbeddedKafka):
    """The embedded broker with its data on disk. It is stopped for a snapshot: it writes them all before it ends."""

    def __init__(self, data_dir: Path, restored_from: Path | None = None) -> None:
        super().__init__(data_dir, keep=True)
        if restored_from is not None:
            shutil.copytree(restored_from, self._store)

    def snapshot(self, to: Path) -> None:
        self.stop()
        shutil.copytree(self._store, to)
        self.start()


def own_kafka(kind: str, folder: Path, restored_from: Path | None = None) -> RestorableKafka:
    """A broker that no other test uses, of the kind of this run; the embedded one where that is nobody's to copy."""
    if kind == "apache":
        return ApacheKafka(folder, restored_from=restored_from)
    return KeptKafka(folder, restored_from)
