"""Intersection of two globs, as a set of globs. It is for information only: results beyond its limits are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Final

from ringfence.model.scope.globs import accepts, is_glob, parse_glob, within

_MEET_CELLS: Final = 4096
_MEET_GLOBS: Final = 32
_TIDY_GLOBS: Final = 64

_Tokens = tuple[str, ...]
_Cell = tuple[int, int]


@lru_cache(maxsize=4096)
def meet(left: str, right: str) -> tuple[str, ...]:
    """Return globs that together match the names that both globs match."""
    if within(left, (right,)):
        return (left,)
    if within(right, (left,)):
        return (right,)
    sequences = _meet_tokens(parse_glob(left).segments, parse_glob(right).segments, "**", _meet_segments)
    # A result that breaks the grammar (`.`) or is too long is no valid name, and is left out.
    return without_contained(tuple(sorted(filter(is_glob, map("/".join, sequences)))))


@lru_cache(maxsize=4096)
def _meet_segments(left: str, right: str) -> tuple[str, ...]:
    if left == right or right == "*":
        return (left,)
    if left == "*":
        return (right,)
    if "*" not in left:
        return (left,) if "*" in right and accepts(tuple(right.split("*")), left) else ()
    if "*" not in right:
        return _meet_segments(right, left)
    segments = _meet_tokens(left, right, "*", lambda one, other: (one,) if one == other else ())
    return tuple(sorted(map("".join, segments)))


def _meet_tokens(
    left: Sequence[str], right: Sequence[str], loop: str, both: Callable[[str, str], Iterable[str]]
) -> set[_Tokens]:
    """Return the token sequences that two patterns share. `loop` is the token that stands for any run of tokens.

    The search walks the product of the two patterns. A path repeats only where both are at `loop`. So the paths are
    finitely many, and each is a pattern again. `both` returns what two other tokens share. Beyond the limits the result
    is incomplete.
    """

    def ways(i: int, j: int) -> list[tuple[_Tokens, _Cell]]:
        """Return the tokens that may come next (none where a loop ends), each with the cell that it leads to."""
        left_loops = i < len(left) and left[i] == loop
        right_loops = j < len(right) and right[j] == loop
        if left_loops and right_loops:
            return [((loop,), (i + 1, j)), ((loop,), (i, j + 1))]
        if left_loops:
            absorbed: list[tuple[_Tokens, _Cell]] = [((right[j],), (i, j + 1))] if j < len(right) else []
            return [*absorbed, ((), (i + 1, j))]
        if right_loops:
            absorbed = [((left[i],), (i + 1, j))] if i < len(left) else []
            return [*absorbed, ((), (i, j + 1))]
        if i < len(left) and j < len(right):
            return [((token,), (i + 1, j + 1)) for token in both(left[i], right[j])]
        return []

    reached: dict[_Cell, list[tuple[_Tokens, _Cell]]] = {}
    todo = [(0, 0)]
    while todo:
        cell = todo.pop()
        if cell in reached:
            continue
        if len(reached) >= _MEET_CELLS:
            break
        reached[cell] = ways(*cell)
        todo.extend(following for _, following in reached[cell])
    end = (len(left), len(right))
    shared: dict[_Cell, set[_Tokens]] = {}
    # Every step leads to a cell further down or right. So from the end backwards, all successors are known.
    for cell in sorted(reached, key=sum, reverse=True):
        sequences: set[_Tokens] = {()} if cell == end else set()
        for tokens, following in reached[cell]:
            sequences.update(tokens + rest for rest in shared.get(following, ()))
        shared[cell] = sequences if len(sequences) <= _MEET_GLOBS else set(sorted(sequences)[:_MEET_GLOBS])
    return shared.get((0, 0), set())


@lru_cache(maxsize=4096)
def without_contained(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Return the globs without those that others contain. Of very many globs, only plain names are dropped."""
    wild = tuple(text for text in texts if "*" in text)
    kept = [text for text in texts if "*" in text or not within(text, wild)]
    if len(wild) <= _TIDY_GLOBS:
        for text in sorted(wild, key=len, reverse=True):
            others = tuple(other for other in kept if other != text)
            if within(text, others):
                kept.remove(text)
    return tuple(kept)
