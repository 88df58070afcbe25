"""Findings of `ringfence doctor` on key files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ringfence.cli.doctor.command import key_files
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.crypto.keys import SigningKey


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o440])
def test_doctor_reports_mode_of_key_file(tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "issuer.json"
    SigningKey.generate("spiffe://ringfence.local/service/issuer").save(file)
    file.chmod(mode)
    if mode == 0o440:
        # A secret of Kubernetes: root owns it, and the group of the service may read it.
        if os.getuid() != 0:
            pytest.skip("only root can make a file of root")
        monkeypatch.setattr(os, "geteuid", lambda: 10001)
    (found,) = key_files(ServiceSettings(key_file=file))
    assert (found.verdict, found.says.rpartition(", ")[2]) == ("good", f"mode {mode:04o}")
