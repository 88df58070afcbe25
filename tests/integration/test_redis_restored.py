"""Redis is lost as `docs/operators/backup-and-restore.md` has it: nobody does anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringfence.dev.redis import EmbeddedRedis
from tests.conftest import Kafka
from tests.site.page_commands import ROOT, run_page, section_of
from tests.support.installation import THIS_CLONE, Installation, lease, organise

PAGE = ROOT / "docs/operators/backup-and-restore.md"


@pytest.mark.timeout(400)
def test_redis_comes_back_empty(kafka: Kafka, tmp_path: Path) -> None:
    redis = EmbeddedRedis(tmp_path / "redis")
    redis.start()
    (tmp_path / "installation").mkdir()
    here = Installation(
        THIS_CLONE, tmp_path / "installation",
        kafka=kafka.bootstrap, embedded_broker=kafka.embedded, redis_url=redis.url,
    )  # fmt: skip
    try:
        here.make()
        here.start()
        task = organise(here)
        held = lease(here, task, "30m")

        redis.stop()  # and its data are deleted
        redis.start()
        # It asks for itself until a revoker has rebuilt Redis.
        assert lease(here, task, "10m") != held
        said = run_page(
            PAGE, here.folder, here.environment("olga"), blocks=section_of(PAGE, "Redis was lost")
        )
        assert "Redis holds what Kafka knows" in said
        assert held in here.leases()
    finally:
        here.end()
        redis.stop()
