"""Credentials of a user's programs in the home directory."""

from __future__ import annotations

import os

from tests.runner.probes.frame import Blocked, canary, given


def reach() -> str:
    for folder in {os.path.expanduser("~"), given["home"], "/root"}:
        for name in given["dotfiles"]:
            try:
                with open(os.path.join(folder, name)) as file:
                    if canary in file.read():
                        return os.path.join(folder, name)
            except OSError:
                continue
    raise Blocked("none is there")
