"""`ringfence target add --openapi`: verbs and request rules of an HTTP API, proposed from its OpenAPI document.

An operation becomes a rule if the gateway can tell its requests from all others by method and path. Every other one is
named with its reason, and stays denied. OpenAPI 3.0 and 3.1 (https://spec.openapis.org/oas/v3.1.1.html), and 2.0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import urlsplit

from pydantic import ValidationError

from ringfence.cli.commands.target_templates import TEMPLATES, Template
from ringfence.client.errors import InvalidCallError
from ringfence.kernel.base.validation_problems import explain
from ringfence.messages.registry import RequestRule
from ringfence.model.http_targets import RequestMap, RequestMapError

MAX_BYTES: Final = 64 * 1024 * 1024
MAX_RULES: Final = 1024
"""As many as a target may have."""

_METHODS: Final[Mapping[str, str]] = {rule.method: rule.verb for rule in TEMPLATES["http"].requests}
"""The verb of each method, as the template for an unknown HTTP API has it."""
_FIELDS: Final = frozenset({"summary", "description", "servers", "parameters"})
"""Fields of a path item that are no operations; also those that begin with `x-`."""
_PARAMETER: Final = re.compile(r"\{([^{}/]+)\}")
_OTHER_TAG: Final = "it has none of the tags"
_ENDPOINTS: Final = frozenset({"graphql", "jsonrpc", "rpc", "batch", "$batch"})
"""Last segments of paths whose body says what is done: one verb for all of it would say nothing."""


@dataclass(frozen=True, slots=True)
class OpenApiMap:
    """The template that a document proposes, and what the template leaves out."""

    template: Template
    gaps: tuple[str, ...]
    """The operations that stay denied, each with the reason."""
    server: str | None
    """The origin that the document names. The document is untrusted: no secret goes there because of it."""


@dataclass(frozen=True, slots=True)
class _Operation:
    name: str
    method: str
    segments: tuple[str | None, ...]
    """Literals; None for what holds a parameter."""
    verb: str | None
    """None if the body says what is done."""
    rule: RequestRule | str
    """A string says why there is none."""

    def overlaps(self, other: _Operation) -> bool:
        """Tell if one request may be either."""
        return (
            self.method == other.method
            and len(self.segments) == len(other.segments)
            and all(
                None in pair or pair[0] == pair[1] for pair in zip(self.segments, other.segments, strict=True)
            )
        )

    def precedes(self, other: _Operation) -> bool:
        """Tell if it is the more specific of two that overlap, so that its rule comes before, as in OpenAPI."""
        pairs = list(zip(self.segments, other.segments, strict=True))
        return self.segments != other.segments and all(two in (None, one) for one, two in pairs)


def read_openapi(file: Path, tags: Sequence[str]) -> OpenApiMap:
    """Propose a template from a document, JSON or YAML.

    `tags`: only operations with one of these; all without. An operation with a tag has the verb `TAG:read`, `TAG:write`
    or `TAG:delete` of its first one. Raises InvalidCallError.
    """
    document = _read(file)
    prefix, server = _base(document)
    operations, gaps = list[_Operation](), list[str]()
    for path, method, own in _named(document):
        if method is None:
            gaps.append(f"{path}: it is not written out in this document")
        else:
            wanted = not tags or not set(own).isdisjoint(tags)
            tag = next((one for one in own if not tags or one in tags), None)
            operations.append(
                _operation(method, f"{prefix}{path}", tag if wanted else next(iter(own), None), wanted)
            )
    kept = [one for one in operations if isinstance(one.rule, RequestRule)]
    while clashes := {id(one): clash for one in kept if (clash := _clash(one, operations, kept))}:
        gaps += [
            f"{one.name}: some of its requests could also be {clashes[id(one)]}"
            for one in kept
            if id(one) in clashes
        ]
        kept = [one for one in kept if id(one) not in clashes]
    gaps += [
        f"{one.name}: {one.rule}"
        for one in operations
        if isinstance(one.rule, str) and one.rule != _OTHER_TAG
    ]
    found = [one.rule for one in sorted(kept, key=_specific_first) if isinstance(one.rule, RequestRule)]
    rules = [rule for rule, _ in groupby(found)]  # paths that differ in a query alone have the same rule
    if not rules:
        raise InvalidCallError(f"{file} has no operation that the gateway could tell by method and path")
    if len(rules) > MAX_RULES:
        raise InvalidCallError(
            f"{file} has {len(rules)} operations, and a target has at most {MAX_RULES} rules; choose some with "
            "--openapi-tag"
        )
    verbs = {
        verb: TEMPLATES["http"].verbs[verb.rpartition(":")[2]] for verb in sorted({one.verb for one in rules})
    }
    return OpenApiMap(Template("http", verbs, tuple(rules)), tuple(gaps), server)


def _read(file: Path) -> dict[str, Any]:
    import yaml

    try:
        if file.stat().st_size > MAX_BYTES:
            raise InvalidCallError(f"{file} has more than {MAX_BYTES // 1024 // 1024} MiB")
        text = file.read_text()
        document = json.loads(text) if text.lstrip().startswith("{") else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InvalidCallError(f"cannot read {file}: {str(error).splitlines()[0]}") from None
    version = document.get("openapi", document.get("swagger")) if isinstance(document, dict) else None
    if not str(version).startswith(("2.0", "3.")) or not isinstance(document.get("paths"), dict):
        raise InvalidCallError(f"{file} is no OpenAPI document of version 2.0 or 3, with paths")
    return cast("dict[str, Any]", document)


def _base(document: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the path before all paths, and the origin, as the document's first server has them."""
    if "swagger" in document:
        host = document.get("host")
        return str(document.get("basePath") or "").rstrip("/"), f"https://{host}" if host else None
    servers = document.get("servers") or [{}]
    first = servers[0] if isinstance(servers, list) and isinstance(servers[0], dict) else {}
    variables = first.get("variables")
    named = variables.items() if isinstance(variables, dict) else ()
    defaults = {name: str(one.get("default")) for name, one in named if isinstance(one, dict)}
    url = _PARAMETER.sub(lambda match: defaults.get(match[1], match[0]), str(first.get("url") or ""))
    parts = urlsplit(url)
    return parts.path.rstrip("/"), f"{parts.scheme}://{parts.netloc}" if parts.netloc else None


def _named(document: Mapping[str, Any]) -> Iterator[tuple[str, str | None, tuple[str, ...]]]:
    """Yield path, method and tags of each operation; no method for a path that is described elsewhere.

    A query that stands in a path is left out: rules are for paths, with any query.
    """
    for path, item in document["paths"].items():
        if not isinstance(item, dict) or "$ref" in item:
            yield str(path), None, ()
            continue
        for method, operation in item.items():
            if method not in _FIELDS and not str(method).startswith("x-"):
                tags = operation.get("tags") if isinstance(operation, dict) else None
                tags = tuple(map(str, tags)) if isinstance(tags, list) else ()
                yield str(path).partition("?")[0], str(method).upper(), tags


def _operation(method: str, path: str, tag: str | None, wanted: bool) -> _Operation:
    name, kind = f"{method} {path}", _METHODS.get(method)
    segments, parts, mixed = list[str | None](), list[str](), ""
    for segment in path.removeprefix("/").split("/"):
        parameter = _PARAMETER.fullmatch(segment)
        if parameter is not None:
            parts.append(f"{{{_unique(parameter[1], parts)}}}")
        else:
            parts.append(segment)
            mixed = mixed or (segment if "{" in segment or "}" in segment else "")
        segments.append(None if parameter or "{" in segment else segment)
    owner, rule = _slug(tag or "", "-"), ""
    verb = None if kind is None else f"{owner}:{kind}" if owner[:1].isalpha() else kind
    if segments[-1] in _ENDPOINTS:
        verb, rule = None, "its body says what is done; write rules with conditions on the body"
    elif verb is None:
        rule = "no verb is usual for this method"
    elif not wanted:
        rule = _OTHER_TAG
    elif mixed:
        rule = f"a rule has no segment of text and parameter together, as {mixed} is"
    return _Operation(name, method, tuple(segments), verb, rule or _rule(method, "/".join(parts), verb or ""))


def _rule(method: str, path: str, verb: str) -> RequestRule | str:
    try:
        rule = RequestRule(method=method, path=f"/{path}", verb=verb, resource=path or "path")
        RequestMap([rule])
    except RequestMapError as error:
        return error.message
    except ValidationError as error:
        return explain(error)
    return rule


def _unique(parameter: str, parts: Sequence[str]) -> str:
    """Return a name for a capture that no other part has."""
    slug = _slug(parameter, "_")
    slug = (slug if slug[:1].isalpha() else f"p_{slug}")[:28]
    names = [slug, *(f"{slug}{number}" for number in range(1, len(parts) + 1))]
    return next(name for name in names if f"{{{name}}}" not in parts)


def _slug(text: str, between: str) -> str:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", between, text).lower()
    return re.sub(r"[^a-z0-9]+", between, words).strip(between)[:40]


def _clash(one: _Operation, operations: Sequence[_Operation], kept: Collection[_Operation]) -> str | None:
    """Return another operation, of another verb, that requests of `one` could as well be; None if there is none."""
    for other in operations:
        if other is one or other.verb == one.verb or not one.overlaps(other) or one.precedes(other):
            continue
        if other not in kept:
            return f"{other.name}, which has no rule"
        if not other.precedes(one):
            return f"{other.name}, which is another verb"
    return None


def _specific_first(one: _Operation) -> tuple[tuple[bool, str], ...]:
    """The order of rules: what is written out is more specific than a parameter."""
    return tuple((segment is None, segment or "") for segment in one.segments)
