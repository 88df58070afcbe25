"""Data-flow analysis over a package's source: which strings can end up in a named field.

A code such as `unknown_agent` is written where something is refused. It reaches `Reason.code`, or the `code` of an
exception, by way of helper functions, tuples, tables and constants. `DataFlow` starts at the fields and follows values
back to the strings. It needs neither the names of modules nor those of helpers: no rename changes what it finds.

It does not follow values from outside the package, and strings that are put together other than by an f-string.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

WILDCARD = "*"
"""Stands for what is put into a string when the program runs (`agent_{status}` is found as `agent_*`)."""

_MAX_STEPS = 8
"""A value is followed back through so many expressions within one function."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Parameter:
    """A parameter of a function, or a field of a class that its constructor takes."""

    definition: Definition
    name: str


@dataclass(frozen=True)
class Place:
    """An expression, its module, and the functions around it, the innermost last."""

    module: Module
    functions: tuple[Function, ...]
    expression: ast.expr

    def at(self, expression: ast.expr) -> Place:
        """Another expression of the same functions."""
        return Place(self.module, self.functions, expression)


@dataclass(eq=False)
class Module:
    """What one file defines, calls and writes."""

    definitions: dict[str, Definition] = field(default_factory=dict)
    """Of its top level, by name."""
    constants: dict[str, list[ast.expr]] = field(default_factory=lambda: defaultdict(list))
    """What is assigned at its top level, by name."""
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)
    """By the local name: the module, and the name in it."""
    around: dict[Definition, tuple[Function, ...]] = field(default_factory=dict)
    """Every definition, and the functions that it stands in."""
    calls: list[Place] = field(default_factory=list)
    strings: list[ast.Constant] = field(default_factory=list)
    written: list[tuple[str, Place]] = field(default_factory=list)
    """What is written to keys of dictionaries, attributes and class attributes, by their names."""


class _Reader(ast.NodeVisitor):
    """Fills a `Module`."""

    def __init__(self) -> None:
        self.module = Module()
        self._functions: tuple[Function, ...] = ()
        self._depth = 0

    def _place(self, expression: ast.expr) -> Place:
        return Place(self.module, self._functions, expression)

    def visit(self, node: ast.AST) -> None:
        """Read one node, and all in it."""
        match node:
            case ast.ImportFrom(module=str() as module):
                self.module.imported |= {one.asname or one.name: (module, one.name) for one in node.names}
            case ast.Assign() | ast.AnnAssign():
                self._assignment(node)
            case ast.Dict():
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(key.value, str):
                        self.module.written.append((key.value, self._place(value)))
            case ast.Call():
                self.module.calls.append(self._place(node))
            case ast.Constant(value=str()):
                self.module.strings.append(node)
            case _:
                pass
        if isinstance(node, Definition):
            self._definition(node)
        else:
            self.generic_visit(node)

    def _definition(self, node: Definition) -> None:
        self.module.around[node] = self._functions
        if self._depth == 0:
            self.module.definitions[node.name] = node
        before = self._functions
        if isinstance(node, Function):
            self._functions = (*before, node)
        else:
            for statement in node.body:
                self.module.written += [(name, self._place(value)) for name, value in _assigned(statement)]
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1
        self._functions = before

    def _assignment(self, node: ast.Assign | ast.AnnAssign) -> None:
        if self._depth == 0:
            for name, value in _assigned(node):
                self.module.constants[name].append(value)
        for target in node.targets if isinstance(node, ast.Assign) else (node.target,):
            if isinstance(target, ast.Attribute) and node.value is not None:
                self.module.written.append((target.attr, self._place(node.value)))


def _assigned(node: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    """Names and what they are bound to."""
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        yield from _bound(node.target, node.value)
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            yield from _bound(target, node.value)


def _bound(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """The same for one target; a tuple is bound element by element."""
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple):
        for index, part in enumerate(target.elts):
            yield from _bound(part, _element(value, index))


def _element(value: ast.expr, index: int | None = None) -> ast.expr:
    """One element of a value, or with None any of them."""
    return ast.Subscript(value, ast.Slice() if index is None else ast.Constant(index), ast.Load())


class DataFlow:
    """Follows values from fields back to strings, through the calls of all modules of a package."""

    def __init__(self, folder: Path, package: str) -> None:
        """`folder`: the source of the package; `package`: its import name."""
        modules = {}
        for file in sorted(folder.rglob("*.py")):
            parts = (package, *file.relative_to(folder).with_suffix("").parts)
            reader = _Reader()
            reader.visit(ast.parse(file.read_text()))
            modules[".".join(parts).removesuffix(".__init__")] = reader.module
        self._modules = modules
        self._home = {one: module for module in modules.values() for one in module.around}
        self._methods: dict[str, list[Function]] = defaultdict(list)
        for definition in self._home:
            if isinstance(definition, ast.ClassDef):
                for one in definition.body:
                    if isinstance(one, Function):
                        self._methods[one.name].append(one)
        self._is_method = {one for found in self._methods.values() for one in found}
        self._inner = {
            (around[-1], one.name): one
            for module in modules.values()
            for one, around in module.around.items()
            if around and one not in self._is_method
        }

    def into(self, fields: Collection[str], owner: str | None = None) -> set[str]:
        """Every string that can end up in a field with one of these names.

        Args:
            fields: names of parameters, class attributes and dictionary keys.
            owner: only fields of the class with this name, as its constructor takes them.

        Returns:
            The strings, with `WILDCARD` for what is formatted into them.
        """
        given: dict[Parameter, list[Place]] = defaultdict(list)
        waiting: list[Place] = []
        for module in self._modules.values():
            if owner is None:
                waiting += [place for name, place in module.written if name in fields]
            for call in module.calls:
                for definition, name, place in self._given(call):
                    if definition is not None:
                        given[Parameter(definition, name)].append(place)
                    of_owner = isinstance(definition, ast.ClassDef) and definition.name == owner
                    if name in fields and (owner is None or of_owner):
                        waiting.append(place)
        found: set[str] = set()
        sinks: set[Parameter] = set()
        while waiting:
            place = waiting.pop()
            for value in self._values(place):
                if isinstance(value, str):
                    found.add(value)
                elif value not in sinks:
                    sinks.add(value)
                    waiting += given.get(value, ())
        return found

    def beginning_with(self, prefix: str) -> set[str]:
        """Every string of the source that begins so; of an f-string what stands before its first value."""
        return {
            node.value
            for module in self._modules.values()
            for node in module.strings
            if isinstance(node.value, str) and node.value.startswith(prefix)
        }

    # --- calls ---

    def _given(self, call: Place) -> Iterator[tuple[Definition | None, str, Place]]:
        """What a call gives to which parameter of which definition; None for one of another package."""
        node = call.expression
        assert isinstance(node, ast.Call)
        for definition in self._called(call, node.func) or (None,):
            names = self._positional(definition) if definition is not None else []
            for index, (name, argument) in enumerate(zip(names, node.args, strict=False)):
                if isinstance(argument, ast.Starred):
                    for inner, rest in enumerate(names[index:]):
                        yield definition, rest, call.at(_element(argument.value, inner))
                    break
                yield definition, name, call.at(argument)
            for keyword in node.keywords:
                if keyword.arg is not None:
                    yield definition, keyword.arg, call.at(keyword.value)

    def _called(self, call: Place, function: ast.expr) -> list[Definition]:
        """What a call may run. Of a method all with its name: nobody knows the types here."""
        match function:
            case ast.Name(id=name):
                found = self._defined(call, name)
                return [found] if found is not None else []
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in call.module.imported:
                module = self._modules.get(".".join(call.module.imported[name]))
                found = module.definitions.get(attribute) if module is not None else None
                return [found] if found is not None else []
            case ast.Attribute(attr=attribute) if not attribute.startswith("__"):
                return [*self._methods.get(attribute, ())]
            case _:
                return []

    def _defined(self, place: Place, name: str) -> Definition | None:
        for function in reversed(place.functions):
            if (found := self._inner.get((function, name))) is not None:
                return found
        return self._of_module(place.module, name)

    def _of_module(self, module: Module, name: str) -> Definition | None:
        if name in module.definitions:
            return module.definitions[name]
        where, original = module.imported.get(name, ("", ""))
        other = self._modules.get(where)
        return self._of_module(other, original) if other is not None and other is not module else None

    def _positional(self, definition: Definition) -> list[str]:
        """The names that positional arguments are bound to."""
        if isinstance(definition, ast.ClassDef):
            return self._fields(definition)
        names = [one.arg for one in (*definition.args.posonlyargs, *definition.args.args)]
        static = any(
            isinstance(one, ast.Name) and one.id == "staticmethod" for one in definition.decorator_list
        )
        return names[1:] if definition in self._is_method and not static else names

    def _fields(self, definition: ast.ClassDef) -> list[str]:
        """What the constructor of a class takes: that of `__init__`, or the fields, inherited ones first."""
        for one in definition.body:
            if isinstance(one, Function) and one.name == "__init__":
                return self._positional(one)
        names: list[str] = []
        for base in definition.bases:
            known = self._of_module(self._home[definition], base.id) if isinstance(base, ast.Name) else None
            if isinstance(known, ast.ClassDef):
                names += self._fields(known)
        for statement in definition.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                names.append(statement.target.id)
        return names

    # --- values: what an expression can be ---

    def _values(self, place: Place, depth: int = 0) -> Iterator[str | Parameter]:
        """The strings that an expression can be, and the parameters that it can come from."""
        if depth > _MAX_STEPS:
            return
        match place.expression:
            case ast.Constant(value=str() as text):
                yield text
            case ast.Subscript(
                value=ast.Call(
                    func=ast.Attribute(attr="partition", value=of),
                    args=[ast.Constant(value=str() as separator)],
                ),
                slice=ast.Constant(value=0),
            ):
                for value in self._values(place.at(of), depth + 1):
                    yield value.partition(separator)[0] if isinstance(value, str) else value
            case ast.JoinedStr(values=parts):
                texts = (str(one.value) if isinstance(one, ast.Constant) else WILDCARD for one in parts)
                yield "".join(texts)
            case ast.Attribute(value=ast.Name(id=name), attr=attribute):
                module = self._modules.get(".".join(place.module.imported.get(name, ())))
                if module is not None:
                    for constant in module.constants.get(attribute, ()):
                        yield from self._values(Place(module, (), constant), depth + 1)
            case _:
                yield from self._parameter(place)
                for other in self._leads_to(place, depth):
                    yield from self._values(other, depth + 1)

    def _leads_to(self, place: Place, depth: int) -> Iterator[Place]:
        """The expressions that an expression can have its value from."""
        node = place.expression
        match node:
            case ast.IfExp():
                yield from (place.at(one) for one in (node.body, node.orelse))
            case ast.BoolOp():
                yield from (place.at(one) for one in node.values)
            case ast.NamedExpr() | ast.Await():
                yield place.at(node.value)
            case ast.Name():
                yield from self._bound_to(place, node.id)
            case ast.Subscript():
                index = node.slice.value if isinstance(node.slice, ast.Constant) else None
                yield from self._elements(place.at(node.value), index, depth)
            case ast.Call(func=ast.Attribute(attr="get"), args=[_, *default]):
                assert isinstance(node.func, ast.Attribute)
                yield from self._elements(place.at(node.func.value), None, depth)
                yield from (place.at(one) for one in default)
            case ast.Call():
                for definition in self._called(place, node.func):
                    if isinstance(definition, Function) and self._is_text(definition, definition.returns):
                        home = self._home[definition]
                        around = (*home.around[definition], definition)
                        yield from (Place(home, around, one) for one in _returns(definition))
            case _:
                pass

    def _bound_to(self, place: Place, name: str) -> Iterator[Place]:
        """What is assigned to a name: in the innermost function that does, else in the module."""
        for depth in range(len(place.functions), 0, -1):
            around = place.functions[:depth]
            values = [value for one, value in _assignments(around[-1]) if one == name]
            if values or name in {one.arg for one in _arguments_of(around[-1])}:
                yield from (Place(place.module, around, value) for value in values)
                return
        if name in place.module.constants:
            yield from (Place(place.module, (), value) for value in place.module.constants[name])
        elif name in place.module.imported:
            where, original = place.module.imported[name]
            if (module := self._modules.get(where)) is not None and module is not place.module:
                yield from self._bound_to(Place(module, (), place.expression), original)

    def _elements(self, place: Place, index: object, depth: int) -> Iterator[Place]:
        """The elements of what an expression can be, where that is written out; `index`: None for all of them."""
        if depth > _MAX_STEPS:
            return
        node = place.expression
        match node:
            case ast.Dict():
                pairs = [
                    (key, value) for key, value in zip(node.keys, node.values, strict=True) if key is not None
                ]
                same = [v for k, v in pairs if isinstance(k, ast.Constant) and k.value == index]
                yield from (place.at(one) for one in same or [value for _, value in pairs])
            case ast.Tuple() | ast.List() | ast.Set():
                chosen = node.elts[index : index + 1] if isinstance(index, int) else node.elts
                yield from (place.at(one) for one in chosen)
            case ast.Call(func=ast.Attribute(attr="items", value=of)):
                for holder in (place.at(of), *self._leads_to(place.at(of), depth)):
                    if isinstance(holder.expression, ast.Dict):
                        for key, value in zip(holder.expression.keys, holder.expression.values, strict=True):
                            if key is not None:
                                yield holder.at(ast.Tuple([key, value], ast.Load()))
            case ast.Call(func=ast.Attribute(attr="values", value=of)):
                yield from self._elements(place.at(of), None, depth + 1)
            case ast.Call(
                func=ast.Name(id="frozenset" | "tuple" | "list" | "sorted" | "MappingProxyType"), args=[only]
            ):
                yield from self._elements(place.at(only), index, depth + 1)
            case _:
                for other in self._leads_to(place, depth):
                    yield from self._elements(other, index, depth + 1)

    def _parameter(self, place: Place) -> Iterator[Parameter]:
        """The parameter that a name is, if it is one that can hold a string."""
        if isinstance(place.expression, ast.Name):
            for function in reversed(place.functions):
                for one in _arguments_of(function):
                    if one.arg == place.expression.id:
                        if self._is_text(function, one.annotation):
                            yield Parameter(function, one.arg)
                        return

    def _is_text(self, definition: Definition, annotation: ast.expr | None) -> bool:
        """Whether a string is among what an annotation allows. The annotations keep the search short."""
        for node in ast.walk(annotation) if annotation is not None else ():
            if isinstance(node, ast.Name) and (
                node.id in ("str", "Literal") or self._is_alias(definition, node.id)
            ):
                return True
        return False

    def _is_alias(self, definition: Definition, name: str) -> bool:
        found = self._bound_to(Place(self._home[definition], (), ast.Name(name, ast.Load())), name)
        return any("Literal" in ast.unparse(one.expression) for one in found)


def _arguments_of(function: Function) -> tuple[ast.arg, ...]:
    return (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)


@cache
def _assignments(function: Function) -> tuple[tuple[str, ast.expr], ...]:
    """What names are bound to in a function: by assignments, loops and comprehensions."""
    found: list[tuple[str, ast.expr]] = []
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            found += _assigned(node)
        elif isinstance(node, ast.NamedExpr):
            found.append((node.target.id, node.value))
        elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
            found += _bound(node.target, _element(node.iter))
    return tuple(found)


@cache
def _returns(function: Function) -> tuple[ast.expr, ...]:
    found = [
        n.value for n in ast.walk(function) if isinstance(n, ast.Return | ast.Yield) and n.value is not None
    ]
    return tuple(found)
