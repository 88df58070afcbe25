"""Measure the structure of the code: sizes, names, docstrings, import cycles, test helpers.

    python -m tools.structure              # the working tree
    python -m tools.structure HEAD~20 .     # a git ref beside the working tree

Prints a table with one column per tree, and below it what each count is made of. Reads git refs without a checkout.
Product code is everything under `services/`; figures of the table are about it, except the last row.
"""

from __future__ import annotations

import argparse
import ast
import io
import math
import subprocess
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PurePosixPath
from statistics import mean, median

WORKING_TREE = "."
SOURCES = "services/"
TESTS = "tests/"
SMALL_LINES = 50
LARGE_LINES = 500
FOLDER_FILES = 25
"""A folder with more files than this is listed, and counted as crowded unless it is in `FLAT_FOLDERS`."""
FLAT_FOLDERS = frozenset({"services/ringfence/cli/commands"})
LARGEST_FOLDERS = 10
HELPER_MODULES = 4
"""A private function's name defined in this many modules is listed: it hardly means the same in all of them."""
DOCSTRING_STARTS = ("What", "Where", "The")

PARTICIPLES = frozenset(
    ("begun", "come", "done", "drawn", "found", "given", "gone", "heard", "held", "kept", "known", "left", "lost",
     "made", "said", "seen", "sent", "told", "written")
)  # fmt: skip
"""The irregular ones. Regular ones end in -ing or -ed."""
PARTICLES = frozenset(("back", "by", "off", "on", "out", "over", "up"))
"""A name such as `handed_over` is judged by the word before these."""
FIELD_TERMS = frozenset(
    ("fencing", "finding", "load_shedding", "logging", "partitioning", "provisioning", "string", "tracing")
)
"""Names in -ing that are nouns of the field."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class UnknownTreeError(Exception):
    """git has no such ref, or the folder is no git repository. Carries git's own message."""


def read_tree(root: Path, ref: str = WORKING_TREE) -> dict[str, str]:
    """The Python files under services/ and tests/, as text by their paths.

    `ref` is whatever git takes for a commit, or `WORKING_TREE`: files of the work tree that git does not ignore.
    Raises UnknownTreeError.
    """
    if ref == WORKING_TREE:
        listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
        paths = sorted(set(filter(_measured, listed.decode().split("\0"))))
        return {path: (root / path).read_text() for path in paths if (root / path).is_file()}
    archive = _git(root, "archive", "--format=tar", ref)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        files = {one.name: tar.extractfile(one) for one in tar if one.isfile() and _measured(one.name)}
        return {path: file.read().decode() for path, file in files.items() if file}


def _measured(path: str) -> bool:
    return path.endswith(".py") and path.startswith((SOURCES, TESTS))


def _git(root: Path, *arguments: str) -> bytes:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True)
    if done.returncode:
        raise UnknownTreeError(done.stderr.decode().strip())
    return done.stdout


@dataclass(frozen=True)
class Module:
    """One parsed file of the product."""

    path: str
    text: str

    @cached_property
    def name(self) -> str:
        """Dotted, as it is imported: `services/ringfence/kernel/crypto/jws.py` is `ringfence.kernel.crypto.jws`."""
        parts = PurePosixPath(self.path.removeprefix(SOURCES)).with_suffix("").parts
        return ".".join(parts[:-1] if self.is_package else parts)

    @property
    def is_package(self) -> bool:
        return self.path.endswith("/__init__.py")

    @property
    def folder(self) -> str:
        return str(PurePosixPath(self.path).parent)

    @cached_property
    def lines(self) -> int:
        return len(self.text.splitlines())

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @cached_property
    def definitions(self) -> list[Definition]:
        """Every function, method and class, nested ones too."""
        return [node for node in ast.walk(self.tree) if isinstance(node, Definition)]

    @cached_property
    def docstrings(self) -> list[str]:
        """Of the module, its classes and functions; not of attributes."""
        found = (ast.get_docstring(node) for node in (self.tree, *self.definitions))
        return [text for text in found if text]

    @cached_property
    def attribute_docstrings(self) -> list[str]:
        """Strings that stand below an assignment in a module or class."""
        bodies = [self.tree.body, *(one.body for one in self.definitions if isinstance(one, ast.ClassDef))]
        return [
            text
            for body in bodies
            for before, node in pairwise(body)
            if isinstance(before, ast.Assign | ast.AnnAssign) and (text := _string(node)) is not None
        ]

    def imported(self, known: frozenset[str]) -> set[str]:
        """The modules of `known` that this one imports: anywhere in the file, also for the type checker alone."""
        found = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {_nearest(alias.name, known) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = self._base(node)
                found |= {_nearest(f"{base}.{alias.name}", known) for alias in node.names}
        return {name for name in found if name} - {self.name}

    def _base(self, node: ast.ImportFrom) -> str:
        """The absolute name of what `from X import ...` names by X."""
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        up = node.level - self.is_package
        return ".".join([*parts[: len(parts) - up], *filter(None, [node.module])])


def _string(node: ast.stmt) -> str | None:
    value = node.value if isinstance(node, ast.Expr) else None
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def _nearest(name: str, known: frozenset[str]) -> str:
    """`name` if it is a module, else the longest prefix that is one; empty for a module of others."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def strongly_connected(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """The components with more than one node, each sorted. Tarjan's algorithm (SIAM Journal on Computing 1, 1972).

    Works without recursion: import chains may be longer than Python's stack.
    """
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    on_stack: set[str] = set()
    found: list[list[str]] = []

    def enter(node: str) -> tuple[str, Iterator[str]]:
        index[node] = lowest[node] = len(index)
        stack.append(node)
        on_stack.add(node)
        return node, iter(sorted(graph.get(node, ())))

    for start in sorted(graph):
        path = [enter(start)] if start not in index else []
        while path:
            node, rest = path[-1]
            for successor in rest:
                if successor not in index:
                    path.append(enter(successor))
                    break
                if successor in on_stack:
                    lowest[node] = min(lowest[node], index[successor])
            else:
                path.pop()
                if path:
                    parent = path[-1][0]
                    lowest[parent] = min(lowest[parent], lowest[node])
                if lowest[node] == index[node]:
                    at = stack.index(node)
                    component = stack[at:]
                    del stack[at:]
                    on_stack.difference_update(component)
                    if len(component) > 1:
                        found.append(sorted(component))
    return sorted(found)


def named_by_participle(stem: str) -> bool:
    """Whether a module's name ends in a gerund or participle: `watching`, `now_asked`, `handed_over`."""
    if stem in FIELD_TERMS:
        return False
    words = stem.split("_")
    while len(words) > 1 and words[-1] in PARTICLES:
        words.pop()
    last = words[-1]
    if last in FIELD_TERMS:
        return False
    return last in PARTICIPLES or (len(last) > 4 and last.endswith(("ing", "ed")))


class Structure:
    """What is measured of one tree. `files` maps paths to texts, as `read_tree` returns them."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self.modules = [
            Module(path, text) for path, text in sorted(files.items()) if path.startswith(SOURCES)
        ]
        self._test_files = sorted(path for path in files if path.startswith(TESTS))

    # --- sizes ---

    @cached_property
    def sizes(self) -> list[int]:
        """Lines of each file."""
        return sorted(module.lines for module in self.modules)

    @cached_property
    def folders(self) -> Counter[str]:
        """Files of each folder, `__init__.py` included, subfolders not."""
        return Counter(module.folder for module in self.modules)

    @property
    def crowded(self) -> dict[str, int]:
        """Folders with more than `FOLDER_FILES` files, except `FLAT_FOLDERS`."""
        return {
            folder: count
            for folder, count in self.folders.most_common()
            if count > FOLDER_FILES and folder not in FLAT_FOLDERS
        }

    # --- names ---

    @cached_property
    def public_names(self) -> set[str]:
        """Distinct names of functions, methods and classes without a leading underscore."""
        return {one.name for module in self.modules for one in module.definitions if one.name[0] != "_"}

    @cached_property
    def functions(self) -> list[str]:
        """Names of all functions and methods, special methods (`__init__`) left out."""
        return [
            one.name
            for module in self.modules
            for one in module.definitions
            if not isinstance(one, ast.ClassDef) and not (one.name[:2] == one.name[-2:] == "__")
        ]

    @property
    def private_share(self) -> float:
        """Which part of the functions has a leading underscore, 0 to 1."""
        return sum(name[0] == "_" for name in self.functions) / max(1, len(self.functions))

    @cached_property
    def shared_class_names(self) -> dict[str, list[str]]:
        """Class names that more than one module defines, with these modules; the most frequent first."""
        return self._defined_in(2, ast.ClassDef)

    @cached_property
    def shared_helpers(self) -> dict[str, list[str]]:
        """Private function names that `HELPER_MODULES` or more modules define at top level, with these modules."""
        found = self._defined_in(HELPER_MODULES, ast.FunctionDef, ast.AsyncFunctionDef)
        return {name: modules for name, modules in found.items() if name[0] == "_" and name[:2] != "__"}

    def _defined_in(self, least: int, *kinds: type[Definition]) -> dict[str, list[str]]:
        where: dict[str, list[str]] = defaultdict(list)
        for module in self.modules:
            for name in sorted({one.name for one in module.tree.body if isinstance(one, kinds)}):
                where[name].append(module.name)
        several = [(name, modules) for name, modules in where.items() if len(modules) >= least]
        return dict(sorted(several, key=lambda one: (-len(one[1]), one[0])))

    @cached_property
    def participle_modules(self) -> list[str]:
        """Modules whose name is a gerund or participle."""
        return [one.name for one in self.modules if named_by_participle(one.name.rpartition(".")[2])]

    # --- docstrings ---

    @property
    def attribute_docstrings(self) -> int:
        return sum(len(module.attribute_docstrings) for module in self.modules)

    def docstrings_beginning(self, word: str) -> int:
        """How many docstrings, those of attributes included, have this first word."""
        return sum(
            text.split(maxsplit=1)[:1] == [word]
            for module in self.modules
            for text in (*module.docstrings, *module.attribute_docstrings)
        )

    # --- imports ---

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """Each module with those that it imports, also within functions and under TYPE_CHECKING."""
        known = frozenset(module.name for module in self.modules)
        return {module.name: module.imported(known) for module in self.modules}

    @cached_property
    def module_cycles(self) -> list[list[str]]:
        """Sets of modules that import each other, directly or through others of the set."""
        return strongly_connected(self.imports)

    @cached_property
    def package_cycles(self) -> list[list[str]]:
        """Sets of siblings in a package (modules, or subpackages with all that is in them) that import each other."""
        graphs: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for importer, targets in self.imports.items():
            for imported in targets:
                ours, theirs = importer.split("."), imported.split(".")
                depth = 0
                while depth < min(len(ours), len(theirs)) and ours[depth] == theirs[depth]:
                    depth += 1
                if depth < min(len(ours), len(theirs)):
                    sibling, other = (".".join(one[: depth + 1]) for one in (ours, theirs))
                    graphs[".".join(ours[:depth])][sibling].add(other)
        return sorted(cycle for graph in graphs.values() for cycle in strongly_connected(graph))

    # --- tests ---

    @cached_property
    def stray_test_helpers(self) -> list[str]:
        """Files of tests/ that hold no tests and stand outside tests/support; conftest.py has to."""
        return [
            path
            for path in self._test_files
            if not path.startswith(f"{TESTS}support/")
            and not (name := PurePosixPath(path).name).startswith("test_")
            and name not in ("conftest.py", "__init__.py")
        ]

    # --- what is printed ---

    def rows(self) -> Iterator[tuple[str, str]]:
        """The rows of the table: a label, the same for every tree, and the value."""
        sizes = self.sizes or [0]
        lines = sum(sizes)
        yield "product files", f"{len(self.modules):,}"
        yield "product lines", f"{lines:,}"
        yield "lines per file: mean", f"{mean(sizes):.0f}"
        yield "lines per file: median", f"{median(sizes):.0f}"
        yield "lines per file: p90", str(sizes[math.ceil(0.9 * len(sizes)) - 1])
        yield "lines per file: max", str(sizes[-1])
        yield f"files under {SMALL_LINES} lines", str(sum(size < SMALL_LINES for size in sizes))
        yield f"files over {LARGE_LINES} lines", str(sum(size > LARGE_LINES for size in sizes))
        yield "folders", str(len(self.folders))
        yield f"folders over {FOLDER_FILES} files (but cli/commands)", str(len(self.crowded))
        yield "public names (functions, classes)", f"{len(self.public_names):,}"
        yield "public names per 1,000 lines", f"{1000 * len(self.public_names) / max(1, lines):.1f}"
        yield "share of private functions", f"{self.private_share:.0%}"
        yield "class names in several modules", str(len(self.shared_class_names))
        yield f"private helper names in {HELPER_MODULES}+ modules", str(len(self.shared_helpers))
        yield "modules named by a gerund or participle", str(len(self.participle_modules))
        yield "attribute docstrings", f"{self.attribute_docstrings:,}"
        for word in DOCSTRING_STARTS:
            yield f'docstrings beginning with "{word}"', f"{self.docstrings_beginning(word):,}"
        yield "import cycles between modules", str(len(self.module_cycles))
        yield "import cycles between siblings of a package", str(len(self.package_cycles))
        yield "test helper files outside tests/support", str(len(self.stray_test_helpers))

    def lists(self) -> Iterator[tuple[str, list[str]]]:
        """What the counts are made of: a heading, and its entries. Empty ones are left out."""
        largest = self.folders.most_common(LARGEST_FOLDERS)
        folders = dict(largest) | {name: n for name, n in self.folders.items() if n > FOLDER_FILES}
        found = {
            "files per folder, the largest": [f"{n:4} {name}" for name, n in folders.items()],
            "class names in several modules": _with_modules(self.shared_class_names),
            f"private helper names in {HELPER_MODULES} or more modules": _with_modules(self.shared_helpers),
            "modules named by a gerund or participle": self.participle_modules,
            "import cycles between modules": [" <-> ".join(one) for one in self.module_cycles],
            "import cycles between siblings of a package": [" <-> ".join(one) for one in self.package_cycles],
            "test helper files outside tests/support": self.stray_test_helpers,
        }
        return ((heading, entries) for heading, entries in found.items() if entries)


def _with_modules(names: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{name} x{len(modules)}: {', '.join(modules)}" for name, modules in names.items()]


def report(trees: Mapping[str, Structure], *, lists: bool = True) -> str:
    """The table, with a column for each of `trees` by its name, and their lists unless `lists` is false."""
    columns = {name: dict(tree.rows()) for name, tree in trees.items()}
    labels = list(next(iter(columns.values())))
    first = max(map(len, labels))
    widths = {name: max(len(name), *map(len, column.values())) for name, column in columns.items()}
    lines = ["  ".join([" " * first, *(name.rjust(widths[name]) for name in columns)])]
    for label in labels:
        values = (column[label].rjust(widths[name]) for name, column in columns.items())
        lines.append("  ".join([label.ljust(first), *values]))
    for name, tree in trees.items() if lists else ():
        for heading, entries in tree.lists():
            lines += ["", f"{name}: {heading}", *(f"  {entry}" for entry in entries)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report on the refs named in `arguments`. Returns the exit status: 2 for an unknown ref."""
    parser = argparse.ArgumentParser(prog="python -m tools.structure", description=__doc__.splitlines()[0])
    parser.add_argument("refs", nargs="*", metavar="REF", help="a git commit, or . for the working tree")
    parser.add_argument("--table", action="store_true", help="the table alone, without the lists")
    options = parser.parse_args(arguments)
    root = Path(__file__).parents[1]
    refs = options.refs or [WORKING_TREE]
    try:
        trees = {_title(ref): Structure(read_tree(root, ref)) for ref in refs}
    except UnknownTreeError as error:
        parser.exit(2, f"{error}\n")
    print(report(trees, lists=not options.table))
    return 0


def _title(ref: str) -> str:
    return "working tree" if ref == WORKING_TREE else ref


if __name__ == "__main__":
    raise SystemExit(main())
