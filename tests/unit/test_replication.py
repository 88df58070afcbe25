"""Replication of topics on a cluster: who is warned of what, and what to do about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ringfence.cli.commands import init as init_command
from ringfence.cli.doctor.command import replication_findings
from ringfence.cli.main import main
from ringfence.client.admin.trust_setup import TrustFolder
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.kafka.topics_admin import Replication, TopicDifference, TopicReplication, TopicsAdmin


def cluster(brokers: int, *topics: tuple[int, int | None]) -> Replication:
    """Topics `t0`, `t1` and so on, by replicas and min.insync.replicas."""
    return Replication(brokers, {f"t{number}": TopicReplication(*one) for number, one in enumerate(topics)})


SINGLE = cluster(3, (1, 1), (1, 1), (3, 2))


@pytest.mark.parametrize(
    "replication",
    [
        cluster(3, (3, 2), (2, 2)),
        cluster(1, (1, 1)),
        cluster(3, (2, None)),
        cluster(3),
        cluster(0),
    ],
    ids=["replicated", "a single broker", "a broker that does not say", "no topics", "nobody known"],
)
def test_sufficient_replication_has_no_warning(replication: Replication) -> None:
    assert replication.warnings() == []


def test_topics_on_one_of_several_brokers_are_named_with_the_remedy() -> None:
    (warning,) = SINGLE.warnings()
    assert "Kafka has 3 brokers, and 2 topics (t0, ...) are on one of them alone" in warning
    assert "RINGFENCE_REPLICATION=3" in warning
    assert "kafka-reassign-partitions.sh" in warning
    assert "RINGFENCE_REPLICATION=2" in cluster(2, (1, None)).warnings()[0], "no more than there are brokers"


def test_replicas_that_nobody_waits_for_are_named_with_the_remedy() -> None:
    (warning,) = cluster(3, (3, 1), (3, 2)).warnings()
    assert warning.startswith("t0 is replicated, and min.insync.replicas is 1")
    assert "min.insync.replicas=2 by kafka-configs.sh" in warning


def test_both_are_said() -> None:
    assert len(cluster(3, (1, 1), (3, 1)).warnings()) == 2


def test_the_doctor_alarms_on_a_cluster_alone() -> None:
    (bad,) = replication_findings(SINGLE)
    assert (bad.verdict, bad.says) == ("bad", SINGLE.warnings()[0])
    (note,) = replication_findings(cluster(1, (1, 1)))
    assert note.verdict == "unknown"
    assert "stored once" in note.says
    (good,) = replication_findings(cluster(3, (3, 2), (2, 2)))
    assert (good.verdict, good.says) == ("good", "3 brokers, 2 replicas of each record at least")
    assert list(replication_findings(cluster(3))) == [], "what is not there is missed by another check"


class _Admin(TopicsAdmin):
    """A cluster with topics of replication factor 1, as it describes itself; the connection is left out."""

    async def __aenter__(self) -> _Admin:
        return self

    async def apply(self, *, keep_bytes: int | None = None) -> list[str]:
        return ["t0"]

    async def set_right(self) -> tuple[list[TopicDifference], list[TopicDifference]]:
        return [], []

    async def replication(self) -> Replication:
        return SINGLE


@pytest.fixture
def a_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("__aenter__", "apply", "set_right", "replication"):
        monkeypatch.setattr(TopicsAdmin, name, getattr(_Admin, name))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("a_cluster")
def test_topics_apply_warns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["topics", "apply"]) == 0, "it did what was asked for"
    told = capsys.readouterr()
    assert told.out == "created t0\n"
    assert f"warning: {SINGLE.warnings()[0]}\n" == told.err
    assert main(["--json", "topics", "apply"]) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == SINGLE.warnings()


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[TrustFolder]:
    """What `init --publish` put on Kafka."""
    folders = list[TrustFolder]()

    async def publish(folder: TrustFolder, *_: object) -> None:
        folders.append(folder)

    async def nothing_newer(*_: object) -> None: ...

    monkeypatch.setattr(init_command, "publish_trust", publish)
    monkeypatch.setattr(init_command, "publish_bundle", publish)
    monkeypatch.setattr(init_command, "require_newest", nothing_newer)
    return folders


@pytest.mark.usefixtures("a_cluster")
@pytest.mark.parametrize("more", [[], ["--renew"]], ids=["the first bundle", "a later one"])
def test_init_warns_where_it_publishes(
    more: list[str], published: list[TrustFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init"]) == 0
    assert "warning" not in capsys.readouterr().err, "it does not talk to Kafka"
    assert main(["init", "--publish", *more]) == 0
    assert capsys.readouterr().err == f"warning: {SINGLE.warnings()[0]}\n"
    assert main(["--json", "init", "--publish", *more]) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == SINGLE.warnings()
    assert len(published) == 2


@pytest.mark.usefixtures("a_cluster")
def test_init_has_published_whether_or_not_it_may_look(
    published: list[TrustFolder], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def refused(self: TopicsAdmin) -> Replication:
        raise UnavailableError("Kafka does not answer")

    monkeypatch.setattr(TopicsAdmin, "replication", refused)
    assert main(["init", "--publish"]) == 0
    assert (len(published), capsys.readouterr().err) == (1, "")
