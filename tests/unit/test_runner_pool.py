"""What the pool of a runner lets orders ask for, and how its file is read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ringfence.kernel.base.errors import SettingsError
from ringfence.messages.run import Mount, RunLimits, RunOrder
from ringfence.model.verdict import ALLOWED
from ringfence.runner.pool import read_pool
from tests.support.verdicts import code_of

IMAGE, OTHER_IMAGE = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"
TASK = "c1a5e6f0-1b2c-5d3e-8f40-e6f01b2c5d3e"


def pool_file(folder: Path, **fields: Any) -> Path:
    for name in ("sources", "reports"):
        (folder / name).mkdir(exist_ok=True)
    mounts = {
        "sources": {"path": str(folder / "sources")},
        "reports": {"path": str(folder / "reports"), "read_write": True, "as_root": True},
    }
    file = folder / "pool.json"
    given = {"name": "reviews", "agents": ["deploy-bot"], "mounts": mounts, "commands": ["review"], **fields}
    file.write_text(json.dumps({name: value for name, value in given.items() if value is not None}))
    return file


def ordered(**fields: Any) -> RunOrder:
    given: dict[str, Any] = {
        "iss": "spiffe://acme.example/user/maria", "aud": "acme.example", "iat": 1, "exp": 2, "jti": "1",
        "pool": "reviews", "agent_id": "deploy-bot", "task_id": TASK, "command": ("review", "422"),
        "limits": RunLimits(memory_bytes=1 << 30, cpu_millis=1000, pids=64), "ttl_s": 600,
    }  # fmt: skip
    return RunOrder(**{**given, **fields})


def limits(**fields: int) -> RunLimits:
    return RunLimits(**{"memory_bytes": 1 << 30, "cpu_millis": 1000, "pids": 64, **fields})


def test_an_order_within_the_pool_has_no_problem_and_becomes_a_plan(tmp_path: Path) -> None:
    pool = read_pool(pool_file(tmp_path, environment={"MODE": "ci"}))
    order = ordered(mounts=(Mount(name="sources"), Mount(name="reports", read_write=True)))
    assert pool.check_order(order) == ALLOWED
    plan = pool.plan(order, order_id="o", run_id="r", deadline_s=9)
    assert [(one.name, one.host, one.inside, one.writable) for one in plan.mounts] == [
        ("sources", tmp_path / "sources", "/workspace/sources", False),
        ("reports", tmp_path / "reports", "/workspace/reports", True),
    ]
    assert (plan.environment, plan.deadline_s, plan.ordered_by) == ({"MODE": "ci"}, 9, order.iss)
    assert plan.policy_digest == pool.digest


def test_a_mount_that_may_be_written_is_read_only_where_the_order_says_so(tmp_path: Path) -> None:
    pool = read_pool(pool_file(tmp_path))
    (mount,) = pool.plan(
        ordered(mounts=(Mount(name="reports"),)), order_id="o", run_id="r", deadline_s=9
    ).mounts
    assert not mount.writable


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"pool": "elsewhere"}, "order_other_pool"),
        ({"agent_id": "other-bot"}, "agent_not_in_pool"),
        ({"command": ("sh", "-c", "review")}, "command_not_in_pool"),
        ({"command": ("./review",)}, "command_not_in_pool"),
        ({"image": IMAGE}, "image_not_in_pool"),
        ({"labels": {"zone": "eu-2"}}, "label_not_in_pool"),
        ({"labels": {"zone": "eu-1", "gpu": "yes"}}, "label_not_in_pool"),
        ({"mounts": (Mount(name="secrets"),)}, "mount_not_in_pool"),
        ({"mounts": (Mount(name="sources", read_write=True),)}, "mount_read_only"),
        ({"mounts": (Mount(name="sources"), Mount(name="sources"))}, "mount_repeated"),
        ({"limits": limits(memory_bytes=(2 << 30) + 1)}, "limit_above_pool"),
        ({"limits": limits(cpu_millis=1001)}, "limit_above_pool"),
        ({"limits": limits(pids=257)}, "limit_above_pool"),
        ({"ttl_s": 1801}, "limit_above_pool"),
    ],
)
def test_order_beyond_the_pool_is_refused(tmp_path: Path, fields: dict[str, Any], code: str) -> None:
    pool = read_pool(pool_file(tmp_path, labels={"zone": "eu-1", "disk": "fast"}))
    assert code_of(pool.check_order(ordered(**fields))) == code


def test_a_pool_runs_what_demands_labels_that_it_has(tmp_path: Path) -> None:
    pool = read_pool(pool_file(tmp_path, labels={"zone": "eu-1", "disk": "fast"}))
    for labels in (None, {}, {"zone": "eu-1"}, {"zone": "eu-1", "disk": "fast"}):
        assert pool.check_order(ordered(labels=labels)) == ALLOWED


def test_the_highest_limits_are_allowed(tmp_path: Path) -> None:
    most = RunLimits(memory_bytes=2 << 30, cpu_millis=1000, pids=256)
    assert read_pool(pool_file(tmp_path)).check_order(ordered(limits=most, ttl_s=1800)) == ALLOWED


@pytest.mark.parametrize(
    ("asked", "default", "runs"),
    [(None, IMAGE, IMAGE), (IMAGE, None, IMAGE), (OTHER_IMAGE, IMAGE, None), (None, None, None)],
)
def test_an_image_is_one_of_the_pools(
    tmp_path: Path, asked: str | None, default: str | None, runs: str | None
) -> None:
    file = pool_file(tmp_path, backend="oci", images=[IMAGE], default_image=default, mounts={})
    pool, order = read_pool(file), ordered(image=asked)
    code = code_of(pool.check_order(order))
    assert (code is None) == (runs is not None)
    if code is None:
        assert pool.plan(order, order_id="o", run_id="r", deadline_s=9).image == runs
    else:
        assert code == "image_not_in_pool"


def test_every_agent_and_every_command_have_to_be_said(tmp_path: Path) -> None:
    pool = read_pool(pool_file(tmp_path, agents=["*"], commands=None))
    assert pool.check_order(ordered(agent_id="other-bot", command=("sh",))) == ALLOWED


def test_the_digest_is_of_everything_in_the_file(tmp_path: Path) -> None:
    files: list[dict[str, Any]] = [
        {}, {"environment": {"A": "1"}}, {"environment": {"A": "2"}}, {"labels": {"zone": "a"}},
        {"agents": ["*"]}, {"limits": {"pids": 100}}, {"concurrency": 5}, {"mounts": {}},
    ]  # fmt: skip
    digests = {read_pool(pool_file(tmp_path, **fields)).digest for fields in files}
    assert len(digests) == len(files)
    assert read_pool(pool_file(tmp_path)).digest == read_pool(pool_file(tmp_path)).digest


def test_toml_says_the_same_as_json(tmp_path: Path) -> None:
    (tmp_path / "sources").mkdir()
    file = tmp_path / "pool.toml"
    file.write_text(
        f'name = "reviews"\nagents = ["deploy-bot"]\n[mounts.sources]\npath = "{tmp_path}/sources"\n'
        "[limits]\npids = 100\n"
    )
    pool = read_pool(file)
    assert (pool.mounts["sources"].path, pool.limits.pids) == (tmp_path / "sources", 100)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": "Reviews"}, "name: must be a name"),
        ({"agents": []}, "agents: must have at least 1"),
        ({"agents": ["Deploy Bot"]}, "must be the name of an agent"),
        ({"agents": None}, "agents: is missing"),
        ({"concurency": 3}, "concurency: is not known"),
        ({"concurrency": 0}, "concurrency: must be at least 1"),
        ({"concurrency": "4"}, "concurrency: must be a whole number"),
        ({"mounts": {"a": {"path": "/run"}}}, "never mounted"),
        ({"mounts": {"a": {"path": "relative"}}}, "no absolute path"),
        ({"mounts": {"a": {"path": "/no/such/folder"}}}, "there is no folder /no/such/folder; make it"),
        ({"mounts": {"a": {"path": "/tmp", "read_write": "yes"}}}, "mounts.a.read_write: must be true or false"),
        ({"images": [IMAGE]}, "images are for the backend oci"),
        ({"backend": "oci"}, "the backend oci needs images"),
        ({"backend": "oci", "images": [IMAGE], "default_image": OTHER_IMAGE}, "default_image is none of images"),
        ({"backend": "oci", "images": [IMAGE]}, "no writable mounts"),
        ({"backend": "docker"}, "backend: must be"),
        ({"images": ["python:3.11"]}, "images.0"),
        ({"environment": {"RINGFENCE_TRUST_ROOT": "x"}}, "the run itself sets RINGFENCE_TRUST_ROOT"),
        ({"environment": {"A-B": "x"}}, "environment"),
        ({"environment": {"A": "x\0y"}}, "NUL"),
        ({"limits": {"memory_bytes": 1}}, "limits.memory_bytes: must be at least"),
        ({"limits": {"disk": 1}}, "limits.disk: is not known"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_file_is_refused_and_says_where(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError) as refused:
        read_pool(pool_file(tmp_path, **fields))
    assert "RINGFENCE_RUNNER_POOL_FILE" in str(refused.value)
    assert says in str(refused.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="about runners of root")
def test_a_writable_folder_of_root_is_refused_unless_the_pool_allows_it(tmp_path: Path) -> None:
    given: dict[str, Any] = {"path": str(tmp_path), "read_write": True}
    with pytest.raises(SettingsError, match=r"belongs to root.*as_root = true"):
        read_pool(pool_file(tmp_path, mounts={"a": given}))
    read_pool(pool_file(tmp_path, mounts={"a": {**given, "as_root": True}}))
    read_pool(pool_file(tmp_path, mounts={"a": {**given, "read_write": False}}))
    os.chown(tmp_path, 1000, 1000)
    read_pool(pool_file(tmp_path, mounts={"a": given}))


def test_path_hidden_by_the_pool_is_hidden_in_its_runs(tmp_path: Path) -> None:
    mounts = {"a": {"path": str(tmp_path), "hide": ["run/agent.sock"]}}
    pool = read_pool(pool_file(tmp_path, mounts=mounts))
    (mount,) = pool.plan(ordered(mounts=(Mount(name="a"),)), order_id="o", run_id="r", deadline_s=9).mounts
    assert mount.for_sandbox().hidden == ("run/agent.sock",)
    with pytest.raises(SettingsError, match="no relative path below"):
        read_pool(pool_file(tmp_path, mounts={"a": {"path": str(tmp_path), "hide": ["../x"]}}))


@pytest.mark.parametrize(("name", "text"), [("p.toml", "name ="), ("p.json", "{"), ("p.toml", "\udce4")])
def test_a_file_that_cannot_be_read_is_no_pool(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(SettingsError, match=r"is no (TOML|JSON)"):
        read_pool(file)
    with pytest.raises(SettingsError, match="cannot read"):
        read_pool(tmp_path / "missing.toml")
