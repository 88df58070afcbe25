"""The commands of `docs/trust.md`, in the order of the page, on a running installation: nobody is restarted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.site.page_commands import ROOT, run_page
from tests.support.installation import STARTED, Installation, installed, lease, organise


@pytest.fixture
def here(kafka: Kafka, redis_server: RedisServer, tmp_path: Path) -> Iterator[Installation]:
    with installed(kafka, redis_server, tmp_path) as made:
        yield made


@pytest.mark.timeout(400)
def test_the_commands_of_the_page(here: Installation) -> None:
    task = organise(here)
    held = lease(here, task, "30m")
    began = here.trust.fingerprint()
    # What the old root signed after the moment on the page is void: all that this installation has.
    replaced = {"2026-11-25T09:00:00": '"$(date -u +%FT%T)"'}
    run_page(ROOT / "docs/trust.md", here.folder, here.environment("olga"), replaced)

    assert here.trust.fingerprint() != began
    here.say("release", held, who="bot")
    assert lease(here, task, "10m")
    ready = [json.loads(here.text(name, "/readyz")) for name in STARTED]
    (version,) = {one["trust_bundle"] for one in ready}
    assert version == 8, "two changes of origins and one of their ends, a renewal, a rotation, two roots"
