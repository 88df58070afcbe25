"""`ringfence scan`: how many files a minute, and what it finds in a labelled corpus, beside other scanners.

Of the corpus (`tests/support/scan_corpus.py`), precision is how many findings are planted secrets, and recall how many
planted secrets are found. detect-secrets and kingfisher take part where they are on the PATH; they do not say values,
so of them a finding counts where a secret stands in the line.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ringfence.scan.external_scanners import ADAPTERS, places_of
from ringfence.scan.findings import Fingerprinter, SecretValue
from ringfence.scan.scanner import ScanOptions, scanning
from tests.support.scan_corpus import Case, plant

SEEDS = 20
FILES = 20_000
_LOOK_ALIKES = "look-alikes"


@dataclass(slots=True)
class Score:
    """Counts of one class."""

    planted: int = 0
    found: int = 0
    wrong: int = 0

    def add(self, other: Score) -> None:
        self.planted += other.planted
        self.found += other.found
        self.wrong += other.wrong

    def precision(self) -> str:
        total = self.found + self.wrong
        return f"{self.found / total:7.1%}" if total else "      -"

    def recall(self) -> str:
        return f"{self.found / self.planted:7.1%}" if self.planted else "      -"


@dataclass(slots=True)
class Scores:
    """Of one scanner, by class."""

    by_class: dict[str, Score] = field(default_factory=lambda: defaultdict(Score))

    def total(self) -> Score:
        total = Score()
        for one in self.by_class.values():
            total.add(one)
        return total


def run(kafka: str) -> None:
    """Print speed, and a line for each class of the corpus."""
    with tempfile.TemporaryDirectory() as folder:
        _speed(Path(folder) / "files")
        shutil.rmtree(Path(folder) / "files")
        _accuracy(Path(folder) / "corpus")


def _speed(folder: Path) -> None:
    """A tree like a developer's: sources, documents, settings, of 1 to 30 KB."""
    source = random.Random(1)
    texts = [path.read_text() for path in sorted(Path("services").rglob("*.py"))[:400]]
    texts += [path.read_text() for path in sorted(Path("docs").rglob("*.md"))[:60]]
    texts += [path.read_text() for path in sorted(Path("schemas").rglob("*.json"))[:60]]
    size = 0
    for number in range(FILES):
        text = source.choice(texts)[:30_000]
        name = source.choice(["module.py", "page.md", "data.json", "values.yaml", "main.go", "notes.txt"])
        path = folder / f"d{number // 100}" / f"{number}-{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        size += len(text)
    for workers in (1, len(os.sched_getaffinity(0))):
        start, used = time.perf_counter(), os.times()
        with scanning(ScanOptions(paths=[folder], workers=workers), Fingerprinter(b"k" * 32)) as scanner:
            report = scanner.run()
        took, after = time.perf_counter() - start, os.times()
        cpu = sum(after[:4]) - sum(used[:4])
        # Of free cores: what else runs on the machine makes a scan wait, and takes hardly more of its processor time.
        alone = report.files / (cpu / workers) * 60
        peak = max(
            resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        print(
            f"{workers} process(es): {report.files:,} files, {size / 1e6:.0f} MB in {took:.1f} s: "
            f"{report.files / took * 60:,.0f} files a minute; {cpu:.1f} s of CPU, "
            f"{cpu / report.files * 1e6:.0f} µs a file: {alone:,.0f} files a minute on free cores; "
            f"{peak / 1024:.0f} MB in the largest process"
        )


def _accuracy(folder: Path) -> None:
    planted = list(plant(folder, SEEDS))
    scores: dict[str, Scores] = {"ringfence": _ours(folder, planted)}
    for adapter in ADAPTERS:
        if shutil.which(adapter.name) is None:
            print(f"{adapter.name} is not on the PATH: left out")
            continue
        start = time.perf_counter()
        scores[adapter.name] = _theirs(planted, places_of(adapter, [str(folder)]))
        print(f"{adapter.name}: {time.perf_counter() - start:.1f} s")
    secrets = sum(len(case.secrets) for _, case in planted)
    print(f"{len(planted):,} files, {secrets:,} secrets; precision and recall")
    print(f"{'':26}" + "".join(f"{name:>24}" for name in scores))
    for label in dict.fromkeys(case.label for _, case in planted):
        _line(label, {name: one.by_class[label] for name, one in scores.items()})
    _line("all", {name: one.total() for name, one in scores.items()})


def _line(label: str, scores: Mapping[str, Score]) -> None:
    cells = [
        f"{one.wrong:>12} findings  "
        if label == _LOOK_ALIKES
        else f"{one.precision():>13} {one.recall():>9} "
        for one in scores.values()
    ]
    sys.stdout.write(f"  {label:24}" + "".join(cells) + "\n")


def _ours(folder: Path, planted: list[tuple[Path, Case]]) -> Scores:
    fingerprints = Fingerprinter(b"k" * 32)
    with scanning(ScanOptions(paths=[folder]), fingerprints) as scanner:
        report = scanner.run()
    found: dict[str, set[str]] = defaultdict(set)
    for one in report.findings:
        # What has no value, such as an encrypted keyring, counts by its pattern.
        found[one.place.path].add(one.fingerprint or f"unread {one.pattern.value}")
    scores = Scores()
    for path, case in planted:
        wanted = {fingerprints.of(SecretValue(secret.value)) for secret in case.secrets}
        wanted |= {f"unread {pattern}" for pattern in case.unread}
        got = found[str(path)]
        scores.by_class[case.label].add(Score(len(wanted), len(wanted & got), len(got - wanted)))
    return scores


def _theirs(planted: list[tuple[Path, Case]], places: list[tuple[str, str, int | None]]) -> Scores:
    lines: dict[str, set[int]] = defaultdict(set)
    for _, place, line in places:
        lines[os.path.realpath(place)].add(line or 0)
    scores = Scores()
    for path, case in planted:
        wanted: set[int] = set()
        count = 0
        text = case.content.decode(errors="replace").splitlines()
        for secret in case.secrets:
            here = _lines_of(text, secret.value)
            count += bool(here & lines[os.path.realpath(path)])
            wanted |= here
        wrong = len(lines[os.path.realpath(path)] - wanted)
        scores.by_class[case.label].add(Score(len(case.secrets), count, wrong))
    return scores


def _lines_of(text: list[str], value: str) -> set[int]:
    """The lines that may be named for a secret: for one of several lines, or an encoded one, any of the file."""
    here = {number for number, line in enumerate(text, start=1) if value in line}
    return here or set(range(1, len(text) + 1))
