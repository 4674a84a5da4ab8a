"""Damaged files give valid segments or a DataError: no other exception, no crash, hang, NaN or flood of memory.

`make test-slow` reads some hundred mutations with each decoder; with OMNILOOM_SOAK set over 10,000.
"""

import io
import os
import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from math import ceil
from time import process_time

import numpy as np
import pytest
from made_media import (
    SOUND_FORMATS,
    VIDEO_FORMATS,
    damaged,
    encode_film,
    encode_sound,
    encode_video,
    large_png,
    mp3_with_cover,
    peak_bytes,
    png_bytes,
    png_video,
    reset_peak,
    speechlike,
    wav,
)
from PIL import Image

from omniloom.errors import DataError
from omniloom.modality.config import AudioConfig, ImageConfig, ModalityConfig, VideoConfig
from omniloom.modality.files import Media
from omniloom.modality.media import read_media
from omniloom.modality.sequence import AUDIO, VIDEO, Segment

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, about samples that are no numbers
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Pillow's, about damaged EXIF
]

CONFIG = ModalityConfig(
    ImageConfig(patch_pixels=4, resize="native", limit_tokens=64, limit_side_pixels=1_000),
    AudioConfig(limit_seconds=20, clip_seconds=8),
    VideoConfig(size_pixels=8, patch_pixels=4, limit_seconds=20, limit_side_pixels=1_000, audio=True),
)
QUICK, MANY = 250, 10_400 if os.environ.get("OMNILOOM_SOAK") else 800  # mutations of each kind
LIMIT_S = 20  # of processor time, for files of a few kilobytes
LIMIT_BYTES = 400_000_000
READ = "read"


def whole_pictures() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (24, 20, 4), np.uint8)) for _ in range(3)]
    deep = generator.integers(0, 2**16, (24, 20, 4), np.uint16)

    def saved(format: str, mode: str = "RGB", animated: bool = False, **options: object) -> bytes:
        stream = io.BytesIO()
        first, *rest = (picture.convert(mode) for picture in pictures)
        first.save(stream, format, **options, **({"save_all": True, "append_images": rest} if animated else {}))
        return stream.getvalue()

    return {
        "jpeg": saved("JPEG", exif=exif),
        "progressive jpeg": saved("JPEG", progressive=True),
        "cmyk jpeg": saved("JPEG", "CMYK"),
        "png": saved("PNG", exif=exif),
        "palette png": saved("PNG", "P", transparency=bytes(range(256))),
        "1-bit png": saved("PNG", "1"),
        "grey and alpha png": saved("PNG", "LA"),
        "animated png": saved("PNG", "RGBA", animated=True),
        "16-bit grey png": png_bytes(deep[..., :1], 0, tRNS=b"\x40\x00"),
        "16-bit colour png": png_bytes(deep[..., :3], 2, tRNS=b"\x40\x00\x40\x00\x40\x00"),
        "16-bit alpha png": png_bytes(deep, 6),
        "gif": saved("GIF"),
        "animated gif": saved("GIF", "RGBA", animated=True),
        "webp": saved("WEBP", exif=exif),
        "lossless webp": saved("WEBP", "RGBA", lossless=True),
        "animated webp": saved("WEBP", "RGBA", animated=True),
    }


def whole_sounds() -> dict[str, bytes]:
    sounds = {name: encode_sound(speechlike(0.3, 48_000), 48_000, name) for name in SOUND_FORMATS}
    sounds |= {name: encode_sound(speechlike(0.3, 48_000), 48_000, name, "aac") for name in ("mp4", "adts")}
    return sounds | {
        "matroska": encode_sound(speechlike(0.3, 48_000), 48_000, "matroska", "libopus"),
        "mov": encode_sound(speechlike(0.3), 16_000, "mov", "alac"),
        "float wav": wav(speechlike(0.3), 16_000, 32, is_float=True),
        "8-bit wav": wav(speechlike(0.3), 11_025, 8),
        "24-bit wav of 3 channels": wav(np.stack([speechlike(0.2)] * 3), 16_000, 24),
        "wav of 7 channels": wav(np.stack([speechlike(0.1)] * 7), 16_000),
        "empty wav": wav(np.zeros(0), 16_000),
        "mp3 with a cover": mp3_with_cover(large_png(9), encode_sound(speechlike(0.2), 16_000, "mp3")),
        "sound of a video": encode_film(0.5, speechlike(0.5), 16_000),
    }


def whole_videos() -> dict[str, bytes]:
    times = list(range(0, 2_000, 100))
    videos = {name: encode_video(times, name) for name in VIDEO_FORMATS}
    return videos | {
        "mpegts": encode_video(times, "mpegts", codec="libx264"),
        "variable rate": encode_video([0, 10, 700, 710, 2_900, 3_300], "mp4"),
        "png mov": png_video(large_png(9), 9),
        "mp4 with sound": encode_film(2, speechlike(2, 48_000), 48_000, "mp4", "aac"),
        "matroska with sound": encode_film(2, speechlike(2), 16_000),
        "avi with sound": encode_film(2, speechlike(2), 16_000, "avi"),
    }


def check_image(segments: list[Segment]) -> None:
    (segment,) = segments
    down, across = segment.position[-1, 1:] + 1
    assert 1 <= len(segment) == down * across <= 64
    assert segment.position.tolist() == [[0, r, c] for r in range(down) for c in range(across)]
    assert segment.content.dtype == np.uint8
    assert segment.content.shape == (len(segment), 48)


def check_audio(segments: list[Segment]) -> None:
    assert 1 <= len(segments) <= 3
    for segment in segments:
        assert segment.modality == AUDIO
        assert np.isfinite(segment.content).all()
        assert segment.content.shape[1] == CONFIG.audio.mels
        assert 1 <= len(segment) == CONFIG.audio.tokens(len(segment.content)) <= 201
        assert segment.position.tolist() == [[t, 0, 0] for t in range(len(segment))]


def check_video(segments: list[Segment]) -> None:
    videos = [segment for segment in segments if segment.modality == VIDEO]
    content = np.concatenate([segment.content for segment in videos])
    assert content.dtype == np.uint8
    assert content.shape[1] == 48
    assert 1 <= len(content) / 4 <= 21
    position = np.concatenate([segment.position for segment in videos])
    assert position.tolist() == [[n // 4, n // 2 % 2, n % 2] for n in range(len(content))]
    for segment in segments:
        if segment.modality == AUDIO:
            check_audio([segment])


KINDS: dict[str, tuple[Callable[[], dict[str, bytes]], Callable[[list[Segment]], None]]] = {
    "image": (cache(whole_pictures), check_image),
    "audio": (cache(whole_sounds), check_audio),
    "video": (cache(whole_videos), check_video),
}
CASES = [(kind, name) for kind, (make, _) in KINDS.items() for name in make()]


def outcome(kind: str, data: bytes, what: str) -> str:
    """READ, or why a file was refused; anything else, or more than its time and memory, fails the test."""
    started, held, result = process_time(), reset_peak(), READ
    try:
        KINDS[kind][1](read_media(kind, Media("file", data), CONFIG))
    except DataError as error:
        result = str(error)
    except Exception as error:
        pytest.fail(f"{what} raised {error!r}")
    assert process_time() - started < LIMIT_S, what
    assert peak_bytes() - held < LIMIT_BYTES, what
    return result


def mutate(kind: str, name: str, seed: str, count_of_kind: int) -> Counter[str]:
    """How many mutations of a file came to each outcome, of so many that all files of its kind share."""
    whole, generator, outcomes = KINDS[kind][0]()[name], random.Random(seed), Counter[str]()
    for number in range(ceil(count_of_kind / len(KINDS[kind][0]()))):
        data = damaged(whole, generator)
        outcomes[outcome(kind, data, f"mutation {number} of {kind} {name}, seed {seed!r},")] += 1
    return outcomes


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_are_read_and_no_others(kind: str) -> None:
    for other, (make, _) in KINDS.items():
        for name, data in make().items():
            result = outcome(kind, data, name)
            if kind == other:
                assert (result == READ) == (name != "empty wav"), name
            elif "image" in (kind, other):
                assert result != READ, name
    for nothing in (b"", b"\0", bytes(5_000), b"\xff" * 5_000, os.urandom(5_000), "naïve\n".encode() * 900):
        assert outcome(kind, nothing, "noise") != READ


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_anywhere_gives_segments_or_a_data_error(kind: str) -> None:
    for name, data in KINDS[kind][0]().items():
        for eighth in range(8):
            outcome(kind, data[: len(data) * eighth // 8], f"{eighth} eighths of {name}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_gives_segments_or_a_data_error_in_the_same_words(kind: str) -> None:
    """The reason goes into the corpus's index, whose hash must not change from run to run."""
    runs = [Counter[str](), Counter[str]()]
    for outcomes in runs:
        for name in KINDS[kind][0]():
            outcomes.update(mutate(kind, name, f"{name} quick", QUICK))
    assert runs[0] == runs[1]
    assert not any("0x" in reason for reason in runs[0])
    assert QUICK / 5 < runs[0][READ] < QUICK * 9 / 10


@pytest.mark.slow
@pytest.mark.timeout(7_200)
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_many_damaged_files_give_segments_or_a_data_error(kind: str, name: str) -> None:
    outcomes = mutate(kind, name, f"{name} many {os.environ.get('OMNILOOM_SOAK', '')}", MANY)
    assert len(outcomes) > 1 or name == "empty wav", outcomes
