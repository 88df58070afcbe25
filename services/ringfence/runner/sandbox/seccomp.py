"""Compiles the system call policy: to BPF by libseccomp, and to the profile of an OCI runtime.

libseccomp is the library of the distribution (Debian: libseccomp2), pyseccomp its binding. Neither is imported before a
filter is needed.
"""

from __future__ import annotations

import errno
import functools
import os
import platform
from typing import Any

from ringfence.runner.sandbox.backend import SandboxUnavailableError
from ringfence.runner.sandbox.syscall_policy import ALLOWED, REFUSED, conditional_rules

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
