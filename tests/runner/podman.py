"""A Podman service of the run's own, and an image made of this machine's Python: nothing is fetched."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Mapping
from importlib.metadata import files, requires
from pathlib import Path

import httpx
from packaging.requirements import Requirement

import ringfence
from ringfence.dev.processes import StackError
from tests.support.mortal import mortal

PACKAGE = Path(ringfence.__file__).parent
_PROGRAMS = ("cat", "chmod", "dash", "env", "id", "kill", "mkdir", "pwd", "python3", "sleep", "true")
_FOLDERS = (
    "dev",
    "etc",
    "home/agent",
    "mnt",
    "proc",
    "run",
    "sys",
    "tmp",
    "usr/bin",
    "usr/lib",
    "usr/lib64",
    "var/tmp",
)


class Podman:
    """Storage, socket and containers are in one folder. The uids that containers map are set for this service alone."""

    def __init__(self, folder: Path, *, packages: Mapping[str, Path] | None = None) -> None:
        """`packages`: what Python finds in the image besides its own library, by path below its folder of packages."""
        self.folder = folder
        self._packages = packages or {}
        self.socket = folder / "api.sock"
        self.image = ""

    def start(self) -> None:
        """Raises StackError."""
        if os.geteuid() != 0:
            raise StackError("--oci podman needs root: it mounts the ranges of uids that containers map")
        for program, package in (("podman", "podman"), ("runc", "runc"), ("catatonit", "catatonit")):
            if shutil.which(program, path=f"{os.environ['PATH']}:/usr/libexec/podman") is None:
                raise StackError(f"{program} is not installed: apt install {package}")
        ranges = self.folder / "ranges"
        ranges.write_text("containers:2147483648:16777216\n")
        # crun refuses machines that have both versions of control groups; runc takes them.
        podman = (
            f"podman --runtime runc --root {self.folder}/root --runroot {self.folder}/run --tmpdir {self.folder}/tmp "
            "--storage-driver overlay --cgroup-manager cgroupfs --events-backend file "
            f"system service --time=0 unix://{self.socket}"
        )
        script = f"mount --bind {ranges} /etc/subuid && mount --bind {ranges} /etc/subgid && exec {podman}"
        (self.folder / "root").mkdir()
        for path in (Path("/etc/subuid"), Path("/etc/subgid")):
            path.touch()
        self._log = (self.folder / "log").open("wb")
        self._process = subprocess.Popen(
            mortal("unshare", "--mount", "sh", "-c", script),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        deadline = time.monotonic() + 30
        while not self.socket.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise StackError(f"podman does not start: {(self.folder / 'log').read_text()[-500:]}")
            time.sleep(0.05)
        self.image = self._import()

    def stop(self) -> None:
        with self.client() as client:
            for one in client.get("/containers/json", params={"all": "1"}).json():
                client.delete(f"/containers/{one['Id']}", params={"force": "1", "v": "1"})
            client.delete(f"/images/{self.image}", params={"force": "1"})
        self._process.terminate()
        self._process.wait()
        self._log.close()

    def client(self) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=str(self.socket))
        return httpx.Client(transport=transport, base_url="http://podman/v1.41", timeout=120)

    def _import(self) -> str:
        archive = self.folder / "image.tar"
        write_image(archive, self._packages)
        with self.client() as client:
            answer = client.post(
                "/images/create",
                params={"fromSrc": "-", "repo": "localhost/ringfence-test"},
                content=archive.read_bytes(),
                headers={"Content-Type": "application/x-tar"},
            )
            if answer.is_error:
                raise StackError(f"podman imports no image: {answer.text[:500]}")
            archive.unlink()
            return str(answer.json()["id"])


def ringfence_packages() -> dict[str, Path]:
    """Ringfence and what it needs without any extra, as installed here: files by their path below site-packages."""
    found = {
        f"ringfence/{path.relative_to(PACKAGE)}": path
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    seen, waiting = set[str](), [*(requires("ringfence") or ())]
    while waiting:
        requirement = Requirement(waiting.pop())
        name = requirement.name.lower()
        if name in seen or (
            requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        ):
            continue
        seen.add(name)
        waiting += requires(name) or ()
        for file in files(name) or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                found[str(file)] = Path(str(file.locate()))
    return found


def write_image(archive: Path, packages: Mapping[str, Path]) -> None:
    """The root file system of an image with a shell, a few programs and Python, from this machine's own files."""
    chosen = {Path("/usr/bin") / name for name in _PROGRAMS}
    python = Path("/usr/bin/python3").resolve()
    library = Path(f"/usr/lib/{python.name}")
    chosen |= {
        path
        for path in library.rglob("*")
        if path.is_file() and not {"__pycache__", "test", "dist-packages"} & set(path.parts)
    }
    libraries = [path for path in packages.values() if path.suffix == ".so"]
    for path in [
        path for path in chosen if path.suffix == ".so" or path.parent == Path("/usr/bin")
    ] + libraries:
        listed = subprocess.run(["ldd", path], capture_output=True, text=True, check=False).stdout
        chosen |= {Path(word) for word in listed.split() if word.startswith("/")}
    with tarfile.open(archive, "w") as tar:
        for folder in _FOLDERS:
            entry = tarfile.TarInfo(folder)
            # As in every image: some runtimes give a tmpfs the mode of the directory below it.
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
            tar.addfile(entry)
        for name in ("bin", "lib", "lib64"):
            _link(tar, name, f"usr/{name}")
        _link(tar, "usr/bin/sh", "dash")
        names = set()
        for path in sorted(chosen):
            # /lib is /usr/lib, on this machine as in the image.
            name = str(path.parent.resolve() / path.name).lstrip("/")
            if name not in names:
                names.add(name)
                entry = tar.gettarinfo(path.resolve(), name)
                entry.uid = entry.gid = 0
                with path.resolve().open("rb") as file:
                    tar.addfile(entry, file)
        for below, path in sorted(packages.items()):
            tar.add(path.resolve(), f"usr/lib/python3/dist-packages/{below}")
        content = b"root:x:0:0::/:/bin/sh\nagent:x:1000:1000::/home/agent:/bin/sh\n"
        entry = tarfile.TarInfo("etc/passwd")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))


def _link(tar: tarfile.TarFile, name: str, target: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = tarfile.SYMTYPE, target
    tar.addfile(entry)
