"""What probes look for, planted. It says `ready`, and stays until its input ends.

Started in network and mount namespaces of its own, it plants listeners at the addresses of cloud metadata and of a name
server, sockets of programs that hold credentials, and files and shared memory that hold the canary.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

given = json.loads(sys.argv[1])
canary = given["canary"][::-1]
uid, folder = given["uid"], Path(given["folder"])
home = Path(given["home"])
libc = ctypes.CDLL(None, use_errno=True)


def run(*argv: str) -> None:
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


def answer_all(server: socket.socket) -> None:
    while True:
        peer, _ = server.accept()
        with peer:
            if peer.family != socket.AF_UNIX:
                peer.recv(1024)  # or what was not read resets the connection
            peer.sendall(f"HTTP/1.0 200 OK\r\n\r\n{canary}".encode())


def answer_names(server: socket.socket) -> None:
    """Every name has the address of the metadata service (RFC 1035: the question, then one A record)."""
    while True:
        query, peer = server.recvfrom(512)
        wants_address = query[-4:-2] == b"\0\1" or b"\0\1\0\1" in query
        end = query.index(b"\0", 12) + 5
        record = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + socket.inet_aton("169.254.169.254")
        count = b"\0\1" if wants_address else b"\0\0"
        reply = (
            query[:2]
            + b"\x81\x80\0\1"
            + count
            + b"\0\0\0\0"
            + query[12:end]
            + (record if wants_address else b"")
        )
        server.sendto(reply, peer)


def serve(server: socket.socket) -> None:
    threading.Thread(target=answer_all, args=(server,), daemon=True).start()


def own(path: Path, mode: int) -> None:
    os.chown(path, uid, uid)
    path.chmod(mode)


def plant_network() -> None:
    run("ip", "link", "set", "lo", "up")
    for address in ("169.254.169.254/32", "169.254.169.253/32"):
        run("ip", "address", "add", address, "dev", "lo")
    run("ip", "-6", "address", "add", "fd00:ec2::254/128", "dev", "lo", "nodad")
    Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 2147483647")
    serve(socket.create_server(("169.254.169.254", 80)))
    serve(socket.create_server(("fd00:ec2::254", 80), family=socket.AF_INET6))
    serve(socket.create_server(("127.0.0.1", given["port"])))
    names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    names.bind(("169.254.169.253", 53))
    threading.Thread(target=answer_names, args=(names,), daemon=True).start()
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind("\0" + given["abstract"])
    abstract.listen()
    serve(abstract)


def plant_files() -> None:
    run("mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", "/run")
    resolver = folder / "resolv.conf"
    resolver.write_text("nameserver 169.254.169.253\noptions timeout:2\n")
    resolver.chmod(0o644)
    run("mount", "--bind", str(resolver), str(Path("/etc/resolv.conf").resolve()))
    for path in map(Path, given["sockets"].values()):
        path.parent.mkdir(parents=True, exist_ok=True)
        for above in list(path.parents)[:-2]:
            above.chmod(0o755)
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(path))
        own(path, 0o600)
        server.listen()
        serve(server)
    for name in given["dotfiles"]:
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"token = {canary}\n")
        own(path, 0o600)
        for above in path.relative_to(home).parents:
            os.chown(home / above, uid, uid)
    setuid = folder / "mounted" / "setuid-cat"
    shutil.copy("/usr/bin/cat", setuid)
    setuid.chmod(0o4755)


def plant_memory() -> None:
    shared = Path(given["shared_memory"])
    shared.write_text(canary)
    own(shared, 0o600)
    segment = libc.shmget(given["shared_key"], 4096, 0o1000 | 0o666)
    libc.shmat.restype = ctypes.c_void_p
    address = libc.shmat(segment, None, 0)
    ctypes.memmove(address, canary.encode(), len(canary))


plant_network()
plant_files()
plant_memory()
print("ready", flush=True)
sys.stdin.read()
Path(given["shared_memory"]).unlink(missing_ok=True)
libc.shmctl(libc.shmget(given["shared_key"], 4096, 0), 0, None)
