"""The programs of `probes/`, each made into one text for `python -c`: where it runs there are no files of the tests.

`DRIVER` is a program that runs many of them, each in a fork of its own, so that one sandbox answers for all.
"""

from __future__ import annotations

import json
from pathlib import Path

PROBES = Path(__file__).with_name("probes")
REACHED, BLOCKED = 0, 3
Results = dict[str, tuple[int, str]]
"""By the name of a case: the exit code of its probe, and what it printed."""

DRIVER = """
import ctypes, http.client, json, os, signal, socket, ssl, subprocess, sys, time, traceback
def run(text, given):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(60)
            os.close(reading)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            sys.argv[1:] = [json.dumps(given)]
            exec(compile(text, "probe", "exec"), {"__name__": "__main__"})
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    os.close(writing)
    with open(reading, "rb") as file:
        said = file.read().decode(errors="replace").strip()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said
results = {}
for name, text, given in json.load(sys.stdin):
    for _ in range(30):
        results[name] = run(text, given)
        # A gateway that waited too long for the processor denies everything, which proves nothing.
        if "stale_view" not in results[name][1]:
            break
        time.sleep(1)
print(json.dumps(results))
"""
"""Input: a list of name, program and what that is given. Output: `Results`, as JSON."""


def results(said: str) -> Results:
    """What the driver printed."""
    return {name: (code, text) for name, (code, text) in json.loads(said).items()}


def program(name: str) -> str:
    """The probe as one program, with the modules that it imports from the tests made in memory."""
    frame, probe = (PROBES / "frame.py").read_text(), (PROBES / f"{name}.py").read_text()
    return "\n".join([
        "import sys, types",
        "for name in ('tests', 'tests.runner', 'tests.runner.probes', 'tests.runner.probes.frame'):",
        "    sys.modules[name] = types.ModuleType(name)",
        f"frame = compile({frame!r}, 'frame.py', 'exec', dont_inherit=True)",
        "exec(frame, sys.modules['tests.runner.probes.frame'].__dict__)",
        "space = {'__name__': 'probe'}",
        f"exec(compile({probe!r}, '{name}.py', 'exec', dont_inherit=True), space)",
        "sys.modules['tests.runner.probes.frame'].main(space['reach'])",
    ])  # fmt: skip
