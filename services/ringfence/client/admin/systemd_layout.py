"""The files that systemd needs to run services on one machine: units, users, folders, keys and settings.

They are laid out in a folder that is copied over the machine's root. systemd-sysusers(8) makes the users, and
systemd-tmpfiles(8) gives each user its keys.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ringfence.client.admin.trust_setup import TOKEN_KEY, TrustFolder
from ringfence.client.errors import InvalidCallError
from ringfence.kernel.base.private_files import make_folders, write_private, write_public
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.crypto.jws import UnverifiedJws, parse
from ringfence.kernel.crypto.service_keys import files_before, next_file
from ringfence.messages.base import ServiceRole
from ringfence.messages.trust import TrustBundle

UNIT = "ringfence@.service"
_ETC = Path("etc/ringfence")
_FIRST: tuple[ServiceRole, ...] = ("audit", "revoker", "issuer", "policy", "registry", "gateway")
"""The order in which services start: readers before writers."""
_HEAD = "# Every user may read this file: it holds no secret. A drop-in has what only one service needs.\n"
_OF_ONE_PROCESS = frozenset({"http", "identity", "instance", "key_dir", "key_file", "state_dir"})
"""Settings that the unit sets for each service, or that one process alone has."""


@dataclass(frozen=True, slots=True)
class SystemdLayout:
    """The services of a machine, and the settings that its files lack."""

    services: tuple[ServiceRole, ...]
    left_out: tuple[str, ...]
    """Settings that are in no file, as they hold a secret."""


def write_systemd_layout(
    destination: Path, trust: TrustFolder, settings: ServiceSettings, names: Sequence[str] = ()
) -> SystemdLayout:
    """Write the files of a machine that runs these services below `destination`, which must be new or empty.

    `names` are services and gateways of the trust bundle; without any, all but runners. A machine runs one gateway.
    Raises InvalidCallError; KeyFileError if there is no key; OSError.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise InvalidCallError(
            f"{destination} exists; name a folder that is new or empty, and copy it over the machine's root"
        )
    if not trust.bundle.exists():
        raise InvalidCallError(f"{trust.bundle} does not exist; make it first: ringfence init")
    bundle = parse(trust.bundle.read_text().strip())
    chosen = _chosen(bundle, names)
    # The root itself is elsewhere by now.
    values, left_out = _shared_settings(settings, settings.trust_root or bundle.header.kid)
    try:
        for file, text in (
            (Path("etc/systemd/system") / UNIT, files(__package__).joinpath(UNIT).read_text()),
            (Path("etc/sysusers.d/ringfence.conf"), _sysusers(chosen)),
            (Path("etc/tmpfiles.d/ringfence.conf"), _tmpfiles(chosen)),
            (_ETC / "ringfence.toml", _toml(values)),
        ):
            make_folders((destination / file).parent)
            write_public(destination / file, text)
        for role, name in chosen.items():
            _copy_keys(trust, role, name, destination / _ETC / "keys" / role)
    except BaseException:
        shutil.rmtree(destination, ignore_errors=True)  # half of a machine would run half of the services
        raise
    return SystemdLayout(tuple(chosen), left_out)


def _chosen(signed: UnverifiedJws, names: Sequence[str]) -> dict[ServiceRole, str]:
    """The name of each role that the machine runs, in the order in which services start."""
    bundle = signed.unverified_claims(TrustBundle)  # one's own file
    roles = {one.id.rpartition("/")[2]: one.roles[0] for one in bundle.services if one.roles[0] != "runner"}
    if unknown := next((name for name in names if name not in roles), None):
        raise InvalidCallError(
            f"{unknown} is no service of the trust bundle that systemd runs; there are {', '.join(sorted(roles))}"
        )
    chosen: dict[ServiceRole, str] = {}
    for name in names or roles:
        if roles[name] in chosen:
            raise InvalidCallError(
                f"a machine runs one {roles[name]}, not {chosen[roles[name]]} and {name}; choose by --service"
            )
        chosen[roles[name]] = name
    order = [*_FIRST, *sorted(chosen.keys() - set(_FIRST))]
    return {role: chosen[role] for role in order if role in chosen}


def _shared_settings(settings: ServiceSettings, trust_root: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    always = {"kafka", "redis_url", "trust_domain", "issuer_url", "replication", "partitions"}
    names = [
        name
        for name in type(settings).model_fields
        if name not in _OF_ONE_PROCESS and (name in always or name in settings.model_fields_set)
    ]
    values = {name: _plain(getattr(settings, name)) for name in names} | {"trust_root": trust_root}
    left_out: tuple[str, ...] = ()
    if urlsplit(settings.redis_url).password:
        del values["redis_url"]
        left_out = ("RINGFENCE_REDIS_URL",)
    return {name: value for name, value in values.items() if value is not None}, left_out


def _plain(value: Any) -> Any:
    return str(value.resolve()) if isinstance(value, Path) else value


def _toml(values: Mapping[str, Any]) -> str:
    """Texts, numbers, lists of texts and truth values are written alike in JSON and TOML."""
    lines = (f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in sorted(values.items()))
    return (
        "# Every user may read this file: it holds no secret. A drop-in has what only one service needs.\n"
        + "".join(lines)
    )


def _sysusers(roles: Mapping[ServiceRole, str]) -> str:
    """See sysusers.d(5)."""
    return "".join(f'u ringfence-{role} - "Ringfence, the service {role}" - -\n' for role in roles)


def _tmpfiles(roles: Mapping[ServiceRole, str]) -> str:
    """See tmpfiles.d(5)."""
    lines = [f"{what} 0755 root root -" for what in (f"d /{_ETC}", f"d /{_ETC}/keys")]
    lines.append(f"z /{_ETC}/ringfence.toml 0644 root root -")
    # `z` for each file would follow a path through a folder of the user, which systemd-tmpfiles refuses.
    lines += [f"Z /{_ETC}/keys/{role} ~0700 ringfence-{role} ringfence-{role} -" for role in roles]
    return "\n".join([*lines, ""])


def _copy_keys(trust: TrustFolder, role: ServiceRole, name: str, folder: Path) -> None:
    """Copy every key of a service. A process looks for its signing key under the name of its role."""
    signing, seal = trust.service_key(name), trust.encryption_key(name)
    own = {
        signing: f"{role}.json",
        next_file(signing): f"{role}{next_file(signing).stem.removeprefix(name)}.json",
    }
    others = [seal, next_file(seal), *files_before(seal)]
    if role == "issuer":
        others += [trust.service_key(TOKEN_KEY), next_file(trust.service_key(TOKEN_KEY))]
    own |= {file: file.name for file in others}
    if not signing.exists():
        raise InvalidCallError(
            f"{signing} does not exist: the keys of {name} are elsewhere; leave it out by --service"
        )
    make_folders(folder)
    for file, target in own.items():
        if file.exists():
            write_private(folder / target, file.read_bytes())
