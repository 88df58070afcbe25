"""A release: the same commit gives the same bytes, it installs from its folder alone, and a changed one is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.chart import VALUES
from tests.support.compose import ROOT
from tests.support.containers import BUILD_OPTIONS, Podman
from tools import release
from tools.release import ReleaseError

NOT_KEPT = ("--unsetenv", "PIP_CERT")


@dataclass
class Release:
    """A release, the same once more, and who may sign."""

    folder: Path
    again: Path
    signers: Path


@pytest.fixture(scope="module")
def made(podman: Podman, tmp_path_factory: pytest.TempPathFactory) -> Release:
    """A release of the committed files of a clone, made twice. The clone is fresh: this one may have changes."""
    work = tmp_path_factory.mktemp("release")
    clone = work / "clone"
    subprocess.run(["git", "clone", "--quiet", f"file://{ROOT}", clone], check=True)
    signers = work / "signers"
    signers.write_text(f"{release.SIGNER} {ssh_key(work / 'key')}\n")
    for name in ("one", "two"):
        release.make(
            work / name,
            key=work / "key",
            podman=podman.program,
            build_options=(*BUILD_OPTIONS, *NOT_KEPT),
            clone=clone,
        )
    return Release(work / "one", work / "two", signers)


def ssh_key(file: Path) -> str:
    """Make a key, and return its public part."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", file], check=True)
    return file.with_suffix(".pub").read_text().strip()


def copied(made: Release, folder: Path) -> Path:
    """Return a copy that a test may change. Files are links to the same content until one is replaced."""
    shutil.copytree(made.folder, folder, copy_function=lambda source, to: Path(to).hardlink_to(source))
    return folder


def replace(file: Path, content: bytes) -> None:
    file.unlink()
    file.write_bytes(content)


def test_same_commit_gives_the_same_bytes(made: Release) -> None:
    names = {
        folder: {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        for folder in (made.folder, made.again)
    }
    assert names[made.folder] == names[made.again]
    differ = [
        name
        for name in names[made.folder]
        if (made.folder / name).read_bytes() != (made.again / name).read_bytes()
    ]
    assert differ == [release.SIGNATURE] or differ == []


def test_release_installs_from_its_folder_alone_and_its_image_starts(made: Release, podman: Podman) -> None:
    release.check(made.folder, signers=made.signers, podman=podman.program)


def test_bill_of_materials_names_licences_and_dependencies_and_no_path_of_this_machine(made: Release) -> None:
    (file,) = made.folder.glob("*.cdx.json")
    document = json.loads(file.read_text())
    assert document["specVersion"] == "1.6"
    parts = {one["name"]: one for one in document["components"]}
    assert parts["cryptography"]["licenses"]
    assert document["metadata"]["component"]["name"] == "ringfence"
    own = next(
        one for one in document["dependencies"] if one["ref"] == document["metadata"]["component"]["bom-ref"]
    )
    assert len(own["dependsOn"]) >= 10
    assert str(ROOT) not in file.read_text()
    assert "file:" not in file.read_text()


def test_chart_of_the_release_is_rendered_by_helm(made: Release) -> None:
    (chart,) = made.folder.glob("ringfence-*.tgz")
    helm = subprocess.run([ROOT / ".ci/helm"], capture_output=True, text=True, check=True).stdout.strip()
    rendered = subprocess.run(
        [helm, "template", "here", chart, "--values", "-"],
        input=json.dumps(VALUES), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert rendered.returncode == 0, rendered.stderr
    assert "kind: Deployment" in rendered.stdout


def test_changed_wheel_is_rejected(made: Release, tmp_path: Path) -> None:
    folder = copied(made, tmp_path / "changed")
    (wheel,) = folder.glob("ringfence-*.whl")
    replace(wheel, wheel.read_bytes() + b"\0")
    with pytest.raises(ReleaseError, match=f"{wheel.name} is not what was signed"):
        release.verify(folder, signers=made.signers)


def test_wheel_with_its_sum_corrected_is_rejected(made: Release, tmp_path: Path) -> None:
    folder = copied(made, tmp_path / "corrected")
    (wheel,) = folder.glob("ringfence-*.whl")
    replace(wheel, wheel.read_bytes() + b"\0")
    lines = (folder / release.SUMS).read_text().splitlines()
    corrected = [
        f"{release.digest_of(wheel)}  {wheel.name}" if line.endswith(wheel.name) else line for line in lines
    ]
    replace(folder / release.SUMS, "".join(f"{line}\n" for line in corrected).encode())
    with pytest.raises(ReleaseError, match="signature"):
        release.verify(folder, signers=made.signers)


def test_additional_wheel_is_rejected(made: Release, tmp_path: Path) -> None:
    folder = copied(made, tmp_path / "additional")
    (folder / "wheels" / "zzz-1.0-py3-none-any.whl").write_bytes(b"")
    with pytest.raises(ReleaseError, match=r"wheels/zzz-1.0-py3-none-any.whl is not signed"):
        release.verify(folder, signers=made.signers)


def test_missing_file_is_rejected(made: Release, tmp_path: Path) -> None:
    folder = copied(made, tmp_path / "missing")
    (folder / "requirements.lock").unlink()
    with pytest.raises(ReleaseError, match=r"requirements.lock is missing"):
        release.verify(folder, signers=made.signers)


def test_link_in_place_of_a_file_is_rejected(made: Release, tmp_path: Path) -> None:
    folder = copied(made, tmp_path / "link")
    (folder / "requirements.lock").unlink()
    (folder / "requirements.lock").symlink_to(made.folder / "requirements.lock")
    with pytest.raises(ReleaseError, match=r"requirements.lock is not what was signed"):
        release.verify(folder, signers=made.signers)


def test_signature_of_another_key_is_rejected(made: Release, tmp_path: Path) -> None:
    signers = tmp_path / "signers"
    signers.write_text(f"{release.SIGNER} {ssh_key(tmp_path / 'other')}\n")
    with pytest.raises(ReleaseError, match="signature"):
        release.verify(made.folder, signers=signers)


def test_signature_of_another_purpose_is_rejected(made: Release, tmp_path: Path) -> None:
    folder = copied(made, tmp_path / "purpose")
    (folder / release.SIGNATURE).unlink()
    key = made.signers.with_name("key")
    subprocess.run(
        ["ssh-keygen", "-q", "-Y", "sign", "-f", key, "-n", "git", folder / release.SUMS], check=True
    )
    with pytest.raises(ReleaseError, match="signature"):
        release.verify(folder, signers=made.signers)


def test_unsigned_folder_is_rejected(made: Release, tmp_path: Path) -> None:
    folder = copied(made, tmp_path / "unsigned")
    (folder / release.SIGNATURE).unlink()
    with pytest.raises(ReleaseError, match="is no signed release"):
        release.verify(folder, signers=made.signers)
