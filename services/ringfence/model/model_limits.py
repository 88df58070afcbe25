"""Limits of what tasks use of language models: comparison, and text for people. Pure."""

from __future__ import annotations

from ringfence.messages.registry import ModelLimits


def higher_limits(limits: ModelLimits | None, most: ModelLimits | None) -> list[str]:
    """Return the names of the limits that are higher than those of `most`. A limit that one of them lacks is not."""
    if limits is None or most is None:
        return []
    named = (("tokens", limits.tokens, most.tokens), ("requests", limits.requests, most.requests))
    return [name for name, one, other in named if one is not None and other is not None and one > other]


def lowest_limits(one: ModelLimits | None, other: ModelLimits | None) -> ModelLimits | None:
    """Return the limits that hold where both do, with the unknown fields of one of them; None if there are none."""
    if one is None or other is None:
        return one or other
    newer = other if other.model_extra else one
    return newer.model_copy(
        update={"tokens": _lower(one.tokens, other.tokens), "requests": _lower(one.requests, other.requests)}
    )


def _lower(one: int | None, other: int | None) -> int | None:
    return min((limit for limit in (one, other) if limit is not None), default=None)


def limits_text(limits: ModelLimits | None) -> str:
    """Return limits for people: `tokens=200000 requests=500`, or `none`."""
    given = limits.model_dump(exclude_none=True) if limits is not None else {}
    return " ".join(f"{name}={value}" for name, value in given.items()) or "none"
