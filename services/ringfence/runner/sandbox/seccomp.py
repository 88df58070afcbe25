"""The system call policy of sandboxes (seccomp), compiled to BPF by libseccomp and to the profile of an OCI runtime.

A call that is not listed answers ENOSYS, as on a kernel that lacks it. That includes future system calls, and
`clone3` and `openat2`, whose flags and mode are in memory, where no filter can read them. A call listed as refused
answers EPERM. Names that a machine's architecture does not have are left out.
libseccomp is the library of the distribution (Debian: libseccomp2), pyseccomp its binding. Neither is imported before
a filter is needed.
"""

from __future__ import annotations

import errno
import functools
import os
import platform
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ringfence.runner.sandbox.backend import SandboxUnavailableError


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ALLOWED = _names(
    """
    accept accept4 access adjtimex alarm arch_prctl bind brk cachestat capget capset chdir chown
    clock_adjtime clock_getres clock_gettime clock_nanosleep close close_range connect copy_file_range dup
    dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2 execve
    execveat exit exit_group faccessat faccessat2 fadvise64 fallocate fchdir fchown
    fchownat fcntl fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat fstatfs fsync
    ftruncate futex futex_requeue futex_wait futex_waitv futex_wake futimesat get_mempolicy get_robust_list
    getcpu getcwd getdents getdents64 getegid geteuid getgid getgroups getitimer getpeername getpgid getpgrp
    getpid getppid getpriority getrandom getresgid getresuid getrlimit getrusage getsid getsockname getsockopt
    gettid gettimeofday getuid getxattr inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel
    io_destroy io_getevents io_pgetevents io_setup io_submit ioprio_get ioprio_set kill landlock_add_rule
    landlock_create_ruleset landlock_restrict_self lchown lgetxattr link linkat listen listxattr llistxattr
    lremovexattr lseek lsetxattr lstat madvise map_shadow_stack mbind membarrier memfd_create mincore
    mlock mlock2 mlockall mmap mprotect mq_getsetattr mq_notify mq_open mq_timedreceive
    mq_timedsend mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync munlock munlockall munmap nanosleep
    newfstatat pause pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free
    pkey_mprotect poll ppoll prctl pread64 preadv preadv2 prlimit64 pselect6 pwrite64 pwritev pwritev2 read
    readahead readlink readlinkat readv recvfrom recvmmsg recvmsg remap_file_pages removexattr rename renameat
    renameat2 restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn
    rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min
    sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval sched_setaffinity
    sched_setattr sched_setparam sched_setscheduler sched_yield seccomp select semctl semget semop semtimedop
    sendfile sendmmsg sendmsg sendto set_mempolicy set_robust_list set_tid_address setfsgid setfsuid setgid
    setgroups setitimer setpgid setpriority setregid setresgid setresuid setreuid setrlimit setsid setsockopt
    setuid setxattr shmat shmctl shmdt shmget shutdown sigaltstack signalfd signalfd4 splice stat statfs statx
    symlink symlinkat sync sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete
    timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime times tkill
    truncate umask uname unlink unlinkat utime utimensat utimes vfork wait4 waitid write writev
    """
)

REFUSED = _names(
    """
    acct add_key bpf chroot clock_settime create_module delete_module fanotify_init fanotify_mark finit_module
    fsconfig fsmount fsopen fspick init_module io_uring_enter io_uring_register io_uring_setup ioperm iopl kcmp
    kexec_file_load kexec_load keyctl listmount listns lookup_dcookie migrate_pages mount mount_setattr
    move_mount move_pages name_to_handle_at nfsservctl open_by_handle_at open_tree open_tree_attr
    perf_event_open pidfd_getfd pivot_root process_madvise process_mrelease process_vm_readv process_vm_writev
    ptrace query_module quotactl quotactl_fd reboot request_key setdomainname sethostname setns settimeofday
    statmount swapoff swapon syslog umount umount2 userfaultfd ustat vhangup vmsplice
    """
)

AF_UNIX, AF_INET, AF_INET6 = 1, 2, 10
SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET = 1, 2, 5
IPPROTO_ICMP, IPPROTO_TCP, IPPROTO_UDP, IPPROTO_ICMPV6 = 1, 6, 17, 58
_SOCK_TYPE_MASK = 0xF
_SOCKETS = (
    *((AF_UNIX, kind, (0, AF_UNIX)) for kind in (SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET)),
    *((family, SOCK_STREAM, (0, IPPROTO_TCP)) for family in (AF_INET, AF_INET6)),
    (AF_INET, SOCK_DGRAM, (0, IPPROTO_UDP, IPPROTO_ICMP)),
    (AF_INET6, SOCK_DGRAM, (0, IPPROTO_UDP, IPPROTO_ICMPV6)),
)
"""Family, type and protocols of the sockets that may be made. Others could load modules of the kernel."""

TIOCSTI, TIOCLINUX, TIOCSETD = 0x5412, 0x541C, 0x5423
S_ISUID, S_ISGID = 0o4000, 0o2000
O_CREAT, O_TMPFILE = 0o100, 0o20000000
"""`open` has a mode with one of these flags alone. The numbers are the same on x86-64 and aarch64."""
_MODES = {
    "chmod": 1, "creat": 1, "fchmod": 1, "fchmodat": 2, "fchmodat2": 2, "mkdir": 1, "mkdirat": 2, "mknod": 1,
    "mknodat": 2,
}  # fmt: skip
"""Which argument is the mode of a file."""
_FLAGS_AND_MODES = {"open": (1, 2), "openat": (2, 3)}
CLONE_NEWTIME, CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x80, 0x20000, 0x2000000, 0x4000000
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x8000000, 0x10000000, 0x20000000, 0x40000000

_NAMESPACES = (
    CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET,
)  # fmt: skip
# The personalities of Linux programs: none, 32 bit, uname 2.6, both, and the question which it is.
_PERSONALITIES = (0, 8, 0x20000, 0x20008, 0xFFFFFFFF)
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Comparison:
    """Whether argument `index`, under `mask`, is `value`.

    All masks are within 32 bits: the kernel reads these arguments as 32-bit numbers, and whatever stands in the upper
    half of the register must not change the answer.
    """

    index: int
    mask: int
    value: int


@dataclass(frozen=True)
class ConditionalRule:
    """A rule for calls of which all comparisons hold. `error` is None if the call is allowed."""

    syscall: str
    comparisons: tuple[Comparison, ...]
    error: int | None


def conditional_rules() -> list[ConditionalRule]:
    """The rules that look at arguments. Of one system call, no call meets two rules with different answers."""
    rules = []
    for syscall in ("socket", "socketpair"):
        families = {family for family, _, _ in _SOCKETS}
        rules += [_rule(syscall, errno.EPERM, (0, mask, value)) for mask, value in _others(families)]
        # An unlisted type or protocol of these families answers ENOSYS, like an unlisted call.
        rules += [
            _rule(syscall, None, (0, _WORD, family), (1, _SOCK_TYPE_MASK, kind), (2, _WORD, protocol))
            for family, kind, protocols in _SOCKETS
            for protocol in protocols
        ]
    rules += _all_but(ioctl := "ioctl", 1, (TIOCSTI, TIOCLINUX, TIOCSETD))
    assert ioctl not in ALLOWED
    rules += _only("personality", 0, _PERSONALITIES)
    # clone(2) takes no CLONE_NEWTIME: that bit is part of its exit signal.
    for syscall, flags in (("clone", _NAMESPACES), ("unshare", (*_NAMESPACES, CLONE_NEWTIME))):
        rules.append(_rule(syscall, None, (0, sum(flags), 0)))
        rules += [_rule(syscall, errno.EPERM, (0, flag, flag)) for flag in flags]
    return [*rules, *_modes_without_set_id()]


def policy_text() -> str:
    """Return the whole policy as text, the same for the same policy: its digest stands in the record of each run."""
    rules = sorted(
        " ".join([
            rule.syscall,
            *(f"{one.index} {one.mask} {one.value}" for one in rule.comparisons),
            str(rule.error),
        ])
        for rule in conditional_rules()
    )  # fmt: skip
    return "\n".join((" ".join(sorted(ALLOWED)), " ".join(sorted(REFUSED)), *rules))


def _modes_without_set_id() -> list[ConditionalRule]:
    """The rules for calls with a file mode: none may set S_ISUID or S_ISGID, which work outside of the sandbox too."""
    rules = []
    for syscall, mode in _MODES.items():
        rules.append(_rule(syscall, None, (mode, S_ISUID | S_ISGID, 0)))
        rules += [_rule(syscall, errno.EPERM, (mode, bit, bit)) for bit in (S_ISUID, S_ISGID)]
    for syscall, (flags, mode) in _FLAGS_AND_MODES.items():
        # Without these flags the mode's register holds anything.
        rules.append(_rule(syscall, None, (flags, O_CREAT | O_TMPFILE, 0)))
        for flag in (O_CREAT, O_TMPFILE):
            rules.append(_rule(syscall, None, (flags, flag, flag), (mode, S_ISUID | S_ISGID, 0)))
            rules += [
                _rule(syscall, errno.EPERM, (flags, flag, flag), (mode, bit, bit))
                for bit in (S_ISUID, S_ISGID)
            ]
    return rules


def _rule(syscall: str, error: int | None, *comparisons: tuple[int, int, int]) -> ConditionalRule:
    return ConditionalRule(syscall, tuple(Comparison(*one) for one in comparisons), error)


def _only(syscall: str, index: int, values: tuple[int, ...]) -> list[ConditionalRule]:
    allowed = [_rule(syscall, None, (index, _WORD, value)) for value in values]
    return allowed + [_rule(syscall, errno.EPERM, (index, mask, value)) for mask, value in _others(values)]


def _all_but(syscall: str, index: int, values: tuple[int, ...]) -> list[ConditionalRule]:
    refused = [_rule(syscall, errno.EPERM, (index, _WORD, value)) for value in values]
    return refused + [_rule(syscall, None, (index, mask, value)) for mask, value in _others(values)]


def _others(values: Collection[int]) -> list[tuple[int, int]]:
    """Masks and values that together match each 32-bit number except these, and each once.

    libseccomp compares an argument once a rule, so "neither this nor that" needs rules of its own: the branches of the
    binary tree of these numbers that lead to none of them.
    """
    found = []
    for depth in range(32):
        mask = _WORD << (31 - depth) & _WORD
        bit = 1 << (31 - depth)
        above = mask & ~bit
        for prefix in sorted({value & mask for value in values}):
            other = prefix ^ bit
            if not any(value & mask == other for value in values):
                assert other & above == prefix & above
                found.append((mask, other))
    return found


_ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}
_OPTIMIZE_AS_TREE = 2


def unavailable() -> str | None:
    """The reason why no filter can be made here, with the remedy; None if one can."""
    if platform.machine() not in _ARCHITECTURES:
        return f"there is no list of system calls for {platform.machine()}: use x86_64 or aarch64"
    try:
        _library()
    except SandboxUnavailableError as error:
        return f"{error.message}: {error.remedy}"
    return None


@functools.cache
def compiled_filter() -> bytes:
    """The BPF program, as `bwrap --seccomp` reads it. Made once a process.

    Raises SandboxUnavailableError if libseccomp or its binding is missing.
    """
    reason = unavailable()
    if reason is not None:
        raise SandboxUnavailableError(reason)
    library = _library()
    program = library.SyscallFilter(library.ERRNO(errno.ENOSYS))
    # Other ABIs, such as 32-bit programs and x32, have other numbers for the same calls.
    program.set_attr(library.Attr.ACT_BADARCH, library.ERRNO(errno.EPERM))
    program.set_attr(library.Attr.CTL_OPTIMIZE, _OPTIMIZE_AS_TREE)
    for name in sorted(ALLOWED):
        _add(library, program, library.ALLOW, name)
    for name in sorted(REFUSED):
        _add(library, program, library.ERRNO(errno.EPERM), name)
    for rule in conditional_rules():
        action = library.ALLOW if rule.error is None else library.ERRNO(rule.error)
        arguments = [
            library.Arg(one.index, library.MASKED_EQ, one.mask, one.value) for one in rule.comparisons
        ]
        _add(library, program, action, rule.syscall, *arguments)
    descriptor = os.memfd_create("seccomp", os.MFD_CLOEXEC)
    with os.fdopen(descriptor, "w+b") as file:
        program.export_bpf(file)
        file.seek(0)
        return file.read()


def oci_profile() -> dict[str, Any]:
    """The same policy as the seccomp profile of Docker and Podman (runtime-spec, `linux.seccomp`)."""
    syscalls: list[dict[str, Any]] = [
        {"names": sorted(ALLOWED), "action": "SCMP_ACT_ALLOW", "args": []},
        {"names": sorted(REFUSED), "action": "SCMP_ACT_ERRNO", "errnoRet": errno.EPERM, "args": []},
    ]
    for rule in conditional_rules():
        # In a profile, `value` is the mask and `valueTwo` what is expected under it. All arguments have to match.
        arguments = [
            {"index": one.index, "value": one.mask, "valueTwo": one.value, "op": "SCMP_CMP_MASKED_EQ"}
            for one in rule.comparisons
        ]
        action = {"action": "SCMP_ACT_ALLOW"} if rule.error is None else {
            "action": "SCMP_ACT_ERRNO", "errnoRet": rule.error}  # fmt: skip
        syscalls.append({"names": [rule.syscall], **action, "args": arguments})
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": errno.ENOSYS,
        "architectures": [_ARCHITECTURES.get(platform.machine(), "SCMP_ARCH_NATIVE")],
        "syscalls": syscalls,
    }


def _add(library: Any, program: Any, action: int, name: str, *arguments: Any) -> None:
    # libseccomp numbers what this architecture lacks below zero; older versions do not know newer names.
    number = library.resolve_syscall(library.system_arch(), name)
    if number >= 0:
        program.add_rule_exactly(action, name, *arguments)


def _library() -> Any:
    try:
        import pyseccomp
    except ImportError as error:
        raise SandboxUnavailableError("the binding of libseccomp is not installed").with_remedy(
            "pip install 'ringfence[runner]'"
        ) from error
    except (OSError, RuntimeError) as error:
        raise SandboxUnavailableError("libseccomp is not installed").with_remedy(
            "apt install libseccomp2"
        ) from error
    return pyseccomp
