"""The process in which a bundle is evaluated: `python -m ringfence.rego.worker_process`, with a socket as its stdin.

A few lines of Rego can take minutes inside one builtin, all memory, or the process itself; nothing in the same process
could stop them. So the service evaluates here, and kills this process where an answer does not come (`workers`).

Both ways, a message is its length (4 bytes, big-endian) and its bytes. First comes the bundle, as JSON; the answer to
it is empty, or says what is wrong with it. Then each input is answered by a `+` and the result, or a `-` and why there
is none. The process ends with its socket.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import struct
import sys
from typing import Any

import regorus

from ringfence.rego.bundle import BundleError
from ringfence.rego.regorus_programs import check_tests, compiled, first_line

LENGTH = struct.Struct(">I")
MAX_MEMORY_BYTES = 2 * 2**30
"""Of address space, of which regorus' allocator reserves a half at its start."""
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve the process that started this one."""
    _confine(int(sys.argv[1]))
    with socket.socket(fileno=0) as connection, connection.makefile("rb") as incoming:
        first = _read(incoming)
        if first is None:
            return
        try:
            machine = _loaded(json.loads(first))
        except BundleError as error:
            _write(connection, str(error).encode())
            return
        _write(connection, b"")
        while (given := _read(incoming)) is not None:
            _write(connection, _evaluate(machine, given))


def _loaded(bundle: dict[str, Any]) -> Any:
    modules = [(name, text) for name, text in bundle["modules"]]
    program = compiled(modules, bundle["entry_point"])
    check_tests(modules, [(name, text) for name, text in bundle["tests"]])
    machine = regorus.Rvm()
    machine.load_program(program)
    return machine


def _evaluate(machine: Any, input_json: bytes) -> bytes:
    try:
        machine.set_input_json(input_json.decode())
        answer: str = machine.execute()
        return b"+" + answer.encode()
    except RuntimeError as error:
        # Among others after 25,000 instructions: what takes so long to judge asks for too much.
        return b"-" + first_line(error).encode()


def _confine(parent: int) -> None:
    """Do not outlive the service, and do not take the machine's memory with you."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            sys.exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the service, which ends this in its time
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _read(incoming: Any) -> bytes | None:
    head = incoming.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    body: bytes = incoming.read(length)
    return body if len(body) == length else None


def _write(connection: socket.socket, message: bytes) -> None:
    connection.sendall(LENGTH.pack(len(message)) + message)


if __name__ == "__main__":
    main()
