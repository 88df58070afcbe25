"""What a mount of a run may not show: keys, the records of the runner, the sockets of the gateway."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringfence.client.settings import ClientSettings
from ringfence.runner.lifecycle.plan import PlannedMount, RunRefusedError
from ringfence.runner.lifecycle.private_paths import check_private_paths, private_paths


def settings(folder: Path) -> ClientSettings:
    return ClientSettings(
        runner_key_file=folder / "keys/runner.json",
        runner_state=folder / "state",
        identity=folder / "users/sam.json",
        kafka_ssl_cert_file=folder / "tls/client.pem",
        kafka_ssl_key_file=folder / "tls/client.key",
        kafka_security_protocol="SASL_SSL",
        kafka_sasl_mechanism="PLAIN",
        kafka_sasl_username="runner",
        kafka_sasl_password=f"file:{folder}/secret/password",
        _env_file=None,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("keys", "state/deep", "sockets", "users", "tls", "secret", "free/deep", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "keys/runner.json").touch()
    return tmp_path


def check(folder: Path, mounted: str) -> None:
    private = {**private_paths(settings(folder)), "the gateway's sockets": folder / "sockets"}
    check_private_paths([PlannedMount("it", folder / mounted, str(folder / mounted))], private)


@pytest.mark.parametrize("mounted", ["free", "free/deep", "elsewhere", "keys-of-others"])
def test_another_folder_is_mounted(folder: Path, mounted: str) -> None:
    (folder / "keys-of-others").mkdir()
    check(folder, mounted)


@pytest.mark.parametrize(
    "mounted", [".", "..", "keys", "state", "state/deep", "sockets", "users", "tls", "secret"]
)
def test_a_mount_that_shows_what_is_private_is_refused(folder: Path, mounted: str) -> None:
    with pytest.raises(RunRefusedError, match="shows") as refused:
        check(folder, mounted)
    assert refused.value.remedy


def test_a_link_to_a_key_counts_where_it_stands_and_where_it_leads(folder: Path) -> None:
    (folder / "keys/runner.json").rename(folder / "elsewhere/real.json")
    (folder / "keys/runner.json").symlink_to(folder / "elsewhere/real.json")
    for mounted in ("keys", "elsewhere"):
        with pytest.raises(RunRefusedError):
            check(folder, mounted)


def test_a_link_to_a_private_folder_counts_as_that_folder(folder: Path) -> None:
    (folder / "alias").symlink_to(folder / "state")
    with pytest.raises(RunRefusedError):
        check(folder, "alias")
