"""Pages for operators, run as their readers run them: programs of others on the trail, an installation of one's own."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.site.dev_folder import dev_running, inherited
from tests.site.page_commands import ROOT, run_page
from tests.support.ocsf import problems

pytestmark = [pytest.mark.tools, pytest.mark.timeout(600)]
DOCS = ROOT / "docs"
JWKS = """\
python - > jwks.json <<'END'
import json
from joserfc.jwk import ECKey
print(json.dumps({"keys": [ECKey.generate_key("P-256", {"kid": "one", "alg": "ES256"}).as_dict(private=False)]}))
END
"""


def beside(command: str, happened: str) -> str:
    """A program that goes on is started, until something is so, and ended."""
    return f"{command} & while kill -0 $! && ! {happened}; do sleep 0.1; done; kill $! && wait $!"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with dev_running(tmp_path_factory.mktemp("dev")) as folder:
        shutil.copytree(ROOT / "deploy/siem", folder / "deploy/siem")
        yield folder


def test_rsyslog_and_kcat_on_siem_md(folder: Path) -> None:
    settings = tomllib.loads((folder / ".ringfence/ringfence.toml").read_text())
    configuration = folder / "deploy/siem/rsyslog.conf"
    configuration.write_text(configuration.read_text().replace("127.0.0.1:9092", settings["kafka"]))
    rsyslogd = 'rsyslogd -n -f "$PWD/rsyslog.conf" -i "$PWD/rsyslog.pid"'
    kcat = "deploy/siem/kcat.sh audit.json"
    replaced = {
        "127.0.0.1:9092": settings["kafka"],
        rsyslogd: beside(rsyslogd, "[ -s audit.json ]") + "; mv audit.json of-rsyslog.json",
        kcat: beside(kcat, "[ -s audit.json ]"),
    }
    environment = inherited()
    environment["PATH"] += ":/usr/sbin"
    run_page(DOCS / "siem.md", folder, environment, replaced)
    for name in ("of-rsyslog.json", "audit.json"):
        first = (folder / name).read_bytes().splitlines()[0]
        assert not problems(orjson.loads(first)), name


def test_an_installation_by_operations_md(tmp_path: Path, kafka: Kafka, redis_server: RedisServer) -> None:
    environment = inherited() | {
        "RINGFENCE_KAFKA": kafka.bootstrap,
        "RINGFENCE_REDIS_URL": redis_server.url,
        "RINGFENCE_TOPIC_PREFIX": "operations",
        "RINGFENCE_REDIS_PREFIX": "operations",
        "RINGFENCE_EMBEDDED_BROKER": str(kafka.embedded).lower(),
    }
    (tmp_path / "docs").symlink_to(DOCS)
    printed = run_page(DOCS / "operations.md", tmp_path, environment, {}, JWKS)
    assert '"targets"' in printed
