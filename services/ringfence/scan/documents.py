"""Bounded parsers for untrusted documents: JSON with comments, YAML, TOML, XML, INI, `NAME=value` lines.

No parser follows an include, expands an alias or an entity, or runs a tag. If a document is too deep, too large or
malformed, the parser raises DocumentError. Its message quotes nothing of the text.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

MAX_DEPTH: Final = 64
MAX_NODES: Final = 200_000
_MAX_TOKENS: Final = 1_000_000
_MAX_TOML_BYTES: Final = 1024 * 1024
_MAX_YAML_BYTES: Final = 4 * 1024 * 1024


class DocumentError(Exception):
    """Raised if a text is malformed. The message quotes nothing of it."""

    limits = False
    """Whether a finding may be missing for it."""


class DocumentLimitError(DocumentError):
    """Raised if a text exceeds a limit."""

    limits = True


_JSON_NODES: Final = re.compile(r'"(?:[^"\\\n]|\\.)*+"|[\[{]|[\]}]', re.DOTALL)


def parse_json(text: str) -> Any:
    """Return a JSON document, also one with comments and trailing commas, as editors write it.

    Raises DocumentError.
    """
    _check_depth(text)
    text = text.removeprefix("\ufeff")
    try:
        try:
            return json.loads(text, parse_int=_number)
        except ValueError:
            return json.loads(_without_comments(text), parse_int=_number)
    except (ValueError, RecursionError):
        raise DocumentError("is not valid JSON") from None


def _number(digits: str) -> int | str:
    return int(digits) if len(digits) < 400 else digits


_JSON_TOKENS: Final = re.compile(r'"(?:[^"\\\n]|\\.)*+"|//[^\n]*|/\*.*?\*/|,(?=\s*+[}\]])', re.DOTALL)


def _without_comments(text: str) -> str:
    # Comments first: one may stand between a trailing comma and its bracket.
    for _ in range(2):
        text = _JSON_TOKENS.sub(lambda match: match[0] if match[0][0] == '"' else " ", text)
    return text


def _check_depth(text: str) -> None:
    """Check depth and number of nodes before a parser makes objects of them. Raises DocumentError."""
    depth = 0
    for number, match in enumerate(_JSON_NODES.finditer(text)):
        if number > _MAX_TOKENS:
            raise DocumentLimitError(f"has more than {_MAX_TOKENS} brackets and texts")
        char = text[match.start()]
        if char in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise DocumentLimitError(f"is nested more than {MAX_DEPTH} levels deep")
        elif char in "]}":
            depth -= 1


def parse_yaml(text: str) -> list[Any]:
    """Return the documents of a YAML stream, all scalars as text. Raises DocumentError.

    An alias is the very object of its anchor, so no alias takes memory; `walk` limits how often it is visited.
    """
    import yaml  # not at the top: most commands need none

    if len(text) > _MAX_YAML_BYTES:
        raise DocumentLimitError("is too large for YAML")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    documents: list[Any] = []
    anchors: dict[str, Any] = {}
    stack: list[tuple[Any, list[Any]]] = []
    nodes = 0

    def put(value: Any) -> None:
        if not stack:
            documents.append(value)
            return
        container, pending = stack[-1]
        if isinstance(container, list):
            container.append(value)
        elif pending:
            key = pending.pop()
            if key == "<<" and isinstance(value, dict):
                for name, inherited in value.items():
                    container.setdefault(name, inherited)
            else:
                container[key] = value
        else:
            pending.append(value if isinstance(value, str) else "?")

    try:
        for event in yaml.parse(text, Loader=loader):
            nodes += 1
            if nodes > MAX_NODES:
                raise DocumentLimitError(f"has more than {MAX_NODES} nodes")
            if isinstance(event, yaml.ScalarEvent):
                if event.anchor:
                    anchors[event.anchor] = event.value
                put(event.value)
            elif isinstance(event, yaml.AliasEvent):
                put(anchors.get(event.anchor or "", ""))
            elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
                container: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
                if event.anchor:
                    anchors[event.anchor] = container
                stack.append((container, []))
                if len(stack) > MAX_DEPTH:
                    raise DocumentLimitError(f"is nested more than {MAX_DEPTH} levels deep")
            elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
                put(stack.pop()[0])
            elif isinstance(event, yaml.DocumentStartEvent):
                anchors = {}
    except yaml.YAMLError:
        raise DocumentError("is not valid YAML") from None
    return documents


def parse_toml(text: str) -> dict[str, Any]:
    """Return a TOML document. Raises DocumentError."""
    if len(text) > _MAX_TOML_BYTES:
        raise DocumentLimitError("is too large for TOML")
    _check_depth(text)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError):
        raise DocumentError("is not valid TOML") from None


def xml_texts(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the path and the text of each element of an XML document, without namespaces.

    A document type declaration is refused: entities could expand without end, or name other files. Raises
    DocumentError.
    """
    from xml.parsers import expat

    found: list[tuple[tuple[str, ...], str]] = []
    path: list[str] = []
    texts: list[list[str]] = []
    parser = expat.ParserCreate("utf-8")  # whatever encoding it declares: it was decoded before
    parser.buffer_text = True

    def refuse(*_: object) -> None:
        raise DocumentLimitError("has a document type declaration, which may expand without end")

    def start(name: str, _: object) -> None:
        path.append(name.rpartition(":")[2])
        texts.append([])
        if len(path) > MAX_DEPTH:
            raise DocumentLimitError(f"is nested more than {MAX_DEPTH} levels deep")

    def end(_: str) -> None:
        if value := "".join(texts.pop()).strip():
            found.append((tuple(path), value))
        path.pop()

    def data(value: str) -> None:
        if texts:
            texts[-1].append(value)

    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, data
    try:
        parser.Parse(text.encode("utf-8", "replace"), True)
    except (expat.ExpatError, ValueError):
        raise DocumentError("is not valid XML") from None
    yield from found


_SECTION: Final = re.compile(r"\s*\[\s*([^\]\n]{0,200}?)\s*\]\s*(?:[#;].*)?$")
_OPTION: Final = re.compile(r"\s*([^=:\s#;\[][^=:\n]{0,199}?)\s*[=:]\s*(.*?)\s*$")


def ini_options(text: str) -> Iterator[tuple[str, str, str, int]]:
    """Yield section, name, value and line of each option of an INI file. Other lines are skipped."""
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if match := _SECTION.match(line):
            section = match[1]
        elif match := _OPTION.match(line):
            yield section, match[1], unquoted(match[2]), number


_ASSIGNMENT: Final = re.compile(r"\s*(?:export\s+|set\s+|setx\s+)?([A-Za-z_][\w.-]{0,199})\s*=\s*(.*)$")


def assignments(text: str) -> Iterator[tuple[str, str, int]]:
    """Yield name, value and line of each `NAME=value` of a file like `.env`. A quoted value may have several lines."""
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        match = _ASSIGNMENT.match(lines[number])
        number += 1
        if not match:
            continue
        first, value = number, match[2].strip()
        quote = value[:1]
        if quote in "\"'" and quote and value.count(quote) == 1:
            while number < len(lines) and number - first < 200:
                value += "\n" + lines[number]
                number += 1
                if quote in lines[number - 1]:
                    break
        yield match[1], unquoted(value), first


def unquoted(value: str) -> str:
    """Return a value without its quotes, and an unquoted one without a comment after it."""
    value = value.strip()
    quote = value[:1]
    if quote and quote in "\"'":
        end = value.find(quote, 1)
        return value[1:end] if end > 0 else value[1:]
    return re.split(r"\s+[#;]", value, maxsplit=1)[0].strip()


def walk(document: Any, *, max_nodes: int = MAX_NODES) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield path and value of each text in a document. Raises DocumentError beyond `max_nodes` nodes."""
    stack: list[tuple[tuple[str, ...], Any]] = [((), document)]
    visited = 0
    while stack:
        path, value = stack.pop()
        visited += 1
        if visited > max_nodes:
            raise DocumentLimitError(f"has more than {max_nodes} nodes, aliases counted")
        if isinstance(value, str):
            yield path, value
        elif isinstance(value, Mapping):
            if len(path) >= MAX_DEPTH:
                raise DocumentLimitError(f"is nested more than {MAX_DEPTH} levels deep")
            if visited + len(stack) + len(value) > max_nodes:
                raise DocumentLimitError(f"has more than {max_nodes} nodes, aliases counted")
            stack.extend(((*path, str(name)[:200]), inner) for name, inner in reversed(list(value.items())))
        elif isinstance(value, Sequence) and not isinstance(value, bytes):
            if len(path) >= MAX_DEPTH:
                raise DocumentLimitError(f"is nested more than {MAX_DEPTH} levels deep")
            if visited + len(stack) + len(value) > max_nodes:
                raise DocumentLimitError(f"has more than {max_nodes} nodes, aliases counted")
            stack.extend(((*path, str(index)), inner) for index, inner in reversed(list(enumerate(value))))


def mapping(value: Any) -> Mapping[str, Any]:
    """Return the value if it is a mapping, otherwise an empty one: an untrusted document can have any form."""
    return value if isinstance(value, Mapping) else {}


def sequence(value: Any) -> Sequence[Any]:
    """Return the value if it is a list, otherwise an empty one."""
    return value if isinstance(value, list) else ()


def text_of(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
