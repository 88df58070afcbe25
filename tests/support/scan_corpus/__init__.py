"""A labelled corpus for `ringfence scan`: files as the real tools write them, with generated secrets and look-alikes.

Nothing in it is real: each secret is made of a seeded random source, with the checksum of its kind. Each case names the
reader that has to find it. The corpus grows by seeds, so thousands of cases differ in their values.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.support.scan_corpus import formats, look_alikes, planted
from tests.support.scan_corpus.maker import BUILDERS, Case, Maker, Secret, pem_body

__all__ = ["Case", "Maker", "Secret", "cases", "formats", "look_alikes", "pem_body", "plant", "planted"]


def cases(seed: int) -> list[Case]:
    """Every case once, with the values of this seed."""
    return [build(Maker(seed * 1000 + number)) for number, build in enumerate(BUILDERS)]


def plant(folder: Path, seeds: int) -> Iterator[tuple[Path, Case]]:
    """Write a corpus of so many seeds, a folder for each case, and yield path and case."""
    for seed in range(seeds):
        for number, one in enumerate(cases(seed)):
            path = folder / f"s{seed:03d}" / f"c{number:03d}" / one.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(one.content)
            yield path, one
