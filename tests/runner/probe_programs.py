"""The programs of `probes/`, each made into one text for `python -c`: where it runs there are no files of the tests."""

from __future__ import annotations

from pathlib import Path

PROBES = Path(__file__).with_name("probes")
REACHED, BLOCKED = 0, 3


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
