"""Each format's records become documents; each record that is none becomes a problem with its reason."""

import base64
import gzip
import io
import json
import subprocess
import sys
import tarfile
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from handmade import save_picture
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.data.config import Reading
from omniloom.data.readers import read_documents
from omniloom.data.readers.lines import read_lines
from omniloom.data.source import RawDocument, RawSegment, Unit
from omniloom.modality.files import Media

Said = tuple[str, bool]


def unit(format: str, *files: Path, part: tuple[int, int] | None = None, **reading: Any) -> Unit:
    return Unit("a-train-00000", "a", "train", format, [str(file) for file in files], part, Reading(**reading))


def read(format: str, *files: Path, part: tuple[int, int] | None = None, **reading: Any) -> list[RawDocument]:
    return list(read_documents(unit(format, *files, part=part, **reading)))


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records), encoding="utf-8")
    return path


def packed(path: Path) -> Path:
    """The file as path.gz or path.zst says, from the plain file of the rest of its name."""
    data = path.with_suffix("").read_bytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else pa.compress(data, "zstd", asbytes=True))
    return path


def texts(document: RawDocument) -> list[Said]:
    assert document.problem is None
    assert all(segment.kind == "text" for segment in document.segments)
    return [(segment.content, segment.is_target) for segment in document.segments]


def parts(document: RawDocument) -> list[tuple[str, Any]]:
    """Kind and content of each segment: text, path or bytes."""
    assert document.problem is None, document.problem
    return [(s.kind, s.content.content if isinstance(s.content, Media) else s.content) for s in document.segments]


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


def chat(tmp_path: Path, *records: Any) -> list[RawDocument]:
    return read("chat", jsonl(tmp_path / "chat.jsonl", *records))


TURNS = [("system", "Be brief."), ("user", "Which colour?"), ("assistant", "red"), ("user", "And?"), ("assistant", "b")]
RENDERED = [
    ("system: Be brief.\n\nuser: Which colour?\n\nassistant:", False),
    (" red", True),
    ("\n\nuser: And?\n\nassistant:", False),
    (" b", True),
]


def test_messages_sharegpt_and_alpaca_read_alike(tmp_path: Path) -> None:
    theirs = {"user": "human", "assistant": "gpt", "system": "system"}
    messages, sharegpt, alpaca, without_input = chat(
        tmp_path,
        {"id": 7, "messages": [{"role": role, "content": text} for role, text in TURNS]},
        {"conversations": [{"from": theirs[role], "value": text} for role, text in TURNS]},
        {"instruction": "Which colour?", "input": "grass", "output": "green"},
        {"instruction": "Which colour?", "input": "", "output": "green"},
    )
    assert texts(messages) == texts(sharegpt) == RENDERED
    assert texts(alpaca) == [("user: Which colour?\n\ngrass\n\nassistant:", False), (" green", True)]
    assert texts(without_input) == [("user: Which colour?\n\nassistant:", False), (" green", True)]


def test_parts_of_a_message_keep_their_order(tmp_path: Path) -> None:
    picture = base64.b64encode(b"bytes").decode()
    content = [
        {"type": "text", "text": "See "},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": f"data:image/png;base64,{picture}"},
        {"type": "image", "path": "b.png"},
        {"type": "text", "text": "and hear"},
        {"type": "audio", "audio": "c.wav"},
        {"type": "input_audio", "input_audio": {"data": picture, "format": "wav"}},
        {"type": "video", "video": f"file://{tmp_path}/d.mp4"},
    ]
    (document,) = chat(
        tmp_path, {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]}
    )
    assert parts(document) == [
        ("text", "user: See "),
        ("image", tmp_path / "a.png"),
        ("image", b"bytes"),
        ("image", tmp_path / "b.png"),
        ("text", "and hear"),
        ("audio", tmp_path / "c.wav"),
        ("audio", b"bytes"),
        ("video", tmp_path / "d.mp4"),
        ("text", "\n\nassistant:"),
        ("text", " x"),
    ]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "neither messages nor conversations nor instruction"),
        ({"messages": []}, "messages is no list of turns, or an empty one"),
        ({"messages": "hi"}, "messages is no list of turns"),
        ({"messages": [None]}, "messages[0] is no mapping"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no turn of the assistant"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "messages[0].role 'usr' is no role; did you mean 'user'?"),
        ({"messages": [{"role": None, "content": "a"}]}, "messages[0].role is null"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content is null"),
        ({"messages": [{"role": "assistant", "content": []}]}, "messages[0].content is empty"),
        ({"messages": [{"role": "assistant", "content": [{"type": "txt"}]}]}, "did you mean 'text'?"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "image"}]}]},
            "messages[0].content[0] names no image",
        ),
        ({"messages": [{"role": "assistant", "content": [{"type": "image", "image": "a\0"}]}]}, "NUL byte"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "image", "url": "https://a/b"}]}]},
            "https:// is not read",
        ),
        ({"messages": [{"role": "assistant", "content": [{"type": "image", "url": "data:,a"}]}]}, "base64 alone"),
        ({"conversations": [{"from": "gpt", "value": 7}]}, "conversations[0].value is a number"),
        ({"instruction": "a", "output": None}, "output is null"),
        ({"instruction": "a"}, "no key 'output'"),
    ],
)
def test_a_conversation_that_is_none_says_where(record: Any, reason: str, tmp_path: Path) -> None:
    (document,) = chat(tmp_path, record)
    assert reason in document.problem


def test_a_preference_is_two_documents_of_one_name(tmp_path: Path) -> None:
    asked, good, bad = (
        {"role": r, "content": c} for r, c in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5"))
    )
    file = jsonl(
        tmp_path / "a.jsonl",
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": [asked], "chosen": [good], "rejected": [bad]},
        {"chosen": [asked, good], "rejected": [asked, bad]},
        {"prompt": "2+2?", "chosen": [asked, good], "rejected": [asked, bad]},
    )
    documents = read("preference", file)
    assert [document.kind for document in documents] == ["chosen", "rejected"] * 4
    for chosen, rejected in zip(documents[::2], documents[1::2], strict=True):
        assert chosen.name == rejected.name
        assert texts(chosen) == [("user: 2+2?\n\nassistant:", False), (" 4", True)]
        assert texts(rejected) == [("user: 2+2?\n\nassistant:", False), (" 5", True)]


def test_only_the_answer_of_a_preference_is_a_target(tmp_path: Path) -> None:
    turns = [{"role": role, "content": text} for role, text in TURNS]
    file = jsonl(tmp_path / "a.jsonl", {"prompt": turns[:-1], "chosen": "b", "rejected": "c"})
    assert [text for text in texts(read("preference", file)[0]) if text[1]] == [(" b", True)]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "a", "chosen": "b"}, "no key 'rejected'"),
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "chosen is null"),
        ({"prompt": "a", "chosen": "b", "rejected": []}, "rejected is no list of turns"),
        (
            {
                "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                "rejected": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "b"}],
            },
            "answer different prompts",
        ),
        ({"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"}, "ends in a turn of the user"),
    ],
)
def test_a_preference_that_is_none_is_one_reject(record: Any, reason: str, tmp_path: Path) -> None:
    (document,) = read("preference", jsonl(tmp_path / "a.jsonl", record))
    assert reason in document.problem


@pytest.mark.parametrize("format", ["chat", "preference"])
def test_conversations_of_a_parquet_file_read_as_those_of_a_jsonl(format: str, tmp_path: Path) -> None:
    turns = [{"role": role, "content": text} for role, text in TURNS]
    record = {"messages": turns} if format == "chat" else {"prompt": turns[:1], "chosen": "b", "rejected": "c"}
    pq.write_table(pa.Table.from_pylist([record, record]), tmp_path / "a.parquet")
    lines = read(format, jsonl(tmp_path / "a.jsonl", record, record))
    rows = read(format, tmp_path / "a.parquet")
    assert [document.segments for document in rows] == [document.segments for document in lines]
    assert [document.name.rpartition("@")[2] for document in rows] == [str(n) for n in range(2) for _ in rows[::2]]


def test_rows_of_media_read_by_bytes_by_path_and_by_struct(tmp_path: Path) -> None:
    data = save_picture(tmp_path / "a.png", 0).read_bytes()
    for column in (
        [{"bytes": data, "path": "x.png"}, {"bytes": None, "path": "a.png"}],
        [data, data],
        ["a.png", "a.png"],
    ):
        file = tmp_path / "a.parquet"
        pq.write_table(pa.table({"image": column, "caption": ["red", "blue"], "unused": [[1], [2]]}), file)
        documents = read("parquet", file)
        assert [parts(document)[1] for document in documents] == [("text", "red"), ("text", "blue")]
        assert [document.segments[1].is_target for document in documents] == [True, True]
        for document in documents:
            kind, content = parts(document)[0]
            assert kind == "image"
            assert content in (data, tmp_path / "a.png")


def test_keys_of_columns_can_be_set_and_a_missing_one_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"speech": [b"wav"], "words": ["hi"]}), tmp_path / "a.parquet")
    (document,) = read("parquet", tmp_path / "a.parquet", audio_key="speech", text_key="words")
    assert parts(document) == [("audio", b"wav"), ("text", "hi")]
    (missing,) = read("parquet", tmp_path / "a.parquet", text_key="word")
    assert "has no column word; did you mean 'words'?" in missing.problem


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": {"bytes": None, "path": None}, "text": "a"}, "image has neither bytes nor path"),
        ({"image": b"a", "text": None}, "no caption"),
        ({"image": None, "text": None}, "the row is empty"),
        ({"image": 7, "text": "a"}, "image is a number"),
        ({"image": [b"a"], "text": "a"}, "image is a list"),
        ({"text": 7}, "text is a number"),
        ({"text": {"a": 1}}, "text is a mapping"),
        ({"text": b"a"}, "text is no text"),
    ],
)
def test_a_row_that_is_no_document_says_why(row: Any, reason: str, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (document,) = read("parquet", tmp_path / "a.parquet")
    assert reason in document.problem
    assert document.name == f"{tmp_path}/a.parquet@0"


def test_row_groups_are_read_apart_and_rows_keep_their_numbers(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [str(number) for number in range(1_000)]}), file, row_group_size=150)
    whole = read("parquet", file)
    assert [texts(document)[0][0] for document in whole] == [str(number) for number in range(1_000)]
    assert [document.name for document in whole] == [f"{file}@{number}" for number in range(1_000)]
    assert read("parquet", file, part=(0, 3)) + read("parquet", file, part=(3, 7)) == whole


def test_rows_over_the_limit_are_rejects_and_are_not_read(tmp_path: Path) -> None:
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(tmp_path / "a.parquet", schema, compression="none", use_dictionary=False) as writer:
        for text in ("a", "b" * 50_000, "c"):
            writer.write_table(pa.table({"text": [text]}))
    first, large, last = read("parquet", tmp_path / "a.parquet", limit_document_bytes=10_000)
    assert (texts(first), texts(last)) == ([("a", True)], [("c", True)])
    assert large.problem.startswith("the row is over limit_document_bytes=10000")


def tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_members_of_one_key_are_a_sample_media_first(tmp_path: Path) -> None:
    members = [
        ("d/0001.json", b'{"caption": "a cat", "width": 4}'),
        ("d/0001.JPG", b"jpg"),
        ("d/0002.txt", b"two"),
        ("d/0002.json", b'{"text": "not this"}'),
        ("d/0002.a.png", b"a"),
        ("d/0002.b.wav", b"b"),
        ("d/0002.cls", b"7"),
        ("d/README", b"no sample"),
        ("d/0003.txt", b"text alone"),
        ("d/0004.mp4", b"mp4"),
        ("d/0005.cls", b"7"),
    ]
    for name, mode in (("a.tar", "w"), ("a.tar.gz", "w:gz")):
        file = tar(tmp_path / name, members, mode)
        one, two, three, four, five = read("webdataset", file)
        assert parts(one) == [("image", b"jpg"), ("text", "a cat")]
        assert parts(two) == [("image", b"a"), ("audio", b"b"), ("text", "two")]
        assert parts(three) == [("text", "text alone")]
        assert [one.segments[-1].is_target, one.name, three.name] == [True, f"{file}@d/0001", f"{file}@d/0003"]
        assert four.problem == "no caption"
        assert five.problem == "no member of a known extension"


def test_a_members_name_that_is_not_utf_8_can_be_told(tmp_path: Path) -> None:
    member = header("a.X.png", f"{0:011o}\0").replace(b"a.X", b"a.\xff")
    member = member[:148] + b"%06o\0 " % (sum(member[:148]) + sum(member[156:]) + 8 * 32) + member[156:]
    (tmp_path / "a.tar").write_bytes(member + header("a.txt", f"{1:011o}\0") + b"a".ljust(512 * 3, b"\0"))
    (document,) = read("webdataset", tmp_path / "a.tar")
    assert parts(document) == [("image", b""), ("text", "a")]
    assert document.segments[0].content.name == f"{tmp_path}/a.tar@a.\\udcff.png"


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.png", b""), ("a.txt", b"\xff")], "not UTF-8 at byte 0"),
        ([("a.png", b""), ("a.txt", b" ")], "txt is empty"),
        ([("a.png", b""), ("a.json", b"{")], "not JSON"),
        ([("a.png", b""), ("a.json", b"[]")], "a record is a mapping with a text"),
        ([("a.png", b""), ("a.json", b"[" * 100_000)], "nested too deep"),
        ([("a.png", b"b" * 60), ("a.txt", b"c" * 60)], "over limit_document_bytes=100"),
    ],
    ids=range(6),
)
def test_a_sample_that_is_no_document_says_why(members: list[tuple[str, bytes]], reason: str, tmp_path: Path) -> None:
    file = tar(tmp_path / "a.tar", [*members, ("b.txt", b"good")])
    limit = 100 if "limit" in reason else 1 << 20
    bad, good = read("webdataset", file, limit_document_bytes=limit)
    assert reason in bad.problem
    assert texts(good) == [("good", True)]


def test_a_tar_that_is_cut_or_bent_gives_what_stands_before_and_a_reject(tmp_path: Path) -> None:
    """Python's tarfile takes a damaged header for the end, a sample that is cut for a whole one."""
    members = [(f"{number}.{kind}", b"x" * 600) for number in range(5) for kind in ("png", "txt")]
    whole = tar(tmp_path / "a.tar", members).read_bytes()
    block = 512 * 3  # a header and two blocks of data
    for at, count in ((block * 5 + 700, 2), (block * 5 + 100, 2), (block * 6, 2), (block * 4 + 1, 1)):
        is_data = at % block > 512
        for data in (whole[:at], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]):
            (tmp_path / "b.tar").write_bytes(data)
            found = read("webdataset", tmp_path / "b.tar")
            if len(data) == len(whole) and is_data:
                assert [document.problem for document in found] == [None] * 5
                continue
            assert [document.problem is None for document in found] == [True] * count + [False]
            assert f"cannot be read after {count} documents: ReadError" in found[-1].problem


def header(name: str, size: str, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar header of a size as it is written."""
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size.encode("latin-1")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("name", "size", "kind"),
    [
        ("a.txt", "\x80" + "\0" * 3 + "\x0f" + "\xff" * 7, tarfile.REGTYPE),  # 2^60: no file
        ("a.bin", "\x80" + "\0" * 3 + "\x0f" + "\xff" * 7, tarfile.REGTYPE),  # skipped, and not by reading that far
        ("a.txt", "\xff" * 10 + "\xfe\0", tarfile.REGTYPE),  # −512: back to this header, for ever
        ("a.txt", "77777777777\0", tarfile.XHDTYPE),  # 8 GB of fields
        ("a.txt", "77777777777\0", tarfile.GNUTYPE_LONGNAME),
    ],
    ids=["huge", "huge skipped", "negative", "pax", "long name"],
)
def test_a_header_that_lies_neither_hangs_nor_fills_the_memory(
    name: str, size: str, kind: bytes, tmp_path: Path
) -> None:
    (tmp_path / "a.tar").write_bytes(header(name, size, kind) + b"\0" * 2048)
    found = read("webdataset", tmp_path / "a.tar")
    assert found
    assert all(document.problem for document in found)


def test_a_negative_size_among_the_pax_fields_does_not_hang(tmp_path: Path) -> None:
    record = b"%d size=-1024\n" % (len(b" size=-1024\n") + 2)
    data = (
        header("x", f"{len(record):011o}\0", tarfile.XHDTYPE)
        + record.ljust(512, b"\0")
        + header("a.txt", "0" * 11 + "\0")
    )
    (tmp_path / "a.tar").write_bytes(data + b"\0" * 1024)
    (document,) = read("webdataset", tmp_path / "a.tar")
    assert "claims -1024 bytes" in document.problem


def write(folder: Path, **files: str | bytes) -> None:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def test_a_medium_takes_the_text_beside_it(tmp_path: Path) -> None:
    from omniloom.data.config import Manifest, SourceSpec
    from omniloom.data.units import list_units

    write(
        tmp_path,
        photos__a_dot_jpg=b"a",
        photos__a_dot_txt="by its name",
        photos__b_dot_png=b"b",
        photos__c_dot_png=b"c",
        photos__README_dot_md="no medium",
        photos__captions_dot_jsonl='{"file": "b.png", "caption": "by its line"}\n'
        '{"file": "a.jpg", "caption": "not this"}\n{\n',
        sound__deep__d_dot_wav=b"d",
        sound__deep__e_dot_mp3=b"e",
        sound__metadata_dot_csv='file_name,text\ndeep/d.wav,"a, b"\n',
        sound__transcripts_dot_tsv="file\ttranscript\ndeep/e.mp3\tc d\n",
    )
    (unit,) = list_units(Manifest({"a": SourceSpec("folder", ["photos", "sound/**/*"])}), tmp_path)
    found = {Path(document.name).name: document for document in read_documents(unit)}
    assert list(found) == ["a.jpg", "b.png", "c.png", "d.wav", "e.mp3"]
    root = tmp_path.resolve()
    assert parts(found["a.jpg"]) == [("image", root / "photos/a.jpg"), ("text", "by its name")]
    assert parts(found["b.png"])[1] == ("text", "by its line")
    assert parts(found["d.wav"]) == [("audio", root / "sound/deep/d.wav"), ("text", "a, b")]
    assert parts(found["e.mp3"])[1] == ("text", "c d")
    assert found["c.png"].problem.startswith("no caption: neither a .txt of its name nor a line of captions|metadata")
    assert "captions.jsonl: JSONDecodeError" in found["c.png"].problem


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.csv", "transcripts.tsv"])
@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"[" * 100_000, b'a,"' + b"b" * 300_000, b"null\n7\n[]\n", b'{"file": 7, "text": "a"}'],
)
def test_metadata_that_is_none_leaves_its_media_without_captions(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / name).write_bytes(content)
    (document,) = read("folder", tmp_path / "a.png", tmp_path / name)
    assert document.problem.startswith("no caption")


def test_real_folders_read_by_their_captions(real_data: Path) -> None:
    from omniloom.data.config import Manifest, SourceSpec
    from omniloom.data.units import list_units

    patterns = {"image": ["image/photos"], "audio": ["audio/fsdd"], "video": ["video/clips"]}
    for kind, pattern in patterns.items():
        units = list_units(Manifest({"a": SourceSpec("folder", pattern)}), real_data)
        documents = [document for unit in units for document in read_documents(unit)]
        good = [document for document in documents if not document.problem]
        assert len(good) > len(documents) / 2 > 1
        assert all(document.problem.startswith("no caption") for document in documents if document.problem)
        for document in good:
            medium, text = document.segments
            assert (medium.kind, text.kind) == (kind, "text")
            assert medium.content.content.is_file()
            assert text.content.strip()
