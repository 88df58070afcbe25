"""Attestation: which identity tokens of platforms match an agent's selectors. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ringfence.kernel.base.ids import digest
from ringfence.messages.enrolment import AttestationSelector
from ringfence.model.unknown_fields import is_understood

_IDENTIFYING = ("sub", "repository", "repository_id", "/kubernetes.io/serviceaccount/uid")
"""Claims that identify one workload or one project among all of an issuer."""
_LONGEST_VALUE = 2048
_SEPARATORS = ":/"


def audience(trust_domain: str) -> str:
    """Return the audience that a platform's token must have.

    No person's token has it, so none of those enrols anything.
    """
    return f"spiffe://{trust_domain}/enrol"


def bound_audience(trust_domain: str, kid: str) -> str:
    """Return the audience bound to one key. Request this one wherever the platform lets its caller choose."""
    return f"{audience(trust_domain)}/{kid}"


def selector_id(selector: AttestationSelector) -> str:
    """Return the id of a selector in enrolments and leases. Different selectors have different ids."""
    fields = selector.model_dump(mode="json", exclude_none=True)
    return digest(json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False))


def problem(selector: AttestationSelector) -> str | None:
    """Return the reason why a selector could match instances of more than one agent, or None."""
    if selector.runner is not None and not (
        selector.key_bound
        and "sub" in selector.claims
        and selector.issuer.endswith(f"/runner/{selector.runner}")
    ):
        return (
            f"a selector for the runs of runner {selector.runner} has its issuer, the agent's SPIFFE ID as sub, and "
            f"is key-bound; write it as runner={selector.runner}"
        )
    for name in _IDENTIFYING:
        pattern = selector.claims.get(name)
        if pattern is not None and _names_one(name, pattern):
            return None
    return (
        f"no claim of the selector for {selector.issuer} says whose workload it is: give one of "
        f"{', '.join(_IDENTIFYING)} whole, or sub with a * at its end after two parts (repo:acme/deploy:*)"
    )


def _names_one(name: str, pattern: str) -> bool:
    literal, star, rest = pattern.partition("*")
    if not star:
        return True
    parts = sum(literal.count(separator) for separator in _SEPARATORS)
    return name == "sub" and not rest and literal[-1:] in tuple(_SEPARATORS) and parts >= 2


def matching(
    selectors: Iterable[AttestationSelector], issuer: str, claims: Mapping[str, Any]
) -> tuple[AttestationSelector, dict[str, str]] | None:
    """Return the first selector that the claims of a verified token match, and the claims that it checks; or None."""
    for selector in selectors:
        if selector.issuer == issuer:
            matched_claims = {
                name: value for name in selector.claims if (value := claim(claims, name)) is not None
            }
            if fits(selector, issuer, matched_claims):
                return selector, matched_claims
    return None


def fits(selector: AttestationSelector, issuer: str, found: Mapping[str, str]) -> bool:
    """Return whether claims, by the names that the selector has for them, meet the selector.

    A selector with a field that this version does not know matches nothing: the field may limit it.
    """
    return (
        selector.issuer == issuer
        and is_understood(selector)
        and all(name in found and matches(pattern, found[name]) for name, pattern in selector.claims.items())
    )


def claim(claims: Mapping[str, Any], name: str) -> str | None:
    """Return one claim as text. None if it is missing, or is not a string, an integer or a boolean."""
    value: Any = claims
    for step in _steps(name):
        if not isinstance(value, Mapping) or step not in value:
            return None
        value = value[step]
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    return value if isinstance(value, str) and len(value) <= _LONGEST_VALUE else None


def _steps(name: str) -> list[str]:
    """Decode a JSON Pointer (RFC 6901 4): `~1` is a slash, `~0` a tilde."""
    if not name.startswith("/"):
        return [name]
    return [step.replace("~1", "/").replace("~0", "~") for step in name[1:].split("/")]


def matches(pattern: str, value: str) -> bool:
    """Return whether `value` matches `pattern`, in which `*` stands for any characters. Linear time for each `*`."""
    first, *rest = pattern.split("*")
    if not rest:
        return pattern == value
    *between, last = rest
    if not value.startswith(first) or len(value) < len(first) + len(last) or not value.endswith(last):
        return False
    at, end = len(first), len(value) - len(last)
    for part in between:
        position = value.find(part, at, end)
        if position < 0:
            return False
        at = position + len(part)
    return True
