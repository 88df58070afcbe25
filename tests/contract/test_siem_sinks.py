"""Every sink in `deploy/siem/` reads the trail as docs/audit-trail.md says, and keeps each event to the byte."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from ringfence.messages.topics import AUDIT

SIEM = Path(__file__).parents[2] / "deploy/siem"
PAGE = Path(__file__).parents[2] / "docs/siem.md"
SINKS = {
    # What keeps the event as it came, and what commits an offset only for what was taken.
    "rsyslog.conf": ('string="%rawmsg%\\n"', 'queue.type="Direct"'),
    "kcat.sh": ("-f '%s\\n'", "-u"),
    "vector.yaml": ("codec: bytes", "acknowledgements:\n      enabled: true"),
    "fluent-bit.yaml": ("format: none", "storage.type: filesystem"),
    "logstash.conf": ('"[event][original]" => "%{message}"', "queue.type: persisted"),
    "splunk-connect.properties": (
        "value.converter=org.apache.kafka.connect.storage.StringConverter",
        "splunk.hec.ack.enabled=true",
    ),
}
COMMITTED = re.compile(r"^[^#\n]*isolation[._]level\W+read_committed", re.MULTILINE)
EARLIEST = re.compile(r"^[^#\n]*auto[._]offset[._]reset\W+earliest", re.MULTILINE)
GROUP = re.compile(r"^[^#\n]*ringfence\.siem\.[a-z-]+", re.MULTILINE)


@pytest.mark.parametrize("name", SINKS)
def test_a_sink_reads_what_is_committed_from_the_beginning_in_a_group_of_its_own(name: str) -> None:
    text = (SIEM / name).read_text()
    assert AUDIT.name("ringfence") in text
    for wanted in (COMMITTED, EARLIEST, GROUP):
        assert wanted.search(text), wanted.pattern
    for wanted_text in SINKS[name]:
        assert wanted_text in text
    assert "SASL_SSL" in text or "sasl:" in text
    assert f"deploy/siem/{name}" in PAGE.read_text()


def test_every_sink_has_a_group_of_its_own() -> None:
    groups = [set(re.findall(r"ringfence\.siem\.[a-z-]+", (SIEM / name).read_text())) for name in SINKS]
    assert all(len(group) == 1 for group in groups)
    assert len(set().union(*groups)) == len(SINKS)


@pytest.mark.parametrize("name", ["vector.yaml", "fluent-bit.yaml"])
def test_yaml_is_yaml(name: str) -> None:
    assert yaml.safe_load((SIEM / name).read_text())


def test_no_property_is_said_twice() -> None:
    lines = (SIEM / "splunk-connect.properties").read_text().splitlines()
    names = [line.partition("=")[0] for line in lines if line and not line.startswith("#")]
    assert len(names) == len(set(names)), json.dumps(names)


# As the programs declare them in their own sources: what is spelled otherwise, they refuse or pass over.
VECTOR_KAFKA = {
    "type", "acknowledgements", "auto_offset_reset", "bootstrap_servers", "commit_interval_ms", "decoding",
    "decompression", "drain_timeout_ms", "fetch_wait_max_ms", "framing", "group_id", "headers_key", "key_field",
    "librdkafka_options", "sasl", "tls", "topics",
}  # fmt: skip
VECTOR_FILE = {"type", "inputs", "path", "encoding", "acknowledgements", "compression", "idle_timeout_secs"}
FLUENT_BIT_KAFKA = {
    "name", "tag", "storage.type", "threaded", "poll_ms", "topics", "format", "brokers", "client_id", "group_id",
    "buffer_max_size", "poll_timeout_ms", "enable_auto_commit",
}  # fmt: skip
FLUENT_BIT_FILE = {"name", "match", "retry_limit", "path", "file", "format", "template", "mkdir"}
FLUENT_BIT_SERVICE = {"flush", "storage.path", "storage.sync", "storage.checksum"}
SPLUNK = {
    "splunk.hec.uri", "splunk.hec.token", "splunk.hec.ssl.validate.certs", "splunk.hec.ack.enabled",
    "splunk.hec.max.retries", "splunk.indexes", "splunk.sourcetypes",
}  # fmt: skip
CONNECT = {"name", "connector.class", "tasks.max", "topics", "key.converter", "value.converter"}


def test_vector_knows_every_option() -> None:
    found = yaml.safe_load((SIEM / "vector.yaml").read_text())
    assert found.keys() == {"data_dir", "sources", "sinks"}
    assert found["sources"]["ringfence"].keys() <= VECTOR_KAFKA
    assert found["sinks"]["file"].keys() <= VECTOR_FILE
    assert found["sinks"]["file"]["inputs"] == list(found["sources"])


def test_fluent_bit_knows_every_option() -> None:
    found = yaml.safe_load((SIEM / "fluent-bit.yaml").read_text())
    (source,), (sink,) = found["pipeline"]["inputs"], found["pipeline"]["outputs"]
    assert {name for name in source if not name.startswith("rdkafka.")} <= FLUENT_BIT_KAFKA
    assert sink.keys() <= FLUENT_BIT_FILE
    assert found["service"].keys() <= FLUENT_BIT_SERVICE
    assert source["tag"] == sink["match"]


def test_splunk_connect_knows_every_option() -> None:
    lines = (SIEM / "splunk-connect.properties").read_text().splitlines()
    names = {line.partition("=")[0] for line in lines if line and not line.startswith("#")}
    assert {name for name in names if not name.startswith("consumer.override.")} <= SPLUNK | CONNECT
