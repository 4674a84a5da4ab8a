"""Files of every format, damaged at random: what comes out are documents and rejects, and it ends."""

import gzip
import importlib.util
import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from omniloom.data.config import Reading
from omniloom.data.index import Reject
from omniloom.data.readers import read_documents
from omniloom.data.source import Unit
from omniloom.modality.files import Media

spec = importlib.util.spec_from_file_location("made_media", Path(__file__).parents[1] / "modality" / "made_media.py")
assert spec is not None
assert spec.loader is not None
made_media = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made_media)

QUICK = 40
SHELLS = ("jsonl_gz", "jsonl_zst", "tar_gz")  # so small a file is unpacked whole or not at all
MANY = 10_000 if "OMNILOOM_SOAK" in os.environ else 300
WORDS = ("red", "naïve", "猫", "\ud83d\ude00", "a\nb", "", "\0")


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def tar(mode: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode, format=tarfile.PAX_FORMAT) as archive:
        for number, name in enumerate(("a.png", "a.txt", "ü" * 120 + ".wav", "ü" * 120 + ".json", "c.0.mp4", "c.txt")):
            data = b'{"caption": "c"}' if name.endswith("json") else b"data" * (number * 50)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def table(rows: list[dict[str, Any]], **options: Any) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream, row_group_size=2, **options)
    return stream.getvalue()


TURNS = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
PARTS = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "a.png"}}],
    },
    {"role": "assistant", "content": "seen"},
]
TEXTS = lines(*({"text": f"{number} {'words ' * number}"} for number in range(20)))
CHATS = lines(
    {"messages": TURNS},
    {"messages": PARTS},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "a", "input": "b", "output": "c"},
    {"messages": [PARTS[0] | {"content": [{"type": "audio", "url": "data:audio/wav;base64,AAAA"}]}, TURNS[1]]},
)
PREFERENCES = lines(
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": TURNS[1:]},
    {"chosen": TURNS, "rejected": TURNS},
)
INTERLEAVED = lines(
    {"segments": [{"image": "a.png"}, {"text": "which?", "loss": False}, {"text": " red"}]},
    {"segments": [{"audio": "s3://b/a.wav"}, {"video": "file:///a.mp4"}, {"text": "hi"}]},
)
ROWS = [
    {"image": {"bytes": bytes(range(200)), "path": "a.png"}, "text": "red", "audio": b"wav"},
    {"image": {"bytes": None, "path": "b.png"}, "text": "blue", "audio": None},
] * 4
CSV = b'file_name,text\na.png,"a, ""b"""\n'

# By name: format, the file's name, what it holds.
FILES: dict[str, tuple[str, str, bytes]] = {
    "text": ("text", "a.txt", "Two lines,\nnaïve 猫.\n".encode() * 20),
    "jsonl": ("jsonl", "a.jsonl", TEXTS),
    "jsonl_gz": ("jsonl", "a.jsonl.gz", gzip.compress(TEXTS, mtime=0)),
    "jsonl_zst": ("jsonl", "a.jsonl.zst", pa.compress(TEXTS, "zstd", asbytes=True)),
    "chat": ("chat", "a.jsonl", CHATS),
    "preference": ("preference", "a.jsonl", PREFERENCES),
    "interleaved": ("interleaved", "a.jsonl", INTERLEAVED),
    "tar": ("webdataset", "a.tar", tar("w")),
    "tar_gz": ("webdataset", "a.tar.gz", tar("w:gz")),
    "parquet": ("parquet", "a.parquet", table(ROWS)),
    "parquet_plain": ("parquet", "a.parquet", table(ROWS, compression="none", use_dictionary=False)),
    "parquet_zstd": ("parquet", "a.parquet", table(ROWS, compression="zstd", data_page_version="2.0")),
    "parquet_chat": ("chat", "a.parquet", table([{"messages": TURNS}] * 6)),
    "folder_jsonl": ("folder", "captions.jsonl", lines({"file": "a.png", "caption": "red"})),
    "folder_csv": ("folder", "metadata.csv", CSV),
    "folder_txt": ("folder", "a.txt", b"red"),
}


def typed(data: bytes, generator: random.Random) -> bytes:
    """JSON damaged by value: a number, null, list, mapping or half of a surrogate pair where something else stood."""
    records = [json.loads(line) for line in data.splitlines()]

    def bent(value: Any) -> Any:
        if generator.random() < 0.15:
            return generator.choice(
                [None, 7, 1.5, True, [], {}, "", "\ud800", "a\0b", "http://a", [[None]], {"url": {}}]
            )
        if isinstance(value, dict):
            return {generator.choice([key, key, key, key[:-1]]): bent(held) for key, held in value.items()}
        return [bent(held) for held in value] if isinstance(value, list) else value

    return lines(*(bent(record) for record in records))


def check(name: str, count: int, folder: Path, damage: Callable[[bytes, random.Random], bytes]) -> None:
    """Every damaged file gives documents and rejects that can be written down, the same ones twice."""
    format, file_name, data = FILES[name]
    path = folder / file_name
    (folder / "a.png").write_bytes(b"")
    files = [str(folder / "a.png"), str(path)] if format == "folder" else [str(path)]
    unit = Unit("a-train-00000", "a", "train", format, files, None, Reading(limit_document_bytes=2_000))
    outcomes = {True: 0, False: 0}
    for seed in range(count):
        path.write_bytes(damage(data, random.Random(f"{name} {seed}")))
        documents = list(read_documents(unit))
        for document in documents:
            outcomes[document.problem is None] += 1
            TypeAdapter(Reject).dump_json(Reject(document.name, document.problem or ""))
            assert " at 0x" not in (document.problem or "")
            assert bool(document.segments) == (document.problem is None)
            for segment in document.segments:
                content = segment.content
                assert isinstance(content, str) or not segment.is_target
                (content if isinstance(content, str) else content.name).encode()
                if isinstance(content, Media) and isinstance(content.content, bytes):
                    assert len(content.content) <= len(data) + 2_000
        if seed % 16 == 0:
            assert list(read_documents(unit)) == documents
    assert outcomes[False], outcomes
    assert outcomes[True] or name in SHELLS, outcomes


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_documents_and_rejects(name: str, tmp_path: Path) -> None:
    check(name, QUICK, tmp_path, made_media.damaged)


@pytest.mark.slow
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("name", FILES)
def test_many_damaged_files_are_documents_and_rejects(name: str, tmp_path: Path) -> None:
    check(name, MANY, tmp_path, made_media.damaged)


RECORDS = ["jsonl", "chat", "preference", "interleaved", "folder_jsonl"]


@pytest.mark.parametrize("name", RECORDS)
def test_records_of_wrong_types_are_rejects(name: str, tmp_path: Path) -> None:
    check(name, QUICK, tmp_path, typed)


@pytest.mark.slow
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("name", RECORDS)
def test_many_records_of_wrong_types_are_rejects(name: str, tmp_path: Path) -> None:
    check(name, MANY, tmp_path, typed)


@pytest.mark.parametrize("suffix", ["jsonl_gz", "jsonl_zst", "tar_gz"])
def test_damage_inside_of_a_sound_shell(suffix: str, tmp_path: Path) -> None:
    """The packing is whole, what it holds is not."""
    plain = {"jsonl_gz": TEXTS, "jsonl_zst": TEXTS, "tar_gz": FILES["tar"][2]}[suffix]

    def inside(data: bytes, generator: random.Random) -> bytes:
        bent = made_media.damaged(plain, generator)
        return pa.compress(bent, "zstd", asbytes=True) if suffix == "jsonl_zst" else gzip.compress(bent, mtime=0)

    check(suffix, QUICK, tmp_path, inside)
