"""A source's files are gathered into units, large ones cut; the units together hold each document once."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.data import units as units_module
from omniloom.data.config import Manifest, SourceSpec
from omniloom.data.readers import read_documents
from omniloom.data.source import Unit
from omniloom.data.units import LEAST_UNIT_BYTES, UNIT_BYTES, _cut, list_units
from omniloom.errors import DataError

MIB = 1 << 20


def units(folder: Path, format: str = "jsonl", *patterns: str, **keys: Any) -> list[Unit]:
    return list_units(Manifest({"a": SourceSpec(format, list(patterns or ["*"]), **keys)}), folder)


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as stream:
        stream.truncate(size)
    return path


@pytest.mark.parametrize(
    ("size", "count"),
    [(0, 1), (1, 1), (MIB, 1), (MIB + 1, 2), (8 * MIB, 8), (100 * MIB, 16), (1_003_888_890, 16), (4 << 30, 64)],
)
def test_a_plain_jsonl_is_cut_evenly(size: int, count: int, tmp_path: Path) -> None:
    sparse(tmp_path / "a.jsonl", size)
    found = units(tmp_path)
    assert len(found) == count
    if count > 1:
        assert [unit.part[0] for unit in found] == [0, *(unit.part[1] for unit in found[:-1])]
        assert found[-1].part[1] == size
        sizes = [unit.part[1] - unit.part[0] for unit in found]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= UNIT_BYTES


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_packed_file_stays_whole(name: str, tmp_path: Path) -> None:
    sparse(tmp_path / name, 200 * MIB)
    (unit,) = units(tmp_path)
    assert unit.part is None


def test_each_tar_is_a_unit_and_a_large_text_stays_whole(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        sparse(tmp_path / name, 10)
    sparse(tmp_path / "a.txt", 100 * MIB)
    assert [len(unit.files) for unit in units(tmp_path, "webdataset", "*.tar")] == [1, 1]
    assert [unit.part for unit in units(tmp_path, "text", "*.txt")] == [None]


def test_lines_that_name_media_are_cut_small(tmp_path: Path) -> None:
    sparse(tmp_path / "a.jsonl", 100 * MIB)
    found = units(tmp_path, "interleaved")
    assert len(found) == 100
    assert found[0].part == (0, MIB)


def test_a_parquet_file_is_cut_by_its_row_groups(tmp_path: Path) -> None:
    table = pa.table({"text": [f"{number:07d}" * 100 for number in range(8_000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1_000, compression="none", use_dictionary=False)
    found = units(tmp_path, "parquet")
    assert len(found) == 8
    assert [unit.part for unit in found] == [(number, number + 1) for number in range(8)]
    read = [document.segments[0].content for unit in found for document in read_documents(unit)]
    assert read == table["text"].to_pylist()


def test_a_damaged_parquet_file_is_left_to_its_reader(tmp_path: Path) -> None:
    sparse(tmp_path / "a.parquet", 10 * MIB)
    (unit,) = units(tmp_path, "parquet")
    (document,) = read_documents(unit)
    assert "ArrowInvalid" in document.problem


@pytest.mark.parametrize(
    ("format", "name", "message"),
    [
        ("jsonl", "a.parquet", "format jsonl does not read .*a.parquet: set format: parquet"),
        ("parquet", "a.jsonl", "format parquet reads files that end in .parquet, not .*a.jsonl"),
        ("folder", "a.txt", "no train image, sound or video matches"),
    ],
)
def test_files_of_another_format_are_refused(format: str, name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=f"source a: {message}"):
        units(tmp_path, format)


def test_a_name_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a\udcff.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"a file whose name is not UTF-8: rename it"):
        units(tmp_path, "text")


def test_a_link_keeps_its_name_and_hides_no_file_from_the_other_split(tmp_path: Path) -> None:
    """As the caches of Hugging Face, git-annex and DVC lay them out: what a link points to has no extension."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot" / "d").mkdir(parents=True)
    lines = b'{"file": "d/b.png", "text": "by its line"}\n'
    for name, data in {"a.png": b"a", "a.txt": b"by its name", "d/b.png": b"b", "captions.jsonl": lines}.items():
        blob = tmp_path / "blobs" / name.replace("/", "").replace(".", "")
        blob.write_bytes(data)
        (tmp_path / "snapshot" / name).symlink_to(blob)
    found = [document for unit in units(tmp_path, "folder", "snapshot") for document in read_documents(unit)]
    assert [document.problem for document in found] == [None, None]
    assert [document.segments[1].content for document in found] == ["by its name", "by its line"]
    with pytest.raises(DataError, match=r"snapshot/a.png is both trained on and held out \(1 such\)"):
        units(tmp_path, "text", "snapshot/a.png", heldout=["blobs/apng"])


def test_the_sources_keys_go_with_its_units(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "b"}')
    (unit,) = units(tmp_path, text_key="body", limit_document_bytes=100)
    assert (unit.reading.text_key, unit.reading.limit_document_bytes) == ("body", 100)
    assert [document.problem for document in read_documents(unit)] == [None]


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), max_size=20),
    format=st.sampled_from(["text", "jsonl", "chat", "interleaved", "webdataset"]),
)
def test_units_hold_each_byte_once(sizes: list[int], format: str) -> None:
    files = {f"{number:02d}.{'gz' if size % 7 == 0 else 'jsonl'}": size for number, size in enumerate(sizes)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units_module, "LEAST_UNIT_BYTES", 3)
        patch.setattr(units_module, "UNIT_BYTES", 12)
        pieces = list(_cut(format, files))
    held: dict[str, list[tuple[int, int]]] = {}
    for members, part in pieces:
        assert members
        assert part is None or len(members) == 1
        for member in members:
            held.setdefault(member, []).append(part or (0, files[member]))
        weight = sum(stop - start for start, stop in (held[member][-1] for member in members))
        assert weight <= 12 or len(members) == 1
    assert held.keys() == files.keys()
    for file, parts in held.items():
        assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])]
        assert parts[-1][1] == files[file]


def test_the_sizes_of_units_are_the_documented_ones() -> None:
    assert (LEAST_UNIT_BYTES, UNIT_BYTES) == (MIB, 64 * MIB)
