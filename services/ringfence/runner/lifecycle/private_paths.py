"""Refuses mounts that would show private paths to a run, or let it write what settings name.

The paths are those of all settings classes that this process has imported, so that a new setting with a path is private
without being listed here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.config_file import personal_path, read_config
from ringfence.kernel.base.settings import RingfenceSettings, settings_classes, table_of
from ringfence.runner.lifecycle.plan import PlannedMount, RunRefusedError
from ringfence.runner.sandbox.mount_points import mount_points, place_of, shown_by

_WITHOUT_SECRETS: Final = ("_CA_FILE", "_POOL_FILE", "_BUNDLE")
"""The ends of names of settings whose files a run may read, and not write."""
_REFERENCES: Final = ("file:", "unix:")


@dataclass(frozen=True)
class PrivatePath:
    """A path that no mount may show; or no writable one, if runs may read it."""

    what: str
    path: Path
    readable: bool = False


def private_paths(settings: ClientSettings) -> list[PrivatePath]:
    """Return every path that settings name: `settings`, the environment and the settings file. Raises SettingsError."""
    file = read_config()
    found = dict[tuple[str, Path], PrivatePath]()

    def add(what: str, path: Path, *, readable: bool = False) -> None:
        found[what, path] = PrivatePath(what, path, readable)

    if file is not None:
        add(f"the settings file ({file.source})", Path(file.path), readable=True)
    if personal := personal_path():  # also one that is not there yet: a run could write it
        add("the personal settings file", personal, readable=True)
    environment = {name.upper(): value for name, value in os.environ.items()}
    for cls in settings_classes(RingfenceSettings):
        prefix, table = str(cls.model_config.get("env_prefix") or ""), table_of(cls, file)
        for field, info in cls.model_fields.items():
            name = f"{prefix}{field}".upper()
            given = [environment.get(name, table.get(field))]
            if isinstance(settings, cls):
                given.append(getattr(settings, field))
            for path in _paths_in(given, is_path=_has_path(info.annotation)):
                add(f"what {name} names", path, readable=name.endswith(_WITHOUT_SECRETS))
    return [*found.values()]


def _has_path(annotation: Any) -> bool:
    return annotation is Path or any(_has_path(part) for part in get_args(annotation))


def _paths_in(value: Any, *, is_path: bool) -> Iterator[Path]:
    """Yield the paths in the value of a setting: a path, a reference such as `file:PATH`, or a collection of them."""
    if isinstance(value, Path):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _paths_in(one, is_path=is_path)
    elif isinstance(value, str) and value[:1] in ("[", "{"):
        with contextlib.suppress(ValueError):
            yield from _paths_in(json.loads(value), is_path=is_path)
    elif isinstance(value, str) and value.startswith("exec:"):
        with contextlib.suppress(ValueError):
            yield from _paths_in(shlex.split(value.removeprefix("exec:")), is_path=False)
    elif isinstance(value, str) and value:
        reference = next((kind for kind in _REFERENCES if value.startswith(kind)), "")
        if reference or is_path or value.startswith("/"):
            yield Path(value.removeprefix(reference))


def check_private_paths(mounts: Iterable[PlannedMount], private: Iterable[PrivatePath]) -> None:
    """Check mounts. Raises RunRefusedError for a mount that contains one of these paths, or is below one.

    A bind mount counts as the folder that it shows, also below the mount. A link counts at its own path and at its
    target, because whoever may write there can change it.
    """
    points, private = mount_points(), [*private]
    for mount in mounts:
        regions = [point.place for point in shown_by(mount.host, points)]
        for one in private:
            if one.readable and not mount.writable:
                continue
            places = {Path(os.path.normpath(one.path.absolute())), Path(os.path.realpath(one.path))}
            stands = [place_of(place, points) for place in places]
            if any(_shows(mount.host, place) or _shows(place, mount.host) for place in places) or any(
                region.shows(place) or place.shows(region) for region in regions for place in stands
            ):
                verb = "could change" if one.readable else "shows"
                raise RunRefusedError(f"the mount {mount.host} {verb} {one.what}, {one.path}").with_remedy(
                    "mount a folder beside it, or keep what is private elsewhere"
                    + (", or mount it read-only" if one.readable else "")
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
