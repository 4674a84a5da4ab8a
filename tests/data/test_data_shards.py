"""Shards hold documents bit for bit; a finished one is kept, anything else is written again."""

import gc
import io
import json
import os
import shutil
import tracemalloc
from concurrent.futures import Future
from pathlib import Path

import av
import numpy as np
import pytest
from handmade import (
    TINY,
    build,
    interleaved_unit,
    make_tokenizer,
    names_of_lines,
    raw_documents,
    save_clip,
    save_lines,
    save_picture,
    save_video,
    text_unit,
    weave_document,
    write_shard,
    write_shard_within,
)
from PIL import Image

from omniloom.data.config import DecodeConfig
from omniloom.data.corpus import Corpus, CorpusSplit, Documents
from omniloom.data.decode import Decoders
from omniloom.data.index import LENGTH, ShardRecord, file_sha256
from omniloom.data.samples import write_samples
from omniloom.data.shards import DOCUMENTS_PER_BATCH, Shard
from omniloom.data.source import Unit
from omniloom.data.weave import Weaver
from omniloom.data.write import tables_path, unit_fingerprint
from omniloom.errors import DataError
from omniloom.modality.config import AudioConfig, ImageConfig, ModalityConfig, VideoConfig
from omniloom.modality.files import Media
from omniloom.modality.media import read_media
from omniloom.modality.sequence import AUDIO, IMAGE, TEXT, VIDEO, Document, Segment
from omniloom.modality.text import load_tokenizer

WIDTHS = TINY.widths


def same(left: Document, right: Document) -> bool:
    """Every field equal, dtype and shape too."""
    pairs = [(getattr(left, name), getattr(right, name)) for name in vars(left)]
    return all(a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b) for a, b in pairs)


def woven(unit: Unit, corpus: Path) -> list[Document]:
    tokenizer = load_tokenizer(corpus / "tokenizer.json")
    return [weave_document(raw, tokenizer, TINY) for raw in raw_documents(unit)]


def tables_of(corpus: Path, record: ShardRecord) -> dict[str, np.ndarray]:
    with np.load(tables_path(corpus / "shards" / record.file)) as tables:
        return dict(tables)


def medium(kind: str, path: Path) -> Segment:
    (segment,) = read_media(kind, Media(path.name, path), TINY)
    return segment


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """An empty corpus folder with its tokenizer."""
    make_tokenizer(tmp_path / "corpus")
    return tmp_path / "corpus"


@pytest.fixture
def pictures(tmp_path: Path) -> Unit:
    """Documents of none, one and two pictures, and one of no text at all."""
    for seed in range(3):
        save_picture(tmp_path / f"{seed}.png", seed, side=4 + seed)
    lines = save_lines(
        tmp_path / "pictures.jsonl",
        [{"image": "0.png"}, {"text": "which colour?", "loss": False}, {"text": " red"}],
        [{"text": "no picture here: naïve 猫"}],
        [{"text": "two"}, {"image": "1.png"}, {"text": "and"}, {"image": "2.png"}],
        [{"image": "0.png"}],
    )
    return interleaved_unit(lines)


def test_documents_come_back_bit_for_bit_in_any_order(corpus: Path, pictures: Unit) -> None:
    record = write_shard(pictures, corpus, TINY)
    expected = woven(pictures, corpus)
    shard = Shard(corpus / "shards" / record.file, WIDTHS)
    assert len(expected) == record.documents == 4
    for index in (3, 0, 2, 1, 0):
        assert same(shard.document(index), expected[index]), index
    assert [len(document.image) for document in expected] == [4, 0, 8, 4]
    lengths = tables_of(corpus, record)["lengths"]
    assert lengths.dtype == LENGTH
    assert lengths.tolist() == [(len(document), number == 1) for number, document in enumerate(expected)]
    assert (record.tokens, record.media_tokens) == (sum(map(len, expected)), {"image": 16, "audio": 0, "video": 0})
    assert record.rejects == []


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the media that are given to be decoded, in order."""
    names: list[str] = []
    submit = Decoders.submit

    def noted(decoders: Decoders, kind: str, media: Media) -> "Future[list[Segment]]":
        names.append(media.name)
        return submit(decoders, kind, media)

    monkeypatch.setattr(Decoders, "submit", noted)
    return names


def test_a_medium_shown_again_is_read_once_and_a_changed_one_anew(
    corpus: Path, tmp_path: Path, submitted: list[str]
) -> None:
    for number in (0, 1):
        save_picture(tmp_path / f"{number}.png", number)
    documents = [[{"text": str(i)}, {"image": f"{i % 2}.png"}] for i in range(6)]
    unit = interleaved_unit(save_lines(tmp_path / "a.jsonl", *documents))
    write_shard(unit, corpus, TINY)
    assert submitted == ["0.png", "1.png"]
    save_picture(tmp_path / "0.png", 2)
    record = write_shard(unit, corpus, TINY)
    shard = Shard(corpus / "shards" / record.file, WIDTHS)
    for index, expected in enumerate(woven(unit, corpus)):
        assert same(shard.document(index), expected), index


def test_documents_are_found_across_arrow_batches(corpus: Path, tmp_path: Path) -> None:
    count = DOCUMENTS_PER_BATCH + 3
    save_picture(tmp_path / "0.png", 0)
    picture = [{"image": "0.png"}]
    unit = interleaved_unit(
        save_lines(tmp_path / "a.jsonl", *([{"text": str(i)}, *(picture * (i % 3 == 0))] for i in range(count)))
    )
    record = write_shard(unit, corpus, TINY)
    shard = Shard(corpus / "shards" / record.file, WIDTHS)
    expected = woven(unit, corpus)
    for index in (0, 1, DOCUMENTS_PER_BATCH - 1, DOCUMENTS_PER_BATCH, count - 1):
        assert same(shard.document(index), expected[index]), index
    assert tables_of(corpus, record)["lengths"]["tokens"].tolist() == [len(document) for document in expected]


def test_the_record_names_the_file_it_stands_beside(corpus: Path, pictures: Unit) -> None:
    record = write_shard(pictures, corpus, TINY)
    path = corpus / "shards" / record.file
    assert (record.source, record.split, record.file) == ("pictures", "train", "pictures-train-00000.arrow")
    assert (record.bytes, record.sha256) == (path.stat().st_size, file_sha256(path))
    assert (corpus / "shards" / "pictures-train-00000.json").is_file()


def test_writing_twice_gives_the_same_bytes(corpus: Path, pictures: Unit, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "again")
    assert write_shard(pictures, corpus, TINY) == write_shard(pictures, tmp_path / "again", TINY)


def test_a_finished_shard_is_kept(corpus: Path, pictures: Unit) -> None:
    first = write_shard(pictures, corpus, TINY)
    before = {path.name: path.stat().st_mtime_ns for path in (corpus / "shards").iterdir()}
    assert write_shard(pictures, corpus, TINY) == first
    assert {path.name: path.stat().st_mtime_ns for path in (corpus / "shards").iterdir()} == before


def test_a_shard_is_written_again_when_its_file_changes(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("red")
    first = write_shard(text_unit(path), corpus, TINY)
    path.write_text("red green")
    second = write_shard(text_unit(path), corpus, TINY)
    assert first.fingerprint != second.fingerprint
    assert second.tokens > first.tokens
    path.write_text("green red")  # of the same size
    assert write_shard(text_unit(path), corpus, TINY).sha256 != second.sha256


MEDIA = {"image": (save_picture, "m.png"), "audio": (save_clip, "m.wav"), "video": (save_video, "m.mp4")}


@pytest.fixture
def mixed(tmp_path: Path) -> Unit:
    """Documents of every medium alone, of several in one, some twice, and of text alone."""
    for save, name in MEDIA.values():
        save(tmp_path / name, 0)
        save(tmp_path / f"other.{name[2:]}", 1)
    image, audio, video = ({kind: name} for kind, (_, name) in MEDIA.items())
    other = {kind: {kind: f"other.{name[2:]}"} for kind, (_, name) in MEDIA.items()}
    lines = save_lines(
        tmp_path / "mixed.jsonl",
        [image, {"text": " red"}],
        [audio, {"text": "which?", "loss": False}, {"text": " red"}],
        [{"text": "before"}, video],
        [audio, {"text": "and"}, image, {"text": "and"}, other["audio"], video, other["image"], {"text": " blue"}],
        [{"text": "no medium"}],
        [video, other["video"], image, audio, other["audio"], audio],
    )
    return interleaved_unit(lines, name="mixed-train-00000")


def test_every_medium_comes_back_from_the_shard_byte_for_byte(corpus: Path, mixed: Unit, tmp_path: Path) -> None:
    record = write_shard(mixed, corpus, TINY)
    expected = woven(mixed, corpus)
    shard = Shard(corpus / "shards" / record.file, WIDTHS)
    assert (record.documents, record.rejects) == (6, [])
    for index in (5, 0, 3, 1, 4, 2):
        assert same(shard.document(index), expected[index]), index
    whole = {name: medium(kind, tmp_path / name).content for kind, (_, name) in MEDIA.items()}
    other = {kind: medium(kind, tmp_path / f"other.{name[2:]}").content for kind, (_, name) in MEDIA.items()}
    held = shard.document(5)
    assert np.array_equal(held.video, np.concatenate([whole["m.mp4"], other["video"]]))
    assert np.array_equal(held.image, whole["m.png"])
    assert np.array_equal(held.audio, np.concatenate([whole["m.wav"], other["audio"], whole["m.wav"]]))
    assert held.audio_frames.tolist() == [5, 5, 5]
    assert [len(document.video) for document in expected] == [0, 0, 8, 8, 0, 16]
    placeholders = load_tokenizer(corpus / "tokenizer.json").placeholder_ids
    for document in expected:
        for kind in (IMAGE, AUDIO, VIDEO):
            assert np.array_equal(document.modality == kind, document.input_ids == placeholders[kind])
        assert not document.loss_mask[document.modality != TEXT].any()


def test_tokens_of_each_medium_are_counted(corpus: Path, mixed: Unit) -> None:
    record = write_shard(mixed, corpus, TINY)
    assert record.media_tokens == {"image": 4 * 4, "audio": 6 * 3, "video": 4 * 8}
    documents = woven(mixed, corpus)
    assert record.tokens == sum(map(len, documents))
    lengths = tables_of(corpus, record)["lengths"]
    assert lengths["tokens"].tolist() == [len(document) for document in documents]
    assert lengths["plain"].tolist() == [False, False, False, False, True, False]
    powers = [len(document).bit_length() - 1 for document in documents]
    assert record.lengths == [powers.count(power) for power in range(31)]


@pytest.mark.parametrize("kind", MEDIA)
def test_a_shard_is_written_again_when_one_of_its_media_changes(
    kind: str, corpus: Path, mixed: Unit, tmp_path: Path
) -> None:
    save, name = MEDIA[kind]
    first = write_shard(mixed, corpus, TINY)
    before = unit_fingerprint(mixed, "t", TINY)
    save(tmp_path / f"other.{name[2:]}", seed=99)
    assert unit_fingerprint(mixed, "t", TINY) != before
    record = write_shard(mixed, corpus, TINY)
    assert record.sha256 != first.sha256
    assert same(Shard(corpus / "shards" / record.file, WIDTHS).document(5), woven(mixed, corpus)[5])
    (tmp_path / name).unlink()
    assert unit_fingerprint(mixed, "t", TINY) not in (before, record.fingerprint)


@pytest.mark.parametrize(
    "sizes",
    [
        ModalityConfig(ImageConfig(8, 2), TINY.audio, TINY.video),
        ModalityConfig(TINY.image, AudioConfig(mels=8, frames_per_token=2), TINY.video),
        ModalityConfig(TINY.image, AudioConfig(mels=4, frames_per_token=4), TINY.video),
        ModalityConfig(TINY.image, TINY.audio, VideoConfig(4, 2, frames_per_second=1)),
    ],
)
def test_other_sizes_of_any_medium_make_another_shard(sizes: ModalityConfig, corpus: Path, mixed: Unit) -> None:
    assert unit_fingerprint(mixed, "t", sizes) != unit_fingerprint(mixed, "t", TINY)
    assert write_shard(mixed, corpus, sizes).sha256 != write_shard(mixed, corpus, TINY).sha256


def test_a_shard_is_written_again_for_other_sizes_and_another_tokenizer(corpus: Path, pictures: Unit) -> None:
    first = write_shard(pictures, corpus, TINY)
    second = write_shard(pictures, corpus, ModalityConfig(ImageConfig(8, 2)))
    assert second.media_tokens["image"] == 4 * first.media_tokens["image"]
    path = corpus / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=1), encoding="utf-8")
    assert write_shard(pictures, corpus, ModalityConfig(ImageConfig(8, 2))).fingerprint != second.fingerprint


def cut_arrow(shards: Path) -> None:
    arrow = next(shards.glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:-10])


def remove_arrow(shards: Path) -> None:
    next(shards.glob("*.arrow")).unlink()


def remove_record(shards: Path) -> None:
    """What a kill while the Arrow file was being written leaves."""
    cut_arrow(shards)
    next(shards.glob("*.json")).unlink()


def cut_record(shards: Path) -> None:
    record = next(shards.glob("*.json"))
    record.write_bytes(record.read_bytes()[:-10])


@pytest.mark.parametrize("damage", [cut_arrow, remove_arrow, remove_record, cut_record])
def test_an_unfinished_shard_is_written_again(damage: object, corpus: Path, pictures: Unit) -> None:
    first = write_shard(pictures, corpus, TINY)
    damage(corpus / "shards")
    assert write_shard(pictures, corpus, TINY) == first
    path = corpus / "shards" / first.file
    assert file_sha256(path) == first.sha256
    assert len(Shard(path, WIDTHS)) == 4


def test_a_shard_with_rejects_is_written_again_under_other_limits(corpus: Path, tmp_path: Path) -> None:
    """What was rejected for want of time may be read with more; a shard without rejects stays."""
    save_picture(tmp_path / "a.png", 0)
    lines = save_lines(tmp_path / "a.jsonl", [{"image": "a.png"}, {"text": "a"}], [{"image": "nowhere.png"}])
    unit = interleaved_unit(lines)
    first = write_shard_within(unit, corpus, TINY, DecodeConfig(seconds=1e-4, seconds_per_megabyte=0))
    assert "decoding took over 0.0001 s (decode.seconds=0.0001" in first.rejects[0].reason
    again = write_shard_within(unit, corpus, TINY, DecodeConfig())
    assert (again.documents, len(again.rejects)) == (1, 1)
    arrow = corpus / "shards" / again.file
    written = arrow.stat().st_mtime_ns
    assert write_shard_within(unit, corpus, TINY, DecodeConfig()) == again
    assert arrow.stat().st_mtime_ns == written
    save_lines(lines, [{"image": "a.png"}, {"text": "a"}])
    whole = write_shard_within(unit, corpus, TINY, DecodeConfig())
    assert write_shard_within(unit, corpus, TINY, DecodeConfig(seconds=77)) == whole


def test_a_bad_medium_is_decoded_once_and_leaves_no_result_behind(
    corpus: Path, tmp_path: Path, submitted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    monkeypatch.setattr(Weaver, "__del__", lambda weaver: kept.append(dict(weaver._underway)), raising=False)
    (tmp_path / "bad.png").write_text("no picture")
    for number in range(3):
        save_picture(tmp_path / f"{number}.png", number)
    documents = [[{"image": "bad.png"}, {"image": f"{i % 3}.png"}, {"text": "a"}] for i in range(40)]
    record = write_shard(interleaved_unit(save_lines(tmp_path / "a.jsonl", *documents)), corpus, TINY)
    assert (record.documents, len(record.rejects)) == (0, 40)
    assert sorted(submitted) == ["0.png", "1.png", "2.png", "bad.png"]
    gc.collect()
    assert kept
    assert not any(kept)


def reject(corpus: Path, folder: Path, *segments: dict[str, object]) -> ShardRecord:
    """The record of a shard of one good document, one bad and one good."""
    good = [{"text": "good"}]
    return write_shard(interleaved_unit(save_lines(folder / "a.jsonl", good, list(segments), good)), corpus, TINY)


def test_unreadable_and_missing_pictures_are_rejected_with_file_and_reason(corpus: Path, tmp_path: Path) -> None:
    whole = save_picture(tmp_path / "whole.png", 0)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:-30])
    (tmp_path / "text.png").write_text("no picture")
    documents = [[{"image": f"{name}.png"}, {"text": "a"}] for name in ("whole", "cut", "text", "missing")]
    lines = save_lines(tmp_path / "a.jsonl", *documents, "{", [{"txt": "a"}])
    record = write_shard(interleaved_unit(lines), corpus, TINY)
    assert record.documents == 1
    assert [reject.name for reject in record.rejects] == names_of_lines(lines, 2, 3, 4, 5, 6)
    said = [reject.reason for reject in record.rejects]
    assert "damaged picture" in said[0]
    assert "not a readable JPEG, PNG, GIF, WEBP picture" in said[1]
    assert f"cannot read {tmp_path / 'missing.png'}: No such file" in said[2]
    assert "not JSON" in said[3]
    assert "did you mean 'text'?" in said[4]


def test_unusable_text_files_are_rejected_with_file_and_reason(corpus: Path, tmp_path: Path) -> None:
    for name, content in {"a": b"\xff", "b": b"good", "c": b""}.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    record = write_shard(text_unit(*(tmp_path / f"{name}.txt" for name in "abc")), corpus, TINY)
    assert record.documents == 1
    assert [(Path(reject.name).name, reject.reason) for reject in record.rejects] == [
        ("a.txt", "not UTF-8 at byte 0"),
        ("c.txt", "empty"),
    ]


def bad_media(folder: Path) -> dict[str, tuple[dict[str, object], str]]:
    """Segments that make a document unusable, each with a piece of the reason."""
    save_clip(folder / "silent.wav", 0, loudness=0)
    save_clip(folder / "quiet.wav", 0, loudness=2)
    save_clip(folder / "short.wav", 0, seconds=0.02)
    save_clip(folder / "clip.wav", 0)
    save_video(folder / "film.mp4", 0)
    (folder / "cut.mp4").write_bytes((folder / "film.mp4").read_bytes()[:600])
    (folder / "text.wav").write_text("no sound")
    (folder / "empty.mp4").write_bytes(b"")
    empty_track = io.BytesIO()
    with av.open(empty_track, "w", format="mp4") as container:
        container.add_stream("libx264", rate=4).width = 16
    (folder / "no frame.mp4").write_bytes(empty_track.getvalue())
    return {
        "silent": ({"audio": "silent.wav"}, "silent clip"),
        "under the floor": ({"audio": "quiet.wav"}, "silent clip"),
        "shorter than a window": ({"audio": "short.wav"}, "clip of 320 samples is shorter than one window of 400"),
        "text for sound": ({"audio": "text.wav"}, "not a readable sound file"),
        "sound for a film": ({"video": "clip.wav"}, ""),
        "film for sound": ({"audio": "film.mp4"}, "no sound in the file"),
        "film for a picture": ({"image": "film.mp4"}, "not a readable JPEG, PNG, GIF, WEBP picture"),
        "no frame": ({"video": "no frame.mp4"}, ""),
        "cut film": ({"video": "cut.mp4"}, "not a readable video file"),
        "empty film": ({"video": "empty.mp4"}, "not a readable video file"),
        "no sound file": ({"audio": "nowhere.wav"}, "No such file"),
        "no film": ({"video": "nowhere.mp4"}, "No such file"),
        "unknown key": ({"sound": "clip.wav"}, "unknown key sound"),
        "target": ({"audio": "clip.wav", "loss": True}, "audio cannot be a target"),
    }


def test_bad_media_are_skipped_counted_and_named(corpus: Path, tmp_path: Path) -> None:
    bad = bad_media(tmp_path)
    good = [{"audio": "clip.wav"}, {"video": "film.mp4"}, {"text": " good"}]
    lines = save_lines(
        tmp_path / "a.jsonl", good, *([good[0], entry, {"text": " bad"}] for entry, _ in bad.values()), good
    )
    record = write_shard(interleaved_unit(lines), corpus, TINY)
    assert record.documents == 2
    assert record.media_tokens == {"image": 0, "audio": 6, "video": 16}
    assert [reject.name for reject in record.rejects] == names_of_lines(lines, *range(2, len(bad) + 2))
    for (name, (_, reason)), reject in zip(bad.items(), record.rejects, strict=True):
        assert reason in reject.reason, name
        assert reject.reason, name
        assert len(reject.reason) < 400, name


@pytest.mark.parametrize("path", [".", "", "a/../nowhere.png", "x" * 5_000, "nul\0.png", "half \ud800.png"])
def test_a_picture_path_that_names_no_file_is_rejected(path: str, corpus: Path, tmp_path: Path) -> None:
    record = reject(corpus, tmp_path, {"image": path})
    assert (record.documents, len(record.rejects)) == (2, 1)


def test_half_a_surrogate_pair_is_rejected(corpus: Path, tmp_path: Path) -> None:
    record = reject(corpus, tmp_path, {"text": "half \ud800"})
    assert (record.documents, len(record.rejects)) == (2, 1)


def test_a_picture_with_damaged_exif_does_not_stop_the_shard(corpus: Path, tmp_path: Path) -> None:
    """EXIF of a width given as text, after an orientation: Pillow fails while it writes the rest back."""
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\2\1\x12\0\3\0\0\0\1\0\6\0\0\1\0\0\2\0\0\0\2x\0\0\0\0\0\0\0"
    whole = save_picture(tmp_path / "a.jpg", 0)
    with Image.open(whole) as picture:
        picture.convert("RGB").save(tmp_path / "a.jpg", "JPEG", exif=exif)
    record = reject(corpus, tmp_path, {"image": "a.jpg"})
    assert record.documents + len(record.rejects) == 3


def test_a_picture_file_over_the_limit_is_rejected_without_being_read(corpus: Path, tmp_path: Path) -> None:
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(100 << 20)
    tracemalloc.start()
    try:
        record = reject(corpus, tmp_path, {"image": "huge.png"})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "modality.image.limit_bytes" in record.rejects[0].reason
    assert peak < 50 << 20


@pytest.mark.timeout(5)
def test_a_picture_path_that_is_a_pipe_is_rejected(corpus: Path, tmp_path: Path) -> None:
    """Opening one waits for a writer, and a device like /dev/zero never ends: only plain files are pictures."""
    os.mkfifo(tmp_path / "pipe.png")
    record = reject(corpus, tmp_path, {"image": "pipe.png"})
    assert (record.documents, len(record.rejects)) == (2, 1)


def test_targets_are_counted_in_the_training_text_alone(corpus: Path, pictures: Unit) -> None:
    record = write_shard(pictures, corpus, TINY)
    tokenizer = load_tokenizer(corpus / "tokenizer.json")
    expected = [0] * tokenizer.vocab_size
    for document in woven(pictures, corpus):
        for token, is_target in zip(document.input_ids.tolist(), document.loss_mask.tolist(), strict=True):
            expected[token] += is_target
    assert sum(expected) > 20
    assert expected[tokenizer.placeholder_ids[1]] == 0
    assert tables_of(corpus, record)["targets"].tolist() == expected


def test_a_unit_without_a_usable_document_makes_an_empty_shard(corpus: Path, tmp_path: Path) -> None:
    record = write_shard(interleaved_unit(save_lines(tmp_path / "a.jsonl", "{")), corpus, TINY)
    assert (record.documents, record.tokens, len(record.rejects)) == (0, 0, 1)
    assert len(Shard(corpus / "shards" / record.file, WIDTHS)) == 0


@pytest.fixture
def smoke(tmp_path: Path) -> Corpus:
    """A whole corpus of the smoke samples, shards of all sources and both splits."""
    return build(write_samples("smoke", tmp_path / "files"), tmp_path / "smoke")


def shard_paths(corpus: Corpus, split: str) -> list[Path]:
    return [corpus.folder / "shards" / shard["file"] for shard in corpus.shard_table(split).to_pylist()]


def test_a_corpus_gives_each_split_its_documents_in_shard_order(smoke: Corpus) -> None:
    for split, words, each in (("train", 8, 60), ("heldout", 2, 12)):
        documents = Documents([smoke], split)
        assert len(documents) == words + 3 * each
        assert documents.modality.widths == WIDTHS
        source = [documents.source(number) for number in range(len(documents))]
        assert source == [0] * words + np.repeat([1, 2, 3], each).tolist()
        lengths = documents.lengths(np.arange(len(documents)))
        assert lengths["plain"].tolist() == [number == 0 for number in source]
        shards = [Shard(path, WIDTHS) for path in shard_paths(smoke, split)]
        expected = [shard.document(index) for shard in shards for index in range(len(shard))]
        assert len(expected) == len(documents)
        for index, document in enumerate(expected):
            assert same(documents.document(index), document)
            assert lengths["tokens"][index] == len(document)
        for number, record in enumerate(smoke.index.sources):
            mine = [document for document, s in zip(expected, source, strict=True) if s == number]
            held = record.split(split)
            assert (held.documents, held.tokens) == (len(mine), sum(map(len, mine)))
            assert sum(held.lengths) == len(mine)
    assert not list(smoke.rejects())


def test_two_corpora_are_one_range_of_documents(smoke: Corpus, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("red green")
    manifest = tmp_path / "corpus.yaml"
    manifest.write_text("sources: {more: {format: text, train: ['*.txt']}}")
    (tmp_path / "more").mkdir()
    shutil.copyfile(smoke.folder / "tokenizer.json", tmp_path / "more" / "tokenizer.json")
    more = build(manifest, tmp_path / "more")
    both, first = Documents([smoke, more], "train"), Documents([smoke], "train")
    assert both.names == [*first.names, "more"]
    assert len(both) == len(first) + 1
    for number in range(len(first)):
        assert same(both.document(number), first.document(number))
        assert both.source(number) == first.source(number)
    assert same(both.document(len(first)), CorpusSplit(more, "train").document(0))
    assert both.source(len(first)) == 4
    with pytest.raises(DataError, match="both have a source"):
        Documents([smoke, smoke], "train")
    (tmp_path / "b.txt").write_text("blue")
    other = build(manifest, tmp_path / "other")
    other.index.files["tokenizer.json"].sha256 = "another"
    with pytest.raises(DataError, match=r"tokenizers of .* differ: tokenize the second with tokenizer.path="):
        Documents([smoke, other], "train")


def test_opening_a_corpus_opens_no_shard(smoke: Corpus) -> None:
    """However many there are: a missing one is missed when a document of it is asked for, or by `verify`."""
    for path in shard_paths(smoke, "train"):
        path.unlink()
    documents = Documents([Corpus(smoke.folder)], "train")
    with pytest.raises(DataError, match="has 0 bytes"):
        documents.document(0)


def test_a_split_without_a_file_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("red green")
    manifest = tmp_path / "corpus.yaml"
    manifest.write_text("sources: {words: {format: text, train: ['*.txt']}}")
    assert len(Documents([build(manifest, tmp_path / "corpus")], "heldout")) == 0


def test_a_corpus_that_opens_twice_has_one_hash_and_names_its_rejects(tmp_path: Path) -> None:
    lines = save_lines(tmp_path / "a.jsonl", [{"text": "good"}], "[]", "[]", "{}")
    manifest = tmp_path / "corpus.yaml"
    manifest.write_text(f"sources: {{pictures: {{format: interleaved, train: [{lines.name}]}}}}")
    corpus = build(manifest, tmp_path / "corpus")
    assert Corpus(corpus.folder).sha256 == corpus.sha256
    assert [reject.name for reject in Corpus(corpus.folder).rejects()] == names_of_lines(lines, 2, 3, 4)
    assert corpus.index.sources[0].train.rejects == 3


def test_a_missing_corpus_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no corpus at .*none: set corpus="):
        Corpus(tmp_path / "none")


def test_a_half_built_corpus_says_so(smoke: Corpus) -> None:
    (smoke.folder / "index.json").unlink()
    with pytest.raises(DataError, match="it is half built: repeat the same tokenize command"):
        Corpus(smoke.folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"[", b"\xff"])
def test_an_index_that_is_none_is_refused(content: bytes, smoke: Corpus) -> None:
    (smoke.folder / "index.json").write_bytes(content)
    with pytest.raises(DataError, match="is no corpus index"):
        Corpus(smoke.folder)


def test_a_shard_of_another_size_than_the_table_says_is_refused(smoke: Corpus) -> None:
    path = shard_paths(smoke, "train")[0]
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    for ask in (Corpus(smoke.folder).verify, lambda: Documents([smoke], "train").document(0)):
        with pytest.raises(DataError, match=f"has {size - 1:,} bytes, the index says {size:,}: tokenize again"):
            ask()
    path.unlink()
    with pytest.raises(DataError, match=f"has 0 bytes, the index says {size:,}"):
        Corpus(smoke.folder).verify()


@pytest.mark.parametrize("name", ["tokenizer.json", "target_counts.json", "train.lengths", "heldout.shards.arrow"])
def test_a_table_that_is_not_the_one_that_was_written_is_refused(name: str, smoke: Corpus) -> None:
    """When the corpus is opened: packing would go on for ever with a table of lengths that is cut short."""
    path = smoke.folder / name
    content = path.read_bytes()
    path.write_bytes(content + b" ")
    with pytest.raises(DataError, match=f"{name} has {len(content) + 1:,} bytes, the index says {len(content):,}"):
        Corpus(smoke.folder)
    path.unlink()
    with pytest.raises(DataError, match=f"{name} has 0 bytes"):
        Corpus(smoke.folder)


def test_another_vocabulary_of_the_same_size_is_refused(smoke: Corpus) -> None:
    smoke.verify()
    path = smoke.folder / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"bos", b"BOS"))
    with pytest.raises(DataError, match="is not the one the shards were made with"):
        Corpus(smoke.folder).verify()


def test_a_document_lies_where_its_file_is_mapped(tmp_path: Path) -> None:
    """One frame of an hour's film must not cost a copy of the hour."""
    save_video(tmp_path / "film.mp4", 0)
    save_clip(tmp_path / "clip.wav", 0)
    picture = save_picture(tmp_path / "picture.png", 0)
    media = [{"image": picture.name}, {"audio": "clip.wav"}, {"video": "film.mp4"}]
    lines = save_lines(tmp_path / "lines.jsonl", [*media, {"text": "red"}])
    make_tokenizer(tmp_path)
    record = write_shard(interleaved_unit(lines), tmp_path, TINY)
    shard = Shard(tmp_path / "shards" / record.file, TINY.widths)
    once, again = shard.document(0), shard.document(0)
    for name, array in vars(once).items():
        assert array.size, name
        assert array.ctypes.data == getattr(again, name).ctypes.data, name
