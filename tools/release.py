"""A release: one folder with everything that an installation needs, and the check that installs from it alone.

    python -m tools.release make FOLDER [--key FILE] [--podman PROGRAM]
    python -m tools.release check FOLDER --signers FILE [--podman PROGRAM]

`make` builds the committed files of HEAD, so the same commit on the same base image gives the same bytes, but for the
signature. `check` trusts nothing but the signers' file (`man ssh-keygen`, ALLOWED SIGNERS).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SUMS = "SHA256SUMS"
SIGNATURE = f"{SUMS}.sig"
NAMESPACE = "ringfence-release"
"""The purpose in the signature: a signature by the same key over something else is none of a release."""
SIGNER = "release"
"""The principal that the signers' file names."""
EXTRAS = "dev,mcp,otel,passkeys"
"""What the folder's wheels install: services, command line, local stack; `dev` includes `server` and `runner`."""
_Command = Sequence[str | Path]


class ReleaseError(Exception):
    """Raised when a release cannot be made, or does not hold what its signature says. The text says why."""


def version() -> str:
    """Return the version of this clone."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def make(
    folder: Path,
    *,
    key: Path | None,
    podman: str | None,
    build_options: Sequence[str] = (),
    clone: Path = ROOT,
) -> None:
    """Build a release of HEAD of `clone` into `folder`, which must not exist.

    Without `key` nothing is signed; without `podman`, a program, it has no image. `build_options` are those of
    `podman build` that this machine needs. Raises ReleaseError.
    """
    if folder.exists():
        raise ReleaseError(f"{folder} exists; name a folder that does not")
    if changed := _output(["git", "status", "--porcelain"], cwd=clone).strip():
        raise ReleaseError(f"{clone} has changes that are not committed; commit them first:\n{changed}")
    epoch = _output(["git", "log", "-1", "--format=%ct"], cwd=clone).strip()
    environment = {**os.environ, "SOURCE_DATE_EPOCH": epoch}
    with _work_folder() as work:
        source, made = work / "source", work / "release"
        source.mkdir()
        archive = subprocess.run(
            ["git", "archive", "HEAD"], cwd=clone, check=True, capture_output=True
        ).stdout
        _run(["tar", "--extract", "--directory", source], input=archive)
        made.mkdir()
        build: _Command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", made, source]
        _run(build, env=environment)
        (made / "requirements.lock").write_bytes((source / "requirements.lock").read_bytes())
        _pack_chart(source / "deploy" / "helm" / "ringfence", made, epoch)
        _collect_wheels(made, work)
        _write_sbom(made, work / "environment", environment)
        if podman is not None:
            _build_image(podman, build_options, source, made, epoch)
        _write_sums(made)
        if key is not None:
            _run(["ssh-keygen", "-q", "-Y", "sign", "-f", key, "-n", NAMESPACE, made / SUMS])
        shutil.move(made, folder)


def check(folder: Path, *, signers: Path, podman: str | None) -> None:
    """Verify a release, install it from its folder alone, and run the demo of what was installed.

    `signers` names who may sign (principal `release`). Without `podman` the image is verified and not started; with it,
    the image is loaded and keeps its name.
    Raises ReleaseError.
    """
    verify(folder, signers=signers)
    with _work_folder() as work:
        python = _install(folder, work / "environment")
        told = _output([python.with_name("ringfence"), "--version"], cwd=work).strip()
        wheel = _one(folder, "ringfence-*.whl")
        if not told or told.split()[-1] != wheel.name.split("-")[1]:
            raise ReleaseError(f"{wheel.name} installs a version that calls itself {told!r}")
        _compare_sbom(folder, python)
        own = {name: value for name, value in os.environ.items() if not name.startswith("RINGFENCE_")}
        _run([python.with_name("ringfence"), "demo"], cwd=work, env={**own, "HOME": str(work)})
        if podman is not None:
            _start_image(podman, _one(folder, "ringfence-*-image.tar"), told)


def verify(folder: Path, *, signers: Path) -> None:
    """Verify the signature, and that the folder holds exactly the files that were signed. Raises ReleaseError."""
    try:
        sums = (folder / SUMS).read_bytes()
        (folder / SIGNATURE).stat()
    except OSError as error:
        raise ReleaseError(f"{folder} is no signed release: {error.strerror}: {error.filename}") from None
    command: _Command = ["ssh-keygen", "-Y", "verify", "-f", signers, "-I", SIGNER, "-n", NAMESPACE, "-s"]
    if _status([*command, folder / SIGNATURE], input=sums) != 0:
        raise ReleaseError(f"{SIGNATURE} holds no signature of a signer in {signers}; do not install this")
    lines = (line.partition("  ") for line in sums.decode().splitlines())
    signed = {name: digest for digest, _, name in lines}
    found = {str(path.relative_to(folder)) for path in _files(folder)} - {SUMS, SIGNATURE}
    if difference := sorted(found ^ signed.keys()):
        missing = "is missing" if difference[0] in signed else "is not signed"
        raise ReleaseError(f"{difference[0]} {missing}; do not install this")
    for name, expected in sorted(signed.items()):
        if digest_of(folder / name) != expected:
            raise ReleaseError(f"{name} is not what was signed; do not install this")


def _collect_wheels(made: Path, work: Path) -> None:
    """Fetch what the lock names by its hashes, and keep what the extras need."""
    fetched, wheels = work / "fetched", made / "wheels"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    lock = made / "requirements.lock"
    download: _Command = ["download", "--require-hashes", "--only-binary", ":all:", "--dest", fetched]
    _run([*pip, *download, "--requirement", lock])
    wheels.mkdir()
    python = _environment(work / "environment")
    wanted = f"{_one(made, 'ringfence-*.whl')}[{EXTRAS}]"
    report = work / "report.json"
    install: _Command = ["--python", python, "install", "--no-index", "--find-links", fetched]
    _run([*pip, *install, "--report", report, wanted])
    for one in json.loads(report.read_text())["install"]:
        name = one["download_info"]["url"].rpartition("/")[2]
        if (fetched / name).exists():
            shutil.copy(fetched / name, wheels / name)


def _pack_chart(chart: Path, made: Path, epoch: str) -> None:
    """Pack the Helm chart. `helm package` would put the time of day into it, and keeps no links."""
    tar: _Command = [*_reproducible_tar(epoch), "--dereference", "--directory", chart.parent, chart.name]
    packed = subprocess.run(["gzip", "--no-name"], input=_run(tar), check=True, capture_output=True).stdout
    (made / f"ringfence-{version()}.tgz").write_bytes(packed)


def _write_sbom(made: Path, environment: Path, variables: dict[str, str]) -> None:
    """Write CycloneDX 1.6 of what an installation holds: components, licences, who needs whom."""
    program = _output([ROOT / ".ci" / "sbom"]).strip()
    survey: _Command = [
        program,
        "environment",
        "--output-reproducible",
        "--pyproject",
        ROOT / "pyproject.toml",
    ]
    written = _output([*survey, environment / "bin" / "python"], env=variables)
    document = json.loads(written)
    for one in document["components"]:
        # Where the wheels were while it was made: of no use to anybody else.
        references = one.get("externalReferences", [])
        one["externalReferences"] = [ref for ref in references if not ref["url"].startswith("file:")]
    document["components"] = [one for one in document["components"] if one["name"] != "ringfence"]
    name = f"ringfence-{version()}.cdx.json"
    (made / name).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def _build_image(podman: str, options: Sequence[str], source: Path, made: Path, epoch: str) -> None:
    """Build the image of deploy/Dockerfile and keep it as an OCI archive, which names it as docker-compose.yml does."""
    layout, id_file = source.with_name("image"), source.with_name("image-id")
    stamped = [
        "--layers=false",
        "--no-cache",
        "--timestamp",
        epoch,
        "--build-arg",
        f"SOURCE_DATE_EPOCH={epoch}",
    ]
    dockerfile = source / "deploy" / "Dockerfile"
    _run([podman, "build", "--quiet", "--iidfile", id_file, *stamped, *options, "--file", dockerfile, source])
    built = id_file.read_text().strip()
    try:
        _run([podman, "save", "--quiet", "--format", "oci-dir", "--output", layout, built])
    finally:
        _status([podman, "image", "rm", built])
    index = layout / "index.json"
    document = json.loads(index.read_text())
    document["manifests"][0]["annotations"] = {
        "org.opencontainers.image.ref.name": f"localhost/ringfence:{version()}"
    }
    index.write_text(json.dumps(document))
    # Podman's own archive holds the time of day.
    archive = made / f"ringfence-{version()}-image.tar"
    _run([*_reproducible_tar(epoch), "--directory", layout, "--file", archive, "."])


def _reproducible_tar(epoch: str) -> list[str]:
    """Return the beginning of a command whose archive depends on nothing but names and contents."""
    owner = ["--owner=0", "--group=0", "--numeric-owner", "--mode=a+rX,u+w,go-w"]
    return ["tar", "--create", "--sort=name", *owner, f"--mtime=@{epoch}"]


def _write_sums(made: Path) -> None:
    names = sorted(str(path.relative_to(made)) for path in _files(made))
    (made / SUMS).write_text("".join(f"{digest_of(made / name)}  {name}\n" for name in names))


def _install(folder: Path, environment: Path) -> Path:
    python = _environment(environment)
    pip: _Command = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        "--python",
        python,
    ]
    wanted = f"{_one(folder, 'ringfence-*.whl')}[{EXTRAS}]"
    _run([*pip, "install", "--no-index", "--find-links", folder / "wheels", wanted])
    return python


def _compare_sbom(folder: Path, python: Path) -> None:
    document = json.loads(_one(folder, "ringfence-*.cdx.json").read_text())
    listed = {(one["name"].lower().replace("_", "-"), one["version"]) for one in document["components"]}
    show = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()))"
    installed = {
        (name.lower().replace("_", "-"), number)
        for name, number in (one.split("==") for one in _output([python, "-c", show]).split())
        if name != "ringfence"
    }
    if difference := sorted(f"{name} {number}" for name, number in listed ^ installed):
        raise ReleaseError(f"the SBOM and what is installed differ in {', '.join(difference)}")


def _start_image(podman: str, archive: Path, told: str) -> None:
    """Load the image, which keeps its name, and run its command line."""
    loaded = _output([podman, "load", "--quiet", "--input", archive]).rpartition(": ")[2].strip()
    run: _Command = [podman, "run", "--rm", "--network", "none", "--read-only", loaded, "--version"]
    if (said := _output(run).strip()) != told:
        raise ReleaseError(f"the image holds {said!r}, the wheel {told!r}")


def _environment(folder: Path) -> Path:
    """Return the interpreter of a new environment, which has not even pip."""
    _run([sys.executable, "-m", "venv", "--without-pip", folder])
    return folder / "bin" / "python"


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def _one(folder: Path, pattern: str) -> Path:
    match list(folder.glob(pattern)):
        case [one]:
            return one
        case found:
            raise ReleaseError(f"{folder} holds {len(found)} files {pattern}, not one")


def digest_of(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal; a link has none."""
    if file.is_symlink():
        return "a link"
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def _work_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ringfence-release-") as folder:
        yield Path(folder)


def _run(command: _Command, **options: Any) -> bytes:
    """Run a program; its output is shown only if it fails. Raises ReleaseError."""
    done = subprocess.run([str(part) for part in command], capture_output=True, check=False, **options)
    if done.returncode != 0:
        said = (done.stdout + done.stderr).decode(errors="replace")[-4000:]
        raise ReleaseError(f"{command[0]} ended with {done.returncode}:\n{said}")
    return bytes(done.stdout)


def _output(command: _Command, **options: Any) -> str:
    return _run(command, **options).decode()


def _status(command: _Command, **options: Any) -> int:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, check=False, **options
    ).returncode


def main(words: Sequence[str]) -> int:
    """Run one of both commands; 1 if it failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.release", description=(__doc__ or "").split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("make", "check"):
        command = commands.add_parser(name)
        command.add_argument("folder", type=Path)
        command.add_argument("--podman", help="makes or starts the image; without it the image is left out")
    commands.choices["make"].add_argument("--key", type=Path, help="an SSH key that signs the sums")
    commands.choices["make"].add_argument("--build-options", default="", help="more options for podman build")
    commands.choices["check"].add_argument(
        "--signers", type=Path, required=True, help="who may sign (ALLOWED SIGNERS)"
    )
    options = parser.parse_args(words)
    try:
        if options.command == "make":
            more = shlex.split(options.build_options)
            make(options.folder, key=options.key, podman=options.podman, build_options=more)
        else:
            check(options.folder, signers=options.signers, podman=options.podman)
    except ReleaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.folder}: {'made' if options.command == 'make' else 'verified, installed and tried'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
