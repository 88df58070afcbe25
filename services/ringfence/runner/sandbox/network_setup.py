"""Sets up the network of a sandbox: `python -I -S network_setup.py PID [low-ports] [ADDRESS...]`.

The pid is that of a process in the sandbox. This program enters the user namespace that owns the network namespace.
`low-ports` lets every process there listen below port 1024. Each address is added to the loopback interface, so that
init can listen at it. The network of the sandbox has nothing but that interface.

It imports nothing of Ringfence, as it may run as root.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
import sys

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
NS_GET_USERNS = 0xB701  # ioctl_ns(2)
RTM_NEWADDR, NLMSG_ERROR = 20, 2  # rtnetlink(7), netlink(7)
NLM_F_REQUEST, NLM_F_ACK, NLM_F_EXCL, NLM_F_CREATE = 0x1, 0x4, 0x200, 0x400
IFA_ADDRESS, IFA_LOCAL = 1, 2
IFA_F_NODAD = 0x02
_LOWEST_PORT = "/proc/sys/net/ipv4/ip_unprivileged_port_start"
_LOW_PORTS = "low-ports"


def main() -> None:
    pid, *wanted = sys.argv[1:]
    try:
        _enter(int(pid))
        if _LOW_PORTS in wanted:
            with open(_LOWEST_PORT, "w") as file:  # noqa: PTH123 - pathlib is slow to import
                file.write("0")
        for address in wanted:
            if address != _LOW_PORTS:
                _add(address)
    except OSError as error:
        sys.exit(f"network: {error.strerror}")


def _enter(pid: int) -> None:
    """Enter the network namespace of a process, and the user namespace that owns it. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    network = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    if os.fstat(network).st_ino == os.stat("/proc/self/ns/net").st_ino:  # noqa: PTH116 - pathlib is slow to import
        # The process has ended, and its pid was given to another one: this is the machine's own network.
        raise OSError(errno.ESRCH, "the sandbox has ended")
    owner = fcntl.ioctl(network, NS_GET_USERNS)
    namespaces = [(network, CLONE_NEWNET)]
    if os.fstat(owner).st_ino != os.stat("/proc/self/ns/user").st_ino:  # noqa: PTH116 - as above
        namespaces.insert(0, (owner, CLONE_NEWUSER))
    for descriptor, kind in namespaces:
        if libc.setns(descriptor, kind) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def _add(address: str) -> None:
    """Add an address to the loopback interface, for itself alone. Raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    packed = socket.inet_pton(family, address)
    index = socket.if_nametoindex("lo")
    body = struct.pack("=BBBBI", family, len(packed) * 8, IFA_F_NODAD if ":" in address else 0, 0, index)
    for kind in (IFA_LOCAL, IFA_ADDRESS):
        body += struct.pack("=HH", 4 + len(packed), kind) + packed
    flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL
    message = struct.pack("=IHHII", 16 + len(body), RTM_NEWADDR, flags, 1, 0) + body
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as kernel:
        kernel.bind((0, 0))
        kernel.send(message)
        answer = kernel.recv(65536)
    kind, number = struct.unpack_from("=H", answer, 4)[0], struct.unpack_from("=i", answer, 16)[0]
    if kind != NLMSG_ERROR or number:
        raise OSError(-number, f"{address} cannot be added: {os.strerror(-number)}")


if __name__ == "__main__":
    main()
