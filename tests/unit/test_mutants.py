"""The tool for mutation testing: which mistakes there are, what they are known by, and how each is run to its end."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

from tests.mutants import survivors
from tests.mutants.modules import MODULES
from tests.mutants.mutation import Mutant, MutantId, mutants_of
from tests.mutants.process import PACKAGE, ROOT, Limits, limit_further_cpu, run_all

SOURCE = '''\
"""What it is about."""

LIMIT = 5


def allowed(wanted: int, held: list[int], *, message: str = "an explanation for people") -> bool:
    """Whether it is."""
    if wanted not in held or wanted > LIMIT:
        raise ValueError(f"{wanted} is not held: ask for it", "code")
    check(held)
    return True
'''


def changes(mutants: list[Mutant]) -> set[tuple[str, str, str]]:
    return {(one.id.where, one.id.old, one.id.new) for one in mutants}


def test_each_mutant_is_the_module_with_one_mistake():
    found = changes(mutants_of("x.py", SOURCE))
    condition = "if wanted not in held or wanted > LIMIT:"
    assert found >= {
        ("", "LIMIT = 5", "LIMIT = 6"),
        ("allowed", condition, "if True:"),
        ("allowed", condition, "if False:"),
        ("allowed", condition, "if wanted not in held:"),
        ("allowed", condition, "if wanted > LIMIT:"),
        ("allowed", condition, "if wanted not in held and wanted > LIMIT:"),
        ("allowed", condition, "if wanted in held or wanted > LIMIT:"),
        ("allowed", condition, "if wanted not in held or wanted >= LIMIT:"),
        ("allowed", "check(held)", "pass"),
        ("allowed", "check(held)", "check(None)"),
        ("allowed", "return True", "return False"),
    }
    for one in mutants_of("x.py", SOURCE):
        compile(one.text, "x.py", "exec")
        assert one.text != SOURCE


def test_text_for_people_is_left_alone():
    for _, old, new in changes(mutants_of("x.py", SOURCE)):
        assert "explanation" not in old
        assert "ask for it" not in old or '"code"' not in new


def test_only_what_is_outside_of_functions_needs_a_new_import():
    inside = {one.id.where: one.in_function for one in mutants_of("x.py", SOURCE)}
    assert inside == {"": False, "allowed": True}


def test_edits_elsewhere_leave_the_name_of_a_mutant_alone():
    edited = SOURCE.replace("LIMIT = 5", "OTHER = 1\n\n\ndef other() -> None:\n    pass\n\n\nLIMIT = 5")
    edited = edited.replace("    check(held)\n", "    held = sorted(held)\n    check(held)\n")
    before = {one.id for one in mutants_of("x.py", SOURCE)}
    assert before <= {one.id for one in mutants_of("x.py", edited)}


def test_two_that_look_alike_are_told_apart():
    found = [one.id for one in mutants_of("x.py", SOURCE + "    check(held)\n")]
    assert len(set(found)) == len(found)
    assert {id.nth for id in found if id.new == "pass"} == {1, 2}


def test_the_list_of_survivors_is_read_as_it_was_written(tmp_path: Path):
    ids = {
        MutantId("b.py", "f", 'x = "a\\n"', "x = None"): "it is »so«",
        MutantId("a.py", "", "y = 1", "y = 2"): "",
        MutantId("a.py", "", "y = 1", "y = 2", 2): "for another reason",
    }
    file = tmp_path / "survivors.toml"
    assert survivors.read(file) == {}
    survivors.write(ids, ["b.py", "a.py"], file)
    assert survivors.read(file) == ids
    text = file.read_text()
    assert text.index("b.py") < text.index("a.py")


def test_every_survivor_that_is_listed_has_a_reason():
    listed = survivors.read()
    assert {id for id, reason in listed.items() if not reason.strip()} == set()
    assert {id.module for id in listed} <= MODULES.keys()


def test_modules_and_their_tests_are_there():
    for module, tests in MODULES.items():
        assert (PACKAGE / module).is_file()
        for name in tests:
            assert (ROOT / "tests" / "unit" / name).is_file()


def spin() -> bool:
    while True:
        pass


def spin_in_a_short_test() -> bool:
    limit_further_cpu(0)
    return spin()


def wait(file: Path) -> bool:
    file.write_text(str(os.getpid()))
    time.sleep(600)
    return False


def leave_a_process(file: Path) -> bool:
    pid = os.fork()
    if pid == 0:
        time.sleep(600)
        os._exit(0)
    file.write_text(str(pid))
    return True


def test_each_is_run_to_its_end_and_leaves_nothing_behind(tmp_path: Path):
    file = tmp_path / "pid"
    works: list[Callable[[], bool]] = [
        lambda: True,
        lambda: False,
        spin,
        functools.partial(wait, tmp_path / "waits"),
        functools.partial(leave_a_process, file),
        spin_in_a_short_test,
    ]
    limits = [
        Limits(60, 60), Limits(60, 60), Limits(0, 60), Limits(60, 1), Limits(60, 60), Limits(600, 600),
    ]  # fmt: skip
    jobs = [(number, work, limit) for number, (work, limit) in enumerate(zip(works, limits, strict=True))]
    verdicts = dict(run_all(jobs, 3))
    assert [verdicts[number] for number in range(6)] == [
        "killed", "survived", "timeout", "timeout", "killed", "timeout",
    ]  # fmt: skip
    for name in ("pid", "waits"):
        await_end(int((tmp_path / name).read_text()))


def await_end(pid: int) -> None:
    while _is_there(pid):
        time.sleep(0.01)


def _is_there(pid: int) -> bool:
    try:
        return not Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].startswith(" Z")
    except FileNotFoundError:
        return False


def test_abandoned_workers_are_ended(tmp_path: Path):
    file = tmp_path / "waits"

    def once_it_waits() -> bool:
        while not file.exists() or not file.read_text():
            time.sleep(0.01)
        return True

    works: list[Callable[[], bool]] = [once_it_waits, functools.partial(wait, file)]
    found = run_all([(number, work, Limits(60, 60)) for number, work in enumerate(works)], 2)
    assert next(found) == (0, "killed")
    found.close()
    await_end(int(file.read_text()))
