"""Files of any kind, and the sizes that decide their tokens."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from made_media import encode_film, encode_video, large_png, speechlike, tone, wav

from omniloom.errors import ConfigError, DataError
from omniloom.modality.config import AudioConfig, ImageConfig, ModalityConfig, VideoConfig, Widths
from omniloom.modality.files import Media, open_bounded
from omniloom.modality.media import decode_media, read_media, segments_of
from omniloom.modality.sequence import MODALITIES
from omniloom.modality.video import Film

TINY = ModalityConfig(ImageConfig(4, 2), AudioConfig(), VideoConfig(4, 2))
FILES = {
    "image": large_png(8),
    "audio": wav(tone(440, 1, 16_000), 16_000),
    "video": encode_video([0, 1_000]),
}


@pytest.mark.parametrize(("kind", "tokens"), [("image", 4), ("audio", 25), ("video", 8)])
def test_each_kind_is_read_by_its_own_reader_whatever_the_files_name(kind: str, tokens: int, tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(FILES[kind])
    (segment,) = read_media(kind, Media("file", path), TINY)
    assert segment.modality == MODALITIES.index(kind)
    assert len(segment) == tokens
    for other in {"image", "audio", "video"} - {kind}:
        with pytest.raises(DataError, match=r"not a readable|no sound in the file"):
            read_media(other, Media("file", path), TINY)


@pytest.mark.parametrize("kind", FILES)
def test_a_file_over_its_limit_is_refused_before_it_is_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, size = tmp_path / "file", len(FILES[kind])
    path.write_bytes(FILES[kind])
    config = ModalityConfig(*(type(sizes)(limit_bytes=size - 1) for sizes in (TINY.image, TINY.audio, TINY.video)))
    monkeypatch.setattr("omniloom.modality.files.os", None)  # without which no file opens
    with pytest.raises(DataError, match=rf"{size} bytes is over modality\.{kind}\.limit_bytes={size - 1}"):
        read_media(kind, Media("file", path), config)


def test_a_file_of_exactly_its_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    for media in (Media("file", tmp_path / "file"), Media("file", b"12345")):
        with open_bounded(media, 5, "limit") as file:
            assert file.read() == b"12345"
        with pytest.raises(DataError, match="5 bytes is over limit=4"):
            open_bounded(media, 4, "limit")


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_plain_file_is_refused_without_waiting(kind: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name, reason in {
        "pipe": "not a plain file",
        ".": "not a plain file",
        "/dev/zero": "not a plain file",
        "missing": "No such file",
        "dangling": "No such file",
        "a" * 300: "cannot read",
        "nul\0": "cannot read",
    }.items():
        with pytest.raises(DataError, match=reason):
            read_media(kind, Media("file", tmp_path / name), TINY)


@pytest.mark.parametrize("kind", [*FILES, "film"])
def test_what_one_process_decodes_another_makes_the_same_segments_of(kind: str, tmp_path: Path) -> None:
    config = ModalityConfig(TINY.image, AudioConfig(clip_seconds=1), VideoConfig(4, 2, audio=kind == "film"))
    data = encode_film(3, speechlike(3), 16_000) if kind == "film" else FILES[kind]
    medium, kind = Media("file", data), "video" if kind == "film" else kind
    decoded = decode_media(kind, medium, config, tmp_path / "spool")
    assert (tmp_path / "spool").exists() == isinstance(decoded, Film) == (kind == "video")
    handed = pickle.loads(pickle.dumps(decoded))
    assert len(pickle.dumps(decoded)) < 2_000 + sum(part.nbytes for part in getattr(decoded, "sound", [])) + (
        0 if isinstance(decoded, Film) else sum(s.content.nbytes + s.position.nbytes for s in decoded)
    )
    seen, expected = segments_of(handed, config), read_media(kind, medium, config)
    assert len(seen) == len(expected)
    for one, other in zip(seen, expected, strict=True):
        assert one.modality == other.modality
        assert np.array_equal(one.content, other.content)
        assert np.array_equal(one.position, other.position)


def test_a_video_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (segment,) = read_media("video", Media("file", FILES["video"]), TINY)
    assert isinstance(segment.content, np.memmap)
    with pytest.raises(DataError):
        read_media("video", Media("file", b""), TINY)
    assert list(tmp_path.iterdir()) == []


def test_the_defaults_pass_their_own_check_and_have_the_contracts_sizes() -> None:
    config = ModalityConfig()
    config.check()
    assert config.widths == Widths(image=588, audio=80, video=588)
    assert config.image.tokens == 256
    assert config.audio.clip_frames == 3_000
    assert [config.audio.tokens(frames) for frames in (1, 4, 5, 100, 101)] == [1, 1, 2, 25, 26]


@pytest.mark.parametrize("frames_per_token", [2, 4, 8])
def test_a_clips_tokens_are_its_whole_and_begun_groups_of_frames(frames_per_token: int) -> None:
    config = AudioConfig(frames_per_token=frames_per_token)
    for frames in range(1, 40):
        assert config.tokens(frames) == len(range(0, frames, frames_per_token))


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("image", {"size_pixels": 225}, ["modality.image.size_pixels=225", "modality.image.patch_pixels=14"]),
        ("video", {"size_pixels": 225}, ["modality.video.size_pixels=225", "modality.video.patch_pixels=14"]),
        ("video", {"patch_pixels": 0}, ["modality.video.size_pixels=224", "modality.video.patch_pixels=0"]),
        ("audio", {"sample_rate": 0}, ["modality.audio.sample_rate=0", "at least 1"]),
        ("audio", {"mels": 0}, ["modality.audio.mels=0", "at least 1"]),
        ("audio", {"hop_ms": 0}, ["modality.audio.hop_ms=0", "at least 1"]),
        ("audio", {"hop_ms": -10}, ["modality.audio.hop_ms=-10", "at least 1"]),
        ("audio", {"sample_rate": 11_025}, ["modality.audio.window_ms=25", "modality.audio.sample_rate=11025"]),
        ("audio", {"sample_rate": 22_050, "window_ms": 20, "hop_ms": 5}, ["hop_ms=5", "sample_rate=22050"]),
        ("audio", {"window_ms": 5}, ["modality.audio.window_ms=5", "modality.audio.hop_ms=10"]),
        ("audio", {"frames_per_token": 1}, ["modality.audio.frames_per_token=1", "2, 4, 8"]),
        ("audio", {"frames_per_token": 6}, ["modality.audio.frames_per_token=6", "2, 4, 8"]),
        ("audio", {"clip_seconds": 0}, ["modality.audio.clip_seconds=0", "at least 1"]),
        ("audio", {"window_ms": 2_000, "clip_seconds": 1}, ["clip_seconds=1", "modality.audio.window_ms=2000"]),
        ("image", {"resize": "squares"}, ["modality.image.resize=squares is none of fixed, native"]),
        ("image", {"limit_tokens": 0}, ["modality.image.limit_tokens=0", "at least 1"]),
        ("video", {"frames_per_second": 0}, ["modality.video.frames_per_second=0", "at most 60"]),
        ("video", {"frames_per_second": 61}, ["modality.video.frames_per_second=61", "at most 60"]),
        ("video", {"frames_per_second": float("nan")}, ["modality.video.frames_per_second=nan"]),
    ],
)
def test_sizes_that_cannot_hold_are_refused_with_key_and_figures(part: str, changes: dict, said: list[str]) -> None:
    config = ModalityConfig()
    for name, value in changes.items():
        assert hasattr(getattr(config, part), name)
        setattr(getattr(config, part), name, value)
    with pytest.raises(ConfigError) as refused:
        config.check()
    for words in said:
        assert words in str(refused.value)
