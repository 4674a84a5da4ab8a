"""Small corpora made by hand, without Ray: what the tokenize job's workers do, called one after another."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from omniloom.data.config import DecodeConfig
from omniloom.data.corpus import Corpus
from omniloom.data.index import ShardRecord
from omniloom.data.manifest import read_manifest
from omniloom.data.readers import read_documents
from omniloom.data.samples.files import write_mp4, write_wav
from omniloom.data.source import RawDocument, Unit
from omniloom.data.tables import write_index
from omniloom.data.units import list_units
from omniloom.data.write import write_shard as write_shard_within
from omniloom.modality.config import AudioConfig, ImageConfig, ModalityConfig, VideoConfig
from omniloom.modality.media import read_media
from omniloom.modality.sequence import Document, Segment, weave
from omniloom.modality.text import TextTokenizer, train_tokenizer

# A picture is 4 tokens of 12 values, a clip of 1/20 s 5 frames of 4 bands in 3 tokens, a video of 1 s 2 times 4 tokens.
TINY = ModalityConfig(
    ImageConfig(size_pixels=4, patch_pixels=2),
    AudioConfig(mels=4, frames_per_token=2),
    VideoConfig(size_pixels=4, patch_pixels=2, frames_per_second=2),
)


def save_picture(path: Path, seed: int, side: int = 4) -> Path:
    """Random pixels as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    path.write_bytes(stream.getvalue())
    return path


def save_clip(path: Path, seed: int, seconds: float = 0.05, loudness: int = 8_000) -> Path:
    """Random noise as a wav at 16 kHz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).integers(-loudness, loudness + 1, round(16_000 * seconds))
    write_wav(path, samples, 16_000)
    return path


def save_video(path: Path, seed: int, frames: int = 4) -> Path:
    """Random pixels as an mp4 of 4 frames a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(path, np.random.default_rng(seed).integers(0, 256, (frames, 16, 16, 3), np.uint8), 4)
    return path


def save_lines(path: Path, *documents: list[dict[str, Any]] | str) -> Path:
    """An interleaved jsonl: a list is a document's segments, a string a line as it stands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [line if isinstance(line, str) else json.dumps({"segments": line}) for line in documents]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def names_of_lines(path: Path, *numbers: int) -> list[str]:
    """What the documents of a jsonl's lines are called, counted from 1."""
    lines = path.read_bytes().splitlines(keepends=True)
    return [f"{path}@{sum(map(len, lines[: number - 1]))}" for number in numbers]


def make_tokenizer(folder: Path) -> None:
    """A corpus folder with a tokenizer and room for shards."""
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.json").is_file():
        train_tokenizer(iter(["red green blue", "which colour? 123"] * 4), 280).save(folder / "tokenizer.json")


def interleaved_unit(*files: Path, name: str = "pictures-train-00000") -> Unit:
    return Unit(name, "pictures", "train", "interleaved", [str(file) for file in files])


def text_unit(*files: Path, name: str = "words-train-00000") -> Unit:
    return Unit(name, "words", "train", "text", [str(file) for file in files])


def raw_documents(unit: Unit) -> list[RawDocument]:
    """What the unit's files hold before their media are read."""
    return list(read_documents(unit))


def weave_document(raw: RawDocument, tokenizer: TextTokenizer, modality: ModalityConfig) -> Document:
    """A document by itself, its media read in this process: what a shard's documents are held against."""
    assert raw.problem is None
    segments: list[Segment] = []
    for part in raw.segments:
        if isinstance(part.content, str):
            segments.append(tokenizer.segment(part.content, part.is_target))
        else:
            segments += read_media(part.kind, part.content, modality)
    return weave(segments, tokenizer.bos_id, tokenizer.eos_id, tokenizer.placeholder_ids, modality.widths)


def write_shard(unit: Unit, corpus: Path, modality: ModalityConfig) -> ShardRecord:
    """As the tokenize job does it, within its usual limits."""
    return write_shard_within(unit, corpus, modality, DecodeConfig())


def build(manifest_path: Path, folder: Path, modality: ModalityConfig = TINY) -> Corpus:
    """All shards of a manifest and the index, in this process."""
    manifest = read_manifest(manifest_path)
    make_tokenizer(folder)
    records = [write_shard(unit, folder, modality) for unit in list_units(manifest, manifest_path.parent)]
    write_index(folder, manifest, records, modality)
    return Corpus(folder)
