"""Lets processes of a sandbox listen below port 1024: `python -I -S low_ports.py PID`.

The pid is that of a process in the sandbox. This program enters the user namespace that owns the network namespace, and
sets `ip_unprivileged_port_start` to 0 there. The network of the sandbox has nothing but its own loopback interface.

It imports nothing of Ringfence, as it may run as root.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import sys

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
NS_GET_USERNS = 0xB701  # ioctl_ns(2)
_LOWEST_PORT = "/proc/sys/net/ipv4/ip_unprivileged_port_start"


def main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        network = os.open(f"/proc/{int(sys.argv[1])}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        owner = fcntl.ioctl(network, NS_GET_USERNS)
        for descriptor, kind in ((owner, CLONE_NEWUSER), (network, CLONE_NEWNET)):
            if libc.setns(descriptor, kind) < 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
        with open(_LOWEST_PORT, "w") as file:  # noqa: PTH123 - pathlib is slow to import
            file.write("0")
    except OSError as error:
        sys.exit(f"low_ports: {error.strerror}")


if __name__ == "__main__":
    main()
