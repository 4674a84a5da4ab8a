"""Files of a store are found, read, told apart and fetched as those of a folder; fsspec's memory:// stands for one."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from handmade import TINY, build, make_tokenizer, save_picture, save_video

from omniloom.data import readers, storage, weave
from omniloom.data.config import DecodeConfig, Manifest, SourceSpec
from omniloom.data.corpus import Documents
from omniloom.data.decode import Decoders
from omniloom.data.readers import read_documents, unit_state
from omniloom.data.source import RawDocument, RawSegment, RemoteMedia, Unit
from omniloom.data.storage import fetch, file_state, said, store_of
from omniloom.data.units import list_units
from omniloom.data.weave import Weaver
from omniloom.errors import ClusterError, DataError
from omniloom.modality.files import Media
from omniloom.modality.text import load_tokenizer


@pytest.fixture
def store() -> Iterator[Any]:
    """fsspec's file system in memory, emptied."""
    memory = fsspec.filesystem("memory")
    memory.rm("/", recursive=True) if memory.ls("/") else None
    yield memory
    memory.rm("/", recursive=True) if memory.ls("/") else None


def units(format: str, *patterns: str, folder: Path = Path(), **keys: Any) -> list[Unit]:
    return list_units(Manifest({"a": SourceSpec(format, list(patterns), **keys)}), folder)


def documents(format: str, *patterns: str, **keys: Any) -> list[RawDocument]:
    return [document for unit in units(format, *patterns, **keys) for document in read_documents(unit)]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_files_of_a_store_are_globbed_and_read(suffix: str, store: Any) -> None:
    for number in range(2):
        data = f'{{"text": "{number}"}}\n{{"text": "more"}}\n'.encode()
        if suffix:
            data = pa.compress(data, "gzip" if suffix == ".gz" else "zstd", asbytes=True)
        store.pipe(f"/bucket/{number}.jsonl{suffix}", data)
    store.pipe("/bucket/other.txt", b"other")
    found = documents("jsonl", f"memory://bucket/*.jsonl{suffix}")
    assert [document.segments[0].content for document in found] == ["0", "more", "1", "more"]
    assert found[1].name == f"memory:///bucket/0.jsonl{suffix}@14"


def test_a_store_and_a_folder_are_read_alike_in_parts(store: Any, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"{number} " * 500}) + "\n" for number in range(2_000))
    store.pipe("/bucket/a.jsonl", lines.encode())
    (tmp_path / "a.jsonl").write_text(lines)
    remote, local = units("jsonl", "memory://bucket/a.jsonl"), units("jsonl", "a.jsonl", folder=tmp_path)
    assert [unit.part for unit in remote] == [unit.part for unit in local]
    assert len(remote) > 3
    for left, right in zip(remote, local, strict=True):
        assert [d.segments for d in read_documents(left)] == [d.segments for d in read_documents(right)]


def test_a_file_url_is_a_local_path(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (unit,) = units("text", f"file://{tmp_path}/*.txt")
    assert unit.files == [str(tmp_path.resolve() / "a.txt")]


def test_parquet_and_tars_of_a_store_are_read(store: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "image": ["x.png", "../y.png"]}), tmp_path / "a.parquet")
    store.pipe("/bucket/d/a.parquet", (tmp_path / "a.parquet").read_bytes())
    one, two = documents("parquet", "memory://bucket/d/*.parquet")
    assert one.segments[0].content == RemoteMedia("x.png", "memory:///bucket/d/x.png")
    assert two.segments[0].content == RemoteMedia("../y.png", "memory:///bucket/y.png")


def test_media_beside_a_stores_document_are_fetched_within_their_limit(store: Any, tmp_path: Path) -> None:
    store.pipe("/bucket/a.jsonl", b'{"segments": [{"image": "a.png"}, {"image": "memory://other/b.png"}]}')
    store.pipe("/bucket/a.png", b"12345")
    (document,) = documents("interleaved", "memory://bucket/a.jsonl")
    beside, elsewhere = (segment.content for segment in document.segments)
    assert fetch(beside, 5, "modality.image.limit_bytes", tmp_path) == Media("a.png", b"12345")
    with pytest.raises(DataError, match=r"file of 5 bytes is over modality.image.limit_bytes=4"):
        fetch(beside, 4, "modality.image.limit_bytes", tmp_path)
    with pytest.raises(DataError, match=r"cannot read memory://other/b.png: FileNotFoundError"):
        fetch(elsewhere, 5, "modality.image.limit_bytes", tmp_path)


def test_a_large_medium_of_a_store_goes_by_a_file_that_is_removed(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is decoded or rejected, also where its document is; and one that is shown again is fetched once."""
    monkeypatch.setattr(storage, "FETCHED_BYTES", 100)
    spool = tmp_path / "spool"
    spool.mkdir()
    film = save_video(tmp_path / "a.mp4", 0)
    store.pipe({"/b/a.mp4": film.read_bytes(), "/b/bad.mp4": b"no film" * 100})
    good, bad, gone = (RawSegment("video", RemoteMedia(n, f"memory://b/{n}"), False) for n in ("a.mp4", "bad.mp4", "c"))
    whole = RawSegment("video", Media("a.mp4", film), False)
    copies: list[str] = []
    copy = type(store).get_file
    monkeypatch.setattr(type(store), "cat_file", None)
    monkeypatch.setattr(type(store), "get_file", lambda s, url, to: (copies.append(url), copy(s, url, to)))
    make_tokenizer(tmp_path)
    raws = [RawDocument("x", segments) for segments in ([good], [whole], [bad, good], [gone, good], [good, bad])]
    with Decoders(TINY, DecodeConfig(), spool) as decoders:
        woven = [document for _, document in Weaver(load_tokenizer(tmp_path / "tokenizer.json"), decoders).weave(raws)]
    assert copies == ["memory://b/a.mp4", "memory://b/bad.mp4"]
    assert (woven[0].video == woven[1].video).all()
    assert "not a readable video" in str(woven[2])
    assert "FileNotFoundError" in str(woven[3])
    assert str(woven[4]) == str(woven[2])
    assert not list(spool.iterdir())


def test_a_copy_that_breaks_off_leaves_nothing_behind(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(self: Any, url: str, to: str) -> None:
        Path(to).write_bytes(b"half")
        raise TimeoutError("no answer")

    store.pipe("/b/a.mp4", bytes(storage.FETCHED_BYTES + 1))
    monkeypatch.setattr(type(store), "get_file", break_off)
    with pytest.raises(ClusterError, match=r"cannot read memory://b/a.mp4: TimeoutError"):
        fetch(RemoteMedia("a", "memory://b/a.mp4"), 1 << 30, "key", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_window_counts_the_bytes_of_a_stores_media(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weave, "WINDOW_MEDIA_BYTES", 20)
    store.pipe({f"/b/{number}": bytes(10) for number in range(5)})
    names = [*range(5), "gone"]
    raws = [RawDocument("x", [RawSegment("video", RemoteMedia("a", f"memory://b/{n}"), False)]) for n in names]
    assert [len(window) for window in weave._windows(raws)] == [2, 2, 2]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/passwd", "names the local file /etc/passwd"),
        ("file:///etc/passwd", "names the local file"),
        ("../../other/a.png", "lies outside of"),
        ("http://169.254.169.254/a", "http:// is not read"),
        ("ssh://host/a", "ssh:// is no store"),
        ("memory://a::file://b", "is no store"),
    ],
)
def test_a_stores_document_names_no_file_of_elsewhere(name: str, reason: str, store: Any) -> None:
    store.pipe("/bucket/a.jsonl", json.dumps({"segments": [{"image": name}]}).encode())
    (document,) = documents("interleaved", "memory://bucket/a.jsonl")
    assert reason in document.problem


def test_a_folder_of_a_store_takes_the_text_beside_its_media(store: Any) -> None:
    store.pipe({"/b/d/a.png": b"a", "/b/d/a.txt": b"by its name", "/b/d/c.png": b"c", "/b/d/e.png": b"e"})
    store.pipe("/b/metadata.jsonl", b'{"file_name": "d/c.png", "text": "by its line"}\n')
    found = documents("folder", "memory://b/d")
    assert [d.segments[-1].content if d.segments else d.problem[:10] for d in found] == [
        "by its name",
        "by its line",
        "no caption",
    ]
    assert found[0].segments[0].content == RemoteMedia("a.png", "memory:///b/d/a.png")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("memory://nowhere/*.txt", "no train file matches memory://nowhere"),
        ("http://a/*.txt", "http:// is not read: download the file"),
        ("s4://a/*.txt", "s4:// is no store; did you mean 's3'?"),
        ("memory://a::zip://b", "is no store"),
    ],
)
def test_a_pattern_of_no_store_is_refused(pattern: str, message: str, store: Any) -> None:
    with pytest.raises(DataError, match=r"source a: .*train") as refused:
        units("text", pattern)
    assert message in str(refused.value)


def test_a_store_without_its_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "find_spec", lambda name: None)
    storage._store.cache_clear()
    for protocol, package in (("s3", "s3fs"), ("gs", "gcsfs"), ("hf", "huggingface_hub"), ("az", "adlfs")):
        with pytest.raises(DataError, match=f"{protocol}:// needs the package {package}: pip install {package}"):
            store_of(f"{protocol}://a/b")


def test_a_store_that_fails_is_no_damage_of_the_file(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would leave out documents in silence: the job fails, and is repeated."""
    store.pipe("/bucket/a.jsonl", b'{"text": "a"}\n')
    (unit,) = units("jsonl", "memory://bucket/a.jsonl")

    def fail(*args: Any, **keys: Any) -> Any:
        raise TimeoutError("no answer")

    monkeypatch.setattr(type(store), "open", fail)
    with pytest.raises(ClusterError, match=r"cannot read memory:///bucket/a.jsonl: TimeoutError: no answer: finished"):
        list(read_documents(unit))
    monkeypatch.setattr(type(store), "size", fail)
    with pytest.raises(ClusterError, match="TimeoutError"):
        fetch(RemoteMedia("a", "memory://bucket/a.jsonl"), 100, "key", tmp_path)


def test_a_stores_file_that_is_gone_is_a_reject(store: Any) -> None:
    store.pipe("/bucket/a.jsonl", b'{"text": "a"}\n')
    (unit,) = units("jsonl", "memory://bucket/a.jsonl")
    store.rm("/bucket/a.jsonl")
    (document,) = read_documents(unit)
    assert "FileNotFoundError" in document.problem


def test_the_state_of_a_file_changes_with_it(store: Any, tmp_path: Path) -> None:
    store.pipe("/bucket/a", b"1")
    (tmp_path / "a").write_bytes(b"1")
    for file, write in (("memory://bucket/a", lambda data: store.pipe("/bucket/a", data)), (str(tmp_path / "a"), None)):
        before = file_state(file)
        assert file_state(file) == before
        (write or (tmp_path / "a").write_bytes)(b"22")
        assert file_state(file) != before
        json.dumps(before)


@pytest.mark.parametrize("where", ["memory", "local"])
def test_the_state_of_a_unit_covers_the_media_that_it_names(where: str, store: Any, tmp_path: Path) -> None:
    lines = b'{"messages": [{"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}]}\n'
    if where == "memory":
        store.pipe({"/b/a.jsonl": lines, "/b/a.png": b"1"})
        (unit,) = units("chat", "memory://b/a.jsonl")
    else:
        (tmp_path / "a.jsonl").write_bytes(lines)
        (tmp_path / "a.png").write_bytes(b"1")
        (unit,) = units("chat", "a.jsonl", folder=tmp_path)
    before = unit_state(unit)
    store.pipe("/b/a.png", b"22") if where == "memory" else (tmp_path / "a.png").write_bytes(b"22")
    assert unit_state(unit) != before


@pytest.mark.parametrize(
    ("column", "is_read"),
    [
        (None, False),
        (pa.array([b"png", None], pa.binary()), False),
        (pa.array([b"png", None], pa.large_binary()), False),
        (pa.array([{"bytes": b"a", "path": "a.png"}, {"bytes": b"b", "path": None}]), False),
        (pa.array([{"bytes": b"a", "path": None}, {"bytes": None, "path": "a.png"}]), True),
        (pa.array([{"bytes": b"a", "path": "a.png"}, None]), True),
        (pa.array([{"path": "a.png"}] * 2), True),
        (pa.array(["a.png", None]), True),
        (pa.array([[b"a"], None]), True),
    ],
)
def test_rows_are_read_for_their_media_only_where_one_may_be_a_path(
    column: pa.Array | None, is_read: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = {"text": ["a", "b"]} | ({"image": column} if column is not None else {})
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    (unit,) = units("parquet", "a.parquet", folder=tmp_path)
    seen: list[str] = []
    real = readers._file_documents
    monkeypatch.setattr(readers, "_file_documents", lambda unit, file: (seen.append(file), real(unit, file))[1])
    unit_state(unit)
    assert bool(seen) == is_read


@pytest.mark.parametrize(
    ("type", "is_read"), [('"text"', False), ('"image"', True), ('"input_audio"', True), ('"vide\\u006f"', True)]
)
def test_lines_are_read_for_their_media_only_where_one_may_be_named(
    type: str, is_read: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = f'{{"type": {type}, "text": "a", "path": "a.png"}}'
    (tmp_path / "a.jsonl").write_text(f'{{"messages": [{{"role": "assistant", "content": [{part}]}}]}}\n')
    (unit,) = units("chat", "a.jsonl", folder=tmp_path)
    named = [s.content for d in read_documents(unit) for s in d.segments if isinstance(s.content, Media)]
    assert bool(named) == is_read
    assert len(unit_state(unit)) == 1 + is_read
    monkeypatch.setattr(readers, "_file_documents", lambda unit, file: iter(()) if is_read else pytest.fail("read"))
    unit_state(unit)


def test_what_an_error_said_is_short_and_the_same_from_run_to_run() -> None:
    for _ in range(2):
        text = said(ValueError(f"line\nof {object()} \ud800 {'x' * 1_000}"))
        assert text.startswith("ValueError: line of <object object> \\ud800 xxx")
        assert len(text) == 200


def test_documents_of_every_format_become_shards(store: Any, tmp_path: Path) -> None:
    """By path, by bytes and by URL, a picture is the same one."""
    png = save_picture(tmp_path / "d" / "a.png", 0).read_bytes()
    store.pipe({"/b/a.jsonl": b'{"segments": [{"image": "a.png"}, {"text": "red"}]}', "/b/a.png": png})
    (tmp_path / "d" / "a.txt").write_text("red")
    pq.write_table(pa.table({"image": [png], "caption": ["red"]}), tmp_path / "a.parquet")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "d" / "a.png", "a.png")
        archive.add(tmp_path / "d" / "a.txt", "a.txt")
    turns = [{"role": "user", "content": "which?"}, {"role": "assistant", "content": "red"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}))
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "which?", "chosen": "red", "rejected": "blue"}))
    sources = {
        "interleaved": "memory://b/a.jsonl",
        "parquet": "a.parquet",
        "webdataset": "a.tar",
        "folder": "d",
        "chat": "chat.jsonl",
        "preference": "pairs.jsonl",
    }
    manifest = {name: {"format": name, "train": [pattern]} for name, pattern in sources.items()}
    (tmp_path / "manifest.yaml").write_text(json.dumps({"sources": manifest}))
    corpus = build(tmp_path / "manifest.yaml", tmp_path / "corpus")
    assert not list(corpus.rejects())
    split = Documents([corpus], "train")
    first = split.document(0)
    assert first.image.any()
    for index in range(1, 4):
        assert (split.document(index).image == first.image).all()
        assert split.document(index).input_ids.tolist() == first.input_ids.tolist()
    for index, answer in ((4, " red"), (5, " red"), (6, " blue")):
        document = split.document(index)
        *learned, end = document.input_ids[document.loss_mask > 0].tolist()
        assert (split.tokenizer.decode(learned), end) == (answer, split.tokenizer.eos_id)
