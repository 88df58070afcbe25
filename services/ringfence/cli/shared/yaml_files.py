"""Reads YAML files that people write, and reports all their errors at once, each with its line."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.text import Lines
from ringfence.messages.codes import Code
from ringfence.model.unknown_fields import nearest

MAX_BYTES = 16 * 1024 * 1024


class YamlFileError(RingfenceError):
    """A YAML file is invalid. The message lists all errors, one a line."""

    code = Code.FILE_INVALID


class YamlFile:
    """One YAML file: converts nodes to values and collects problems. `finish` raises them."""

    def __init__(self, path: Path) -> None:
        """Raises YamlFileError if the file cannot be read, or is no YAML."""
        self._path = path
        self._problems: list[tuple[int, str]] = []
        try:
            if path.stat().st_size > MAX_BYTES:
                raise YamlFileError(f"{path} is larger than {MAX_BYTES} bytes")
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise YamlFileError(f"cannot read {path}: {error}") from None
        self._refuse_aliases(text)
        try:
            self.root: Any = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"line {mark.line + 1}: " if mark else ""
            raise YamlFileError(f"{path} is no YAML: {where}{getattr(error, 'problem', error)}") from None
        except RecursionError:
            raise YamlFileError(f"{path} is nested too deeply") from None
        if self.root is None:
            raise YamlFileError(f"{path} is empty")

    def problem(self, node: Any, text: str) -> None:
        self._problems.append((_line(node), text))

    def finish(self) -> None:
        """Raise YamlFileError where problems were recorded."""
        if self._problems:
            lines = [f"{self._path}:{line}: {text}" for line, text in sorted(self._problems)]
            raise YamlFileError(Lines(lines))

    def members(self, node: Any, what: str, known: Collection[str] | None = None) -> dict[str, Any]:
        """The members of a mapping, name to node. Duplicate names, and names that are not `known`, are problems."""
        if not isinstance(node, yaml.MappingNode):
            self.problem(node, f"{what} must be a mapping, with lines of `name: value`")
            return {}
        nodes: dict[str, Any] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            if not name or (known is not None and name not in known):
                near = nearest(name, known or ())
                hint = f": did you mean {near!r}?" if near else ""
                self.problem(key, f"{what} has no {name or 'such name'!r}{hint}")
            elif name in nodes:
                self.problem(key, f"{name!r} is there twice")
            else:
                nodes[name] = value
        return nodes

    def text(self, node: Any, what: str) -> str:
        """A text that is not empty; "" after a problem."""
        if isinstance(node, yaml.ScalarNode) and node.tag != "tag:yaml.org,2002:null" and node.value.strip():
            return str(node.value)
        self.problem(node, f"{what} must be a text")
        return ""

    def flag(self, node: Any, what: str) -> bool:
        """Return `true` or `false`; False after a problem."""
        if isinstance(node, yaml.ScalarNode) and node.value in ("true", "false"):
            return bool(node.value == "true")
        self.problem(node, f"{what} must be true or false")
        return False

    def texts(self, node: Any, what: str) -> Iterator[tuple[Any, str]]:
        """The texts of a list, each with its node."""
        if not isinstance(node, yaml.SequenceNode):
            self.problem(node, f"{what} must be a list")
            return
        for item in node.value:
            if text := self.text(item, f"each of {what}"):
                yield item, text

    def _refuse_aliases(self, text: str) -> None:
        """Refuse aliases: one can expand to thousands of copies, and hides what a line says."""
        try:
            events = list(yaml.parse(text, Loader=yaml.SafeLoader))
        except yaml.YAMLError:
            return  # reported below, with its line
        for event in events:
            if isinstance(event, yaml.AliasEvent):
                raise YamlFileError(
                    f"{self._path}:{_line(event)}: aliases (*{event.anchor}) are not read; write it out"
                )


def _line(what: Any) -> int:
    return int(what.start_mark.line) + 1
