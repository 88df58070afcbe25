"""Refuses mounts that would show private paths of the runner to a run: keys, records of sandboxes, gateway sockets."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ringfence.client.settings import ClientSettings
from ringfence.runner.lifecycle.plan import PlannedMount, RunRefusedError
from ringfence.runner.sandbox.mount_points import mount_points, place_of, shown_by


def private_paths(settings: ClientSettings) -> dict[str, Path]:
    """Return the paths in the settings that no run may see, by description."""
    password = settings.kafka_sasl_password or ""
    named = {
        "the records of the runner": settings.runner_state,
        "the runner's key": settings.runner_key_file,
        "the key of a person": settings.identity,
        "the key for Kafka": settings.kafka_ssl_key_file,
        "the password for Kafka": Path(password.removeprefix("file:"))
        if password.startswith("file:")
        else None,
    }
    return {what: path for what, path in named.items() if path is not None}


def check_private_paths(mounts: Iterable[PlannedMount], private: dict[str, Path]) -> None:
    """Check mounts. Raises RunRefusedError for a mount that contains one of these paths, or is below one.

    A bind mount counts as the folder that it shows, also below the mount. A link counts at its own path and at its
    target, because whoever may write there can change it.
    """
    points = mount_points()
    for mount in mounts:
        regions = [point.place for point in shown_by(mount.host, points)]
        for what, path in private.items():
            places = {Path(os.path.normpath(path.absolute())), Path(os.path.realpath(path))}
            stands = [place_of(place, points) for place in places]
            if any(_shows(mount.host, place) or _shows(place, mount.host) for place in places) or any(
                region.shows(place) or place.shows(region) for region in regions for place in stands
            ):
                raise RunRefusedError(f"the mount {mount.host} shows {what}, {path}").with_remedy(
                    "mount a folder beside it, or keep what is private elsewhere"
                )


def _shows(folder: Path, path: Path) -> bool:
    """Whether `path` is `folder` or is below it."""
    real = Path(os.path.realpath(folder))
    same = _inode(real)
    return any(
        place in (folder, real) or (same is not None and _inode(place) == same)
        for start in (path, Path(os.path.realpath(path)))
        for place in (start, *start.parents)
    )


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
