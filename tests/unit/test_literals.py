"""Data-flow analysis finds the strings that end up in a field, however they come there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.literals import DataFlow

BASE = """
class Reason:
    code: str
    message: str

class AnyError(Exception):
    code = "by_class"
    def __init__(self, message: str, *, code: str | None = None) -> None: ...

IMPORTED = "by_import"
def helper(why: str, message: str) -> Reason:
    return Reason(why, message)
"""


def codes(folder: Path, source: str) -> set[str]:
    """What `source` adds to the codes that `BASE` has by itself."""
    (folder / "base.py").write_text(BASE)
    (folder / "user.py").write_text("from house import base\nfrom house.base import *\n" + source)
    return DataFlow(folder, "house").into(("code",)) - {"by_class"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(): raise X('text', code='keyword')", {"keyword"}),
        ("class E(X):\n    code = 'attribute'", {"attribute"}),
        ("def f(e):\n    e.code = 'assigned'", {"assigned"}),
        ("ANSWER = {'code': 'key', 'text': 'other'}", {"key"}),
        ("from house.base import Reason\nx = Reason('position', 'text')", {"position"}),
        ("from house.base import helper\nx = helper('through', 'text')", {"through"}),
        ("from house.base import helper as h\nx = h('renamed', 'text')", {"renamed"}),
        ("x = base.helper('by_module', 'text')", {"by_module"}),
        ("from house.base import helper\ndef f(a: str): return helper(a, 't')\nx = f('twice')", {"twice"}),
        ("from house.base import IMPORTED, Reason\nx = Reason(IMPORTED, 'text')", {"by_import"}),
        ("x = X(code=base.IMPORTED)", {"by_import"}),
        ("def f(a):\n    c = 'one' if a else 'two'\n    return X(code=c)", {"one", "two"}),
        ("def f(a): return X(code=a or 'else')", {"else"}),
        ("def f(a): return X(code=f'agent_{a}')", {"agent_*"}),
        ("T = {1: 'first', 2: 'second'}\ndef f(a): return X(code=T[a])", {"first", "second"}),
        ("T = {1: 'first'}\ndef f(a): return X(code=T.get(a, 'default'))", {"first", "default"}),
        ("T = {1: ('pair', 'text')}\ndef f():\n    for k, (c, t) in T.items(): X(code=c)", {"pair"}),
        ("def g() -> tuple[str, str]: return 'pair', 'text'\ndef f():\n    c, t = g()\n    X(code=c)", {"pair"}),
        ("from house.base import helper\ndef g() -> tuple[str, str]: return 'star', 't'\nx = helper(*g())", {"star"}),
        ("def g() -> str: return 'cut: text'\ndef f():\n    c, _, t = g().partition(': ')\n    X(code=c)", {"cut"}),
        ("class A:\n    def no(self, why: str): X(code=why)\n    def f(self): self.no('method')", {"method"}),
        ("def f():\n    def inner(why: str): X(code=why)\n    inner('nested')", {"nested"}),
        ("x = X(message='no code')", set()),
    ],
)  # fmt: skip
def test_a_string_is_found_however_it_comes_to_a_field(
    tmp_path: Path, source: str, expected: set[str]
) -> None:
    assert codes(tmp_path, source) == expected


def test_with_an_owner_only_its_own_field_counts(tmp_path: Path) -> None:
    (tmp_path / "base.py").write_text(BASE)
    (tmp_path / "user.py").write_text(
        "from house.base import helper\nhelper('own', 'x')\nother(code='other')"
    )
    assert DataFlow(tmp_path, "house").into(("code",), "Reason") == {"own"}


def test_strings_with_a_prefix_are_found_also_at_the_start_of_an_f_string(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text("A = 'urn:x:whole'\nB = f'urn:x:{A}'\nC = 'other'")
    assert DataFlow(tmp_path, "house").beginning_with("urn:x:") == {"urn:x:whole", "urn:x:"}
