"""What every pod of the Helm chart has to be, and a pod as this machine can run it, without a cluster."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil

from ringfence.dev.processes import Child, spawn
from tests.support.chart import Document, container_of, pod_of, port_of, secrets_of
from tests.support.compose import ROOT

IMAGE_FOLDER = "/opt/ringfence"
"""The working directory of the image (deploy/Dockerfile)."""


def check_unprivileged(pod: dict[str, Any]) -> None:
    """Check that the specification of a pod gives it no privilege, no token and no path of its host."""
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False, "variables of Kubernetes look like settings"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for one in pod["containers"]:
        assert one["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "@sha256:" in one["image"]
        assert one["resources"]["limits"]["memory"]
    assert not any("hostPath" in volume for volume in pod["volumes"])


class Node:
    """This machine as the node of a cluster: the addresses and names of pods, and a folder for their volumes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # All of 127.0.0.0/8 is the loopback interface on Linux. Other runs of the tests have other addresses.
        self._network = f"127.{1 + secrets.randbelow(254)}.{secrets.randbelow(256)}"
        self._names: dict[str, str] = {}
        self._addresses: dict[str, str] = {}

    def address(self, pod: str) -> str:
        """The address of a pod, by its name."""
        return self._addresses.setdefault(pod, f"{self._network}.{len(self._addresses) + 2}")

    def name(self, address: str, *names: str) -> None:
        """Let pods find an address by these names, as the DNS of a cluster does."""
        self._names |= dict.fromkeys(names, address)

    def hosts(self) -> str:
        """These names, as /etc/hosts has them."""
        return "".join(f"{address} {name}\n" for name, address in self._names.items())


class Pod:
    """One pod of a workload, in a container of bubblewrap.

    As in a cluster, it has the user, groups, environment, arguments and mounts of the chart, a read-only root, no
    capability, files of secrets as the kubelet makes them, and an address of its own. Unlike there, it shares the
    network and the processes' list of this machine, and has no seccomp filter.
    """

    def __init__(
        self, node: Node, workload: Document, environment: Mapping[str, str], replica: int = 0
    ) -> None:
        """`environment` is the one of the chart, with what the operator of this installation put there."""
        self.name = f"{workload['metadata']['name']}-{replica}"
        self.address = node.address(self.name)
        self.container = container_of(workload)
        self.grace_s: float = pod_of(workload).get("terminationGracePeriodSeconds", 30)
        self._node = node
        self._pod = pod_of(workload)
        self._claims = {one["metadata"]["name"] for one in workload["spec"].get("volumeClaimTemplates", ())}
        # Every address of the pod: the network is shared, so it may listen only on its own.
        self._environment = {
            name: value.replace("0.0.0.0:", f"{self.address}:") for name, value in environment.items()
        }
        self._child: Child | None = None

    @property
    def child(self) -> Child:
        assert self._child is not None
        return self._child

    def start(self, given: Mapping[str, Mapping[str, bytes]], *, key_mode: int | None = None) -> Child:
        """Start its container. `given`: the files of each Secret and ConfigMap.

        `key_mode` replaces the mode that these files get.
        """
        context = self._pod["securityContext"]
        uid, gid = context["runAsUser"], context["runAsGroup"]
        group = context.get("fsGroup", gid)
        as_root = os.geteuid() == 0
        places = [Path(mount["mountPath"]) for mount in self.container["volumeMounts"]]
        mounts = _folders_above(places)
        for mount in self.container["volumeMounts"]:
            place = mount["mountPath"]
            (volume,) = [
                one for one in [*self._pod["volumes"], *({"name": name} for name in self._claims)]
                if one["name"] == mount["name"]
            ]  # fmt: skip
            if "projected" in volume:
                mode = volume["projected"]["defaultMode"] | (0o440 if "fsGroup" in context else 0)
                files = {
                    file: content for one in secrets_of(self._pod) for file, content in given[one].items()
                }
                folder = self._secret(files, mode if key_mode is None else key_mode, group)
                mounts += ["--ro-bind", str(folder), place]
            elif "configMap" in volume:
                folder = self._secret(given[volume["configMap"]["name"]], 0o644, group)
                mounts += ["--ro-bind", str(folder), place]
            elif volume.get("emptyDir", {}).get("medium") == "Memory":
                mounts += ["--perms", "1777", "--tmpfs", place]
            else:
                # A fresh volume belongs to root, and the group of the pod may write to it.
                mounts += ["--bind", str(self._volume(mount["name"], group)), place]
        settings = {
            **_IMAGE_ENVIRONMENT,
            "HOSTNAME": self.name,
            **self._environment,
        }
        identity = (
            ["setpriv", f"--reuid={uid}", f"--regid={gid}", f"--groups={group}", "--no-new-privs",
             "--bounding-set=-all", "--inh-caps=-all", "--"]
            if as_root else []
        )  # fmt: skip
        user = [] if as_root else ["--unshare-user", "--uid", str(uid), "--gid", str(gid)]
        self._child = spawn(
            self.name,
            ["bwrap", *user, "--unshare-pid", "--unshare-ipc", "--die-with-parent", *self._image(), *mounts,
             "--remount-ro", "/", "--chdir", IMAGE_FOLDER, "--clearenv",
             *(part for name, value in settings.items() for part in ("--setenv", name, value)),
             *identity, sys.executable, "-P", "-m", "ringfence.cli.main", *self.container["args"]],
            log_path=self._node.folder / f"{self.name}.log",
        )  # fmt: skip
        return self._child

    def stop(self) -> int | None:
        """End it as the kubelet does. Returns its exit status; None if it took longer than its grace period."""
        self.process.send_signal(signal.SIGTERM)  # bubblewrap passes no signal on
        return self.child.wait(self.grace_s)

    @property
    def process(self) -> psutil.Process:
        """The service in the container, below the processes of bubblewrap."""
        below = psutil.Process(self.child.pid).children(recursive=True)
        return next(one for one in below if one.name() != "bwrap")

    def probe(self, kind: str, *, headers: bool = True) -> str | None:
        """Ask as a probe of the chart does. Returns why it fails; None if it succeeds."""
        get = self.container[kind]["httpGet"]
        url = f"http://{self.address}:{port_of(self.container, get['port'])}{get['path']}"
        sent = {one["name"]: one["value"] for one in get.get("httpHeaders", ())} if headers else {}
        try:
            answer = httpx.get(url, headers=sent, timeout=10, trust_env=False)
        except httpx.TransportError as error:
            return f"{url}: {error!r}"
        return None if 200 <= answer.status_code < 400 else f"{url}: {answer.status_code} {answer.text}"

    def listens(self, name: str) -> bool:
        """Whether somebody accepts connections at the port of this name."""
        with socket.socket() as client:
            return client.connect_ex((self.address, port_of(self.container, name))) == 0

    def _image(self) -> list[str]:
        """The root of the container: programs and packages to read, and nothing else of this machine."""
        hosts, users = self._node.folder / f"{self.name}.hosts", self._node.folder / f"{self.name}.passwd"
        hosts.write_text(f"127.0.0.1 localhost\n{self._node.hosts()}")
        users.write_text(
            "root:x:0:0:root:/root:/bin/sh\nringfence:x:10001:10001::/home/ringfence:/usr/sbin/nologin\n"
        )
        read = [Path("/usr"), Path("/etc/ld.so.cache"), Path("/etc/ssl"), Path("/etc/pki")]
        read += [Path(sys.base_prefix), Path(sys.prefix), ROOT / "services", ROOT / "deploy/policy"]
        there = [path for path in read if path.exists()]
        binds = [
            *_folders_above(there),
            *(part for path in there for part in ("--ro-bind", str(path), str(path))),
        ]
        links = [
            part
            for path in map(Path, ("/bin", "/sbin", "/lib", "/lib64"))
            if path.is_symlink()
            for part in ("--symlink", str(path.readlink()), str(path))
        ]
        return [
            *binds, *links, "--ro-bind", str(hosts), "/etc/hosts", "--ro-bind", str(users), "/etc/passwd",
            "--dev", "/dev", "--proc", "/proc", "--perms", "0755", "--dir", IMAGE_FOLDER,
        ]  # fmt: skip

    def _secret(self, files: Mapping[str, bytes], mode: int, group: int) -> Path:
        """A volume of Secrets or of a ConfigMap, as the kubelet writes it.

        The files are links into a folder that it replaces as a whole.
        """
        folder = self._node.folder / f"{self.name}-{secrets.token_hex(4)}"
        (folder / "..written").mkdir(parents=True)
        (folder / "..data").symlink_to("..written")
        for name, content in files.items():
            file = folder / "..written" / name
            file.write_bytes(content)
            if os.geteuid() == 0:
                os.chown(file, 0, group)
                file.chmod(mode)
            else:
                file.chmod(mode & ~0o040)  # nobody but root can make a file of root
            (folder / name).symlink_to(f"..data/{name}")
        for one in (folder, folder / "..written"):
            one.chmod(0o755)
        return folder

    def _volume(self, name: str, group: int) -> Path:
        folder = self._node.folder / f"{self.name}-{name}-{secrets.token_hex(4)}"
        folder.mkdir()
        if os.geteuid() == 0:
            os.chown(folder, 0, group)
        folder.chmod(0o2775)
        return folder


def _folders_above(paths: list[Path]) -> list[str]:
    """Options that make the folders above these. By itself bubblewrap makes them so that only root can enter."""
    above = dict.fromkeys(one for path in paths for one in reversed(path.parents[:-1]))
    return [part for path in above for part in ("--perms", "0755", "--dir", str(path))]


_IMAGE_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/home/ringfence",
    "PYTHONUNBUFFERED": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
"""What the image and the container runtime set. The folder of the user is missing there too."""
