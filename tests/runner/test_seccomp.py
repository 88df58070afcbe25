"""The compiled filter, by interpreting it: what it answers for each system call, whatever stands in the registers."""

from __future__ import annotations

import errno
import itertools
import json
import platform
import random
import struct

import pyseccomp
import pytest

from ringfence.runner.sandbox.seccomp import compiled_filter, oci_profile
from ringfence.runner.sandbox.syscall_policy import ALLOWED, REFUSED, conditional_rules

ALLOW, ERRNO = 0x7FFF0000, 0x00050000
EPERM, ENOSYS = ERRNO | errno.EPERM, ERRNO | errno.ENOSYS
X86_64, I386, AARCH64 = 0xC000003E, 0x40000003, 0xC00000B7
NATIVE = X86_64 if platform.machine() == "x86_64" else AARCH64
GARBAGE = 0xDEADBEEF << 32


def answer(syscall: str | int, *arguments: int, arch: int = NATIVE) -> int:
    """What the kernel's interpreter of classic BPF (linux/filter.h) returns for this struct seccomp_data."""
    number = (
        syscall if isinstance(syscall, int) else pyseccomp.resolve_syscall(pyseccomp.system_arch(), syscall)
    )
    given = [value & (1 << 64) - 1 for value in (*arguments, *[0] * (6 - len(arguments)))]
    data = struct.pack("<iIQ6Q", number, arch, 0, *given)
    program = list(struct.iter_unpack("<HBBI", compiled_filter()))
    accumulator, at = 0, 0
    while True:
        code, jump_true, jump_false, constant = program[at]
        at += 1
        if code == 0x20:  # load a word
            (accumulator,) = struct.unpack_from("<I", data, constant)
        elif code == 0x54:  # and
            accumulator &= constant
        elif code == 0x06:
            return constant
        elif code == 0x05:
            at += constant
        else:
            holds = {
                0x15: accumulator == constant,
                0x25: accumulator > constant,
                0x35: accumulator >= constant,
                0x45: bool(accumulator & constant),
            }[code]
            at += jump_true if holds else jump_false


@pytest.mark.parametrize("syscall", ["socket", "socketpair"])
@pytest.mark.parametrize("upper", [0, GARBAGE, 0xFFFFFFFF << 32])
def test_sockets_are_of_three_families(syscall: str, upper: int) -> None:
    for family in [*range(64), 255, 256, 0x10001, 0x80000002, 0xFFFFFFFF]:
        assert answer(syscall, upper | family) == (ALLOW if family in (1, 2, 10) else EPERM), family


def test_families_are_compared_in_every_bit() -> None:
    values = random.Random(1).choices(range(1 << 32), k=2000)
    for family in (1, 2, 10):
        values += [family ^ 1 << bit for bit in range(32)]
    for value in values:
        assert answer("socket", value) == (ALLOW if value in (1, 2, 10) else EPERM), value


@pytest.mark.parametrize("upper", [0, GARBAGE])
def test_terminals_take_no_typed_input(upper: int) -> None:
    commands = [0x5412, 0x541C, 0x5401, 0x5413, 0x541B, 0x5411, 0x541D, 0, 0xFFFFFFFF, 0x80045430]
    commands += [0x5412 ^ 1 << bit for bit in range(32)]
    for command in commands:
        assert answer("ioctl", 0, upper | command) == (EPERM if command in (0x5412, 0x541C) else ALLOW), hex(
            command
        )


@pytest.mark.parametrize("upper", [0, GARBAGE])
def test_no_new_namespace(upper: int) -> None:
    flags = [0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000]
    for chosen in itertools.chain.from_iterable(itertools.combinations(flags, count) for count in (1, 2, 7)):
        assert answer("clone", upper | sum(chosen) | 17) == EPERM
        assert answer("unshare", upper | sum(chosen)) == EPERM
    assert answer("unshare", upper | 0x80) == EPERM  # time
    # What threads, fork and posix_spawn use.
    for allowed in (0x3D0F00, 17, 0x4111, 0x1200011):
        assert answer("clone", upper | allowed) == ALLOW, hex(allowed)
    assert answer("unshare", upper | 0x600) == ALLOW
    # Its flags are in memory: programs fall back to clone.
    assert answer("clone3") == ENOSYS


def test_personality_is_one_of_linux() -> None:
    assert [answer("personality", value) for value in (0, 8, 0x20000, 0x20008, 0xFFFFFFFF)] == [ALLOW] * 5
    assert answer("personality", 0x40000) == EPERM  # without address randomisation
    assert answer("personality", 0x400000) == EPERM


@pytest.mark.parametrize("syscall", sorted(REFUSED))
def test_what_is_refused_answers_eperm(syscall: str) -> None:
    if pyseccomp.resolve_syscall(pyseccomp.system_arch(), syscall) >= 0:
        assert answer(syscall) == EPERM


def test_what_is_allowed_is_allowed_and_all_else_does_not_exist() -> None:
    numbers = {}
    for name in ALLOWED | REFUSED | {rule.syscall for rule in conditional_rules()}:
        numbers[pyseccomp.resolve_syscall(pyseccomp.system_arch(), name)] = name
    for number in range(2000):
        if number not in numbers:
            assert answer(number) == ENOSYS, number
        elif numbers[number] in ALLOWED:
            assert answer(number, *[0xFFFFFFFFFFFFFFFF] * 6) == ALLOW, numbers[number]


def test_lists_do_not_overlap() -> None:
    assert not ALLOWED & REFUSED
    assert not {rule.syscall for rule in conditional_rules()} & (ALLOWED | REFUSED)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="about x86_64's other ABIs")
def test_other_abis_are_refused() -> None:
    assert answer(1, arch=I386) == EPERM  # exit
    assert answer(102, 1, arch=I386) == EPERM  # socketcall
    assert answer(1, arch=AARCH64) == EPERM
    for number in (0, 41, 59, 101, 512, 547):  # read, socket, execve, ptrace, and two of x32 alone
        assert answer(number | 0x40000000) == EPERM, number


def test_the_oci_profile_says_the_same() -> None:
    profile = json.loads(json.dumps(oci_profile()))
    assert (profile["defaultAction"], profile["defaultErrnoRet"]) == ("SCMP_ACT_ERRNO", errno.ENOSYS)
    values = [*random.Random(2).choices(range(1 << 32), k=300), 1, 2, 10, 0x5412, 0x541C, 0x10000000, 17]
    for syscall, index in (("socket", 0), ("ioctl", 1), ("clone", 0), ("unshare", 0), ("personality", 0)):
        for value in values:
            found = {
                ALLOW if entry["action"] == "SCMP_ACT_ALLOW" else ERRNO | entry["errnoRet"]
                for entry in profile["syscalls"]
                if syscall in entry["names"]
                and all(
                    value & one["value"] == one["valueTwo"] and one["index"] == index for one in entry["args"]
                )
            }
            assert found == {answer(syscall, *[0] * index, value)}, (syscall, hex(value))
