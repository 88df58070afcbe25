"""The Rego policy bundle: a folder of `.rego` files, and a revision that is the hash of their content."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.codes import Code

TEST_SUFFIX = "_test.rego"
_INSTALLED = Path(__file__).parent / "bundle"
_IN_CLONE = Path(__file__).parents[3] / "deploy" / "policy"
OWN_BUNDLE = _INSTALLED if _INSTALLED.is_dir() else _IN_CLONE
"""The bundle that comes with Ringfence: beside this file in a wheel, `deploy/policy` in a clone."""

Module = tuple[str, str]
"""File name and text of a `.rego` file."""


class BundleError(RingfenceError):
    """The bundle is missing, does not compile, or fails its tests. The message names file and line if there is one."""

    code = Code.BUNDLE_INVALID


class MissingRuleError(BundleError):
    """The bundle has no rule of that name: it does not decide what is asked."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """The modules of a policy bundle."""

    folder: Path
    modules: tuple[Module, ...]
    """The rules, which are evaluated."""
    tests: tuple[Module, ...]
    """The `*_test.rego` files. They have to pass before the rules are put in force."""
    revision: str
    """SHA-256 (hex) over names and contents of the rules: bundles with the same revision decide alike."""


def load_bundle(folder: Path | None = None) -> Bundle:
    """Read the bundle in a folder; None is the one that comes with Ringfence. Raises BundleError."""
    folder = folder or OWN_BUNDLE
    revision = hashlib.sha256()
    modules: list[Module] = []
    tests: list[Module] = []
    for path in bundle_files(folder):
        name = path.relative_to(folder).as_posix()
        try:
            content = path.read_bytes()
            module = (name, content.decode())
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{name} in the policy bundle {folder} cannot be read: {error}") from None
        if name.endswith(TEST_SUFFIX):
            tests.append(module)
            continue
        modules.append(module)
        # Lengths, so that no two different bundles run together into the same bytes.
        revision.update(f"{len(name.encode())}:{name}{len(content)}:".encode() + content)
    if not modules:
        raise BundleError(f"no .rego file in the policy bundle {folder}; name a folder that has some")
    return Bundle(folder, tuple(modules), tuple(tests), revision.hexdigest())


def bundle_files(folder: Path) -> list[Path]:
    """The `.rego` files of a bundle, sorted. Hidden folders are left out: Kubernetes keeps copies there, behind its
    links.
    """

    def visible() -> Iterator[Path]:
        for path in folder.rglob("*.rego"):
            if not any(part.startswith(".") for part in path.relative_to(folder).parts):
                yield path

    return sorted(visible())


def archive(bundle: Bundle) -> bytes:
    """The bundle without its tests, as an OPA server takes it (`.tar.gz`). The manifest names the revision."""
    manifest = {"revision": bundle.revision, "rego_version": 1}
    packed = io.BytesIO()
    # No times: the same bundle is the same bytes.
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name, text in ((".manifest", json.dumps(manifest)), *bundle.modules):
            content = text.encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()
