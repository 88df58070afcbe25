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
