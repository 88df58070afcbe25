"""The process between the runner and bubblewrap: `python -I -S launcher.py FD`, with its plan as JSON on a descriptor.

It becomes bubblewrap, after it has done what has to be done in the new process itself:

1. join the control groups, so that all memory of the sandbox is counted;
2. as root: mount the host paths in a mount namespace of its own, with the owner's files shown as the sandbox user's
   (mount_setattr(2), MOUNT_ATTR_IDMAP), and give up root for an unprivileged uid that nobody else has;
3. ask the kernel to kill it when the runner dies;
4. wait for the runner's word: if the runner died before step 3, the pipe ends, and so does this process;
5. start the timer of the TTL, which stays over execve(2) and ends bubblewrap whatever the runner does.

It imports nothing of Ringfence: it runs as root for a moment, with an interpreter that reads no site packages.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 0x4000, 0x40000
PR_SET_PDEATHSIG = 1
# mount(2) as file descriptors: the numbers are the same on all architectures.
SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_MOUNT_SETATTR = 428, 429, 442
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC, AT_RECURSIVE, AT_EMPTY_PATH = 1, 0o2000000, 0x8000, 0x1000
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOUNT_ATTR_IDMAP = 0x100000

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttributes(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def main() -> None:
    with os.fdopen(int(sys.argv[1])) as file:
        plan = json.load(file)
    # The error stream is the runner's until bubblewrap has started the command: what goes wrong here is said there.
    try:
        prepare(plan)
        os.execve(plan["program"], plan["argv"], {})  # noqa: S606
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        sys.stderr.write(f"launcher: {error.strerror}{where}\n")
        os._exit(1)


def prepare(plan: dict[str, Any]) -> None:
    """Carry out steps 1 to 5. Raises OSError."""
    for path in plan["cgroups"]:
        descriptor = os.open(f"{path}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        os.write(descriptor, b"0")
        os.close(descriptor)
    # A limit of 1 stops core dumps to files, which need a page, and to programs, which a limit of 0 does not stop.
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    uid = plan["uid"]
    if uid is not None:
        if plan["staged"]:
            stage_mounts(plan["staging"], plan["staged"], uid)
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        except OSError as error:
            text = "root of a user namespace has no uid to give to a sandbox: start the runner as an ordinary user"
            raise OSError(error.errno, text) from None
    stream, number = plan["stderr"]
    os.dup2(stream, number, inheritable=True)
    os.close(stream)
    _check(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if not os.read(plan["go"], 1):
        os._exit(1)
    os.close(plan["go"])
    if plan["ttl_s"] is not None:
        signal.setitimer(signal.ITIMER_REAL, plan["ttl_s"])


def stage_mounts(folder: str, mounts: list[dict[str, Any]], uid: int) -> None:
    """Put each mount's tree below `folder`, named by its number, in a mount namespace that only this process has.

    `uid` then has the rights that the owner of the mounted file or directory has. Raises OSError.
    """
    # A copy of each tree is taken while the descriptors still belong to the mount namespace of this process.
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE | AT_EMPTY_PATH
    trees = [_check(_libc.syscall(SYS_OPEN_TREE, mount["fd"], b"", flags), mount["host"]) for mount in mounts]
    _check(_libc.unshare(CLONE_NEWNS))
    _mount(None, "/", None, MS_REC | MS_PRIVATE, None)
    _mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0755,size=1m")
    for number, (mount, tree) in enumerate(zip(mounts, trees, strict=True)):
        target = f"{folder}/{number}"
        if mount["directory"]:
            os.mkdir(target)  # noqa: PTH102 - pathlib is slow to import
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        _map_owner(tree, mount, uid)
        _check(
            _libc.syscall(SYS_MOVE_MOUNT, tree, b"", -100, target.encode(), MOVE_MOUNT_F_EMPTY_PATH), target
        )
        os.close(tree)
        os.close(mount["fd"])


def _map_owner(tree: int, mount: dict[str, Any], uid: int) -> None:
    owner = os.fstat(mount["fd"])
    namespace = _user_namespace(owner.st_uid, owner.st_gid, uid)
    attributes = _MountAttributes(attr_set=MOUNT_ATTR_IDMAP, userns_fd=namespace)
    arguments = (tree, b"", AT_EMPTY_PATH | AT_RECURSIVE, ctypes.byref(attributes), ctypes.sizeof(attributes))
    try:
        _check(_libc.syscall(SYS_MOUNT_SETATTR, *arguments), mount["host"])
    except OSError as error:
        # A mount to read needs no owner's rights where everybody may read it; one to write is refused.
        if mount["writable"]:
            text = (
                "its file system cannot show its owner as the sandbox's user: start the runner as that owner"
            )
            raise OSError(error.errno, text, mount["host"]) from None
    finally:
        os.close(namespace)


def _user_namespace(owner_uid: int, owner_gid: int, uid: int) -> int:
    """A user namespace that maps these owners to `uid`, held open by a descriptor: what MOUNT_ATTR_IDMAP takes."""
    ready, finished = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        _libc.unshare(CLONE_NEWUSER)
        os.write(ready[1], b"1")
        os.close(finished[1])
        os.read(finished[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        for kind, inside, outside in (("uid", owner_uid, uid), ("gid", owner_gid, uid)):
            with open(f"/proc/{child}/{kind}_map", "w") as file:  # noqa: PTH123
                file.write(f"{inside} {outside} 1")
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        for descriptor in (*ready, *finished):
            os.close(descriptor)
        os.waitpid(child, 0)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _check(_libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]), target)


def _check(result: int, filename: str | None = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), filename)
    return result


if __name__ == "__main__":
    main()
