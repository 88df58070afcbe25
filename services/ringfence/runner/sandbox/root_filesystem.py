"""The root file system of a bubblewrap sandbox: the host directories that it shows, and the files of /etc that it has.

/etc is never shown whole: it holds keys, passwords and the names of others. /sys is left out. /usr is shown read-only,
without the folders of it in which administrators put settings with secrets.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ringfence.runner.sandbox.backend import HOME

USER = "agent"
UID = 1000
INSTANCE_BYTES = 1 << 20
"""Size of the folder in memory with the key of a run's instance and the certificates that its programs trust."""

_MERGED = ("/bin", "/lib", "/lib32", "/lib64", "/libx32", "/sbin")
# Settings of programs for all users of the machine, which may hold tokens: npm, pip, git.
_HIDDEN = ("/usr/etc", "/usr/local/etc")
# Public, and needed by the usual programs: the dynamic linker, certificates, Debian's alternatives, time zones, Java.
_FROM_ETC = (
    "/etc/alternatives", "/etc/ca-certificates", "/etc/crypto-policies", "/etc/java-11-openjdk", "/etc/java-17-openjdk",
    "/etc/java-21-openjdk", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime", "/etc/magic",
    "/etc/mime.types", "/etc/pki/ca-trust/extracted", "/etc/pki/tls/certs", "/etc/protocols", "/etc/services",
    "/etc/ssl/cert.pem", "/etc/ssl/certs", "/etc/ssl/openssl.cnf", "/etc/terminfo", "/etc/timezone",
)  # fmt: skip
# What of /proc tells about the machine or other users and nothing about the sandbox.
_HIDDEN_PROC = ("/proc/kcore", "/proc/keys", "/proc/key-users", "/proc/kallsyms", "/proc/kmsg", "/proc/latency_stats",
                "/proc/sched_debug", "/proc/timer_list", "/proc/sysrq-trigger")  # fmt: skip


def system_arguments() -> list[str]:
    """The arguments of bwrap that show the machine's programs and libraries."""
    arguments = ["--ro-bind", "/usr", "/usr"]
    for path in _MERGED:
        folder = Path(path)
        if folder.is_symlink():
            arguments += ["--symlink", str(folder.readlink()), path]
        elif folder.is_dir():
            arguments += ["--ro-bind", path, path]
    for path in _HIDDEN:
        if Path(path).is_dir():
            arguments += ["--size", "4096", "--perms", "0555", "--tmpfs", path, "--remount-ro", path]
    for path in _FROM_ETC:
        # Some are links to what is below /usr: bwrap shows what they lead to.
        arguments += ["--ro-bind-try", path, path]
    return arguments


def proc_arguments() -> list[str]:
    """A /proc of the sandbox's own pid namespace, with the files of the whole machine covered."""
    arguments = ["--proc", "/proc"]
    for path in _HIDDEN_PROC:
        if Path(path).exists():
            arguments += ["--ro-bind", "/dev/null", path]
    return arguments


def hosts_file(hosts: Mapping[str, str]) -> bytes:
    """The file /etc/hosts (hosts(5)) with these addresses by name."""
    lines = [
        "127.0.0.1 localhost sandbox",
        "::1 localhost",
        *(f"{address} {name}" for name, address in hosts.items()),
    ]
    return "".join(f"{line}\n" for line in lines).encode()


def made_files(uid: int, hosts: Mapping[str, str]) -> dict[str, bytes]:
    """The files of /etc, by path inside. They name no user and nothing else of this machine."""
    return {
        "/etc/passwd": (
            f"root:x:{0 if uid else 65533}:0:root:/root:/usr/sbin/nologin\n"
            f"{USER}:x:{uid}:{uid}::{HOME}:/bin/sh\n"
            "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
        ).encode(),
        "/etc/group": f"{USER}:x:{uid}:\nnogroup:x:65534:\n".encode(),
        "/etc/hosts": hosts_file(hosts),
        "/etc/hostname": b"sandbox\n",
        # No name server: names are resolved by whoever answers at the socket.
        "/etc/resolv.conf": b"",
        "/etc/nsswitch.conf": b"passwd: files\ngroup: files\nhosts: files\n",
    }


def default_environment(uid: int) -> dict[str, str]:
    return {
        "HOME": HOME,
        "LANG": "C.UTF-8",
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
        "TMPDIR": "/tmp",
        "USER": USER if uid else "root",
    }
