"""A video's frames lie in a file and its sound between them: as plain loops over PyAV's frames say."""

import io
import math
import pickle
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from made_media import encode_film, encode_video, peak_growth_bytes, shade, speechlike

from omniloom.errors import DataError
from omniloom.modality.audio import log_mel
from omniloom.modality.config import AudioConfig, VideoConfig
from omniloom.modality.files import Media
from omniloom.modality.sequence import AUDIO, VIDEO, Segment
from omniloom.modality.video import decode_video, film_segments, read_video

SOUND = AudioConfig()
RATE = SOUND.sample_rate


def heard_at(frames_per_second: float = 1, **changes: int) -> VideoConfig:
    return VideoConfig(size_pixels=4, patch_pixels=2, frames_per_second=frames_per_second, audio=True, **changes)


def read(data: bytes, config: VideoConfig, audio: AudioConfig = SOUND) -> list[Segment]:
    return read_video(Media("film", data), config, audio)


def literal_film(data: bytes, frames_per_second: float) -> list[tuple[int, list[list[float]]]]:
    """(grey, log-mel frames) of each tick, read in two passes over the whole file; the sound is at RATE."""
    with av.open(io.BytesIO(data)) as container:
        pictures = [(f.time, f.to_ndarray(format="rgb24").mean()) for f in container.decode(video=0)]
    with av.open(io.BytesIO(data)) as container:
        sounds = [(frame.time, frame.to_ndarray().flatten() / 2**15) for frame in container.decode(audio=0)]
    mel = log_mel(np.concatenate([samples for _, samples in sounds]).astype(np.float32), SOUND).astype(np.float16)
    film, tick = [], 0
    while tick / frames_per_second <= pictures[-1][0] - pictures[0][0] + 5e-4:
        at = pictures[0][0] + tick / frames_per_second
        grey = [grey for time, grey in pictures if time <= at + 5e-4][-1]
        until = at + 1 / frames_per_second
        times = [sounds[0][0] + number / 100 for number in range(len(mel))]
        film.append((grey, [list(m) for t, m in zip(times, mel, strict=True) if at - 5e-4 <= t < until - 5e-4]))
        tick += 1
    return film


def check(segments: list[Segment], expected: list[tuple[int, list[list[float]]]]) -> None:
    """The segments show and sound as `expected`; a run of frames without sound is one segment."""
    kinds, tick = [segment.modality for segment in segments], 0
    assert all(pair != (VIDEO, VIDEO) for pair in pairwise(kinds))
    for segment in segments:
        if segment.modality == AUDIO:
            assert segment.content.tolist() == expected[tick - 1][1]
            assert segment.position.tolist() == [[t, 0, 0] for t in range(math.ceil(len(segment.content) / 4))]
            continue
        for frame in segment.content.reshape(-1, 4, 12):
            assert np.abs(frame.astype(int) - expected[tick][0]).max() <= 2
            tick += 1
        times = range(tick - len(segment) // 4, tick)
        assert segment.position.tolist() == [[t, r, c] for t in times for r in range(2) for c in range(2)]
    assert tick == len(expected)
    assert kinds.count(AUDIO) == sum(bool(mel) for _, mel in expected)


@pytest.mark.parametrize("container", ["matroska", "mov", "avi"])
@pytest.mark.parametrize("frames_per_second", [1, 2, 4, 0.5])
def test_the_sound_from_each_frame_to_the_next_follows_it(container: str, frames_per_second: float) -> None:
    data = encode_film(3.2, speechlike(3.2), RATE, container)
    segments = read(data, heard_at(frames_per_second))
    assert {segment.modality for segment in segments} == {VIDEO, AUDIO}
    check(segments, literal_film(data, frames_per_second))
    if container != "avi" and frames_per_second == 1:
        assert [len(s.content) for s in segments if s.modality == AUDIO] == [100, 100, 100, 20]


@pytest.mark.parametrize(
    ("sound_s", "starts_ms"),
    [(1.5, 0), (6, 0), (2, 1_500), (2, 250), (0.7, 2_900), (1, 30_000)],
    ids=["short", "long", "late", "a little late", "at the end", "after it"],
)
def test_sound_lies_where_its_times_say(sound_s: float, starts_ms: int) -> None:
    data = encode_film(3, speechlike(sound_s), RATE, sound_starts_ms=(starts_ms,))
    check(read(data, heard_at()), literal_film(data, 1))


def test_sound_that_begins_before_the_pictures_is_cut_to_them() -> None:
    stream = io.BytesIO()
    sound = speechlike(4)
    with av.open(stream, "w", format="matroska") as output:
        track, heard = output.add_stream("mpeg4", rate=10), output.add_stream("pcm_s16le", rate=RATE, layout="mono")
        track.width = track.height = 32
        track.pix_fmt = "yuv420p"
        for at in range(0, len(sound), 1_600):
            values = (sound[None, at : at + 1_600] * 2**15).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(values, format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, at, Fraction(1, RATE)
            output.mux(heard.encode(frame))
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), shade(number), np.uint8), format="rgb24")
            frame.pts, frame.time_base = 10 + number, Fraction(1, 10)
            output.mux(track.encode(frame))
        output.mux(track.encode(None))
    segments = read(stream.getvalue(), heard_at())
    check(segments, literal_film(stream.getvalue(), 1))
    mel = log_mel((sound * 2**15).astype(np.int16).astype(np.float32) / 2**15, SOUND).astype(np.float16)
    assert np.array_equal(segments[1].content, mel[100:200])


def test_a_hole_in_the_sound_is_silent() -> None:
    data = encode_film(4, speechlike(2), RATE, sound_starts_ms=(0, 2_500))
    clips = [s.content for s in read(data, heard_at()) if s.modality == AUDIO]
    assert [len(clip) for clip in clips] == [100, 100, 100, 50]
    assert (clips[1][2:] == -10).all()
    assert (clips[2][:48] == -10).all()
    assert (clips[2][52:].astype(float).max(axis=1) > -4).all()
    assert (clips[3].astype(float).max(axis=1) > -4).all()


def test_without_a_sound_or_with_a_silent_one_there_is_one_segment(tmp_path: Path) -> None:
    plain = encode_film(3, speechlike(3), RATE)
    silent = encode_film(3, np.zeros(3 * RATE, np.float32), RATE)
    for data, config in (
        (plain, VideoConfig(4, 2)),
        (silent, heard_at()),
        (encode_video([0, 1_000, 2_000]), heard_at()),
        (encode_film(3, speechlike(0.02), RATE), heard_at()),  # shorter than a window
    ):
        film = decode_video(Media("film", data), config, SOUND, tmp_path / "film")
        assert film.sound == []
        (segment,) = film_segments(film, SOUND)
        assert len(segment) == 12
        assert segment.position[:, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_sound_between_two_frames_is_cut_into_clips() -> None:
    data = encode_film(5, speechlike(5), RATE)
    segments = read(data, heard_at(0.25), AudioConfig(clip_seconds=1))
    assert [(s.modality, len(s.content)) for s in segments] == [(3, 4), *[(2, 100)] * 4, (3, 4), (2, 100)]


@pytest.mark.parametrize(("container", "codec"), [("mp4", "aac"), ("matroska", "libopus"), ("mpegts", "aac")])
def test_compressed_sound_of_another_rate_is_heard_in_time(container: str, codec: str) -> None:
    loud = np.concatenate([np.zeros(48_000), speechlike(1, 48_000), np.zeros(48_000)]).astype(np.float32)
    data = encode_film(3, loud, 48_000, container, codec)
    clips = [s.content.astype(float) for s in read(data, heard_at()) if s.modality == AUDIO]
    assert len(clips) == 3
    assert clips[1][10:90].mean() > -5
    for quiet in (clips[0], clips[2]):
        assert quiet[10:90].mean() < clips[1].mean() - 2


def test_sound_without_numbers_refuses_the_video() -> None:
    sound = speechlike(1)
    sound[700] = math.nan
    data = encode_film(1, sound, RATE, codec="pcm_f32le")
    with pytest.raises(DataError, match="no numbers"):
        read(data, heard_at())
    assert len(read(data, VideoConfig(4, 2))) == 1


def test_sound_far_past_the_limit_is_let_go() -> None:
    data = encode_film(2, speechlike(2), RATE, sound_starts_ms=(0, 3_600_000))
    segments = read(data, heard_at(limit_seconds=3))
    assert [len(s.content) for s in segments] == [4, 100, 4]


def test_a_film_is_a_file_of_frames_that_its_segments_map(tmp_path: Path) -> None:
    data, path = encode_film(3, speechlike(3), RATE), tmp_path / "film"
    film = decode_video(Media("film", data), heard_at(2), SOUND, path)
    assert (film.path, film.frames, film.grid, film.patch_values) == (path, 6, (2, 2), 12)
    assert path.stat().st_size == 6 * 4 * 12
    assert film.sound[0].dtype == np.float16
    segments = film_segments(pickle.loads(pickle.dumps(film)), SOUND)
    videos = [segment.content for segment in segments if segment.modality == VIDEO]
    assert all(isinstance(content, np.memmap) for content in videos)
    assert len({id(content._mmap) for content in videos}) == 1
    assert path.read_bytes() == b"".join(content.tobytes() for content in videos)
    path.unlink()
    assert videos[5].mean() == pytest.approx(shade(25), abs=4)  # still mapped
    with pytest.raises(ValueError, match="read-only"):
        videos[0][0, 0] = 1


def test_path_and_bytes_read_alike(tmp_path: Path) -> None:
    data, path = encode_film(2, speechlike(2), RATE), tmp_path / "concat:odd name.txt"
    path.write_bytes(data)
    for one, other in zip(read(data, heard_at()), read_video(Media("f", path), heard_at(), SOUND), strict=True):
        assert np.array_equal(one.content, other.content)
        assert np.array_equal(one.position, other.position)


def test_a_full_disk_is_no_fault_of_the_video() -> None:
    data = encode_video(list(range(0, 300_000, 1_000)))
    with pytest.raises(OSError, match="No space left"):
        decode_video(Media("film", data), VideoConfig(), SOUND, Path("/dev/full"))


@pytest.mark.slow
@pytest.mark.parametrize("audio", [False, True])
def test_peak_memory_does_not_grow_with_the_length_of_a_video(tmp_path: Path, audio: bool) -> None:
    peaks = []
    for seconds in (30, 600):
        path = tmp_path / f"{seconds}.mkv"
        path.write_bytes(encode_film(seconds, speechlike(seconds), RATE))
        config = f"config.VideoConfig(audio={audio}), config.AudioConfig()"
        peaks += peak_growth_bytes("video.read_video", path, config=config)
    # 570 frames more are 8.6e7 bytes of patches, their sound 1.8e7 of samples as 16 bits and 9e6 of log-mel frames.
    assert peaks[1] - peaks[0] < (3e7 if audio else 1.5e7)


@pytest.mark.slow
def test_no_more_than_a_few_large_frames_are_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.mp4"
    path.write_bytes(encode_video(list(range(0, 300_000, 1_000)), "mp4", (1_280, 720), "mpeg4"))
    (growth,) = peak_growth_bytes("video.read_video", path, config="config.VideoConfig(), config.AudioConfig()")
    assert growth < 8e7  # all 300 as decoded are 4.1e8


@pytest.mark.slow
def test_every_real_clip_sounds_as_its_own_track(real_data: Path) -> None:
    heard = 0
    for path in sorted((real_data / "video").rglob("*")):
        if path.suffix not in {".mp4", ".webm", ".mkv", ".mov", ".avi"}:
            continue
        segments = read_video(Media(path.name, path), heard_at(), SOUND)
        with av.open(str(path)) as container:
            has_sound = bool(container.streams.audio)
        heard += has_sound
        assert has_sound or {segment.modality for segment in segments} == {VIDEO}, path.name
        assert all(np.isfinite(segment.content).all() for segment in segments), path.name
        alone = read_video(Media(path.name, path), VideoConfig(4, 2), SOUND)[0].content
        assert np.array_equal(np.concatenate([s.content for s in segments if s.modality == VIDEO]), alone), path.name
