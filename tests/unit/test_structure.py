"""The measurements of tools/structure.py, on a small repository."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tools.structure import (
    Structure,
    UnknownTreeError,
    named_by_participle,
    read_tree,
    report,
    strongly_connected,
)

FILES = {
    "services/shop/__init__.py": '"""A shop."""\n',
    "services/shop/stock.py": '\n'.join((
        '"""What is there."""', "LIMIT = 3", '"""The most."""',
        "class Item:", '    """Where it lies."""', "    shelf: int = 0", '    """The shelf."""',
        "    def __init__(self) -> None: ...", "    def move(self) -> None: ...", "    def _lift(self) -> None: ...",
        "def _said() -> None: ...", "",
    )),
    # A cycle of three: plainly, in a function, and for the type checker alone.
    "services/shop/orders/__init__.py": "",
    "services/shop/orders/taking.py": "from shop.orders import bill\nclass Item: ...\ndef _said(): ...\n",
    "services/shop/orders/bill.py": "def total():\n    from ..orders.tax import rate\ndef _said(): ...\n",
    "services/shop/orders/tax.py": "if TYPE_CHECKING:\n    import shop.orders.taking\nrate = 7\ndef _said(): ...\n",
    # No cycle of modules, but one of packages: till imports orders.tax, and orders.slip imports till.
    "services/shop/till.py": "import json\nfrom shop.orders.tax import rate\n",
    "services/shop/orders/slip.py": "import shop.till\n",
    "tests/unit/test_stock.py": "",
    "tests/conftest.py": "",
    "tests/helper.py": "",
    "tests/support/__init__.py": "",
    "tests/support/clock.py": "",
}  # fmt: skip


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """`FILES`, committed."""
    git(tmp_path, "init", "--quiet")
    for path, text in FILES.items():
        write(tmp_path / path, text)
    commit(tmp_path)
    return tmp_path


def git(root: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=test", "-c", "user.email=test@test.example", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True)


def commit(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "test")


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_counts_of_sizes_names_and_docstrings(repository: Path):
    shop = Structure(read_tree(repository))
    rows = dict(shop.rows())
    assert rows["product files"] == "8"
    assert rows["product lines"] == str(sum(FILES[m.path].count("\n") for m in shop.modules))
    assert rows["lines per file: max"] == str(FILES["services/shop/stock.py"].count("\n"))
    assert rows["files under 50 lines"] == "8"
    assert rows["files over 500 lines"] == "0"
    assert shop.folders == {"services/shop": 3, "services/shop/orders": 5}
    assert shop.public_names == {"Item", "move", "total"}
    assert sorted(shop.functions) == ["_lift", "_said", "_said", "_said", "_said", "move", "total"]
    assert rows["share of private functions"] == "71%"
    assert shop.shared_class_names == {"Item": ["shop.orders.taking", "shop.stock"]}
    assert list(shop.shared_helpers) == ["_said"]
    assert shop.participle_modules == ["shop.orders.taking"]
    assert shop.attribute_docstrings == 2
    assert [shop.docstrings_beginning(word) for word in ("What", "Where", "The", "A")] == [1, 1, 2, 1]
    assert shop.stray_test_helpers == ["tests/helper.py"]


def test_a_helper_in_three_modules_is_not_listed(repository: Path):
    write(repository / "services/shop/stock.py", "")
    assert Structure(read_tree(repository)).shared_helpers == {}


def test_import_cycles_count_imports_in_functions_and_for_the_type_checker(repository: Path):
    shop = Structure(read_tree(repository))
    ring = ["shop.orders.bill", "shop.orders.taking", "shop.orders.tax"]
    assert shop.module_cycles == [ring]
    assert shop.package_cycles == [["shop.orders", "shop.till"], ring]
    write(repository / "services/shop/orders/bill.py", "")
    write(repository / "services/shop/orders/slip.py", "")
    opened = Structure(read_tree(repository))
    assert (opened.module_cycles, opened.package_cycles) == ([], [])


def test_a_name_imported_from_a_package_that_imports_the_importer_is_a_cycle():
    shop = Structure({
        "services/shop/__init__.py": "from shop.stock import Item\n",
        "services/shop/stock.py": "from shop import Item\n",
    })  # fmt: skip
    assert shop.module_cycles == [["shop", "shop.stock"]]


def test_folders_over_the_limit_are_crowded_except_the_commands():
    folders = {"services/shop": 26, "services/till": 25, "services/ringfence/cli/commands": 26}
    shop = Structure({f"{name}/m{n}.py": "" for name, count in folders.items() for n in range(count)})
    assert shop.crowded == {"services/shop": 26}
    assert len(shop.folders) == 3


def test_a_commit_is_read_without_a_checkout_and_stands_beside_the_working_tree(repository: Path):
    write(repository / "services/shop/new.py", "x = 1\n")
    (repository / "services/shop/till.py").unlink()
    write(repository / ".gitignore", "ignored.py\n")
    write(repository / "services/shop/ignored.py", "x = 1\n")
    before, after = read_tree(repository, "HEAD"), read_tree(repository)
    assert before == FILES
    assert set(before) - set(after) == {"services/shop/till.py"}
    assert set(after) - set(before) == {"services/shop/new.py"}
    table = report({"HEAD": Structure(before), "working tree": Structure(after)}).splitlines()
    assert table[0].split() == ["HEAD", "working", "tree"]
    cycles = next(line for line in table if line.startswith("import cycles between siblings"))
    assert cycles.split()[-2:] == ["2", "1"]
    assert "HEAD: test helper files outside tests/support" in table


def test_an_unknown_commit_is_an_error_with_git_s_reason(repository: Path):
    with pytest.raises(UnknownTreeError, match="nowhere"):
        read_tree(repository, "nowhere")


@pytest.mark.parametrize(
    ("graph", "components"),
    [
        ({"a": ["b"], "b": ["c"], "c": []}, []),
        ({"a": ["b"], "b": ["a"], "c": ["a", "d"], "d": ["c"]}, [["a", "b"], ["c", "d"]]),
        ({"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": ["b"], "e": ["e"]}, [["b", "d"]]),
        # Longer than Python's recursion limit.
        ({str(n): [str((n + 1) % 5000)] for n in range(5000)}, [sorted(map(str, range(5000)))]),
    ],
)
def test_strongly_connected_components(graph: dict[str, list[str]], components: list[list[str]]):
    assert strongly_connected(graph) == components


@pytest.mark.parametrize(
    "name", ["watching", "issued", "said", "handed_over", "audit_verifying", "pushing_back"]
)
def test_names_that_are_participles(name: str):
    assert named_by_participle(name)


@pytest.mark.parametrize(
    "name", ["tracing", "load_shedding", "malformed_topics", "ring", "settings", "seed", "lease", "__init__"]
)
def test_names_that_are_nouns(name: str):
    assert not named_by_participle(name)
