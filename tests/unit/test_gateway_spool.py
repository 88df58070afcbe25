"""Events on disk: none is lost by a crash, none comes out in another order, and a full disk is said to be."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ringfence.gateway.events.spool import MAX_ENTRY_BYTES, Spool, SpoolError, SpoolFullError, SpoolMark

MAX = 1024 * 1024


def opened(folder: Path, max_bytes: int = MAX, segment_bytes: int = 256) -> Spool:
    return Spool(folder, max_bytes=max_bytes, segment_bytes=segment_bytes)


def emptied(spool: Spool) -> list[bytes]:
    """All that waits, marked as published."""
    found: list[bytes] = []
    while spool.has_unpublished():
        entries, mark = spool.peek()
        found += entries
        spool.mark_published(mark)
    return found


def entries(count: int, start: int = 0) -> list[bytes]:
    return [b"entry %d " % number + b"x" * (number % 50) for number in range(start, start + count)]


def crashed(spool: Spool) -> None:
    """Nothing is closed in good order."""
    for descriptor in (spool._file, spool._mark, spool._lock):
        os.close(descriptor)


def test_entries_come_out_once_and_in_order(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    for entry in entries(100):
        spool.append(entry)
    assert emptied(spool) == entries(100)
    assert emptied(spool) == []
    spool.append(b"later")
    assert emptied(spool) == [b"later"]
    spool.close()


def test_a_place_in_the_spool_is_published_once_all_before_it_is(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    start, marks = spool.end_mark(), list[SpoolMark]()
    for entry in entries(100):
        spool.append(entry)
        marks.append(spool.end_mark())
    assert sorted(set(marks)) == marks, "each is after the one before, in whatever segment"
    done = 0
    while spool.has_unpublished():
        assert [spool.is_published(mark) for mark in marks] == [number < done for number in range(100)]
        found, mark = spool.peek()
        assert not found or not spool.is_published(mark), "it was only read"
        spool.mark_published(mark)
        done += len(found)
        assert spool.is_published(start)
    assert all(spool.is_published(mark) for mark in marks)
    spool.append(b"later")
    assert spool.is_published(marks[-1])
    assert not spool.is_published(spool.end_mark())
    spool.close()


def test_entries_of_an_earlier_process_precede_every_mark(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool.append(b"one")
    crashed(spool)
    spool = opened(tmp_path)
    mark = spool.end_mark()
    assert not spool.is_published(mark)
    assert emptied(spool) == [b"one"]
    assert spool.is_published(mark)
    spool.close()
    spool = opened(tmp_path)
    mark = spool.end_mark()
    assert emptied(spool) == []
    assert spool.is_published(mark)
    spool.close()


def test_files_go_when_kafka_has_them(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    for entry in entries(100):
        spool.append(entry)
    assert len(list(tmp_path.glob("*.spool"))) > 10
    emptied(spool)
    assert len(list(tmp_path.glob("*.spool"))) == 1
    assert spool.size() <= 512
    spool.close()


def test_unpublished_entries_survive_a_crash(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    for entry in entries(20):
        spool.append(entry)
    some, mark = spool.peek()
    spool.mark_published(mark)
    crashed(spool)
    again = opened(tmp_path)
    again.append(b"new")
    assert emptied(again) == [*entries(20)[len(some) :], b"new"]
    again.close()
    last = opened(tmp_path)
    assert emptied(last) == []
    last.close()


def test_without_its_mark_everything_comes_again_rather_than_nothing(tmp_path: Path) -> None:
    spool = opened(tmp_path, segment_bytes=10_000)
    for entry in entries(5):
        spool.append(entry)
    crashed(spool)
    (tmp_path / "published").unlink()
    again = opened(tmp_path)
    assert emptied(again) == entries(5)
    again.close()


def test_damaged_segment_does_not_block_the_spool(tmp_path: Path) -> None:
    """Whoever publishes would look at it for ever."""
    spool = opened(tmp_path, segment_bytes=10_000)
    for entry in entries(3):
        spool.append(entry)
    (file,) = tmp_path.glob("*.spool")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert emptied(spool) == entries(2)
    spool.append(b"later")
    assert emptied(spool) == [b"later"]
    assert not spool.has_unpublished()
    spool.close()


def test_half_an_entry_that_cannot_be_taken_back_hides_none_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool, write = opened(tmp_path, segment_bytes=10_000), os.write

    def half(file: int, data: bytes) -> int:
        return write(file, data[: len(data) // 2])

    def refused(*_: object) -> None:
        raise OSError(errno.EIO, "no")

    with monkeypatch.context() as broken:
        broken.setattr(os, "write", half)
        broken.setattr(os, "ftruncate", refused)
        broken.setattr(os, "fsync", refused)
        with pytest.raises(SpoolFullError):
            spool.append(b"lost")
    spool.append(b"kept")
    assert emptied(spool) == [b"kept"]
    spool.close()


@pytest.mark.parametrize("damage", ["torn", "flipped", "length"])
def test_a_damaged_end_loses_that_and_nothing_after_it(tmp_path: Path, damage: str) -> None:
    spool = opened(tmp_path, segment_bytes=10_000)
    for entry in entries(3):
        spool.append(entry)
    crashed(spool)
    (file,) = tmp_path.glob("*.spool")
    data = bytearray(file.read_bytes())
    if damage == "torn":
        data = data[:-3]
    elif damage == "flipped":
        data[-1] ^= 1
    else:
        data += b"\xff\xff\xff\xff"
    file.write_bytes(data)
    again = opened(tmp_path)
    again.append(b"after")
    expected = entries(3) if damage == "length" else entries(2)
    assert emptied(again) == [*expected, b"after"]
    again.close()


def test_a_full_spool_takes_no_more_until_something_was_published(tmp_path: Path) -> None:
    spool = opened(tmp_path, max_bytes=1000)
    took = 0
    with pytest.raises(SpoolFullError, match="Kafka"):
        for entry in entries(1000):
            spool.append(entry)
            took += 1
    assert 0 < took < 1000
    assert emptied(spool) == entries(took)
    spool.append(b"again")
    with pytest.raises(SpoolFullError):
        spool.append(b"x" * (MAX_ENTRY_BYTES + 1))
    spool.close()


def test_a_disk_that_takes_no_more_is_said_to_be_and_leaves_no_half_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = opened(tmp_path)
    spool.append(b"one")
    write = os.write

    def full(file: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    def half(file: int, data: bytes) -> int:
        return write(file, data[: len(data) // 2])

    for trouble in (full, half):
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", trouble)
            with pytest.raises(SpoolFullError):
                spool.append(b"two")
    spool.append(b"three")
    assert emptied(spool) == [b"one", b"three"]
    spool.close()


def test_one_folder_is_for_one_gateway(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    with pytest.raises(SpoolError, match="RINGFENCE_GATEWAY_SPOOL"):
        opened(tmp_path)
    spool.close()
    opened(tmp_path).close()
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolError):
        opened(tmp_path / "file")
