"""Problems of fields in the product's words, from pydantic's errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import ValidationError

from ringfence.kernel.base.text import visible, visible_name
from ringfence.messages.base import WORDS_FOR_PATTERNS

_WORDS: Final[Mapping[str, str]] = {
    "bool_type": "must be true or false",
    "extra_forbidden": "is not known",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "json_invalid": "is not valid JSON: {error}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "missing": "is missing",
    "string_too_long": "must have at most {max_length} characters",
    "string_type": "must be a text",
    "too_long": "must have at most {max_length} entries",
    "too_short": "must have at least {min_length} entries",
    "tuple_type": "must be a list",
}
"""How errors of pydantic are said here, by their type."""


def problem_of(item: Mapping[str, Any]) -> str:
    """Return what is wrong with one field, as a phrase without the value, which could be secret.

    `item`: one of `ValidationError.errors()`.
    """
    context = item.get("ctx", {})
    if (words := WORDS_FOR_PATTERNS.get(str(context.get("pattern")))) is not None:
        return words
    if item["type"] == "string_too_short":
        least = context["min_length"]
        return "must not be empty" if least == 1 else f"must have at least {least} characters"
    if (words := _WORDS.get(item["type"])) is not None:
        return words.format_map(context)
    return visible(item["msg"].removeprefix("Value error, "))


def explain(error: ValidationError) -> str:
    """The validation errors of pydantic as one sentence, by field, without the values, which could be secret."""
    items = error.errors(include_url=False)
    # A list all of whose members are wrong is said to be too short as well.
    around = {item["loc"][:depth] for item in items for depth in range(1, len(item["loc"]))}
    found = [
        # Names of unknown fields are a stranger's words.
        f"{'.'.join(visible_name(str(part)[:80]) for part in item['loc']) or 'it'}: " + problem_of(item)
        for item in items
        if item["loc"] not in around
    ]
    return "; ".join(found[:5])[:500]
