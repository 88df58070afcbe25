"""Mutants of a Python module: each is its source with one small mistake in it.

Most operators are mutmut's. Those below add the mistakes that matter most in a module that decides: a check that is
gone, and one of several conditions that is gone. mutmut's own command is not used: it leaves out constants, tables and
class bodies, its workers inherit filled `lru_cache`s, and its mutants have running numbers, which every edit changes.

Not mutated, as no program depends on it:

- text for people: strings with a space in them, what stands in such an f-string, `message`, arguments of log calls.
  Tests assert codes and the named parts that a reader needs;
- types: annotations, aliases, the first argument of `cast`, `isinstance`;
- decorators (`dataclass`, `lru_cache` and its size), imports and docstrings.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import libcst as cst
import libcst.matchers as m
from libcst.metadata import ByteSpanPositionProvider, MetadataWrapper, ParentNodeProvider
from mutmut.mutation.mutators import (
    operator_arg_removal,
    operator_assignment,
    operator_augmented_assignment,
    operator_if_exp,
    operator_keywords,
    operator_lambda,
    operator_match,
    operator_name,
    operator_number,
    operator_remove_unary_ops,
    operator_string,
    operator_swap_op,
    operator_symmetric_string_methods_swap,
    operator_unsymmetrical_string_methods_swap,
)

_TYPES = ("Callable", "Literal", "TypeVar", "ParamSpec", "Annotated", "Union", "Optional")
_UNTOUCHED_CALLS = ("len", "isinstance", "TypeVar", "ParamSpec")


@dataclass(frozen=True, slots=True)
class MutantId:
    """Names a mutant by what it changes, so that edits elsewhere in the module leave the name as it is."""

    module: str
    """The file, below the package."""
    where: str
    """The function or class, with those around it; empty at the top of the module."""
    old: str
    """The changed lines, white space collapsed."""
    new: str
    nth: int = 1
    """Which of several that are alike in all of this."""


@dataclass(frozen=True, slots=True)
class Mutant:
    id: MutantId
    line: int
    text: str
    """The whole module with the mistake."""
    in_function: bool
    """Whether only the body of the function `where` differs; otherwise the module has to be imported anew."""


def mutants_of(module: str, source: str) -> list[Mutant]:
    """Every mutant of a module, in the order of its lines."""
    wrapper = MetadataWrapper(cst.parse_module(source))
    collector = _Collector(wrapper.module)
    wrapper.visit(collector)
    seen = {ast.dump(ast.parse(source))}
    times: Counter[MutantId] = Counter()
    found: list[Mutant] = []
    for where, in_function, start, text, shape in sorted(collector.found, key=lambda one: one[2]):
        if shape in seen:
            continue
        seen.add(shape)
        old, new = _changed_lines(source, text)
        id = MutantId(module, where, old, new)
        times[id] += 1
        line = source.encode()[:start].count(b"\n") + 1
        found.append(Mutant(replace(id, nth=times[id]), line, text, in_function))
    return found


def _changed_lines(source: str, text: str) -> tuple[str, str]:
    old, new = _lines(source), _lines(text)
    while old and new and old[0] == new[0]:
        del old[0], new[0]
    while old and new and old[-1] == new[-1]:
        del old[-1], new[-1]
    return " ".join(old), " ".join(new)


def _lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


# Operators ---------------------------------------------------------------------------------------------------


def _conditions(node: cst.If | cst.CompIf) -> Iterator[cst.BaseExpression]:
    """`if x` becomes `if True` and `if False`."""
    for value in ("True", "False"):
        if not m.matches(node.test, m.Name(value)):
            yield cst.Name(value)


def _operands(node: cst.BooleanOperation) -> Iterator[cst.BaseExpression]:
    """`a and b` becomes `a` and `b`."""
    yield node.left.with_changes(lpar=[*node.lpar, *node.left.lpar], rpar=[*node.left.rpar, *node.rpar])
    yield node.right.with_changes(lpar=[*node.lpar, *node.right.lpar], rpar=[*node.right.rpar, *node.rpar])


def _fewer_errors(node: cst.Tuple) -> Iterator[cst.Tuple]:
    """`except (A, B)` becomes `except (B,)` and `except (A,)`."""
    for left_out in range(len(node.elements)):
        rest = [e.with_changes(comma=cst.Comma()) for i, e in enumerate(node.elements) if i != left_out]
        yield node.with_changes(elements=rest)


def _other_string(node: cst.SimpleString) -> Iterable[cst.BaseString]:
    """`"a"` becomes `"XXaXX"`; mutmut's other cases of the same letters say nothing more."""
    return list(operator_string(node))[:1]


def _other_template(node: cst.FormattedString) -> Iterator[cst.FormattedString]:
    """`f"a{b}"` becomes `f"XXa{b}"`."""
    yield node.with_changes(parts=[cst.FormattedStringText("XX"), *node.parts])


def _arguments(node: cst.Call) -> Iterator[cst.Call]:
    """Each argument becomes None, but not those that are text for people.

    mutmut leaves out each as well, which mostly is a TypeError that any test finds.
    """
    for mutant in operator_arg_removal(node):
        if len(mutant.args) == len(node.args):
            (changed,) = (old for old, new in zip(node.args, mutant.args, strict=True) if old is not new)
            if not _is_text_argument(changed):
                yield mutant


def _is_text(node: cst.CSTNode) -> bool:
    """Whether an expression is a text for people."""
    if isinstance(node, cst.SimpleString):
        return " " in node.value or node.value.startswith(('"""', "'''"))
    if isinstance(node, cst.FormattedString):
        return any(isinstance(part, cst.FormattedStringText) and " " in part.value for part in node.parts)
    if isinstance(node, cst.ConcatenatedString):
        return _is_text(node.left) or _is_text(node.right)
    if isinstance(node, cst.IfExp):
        return _is_text(node.body) and _is_text(node.orelse)
    if isinstance(node, cst.BinaryOperation):
        return _is_text(node.left) or _is_text(node.right)
    return m.matches(node, m.Name("message") | m.Subscript(value=m.Name("message")))


def _is_text_argument(arg: cst.Arg) -> bool:
    return _is_text(arg.value) or (arg.keyword is not None and arg.keyword.value == "message")


class _Collector(cst.CSTVisitor):
    """Visits a module and collects (where, in_function, position, text of the mutated module, its syntax tree)."""

    METADATA_DEPENDENCIES = (ByteSpanPositionProvider, ParentNodeProvider)

    def __init__(self, module: cst.Module) -> None:
        super().__init__()
        self.found: list[tuple[str, bool, int, str, str]] = []
        self._module = module
        self._source = module.code.encode()
        self._names: list[str] = []
        self._functions = 0

    # --- where ---

    def visit_ClassDef(self, node: cst.ClassDef) -> bool:
        if not self._functions:
            self._names.append(node.name.value)
        node.body.visit(self)
        if not self._functions:
            self._names.pop()
        return False

    def visit_FunctionDef(self, node: cst.FunctionDef) -> bool:
        if not self._functions:
            self._names.append(node.name.value)
        node.params.visit(self)  # defaults: evaluated when the module is imported
        self._functions += 1
        node.body.visit(self)
        self._functions -= 1
        if not self._functions:
            self._names.pop()
        return False

    # --- what is left out ---

    def visit_Annotation(self, node: cst.Annotation) -> bool:
        return False

    def visit_Import(self, node: cst.Import) -> bool:
        return False

    def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:
        return False

    def visit_Call(self, node: cst.Call) -> bool:
        if m.matches(node.func, m.Attribute(value=m.Name("log"))):
            return False
        if m.matches(node.func, m.Name("cast")):
            node.args[1].visit(self)
            return False
        if m.matches(node.func, m.OneOf(*(m.Name(name) for name in _UNTOUCHED_CALLS))):
            return False
        self._add(node, _arguments(node))
        self._add(node, operator_symmetric_string_methods_swap(node))
        self._add(node, operator_unsymmetrical_string_methods_swap(node))
        return True

    def visit_Arg(self, node: cst.Arg) -> bool:
        return not _is_text_argument(node)

    def visit_SimpleString(self, node: cst.SimpleString) -> bool:
        if not _is_text(node):
            self._add(node, _other_string(node))
        return False

    def visit_FormattedString(self, node: cst.FormattedString) -> bool:
        if _is_text(node):
            return False
        self._add(node, _other_template(node))
        return True

    def visit_ConcatenatedString(self, node: cst.ConcatenatedString) -> bool:
        return False

    def visit_Assign(self, node: cst.Assign) -> bool:
        if _is_text(node.value) or m.matches(node.targets[0].target, m.Name("message") | m.Name("log")):
            return False
        return self._assigned(node, node.value)

    def visit_AnnAssign(self, node: cst.AnnAssign) -> bool:
        return node.value is not None and self._assigned(node, node.value)

    def _assigned(self, node: cst.Assign | cst.AnnAssign, value: cst.BaseExpression) -> bool:
        names = m.OneOf(*(m.Name(name) for name in _TYPES))
        if m.matches(value, m.Subscript(value=names) | m.Call(func=names)):
            return False
        self._add(node, operator_assignment(node))
        return True

    # --- what is mutated ---

    def visit_If(self, node: cst.If) -> None:
        self._add(node.test, _conditions(node))

    def visit_CompIf(self, node: cst.CompIf) -> None:
        self._add(node.test, _conditions(node))

    def visit_IfExp(self, node: cst.IfExp) -> None:
        self._add(node, operator_if_exp(node))

    def visit_BooleanOperation(self, node: cst.BooleanOperation) -> None:
        self._add(node, operator_swap_op(node))
        self._add(node, _operands(node))

    def visit_BinaryOperation(self, node: cst.BinaryOperation) -> bool:
        self._add(node, operator_swap_op(node))
        return True

    def visit_UnaryOperation(self, node: cst.UnaryOperation) -> None:
        self._add(node, operator_remove_unary_ops(node))
        self._add(node, operator_swap_op(node))

    def visit_ComparisonTarget(self, node: cst.ComparisonTarget) -> None:
        self._add(node, operator_swap_op(node))
        for changed in operator_keywords(node.operator):
            self._add(node, [node.with_changes(operator=changed)])

    def visit_AugAssign(self, node: cst.AugAssign) -> None:
        self._add(node, operator_swap_op(node))
        self._add(node, operator_augmented_assignment(node))

    def visit_ExceptHandler(self, node: cst.ExceptHandler) -> None:
        if isinstance(node.type, cst.Tuple):
            self._add(node.type, _fewer_errors(node.type))

    def visit_Expr(self, node: cst.Expr) -> bool:
        """A call whose result nobody takes becomes `pass`: `_check_signature(...)` is gone."""
        called = node.value.expression if isinstance(node.value, cst.Await) else node.value
        if isinstance(called, cst.Call) and not m.matches(called.func, m.Attribute(value=m.Name("log"))):
            self._add(node, [cst.Pass()])
        return not isinstance(node.value, cst.BaseString)

    def visit_Break(self, node: cst.Break) -> None:
        self._add(node, operator_keywords(node))

    def visit_Continue(self, node: cst.Continue) -> None:
        self._add(node, operator_keywords(node))

    def visit_Match(self, node: cst.Match) -> None:
        self._add(node, operator_match(node))

    def visit_Lambda(self, node: cst.Lambda) -> None:
        self._add(node, operator_lambda(node))

    def visit_Name(self, node: cst.Name) -> None:
        self._add(node, operator_name(node))

    def visit_Integer(self, node: cst.Integer) -> None:
        self._add(node, operator_number(node))

    def visit_Float(self, node: cst.Float) -> None:
        self._add(node, operator_number(node))

    def _add(self, node: cst.CSTNode, changed: Iterable[cst.CSTNode]) -> None:
        span = self.get_metadata(ByteSpanPositionProvider, node)
        for new in changed:
            if isinstance(node, cst.Match):
                text = self._module.deep_replace(node, new).code  # type: ignore[attr-defined]
            else:
                rendered = self._module.code_for_node(new).encode()
                if not isinstance(node, cst.ComparisonTarget):  # whose place includes the space before it
                    rendered = rendered.strip()
                before, after = self._source[: span.start], self._source[span.start + span.length :]
                text = (before + b" " * _needs_space(before) + rendered + after).decode()
            try:
                tree = ast.parse(text)
            except SyntaxError:
                text = self._module.deep_replace(node, new).code  # type: ignore[attr-defined]
                tree = ast.parse(text)
            place = ".".join(self._names), bool(self._functions), span.start
            self.found.append((*place, text, ast.dump(tree)))


def _needs_space(before: bytes) -> bool:
    return before[-1:].isalnum()
