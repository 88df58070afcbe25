"""The compiled filter, by interpreting it: what it answers for each system call, whatever stands in the registers."""

from __future__ import annotations

import errno
import functools
import itertools
import json
import platform
import random
import struct

import pyseccomp
import pytest

from ringfence.runner.sandbox.seccomp import ALLOWED, REFUSED, compiled_filter, conditional_rules, oci_profile

ALLOW, ERRNO = 0x7FFF0000, 0x00050000
EPERM, ENOSYS = ERRNO | errno.EPERM, ERRNO | errno.ENOSYS
X86_64, I386, AARCH64 = 0xC000003E, 0x40000003, 0xC00000B7
NATIVE = X86_64 if platform.machine() == "x86_64" else AARCH64
GARBAGE = 0xDEADBEEF << 32


@functools.cache
def instructions() -> list[tuple[int, ...]]:
    return list(struct.iter_unpack("<HBBI", compiled_filter()))


def answer(syscall: str | int, *arguments: int, arch: int = NATIVE) -> int:
    """What the kernel's interpreter of classic BPF (linux/filter.h) returns for this struct seccomp_data."""
    number = (
        syscall if isinstance(syscall, int) else pyseccomp.resolve_syscall(pyseccomp.system_arch(), syscall)
    )
    given = [value & (1 << 64) - 1 for value in (*arguments, *[0] * (6 - len(arguments)))]
    data = struct.pack("<iIQ6Q", number, arch, 0, *given)
    program = instructions()
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


UNIX, INET, INET6 = 1, 2, 10
STREAM, DGRAM, RAW, SEQPACKET, DCCP = 1, 2, 3, 5, 6
SOCKETS = {
    *itertools.product([UNIX], [STREAM, DGRAM, SEQPACKET], [0, 1]),
    *itertools.product([INET, INET6], [STREAM], [0, 6]),
    *((INET, DGRAM, protocol) for protocol in (0, 17, 1)),
    *((INET6, DGRAM, protocol) for protocol in (0, 17, 58)),
}


@pytest.mark.parametrize("syscall", ["socket", "socketpair"])
@pytest.mark.parametrize("upper", [0, GARBAGE, 0xFFFFFFFF << 32])
def test_sockets_are_of_three_families(syscall: str, upper: int) -> None:
    for family in [*range(64), 255, 256, 0x10001, 0x80000002, 0xFFFFFFFF]:
        expected = ALLOW if family in (UNIX, INET, INET6) else EPERM
        assert answer(syscall, upper | family, STREAM) == expected, family


def test_families_are_compared_in_every_bit() -> None:
    values = random.Random(1).choices(range(1 << 32), k=2000)
    for family in (UNIX, INET, INET6):
        values += [family ^ 1 << bit for bit in range(32)]
    for value in values:
        assert answer("socket", value, STREAM) == (ALLOW if value in (UNIX, INET, INET6) else EPERM), value


@pytest.mark.parametrize("syscall", ["socket", "socketpair"])
@pytest.mark.parametrize("upper", [0, GARBAGE])
def test_sockets_are_of_listed_types_and_protocols(syscall: str, upper: int) -> None:
    protocols = [*range(264), 0x106, 0x10006, 0x80000000, 0xFFFFFFFF, *(6 ^ 1 << bit for bit in range(32))]
    for family, kind in itertools.product([UNIX, INET, INET6], range(16)):
        for protocol in protocols:
            expected = ALLOW if (family, kind, protocol) in SOCKETS else ENOSYS
            flags = 0o2000000 | 0o4000  # SOCK_CLOEXEC, SOCK_NONBLOCK
            given = (upper | family, upper | kind | flags, upper | protocol)
            assert answer(syscall, *given) == expected, (family, kind, protocol)


MODES = {"chmod": 1, "creat": 1, "fchmod": 1, "fchmodat": 2, "fchmodat2": 2, "mkdir": 1, "mkdirat": 2, "mknod": 1,
         "mknodat": 2}  # fmt: skip
FILE_MODES = [
    *(bits | mode for bits in range(0, 0o10000, 0o1000) for mode in (0, 0o644, 0o755, 0o777)),
    *(0o104755, 0o40755, 0o12000, 0xFFFFFFFF, 0o20000000),
]


def exists(syscall: str) -> bool:
    return bool(pyseccomp.resolve_syscall(pyseccomp.system_arch(), syscall) >= 0)


@pytest.mark.parametrize("syscall", [name for name in MODES if exists(name)])
@pytest.mark.parametrize("upper", [0, GARBAGE])
def test_no_file_gets_a_set_id_bit(syscall: str, upper: int) -> None:
    before = [0xFFFFFFFFFFFFFFFF] * MODES[syscall]
    for mode in FILE_MODES:
        expected = EPERM if mode & 0o6000 else ALLOW
        assert answer(syscall, *before, upper | mode) == expected, oct(mode)


@pytest.mark.parametrize(("syscall", "first"), [("open", 1), ("openat", 2)])
@pytest.mark.parametrize("upper", [0, GARBAGE])
def test_no_file_is_created_with_a_set_id_bit(syscall: str, first: int, upper: int) -> None:
    if not exists(syscall):
        pytest.skip(f"not provable here: no {syscall}")
    creating = (0o100, 0o20000000, 0o20200000, 0o100 | 0o20000000, 0o101, 0xFFFFFFFF)
    for flags in (*creating, 0, 1, 2, 0o200000, 0o2000000, 0xFFFFFFFF & ~0o20000100):
        for mode in FILE_MODES:
            # A mode that no file gets is whatever was in the register before.
            expected = EPERM if flags in creating and mode & 0o6000 else ALLOW
            given = [0xFFFFFFFFFFFFFFFF] * first
            assert answer(syscall, *given, upper | flags, upper | mode) == expected, (oct(flags), oct(mode))


def test_a_mode_in_memory_is_no_call() -> None:
    assert answer("openat2") == ENOSYS


@pytest.mark.parametrize("upper", [0, GARBAGE])
def test_terminals_take_no_typed_input(upper: int) -> None:
    commands = [0x5412, 0x541C, 0x5401, 0x5413, 0x541B, 0x5411, 0x541D, 0, 0xFFFFFFFF, 0x80045430]
    commands += [0x5423, *(known ^ 1 << bit for known in (0x5412, 0x5423) for bit in range(32))]
    for command in commands:
        expected = EPERM if command in (0x5412, 0x541C, 0x5423) else ALLOW
        assert answer("ioctl", 0, upper | command) == expected, hex(command)


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
def test_refused_system_call_answers_eperm(syscall: str) -> None:
    if pyseccomp.resolve_syscall(pyseccomp.system_arch(), syscall) >= 0:
        assert answer(syscall) == EPERM


def test_allowed_system_calls_pass_and_all_others_answer_enosys() -> None:
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
    chosen = random.Random(2)
    values = [
        *chosen.choices(range(1 << 32), k=300),
        0,
        1,
        2,
        6,
        10,
        0o100,
        0o4755,
        0x5412,
        0x541C,
        0x10000000,
    ]
    for syscall in sorted({rule.syscall for rule in conditional_rules()}):
        if not exists(syscall):
            continue
        for _ in range(600):
            given = chosen.choices(values, k=4)
            found = {
                ALLOW if entry["action"] == "SCMP_ACT_ALLOW" else ERRNO | entry["errnoRet"]
                for entry in profile["syscalls"]
                if syscall in entry["names"]
                and all(given[one["index"]] & one["value"] == one["valueTwo"] for one in entry["args"])
            }
            assert (found or {ENOSYS}) == {answer(syscall, *given)}, (syscall, [*map(hex, given)])
