"""The values of the chart: what it takes, and what it rejects with an error that says what to correct."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from ringfence.dev.processes import StackError
from tests.support.chart import (
    CHART,
    DIGEST,
    SIGN_PAGE,
    VALUES,
    Document,
    container_of,
    documents,
    helm,
    merged,
    pod_of,
    rendered,
    services,
)


def objects(changes: Document, values: Document = VALUES) -> dict[str, Document]:
    """What the release `ringfence` makes of these values, by kind and name."""
    found = rendered(merged(values, changes))
    return {f"{one['kind']}/{one['metadata']['name']}": one for one in found}


@pytest.mark.parametrize("values", [VALUES, SIGN_PAGE], ids=["services", "sign page"])
def test_lint_finds_nothing(values: Document) -> None:
    done = helm("lint", "--strict", str(CHART), "--namespace", "ringfence", values=values)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout + done.stderr


REJECTED: list[tuple[str, Document, str]] = [
    ("unknown value", {"service": {}}, "additional properties 'service' not allowed"),
    ("unknown service", {"services": {"runner": {"enabled": True}}}, "'runner' not allowed"),
    ("misspelt value of a service", {"services": {"policy": {"replica": 3}}}, "'replica' not allowed"),
    ("no replica", {"services": {"policy": {"replicas": 0}}}, "'/services/policy/replicas': minimum"),
    ("two pods of a gateway", {"services": {"gateway": {"replicas": 2}}}, "'/services/gateway/replicas'"),
    ("no image", {"image": {"repository": ""}}, "'/image/repository'"),
    ("a digest cut short", {"image": {"digest": "sha256:00"}}, "'/image/digest'"),
    ("no trust root", {"settings": {"RINGFENCE_TRUST_ROOT": ""}}, "RINGFENCE_TRUST_ROOT"),
    ("no Kafka", {"settings": {"RINGFENCE_KAFKA": ""}}, "RINGFENCE_KAFKA"),
    ("no URL of the issuer", {"settings": {"RINGFENCE_ISSUER_URL": "issuer"}}, "RINGFENCE_ISSUER_URL"),
    ("a setting of another program", {"settings": {"PATH": "/tmp"}}, "'/settings'"),
    ("a number for a text", {"settings": {"RINGFENCE_PARTITIONS": 6}}, "got number, want string"),
    ("a password", {"settings": {"RINGFENCE_KAFKA_SASL_PASSWORD": "hunter2"}}, "KAFKA_SASL_PASSWORD"),
    ("a password in a URL", {"redis": {"url": "redis://:hunter2@valkey:6379/0"}}, "'/redis/url'"),
    ("Redis for all", {"settings": {"RINGFENCE_REDIS_URL": "redis://valkey"}}, "'/settings'"),
    ("no Redis", {"redis": {"url": ""}}, "issuer and revoker need redis.url"),
    ("a console without an origin", {"services": {"console": {"settings": None}}}, "/services/console"),
    ("a volume of the console", {"services": {"console": {"state": {"size": "1Gi"}}}}, "/services/console"),
    ("a size without a unit", {"services": {"audit": {"state": {"size": "20"}}}}, "/services/audit/state/size"),
    (
        "the sign page among others",
        {"services": {"sign-page": SIGN_PAGE["services"]["sign-page"]}},
        "the sign page is a release of its own",
    ),
    ("agents among keys", {"agents": {"namespace": "ringfence"}}, "a namespace of their own"),
    ("agents without a gateway", {"services": {"gateway": {"enabled": False}}}, "lead to a gateway"),
    ("no reader", {"networkPolicies": {"readers": []}}, "'/networkPolicies/readers'"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), [row[1:] for row in REJECTED], ids=[row[0] for row in REJECTED])
def test_wrong_values_are_rejected_by_name(changes: Document, says: str) -> None:
    with pytest.raises(StackError) as refused:
        rendered(merged(VALUES, changes))
    assert says in refused.value.message


def test_values_as_they_come_are_rejected_with_all_that_is_missing() -> None:
    done = helm("template", "ringfence", str(CHART))
    assert done.returncode != 0
    for name in ("image/repository", "TRUST_DOMAIN", "TRUST_ROOT", "KAFKA", "ISSUER_URL", "POLICY_URL"):
        assert name in done.stderr


def test_kubernetes_older_than_the_oldest_version_is_rejected() -> None:
    with pytest.raises(StackError) as refused:
        rendered(VALUES, version="1.29")
    assert "1.30" in refused.value.message


@pytest.mark.parametrize("name", sorted({"registry", "policy", "audit", "scim", "signals", "console"}))
def test_disabled_service_leaves_no_object(name: str) -> None:
    left = objects({"services": {name: {"enabled": False}}})
    assert not [one for one in left if one.endswith(f"/ringfence-{name}")]
    assert len([one for one in objects({}) if one.endswith(f"/ringfence-{name}")]) >= 5


def test_budgets_policies_jobs_and_monitoring_are_optional() -> None:
    off: Document = {
        "podDisruptionBudgets": False,
        "networkPolicies": {"enabled": False},
        "agents": {"namespace": ""},
        "jobs": {"topics": False, "trustBundle": {"configMap": ""}},
        "monitoring": {"serviceMonitor": False, "alerts": False},
    }
    kinds = {one["kind"] for one in objects(off).values()}
    assert kinds == {"ServiceAccount", "Service", "StatefulSet", "Deployment"}


def image(changes: Document, name: str = "audit") -> str:
    values = merged(VALUES, changes)
    (found,) = [
        container_of(one)["image"]
        for one in rendered(values)
        if one["kind"] in ("StatefulSet", "Deployment", "Job")
        and one["metadata"]["name"] == f"ringfence-{name}"
    ]
    answer: str = found
    return answer


def test_image_is_named_by_digest_before_tag_and_by_the_version_of_the_chart() -> None:
    assert image({"image": {"tag": "0.1.1"}}) == f"registry.example/ringfence@{DIGEST}"
    assert image({"image": {"tag": "0.1.1", "digest": ""}}) == "registry.example/ringfence:0.1.1"
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert image({"image": {"digest": ""}}) == f"registry.example/ringfence:{version}"


def test_one_service_and_the_jobs_can_have_the_next_image_before_the_others() -> None:
    following = "sha256:" + "1" * 64
    changes = {
        "services": {"audit": {"image": {"digest": following}}},
        "jobs": {"image": {"digest": following}},
    }
    assert image(changes) == image(changes, "topics") == f"registry.example/ringfence@{following}"
    assert image(changes, "policy") == f"registry.example/ringfence@{DIGEST}"


def test_redis_url_with_a_password_comes_from_a_secret() -> None:
    changes = {"redis": {"url": "", "urlSecret": {"name": "ringfence-redis", "key": "url"}}}
    issuer = container_of(objects(changes)["StatefulSet/ringfence-issuer"])
    (variable,) = [one for one in issuer["env"] if one["name"] == "RINGFENCE_REDIS_URL"]
    assert variable["valueFrom"] == {"secretKeyRef": {"name": "ringfence-redis", "key": "url"}}


def test_setting_of_a_service_wins_over_that_of_all() -> None:
    changes = {
        "settings": {"RINGFENCE_LOG_LEVEL": "warning"},
        "services": {"policy": {"settings": {"RINGFENCE_LOG_LEVEL": "debug"}}},
    }

    def level(name: str) -> Any:
        container = container_of(objects(changes)[f"StatefulSet/ringfence-{name}"])
        return next(one["value"] for one in container["env"] if one["name"] == "RINGFENCE_LOG_LEVEL")

    assert (level("policy"), level("audit")) == ("debug", "warning")


def test_changed_setting_changes_the_pods_so_that_they_restart() -> None:
    changed = objects({"settings": {"RINGFENCE_GRACE_S": "4"}})["StatefulSet/ringfence-policy"]
    assert pod_of(changed) != pod_of(services()["policy"])


def test_values_hold_no_secret() -> None:
    assert not [one for one in documents().values() if one["kind"] in ("Secret", "ConfigMap")]
