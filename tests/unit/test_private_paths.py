"""What a mount of a run may not show: keys, the records of the runner, the sockets of the gateway."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringfence.cli.shared.settings_check import import_settings
from ringfence.client.settings import ClientSettings
from ringfence.runner.lifecycle.plan import PlannedMount, RunRefusedError
from ringfence.runner.lifecycle.private_paths import check_private_paths, private_paths
from ringfence.runner.sandbox.backend import Mount, SandboxSpecError, check_mounts
from ringfence.runner.sandbox.mount_points import mount_points, place_of, shown_by


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
        kafka_ssl_ca_file=folder / "public/kafka.pem",
        gateway_ca_file=folder / "gateway-public/ca.pem",
        gateway_sockets=folder / "sockets",
        _env_file=None,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("keys", "state/deep", "sockets", "users", "tls", "secret", "free/deep", "elsewhere",
                 "public", "gateway-public", "config"):  # fmt: skip
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "keys/runner.json").touch()
    return tmp_path


def check(folder: Path, mounted: str, *, writable: bool = False) -> None:
    mount = PlannedMount("it", folder / mounted, str(folder / mounted), writable)
    check_private_paths([mount], private_paths(settings(folder)))


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


@pytest.mark.parametrize("mounted", ["public", "gateway-public"])
def test_writable_mount_of_readable_paths_is_refused(folder: Path, mounted: str) -> None:
    check(folder, mounted)
    with pytest.raises(RunRefusedError, match="could change") as refused:
        check(folder, mounted, writable=True)
    assert "read-only" in (refused.value.remedy or "")


def test_the_named_settings_file_is_in_no_writable_mount(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "config/ringfence.toml"
    file.write_text('kafka = "127.0.0.1:9092"\n')
    check(folder, "config", writable=True)
    monkeypatch.setenv("RINGFENCE_CONFIG", str(file))
    check(folder, "config")
    with pytest.raises(RunRefusedError, match="could change the settings file"):
        check(folder, "config", writable=True)


def test_place_of_personal_settings_file_is_in_no_writable_mount(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while there is no such file."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "elsewhere"))
    check(folder, "elsewhere")
    with pytest.raises(RunRefusedError, match="personal settings file"):
        check(folder, "elsewhere", writable=True)


def test_command_for_kafka_tokens_is_in_no_mount(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(folder, "elsewhere")
    monkeypatch.setenv(
        "RINGFENCE_KAFKA_SASL_TOKEN_SOURCE", f"exec:{folder}/elsewhere/print-token --audience kafka"
    )
    with pytest.raises(RunRefusedError, match="RINGFENCE_KAFKA_SASL_TOKEN_SOURCE"):
        check(folder, "elsewhere", writable=True)


NAMED: dict[str, tuple[str, str]] = {
    "RINGFENCE_GATEWAY_SPOOL": ("gateway", 'spool = "{}"'),
    "RINGFENCE_GATEWAY_TARGETS_CA_FILE": ("gateway", 'targets_ca_file = "{}"'),
    "RINGFENCE_ISSUER_PUBLISHED_TOKEN_KEY_FILES": (
        "issuer",
        'published_token_key_files = ["/nowhere", "{}"]',
    ),
    "RINGFENCE_POLICY_WEBHOOKS": ("policy", 'webhooks = {{ a = "env:B", b = "file:{}" }}'),
    "RINGFENCE_AUDIT_INDEX_FILE": ("audit", 'index_file = "{}"'),
}


@pytest.mark.parametrize(("name", "table", "line"), [(name, *rest) for name, rest in NAMED.items()])
def test_a_path_in_a_setting_of_any_service_is_in_no_writable_mount(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, table: str, line: str
) -> None:
    import_settings()
    file = folder / "config/ringfence.toml"
    file.write_text(f"[{table}]\n{line.format(folder / 'elsewhere/it')}\n")
    check(folder, "elsewhere", writable=True)
    monkeypatch.setenv("RINGFENCE_CONFIG", str(file))
    with pytest.raises(RunRefusedError, match=name):
        check(folder, "elsewhere", writable=True)
    if name.endswith("_CA_FILE"):
        check(folder, "elsewhere")
    else:
        with pytest.raises(RunRefusedError, match=name):
            check(folder, "elsewhere")


@pytest.mark.parametrize("value", ["{}", '["{}"]'])
def test_a_path_in_the_environment_is_private(
    folder: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    import_settings()
    monkeypatch.setenv("ringfence_issuer_published_token_key_files", value.format(folder / "elsewhere/it"))
    with pytest.raises(RunRefusedError, match="RINGFENCE_ISSUER_PUBLISHED_TOKEN_KEY_FILES"):
        check(folder, "elsewhere")


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


# --- what is mounted below a folder, by mountinfo -------------------------------------------------------------------


MOUNTS = r"""
22 1 8:1 / / rw - ext4 /dev/sda1 rw
23 22 0:21 / /proc rw - proc proc rw
24 22 0:22 / /run rw - tmpfs tmpfs rw
31 22 8:1 /srv/keys /data/job/keys rw - ext4 /dev/sda1 rw
32 22 0:22 /user/7 /data/other/sockets rw - tmpfs tmpfs rw
33 22 8:2 / /data/job/a\040disk rw - ext4 /dev/sdb1 rw
34 22 0:21 / /data/system/proc rw - proc proc rw
"""


def test_mount_below_a_folder_is_seen() -> None:
    points = mount_points(MOUNTS.strip())
    shown = shown_by(Path("/data/job"), points)
    assert [(str(point.path), point.place.device, str(point.place.path)) for point in shown] == [
        ("/data/job", "8:1", "/data/job"),
        ("/data/job/keys", "8:1", "/srv/keys"),
        ("/data/job/a disk", "8:2", "/"),
    ]
    key = place_of(Path("/srv/keys/runner.json"), points)
    assert [point.place.shows(key) for point in shown] == [False, True, False]
    assert place_of(Path("/data/job/keys/runner.json"), points) == key
    (_, sockets) = shown_by(Path("/data/other"), points)
    assert place_of(Path("/run"), points).shows(sockets.place)
    assert [point.kind for point in shown_by(Path("/data/system"), points)] == ["ext4", "proc"]


@pytest.fixture
def bound(folder: Path) -> Iterator[Path]:
    """The folder `free`, below which the folder of the keys is mounted again."""
    (folder / "free/again").mkdir()
    mount = ["mount", "--bind", str(folder / "keys"), str(folder / "free/again")]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("not provable here: nobody may mount")
    yield folder
    subprocess.run(["umount", str(folder / "free/again")], check=True)


def test_a_bind_mount_below_a_folder_counts_as_what_it_shows(bound: Path) -> None:
    for mounted in ("free", "free/again"):
        with pytest.raises(RunRefusedError, match="RINGFENCE_RUNNER_KEY_FILE"):
            check(bound, mounted)
    check(bound, "free/deep")


def test_no_sandbox_mounts_what_has_the_kernels_files_below_it(folder: Path) -> None:
    (folder / "free/proc").mkdir()
    mount = ["mount", "-t", "proc", "proc", str(folder / "free/proc")]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("not provable here: nobody may mount")
    try:
        with pytest.raises(SandboxSpecError, match="kernel's files"):
            check_mounts((Mount(folder / "free", "/work"),), folder / "state")
    finally:
        subprocess.run(["umount", str(folder / "free/proc")], check=True)
    check_mounts((Mount(folder / "free", "/work"),), folder / "state")
