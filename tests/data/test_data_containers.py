"""Rows of Parquet, samples of tars and media of folders become documents; damage is told, whatever it claims."""

import io
import tarfile
from pathlib import Path
from typing import Any

import av
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from handmade import save_picture
from read_raw import parts, read, texts

from omniloom.data.config import Manifest, SourceSpec
from omniloom.data.readers import read_documents, unit_state
from omniloom.data.readers.media import MEDIA_KINDS
from omniloom.data.source import Unit
from omniloom.data.units import list_units
from omniloom.modality import audio, video


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


def test_every_container_that_a_decoder_opens_is_a_medium_by_its_name() -> None:
    # What FFmpeg does not list itself: they are its ogg, mp4 and aac by other names.
    others = {"oga": "ogg", "opus": "ogg", "ogv": "ogg", "m4v": "mp4"}
    for kind, containers in (("audio", audio.CONTAINERS), ("video", video.CONTAINERS)):
        opened = set().union(*(av.ContainerFormat(name).extensions for name in containers.split(",")))
        assert {others.get(name, name) for name, of in MEDIA_KINDS.items() if of == kind} <= opened
    for name in (audio.CONTAINERS + "," + video.CONTAINERS).split(","):
        extensions = av.ContainerFormat(name).extensions
        assert {others.get(extension, extension) for extension in MEDIA_KINDS} & extensions, name


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
        ([("a.bmp", b"b"), ("a.txt", b"c")], "not a medium: .bmp is not read; known are jpg, jpeg"),
        ([("a.png", b"b"), ("a.depth.NPY", b"b"), ("a.json", b'{"text": "c"}')], "not a medium: .npy is not read"),
        ([("a.png", b"b" * 60), ("a.txt", b"c" * 60)], "over limit_document_bytes=100"),
    ],
    ids=range(8),
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


def folder_units(folder: Path, *patterns: str, **keys: Any) -> list[Unit]:
    return list_units(Manifest({"a": SourceSpec("folder", list(patterns), **keys)}), folder)


def test_a_medium_takes_the_text_beside_it(tmp_path: Path) -> None:
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
    unit, lines = folder_units(tmp_path, "photos", "sound/**/*")
    (bad,) = read_documents(lines)
    assert bad.name.startswith(f"{tmp_path}/photos/captions.jsonl@")
    assert "JSONDecodeError" in bad.problem
    found = {Path(document.name).name: document for document in read_documents(unit)}
    assert list(found) == ["a.jpg", "b.png", "c.png", "d.wav", "e.mp3"]
    root = tmp_path.resolve()
    assert parts(found["a.jpg"]) == [("image", root / "photos/a.jpg"), ("text", "by its name")]
    assert parts(found["b.png"])[1] == ("text", "by its line")
    assert parts(found["d.wav"]) == [("audio", root / "sound/deep/d.wav"), ("text", "a, b")]
    assert parts(found["e.mp3"])[1] == ("text", "c d")
    assert found["c.png"].problem.startswith("no caption: neither a .txt of its name nor a line of captions|metadata")
    assert "captions.jsonl@85: JSONDecodeError" in found["c.png"].problem


def test_files_that_are_no_media_are_rejects(tmp_path: Path) -> None:
    """But not what systems and tools leave beside them."""
    write(tmp_path, a_dot_bmp=b"a", a_dot_txt="red", b_dot_png=b"b", b_dot_txt="blue", HASH=b"h")
    write(tmp_path, README_dot_md="", _dot_DS_Store="", labels_dot_json="", LICENSE="", _dot_git__x="")
    problems = {Path(d.name).name: d.problem for unit in folder_units(tmp_path, "*") for d in read_documents(unit)}
    assert list(problems) == ["HASH", "a.bmp", "b.png"]
    assert problems["HASH"].startswith("not a medium: a file without an extension is not read; known are jpg, jpeg")
    assert problems["a.bmp"].startswith("not a medium: .bmp is not read; known are jpg, jpeg")
    assert problems["b.png"] is None


def test_bad_lines_of_metadata_are_rejects_once(tmp_path: Path) -> None:
    """In however many units and splits the media of their folders are."""
    write(
        tmp_path,
        captions_dot_csv="file,text\nd/0.png,red\nd/7.png,red\n,red\nd/1.png,\n",
        d__metadata_dot_jsonl='{"file": "8.png", "text": "red"}\n{"file": "2.png", "text": "blue"}\n',
        **{f"d__{number}_dot_png": bytes(1 << 20) for number in range(4)},
    )
    units = folder_units(tmp_path, "captions.csv", "d/0.png", "d/[1-2].png", heldout=["d/3.png"])
    assert [len(unit.files) for unit in units] == [3, 3, 3, 2, 3]
    bad = {d.name.rpartition("/")[2]: d.problem for unit in units for d in read_documents(unit) if d.problem}
    own = {name: problem for name, problem in bad.items() if "@" in name}
    assert own == {
        "captions.csv@1": "names a file that is not there: 7.png",
        "captions.csv@2": "ValueError: none of file_name, file, path, file_path in a line",
        "metadata.jsonl@0": "names a file that is not there: 8.png",
    }
    assert bad.keys() - own == {"1.png", "3.png"}  # their own rejects, for want of a caption
    before = unit_state(units[3])
    (tmp_path / "d" / "8.png").write_bytes(b"")
    assert unit_state(units[3]) != before


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
    patterns = {"image": ["image/photos"], "audio": ["audio/fsdd"], "video": ["video/clips"]}
    for kind, pattern in patterns.items():
        units = folder_units(real_data, *pattern)
        documents = [document for unit in units for document in read_documents(unit)]
        good = [document for document in documents if not document.problem]
        assert len(good) > len(documents) / 2 > 1
        assert all(document.problem.startswith("no caption") for document in documents if document.problem)
        for document in good:
            medium, text = document.segments
            assert (medium.kind, text.kind) == (kind, "text")
            assert medium.content.content.is_file()
            assert text.content.strip()
