"""Lines of text become documents, packed or plain, whole or in parts; a line that is none becomes a problem."""

import gzip
import json
import subprocess
import sys
import zlib
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from read_raw import jsonl, packed, read, texts

from omniloom.data.readers.lines import read_lines
from omniloom.data.source import RawSegment


def test_a_line_of_a_jsonl_is_a_document_by_its_text(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"text": "naïve 猫"}, "", {"caption": "a cat"}, {"body": "b", "text": None})
    first, second, third = read("jsonl", file)
    assert first.segments == [RawSegment("text", "naïve 猫", is_target=True)]
    assert texts(second) == [("a cat", True)]
    assert third.problem.startswith("no text or caption; its keys: body, text: set text_key")
    assert [texts(d) for d in read("jsonl", file, text_key="body") if not d.problem] == [[("b", True)]]
    offsets = [int(document.name.removeprefix(f"{file}@")) for document in (first, second, third)]
    assert [json.loads(file.read_bytes()[at:].splitlines()[0]) for at in offsets][1] == {"caption": "a cat"}


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("format", ["jsonl", "text"])
def test_packed_files_read_as_what_they_hold(format: str, suffix: str, tmp_path: Path) -> None:
    plain = jsonl(tmp_path / "a.jsonl", *({"text": str(number) * 50} for number in range(9_000)))
    unpacked, same = read(format, plain), read(format, packed(tmp_path / f"a.jsonl.{suffix}"))
    assert [document.segments for document in same] == [document.segments for document in unpacked]
    assert len(same) == (9_000 if format == "jsonl" else 1)


def test_a_gz_of_two_members_is_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n') + gzip.compress(b'{"text": "b"}\n'))
    assert [texts(document)[0][0] for document in read("jsonl", tmp_path / "a.jsonl.gz")] == ["a", "b"]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_packed_file_that_breaks_off_is_one_reject_behind_its_documents(suffix: str, tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", *({"text": f"{number} {zlib.crc32(str(number).encode())}"} for number in range(60_000)))
    file = packed(tmp_path / f"a.jsonl.{suffix}")
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    *good, broken = read("jsonl", file)
    assert len(good) > 10_000
    assert not any(document.problem for document in good)
    assert broken.name == str(file)
    assert broken.problem == f"cannot be read after {len(good)} documents: OSError: Truncated compressed stream"


@pytest.mark.parametrize("format", ["text", "jsonl", "chat", "parquet", "webdataset"])
def test_a_missing_file_and_one_that_is_none_are_rejects(format: str, tmp_path: Path) -> None:
    (tmp_path / "b.parquet").mkdir()
    (tmp_path / "c.jsonl").mkdir()
    for name in ("a.parquet", "a.txt", "b.parquet", "c.jsonl"):
        (document,) = read(format, tmp_path / name)
        assert document.name == str(tmp_path / name)
        assert document.problem


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"[]", "a record is a mapping with text"),
        (b"null", "a record is a mapping with text"),
        (b'{"text": null}', "no text or caption"),
        (b'{"text": 7}', "text is a number, not a string"),
        (b'{"text": ["a"]}', "text is a list, not a string"),
        (b'{"text": {"text": "a"}}', "text is a mapping, not a string"),
        (b'{"text": "  "}', "text is empty"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair is no text"),
        (b'{"\\ud800": "a"}', "no text or caption"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"text": ' + b"9" * 5_000 + b"}", "Exceeds the limit"),
        (b"\xff\xfe{\0}\0", "not UTF-8 at byte 0"),
    ],
    ids=range(14),
)
def test_a_bad_line_is_a_reject_among_good_ones(line: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}')
    first, bad, last = read("jsonl", file)
    assert (texts(first), texts(last)) == ([("a", True)], [("b", True)])
    assert (bad.name, bad.segments) == (f"{file}@14", [])
    assert reason in bad.problem
    bad.problem.encode()  # it is written to a json file


def test_a_byte_order_mark_before_the_first_line_is_none_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert texts(read("jsonl", tmp_path / "a.jsonl")[0]) == [("a", True)]


def test_a_document_over_its_limit_is_a_reject_with_the_key(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b" * 5_000_000}, {"text": "c" * 89}, {"text": "d" * 88})
    first, large, over, fits = read("jsonl", file, limit_document_bytes=100)
    for document in (large, over):
        assert document.problem.startswith("the line is over limit_document_bytes=100: raise it")
    assert (texts(first), texts(fits)) == ([("a", True)], [("d" * 88, True)])
    (whole,) = read("text", file, limit_document_bytes=100)
    assert whole.problem.startswith("the file is over limit_document_bytes=100")


@settings(max_examples=200, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=12),
    cuts=st.lists(st.integers(0, 200), max_size=5),
    limit=st.integers(1, 14),
    ends=st.booleans(),
)
def test_parts_of_a_file_hold_each_line_once(
    lines: list[bytes], cuts: list[int], limit: int, ends: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever the cuts, the parts together are the whole; offsets are those of the lines."""
    file = tmp_path_factory.getbasetemp() / "cut.txt"
    data = b"\n".join(lines) + (b"\n" if ends and lines else b"")
    file.write_bytes(data)
    bounds = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    found = [line for part in pairwise(bounds) for line in read_lines(str(file), part, limit)]
    assert found == list(read_lines(str(file), None, limit))
    expected, at = [], 0
    for line in (piece + b"\n" for piece in data.split(b"\n")):
        line = line if at + len(line) <= len(data) else line[:-1]  # the last one may have no end
        if line:
            expected.append((at, line if len(line.removesuffix(b"\n")) <= limit else None))
        at += len(line)
    assert found == expected


@pytest.mark.slow
def test_a_large_file_and_an_endless_line_are_read_in_little_memory(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("w") as lines, gzip.open(tmp_path / "line.jsonl.gz", "wb", 1) as line:
        for _ in range(64):
            lines.write(f"{json.dumps({'text': 'word ' * 400})}\n" * 512)
            line.write(b"a" * (1 << 22))
    packed_file, plain = tmp_path / "line.jsonl.gz", tmp_path / "a.jsonl"
    code = """
import sys
from pathlib import Path
from omniloom.data.config import Reading
from omniloom.data.readers import read_documents
from omniloom.data.source import Unit
peak = lambda: 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
for file in sys.argv[1:]:
    before = peak()
    unit = Unit("a", "a", "train", "jsonl", [file], None, Reading(limit_document_bytes=1 << 20))
    print(sum(1 for document in read_documents(unit)), peak() - before)
"""
    ran = subprocess.run([sys.executable, "-c", code, plain, packed_file], capture_output=True, text=True, check=True)
    (documents, growth), (rejects, growth_of_line) = (map(int, line.split()) for line in ran.stdout.splitlines())
    assert (documents, rejects) == (64 * 512, 1)
    assert max(growth, growth_of_line) < 16 << 20
