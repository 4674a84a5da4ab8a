"""Video files become patches of the frames on screen at each tick, or are refused with a DataError."""

import io
import json
import random
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from made_media import (
    VIDEO_FORMATS,
    encode_sound,
    encode_video,
    large_png,
    peak_growth_bytes,
    png_video,
    shade,
    tone,
    wav,
)
from PIL import Image

from omniloom.errors import DataError
from omniloom.modality.config import AudioConfig, VideoConfig
from omniloom.modality.files import Media
from omniloom.modality.sequence import VIDEO, Segment
from omniloom.modality.video import read_video

TINY = VideoConfig(size_pixels=4, patch_pixels=2)  # 4 tokens a frame
UNREADABLE = "not a readable video file"


def film(content: bytes | Path, config: VideoConfig) -> Segment:
    """A video without its sound: one segment."""
    (segment,) = read_video(Media("film", content), config, AudioConfig())
    return segment


def at_rate(frames_per_second: float, **changes: int) -> VideoConfig:
    return VideoConfig(size_pixels=4, patch_pixels=2, frames_per_second=frames_per_second, **changes)


def shown(times_ms: list[int], frames_per_second: float) -> list[int]:
    """Number of the frame on screen at each tick, up to the last frame's own time; a loop over milliseconds."""
    numbers, tick = [], 0
    while tick * 1_000 / frames_per_second <= times_ms[-1] - times_ms[0]:
        at = times_ms[0] + tick * 1_000 / frames_per_second
        numbers.append(max(n for n, time in enumerate(times_ms) if time <= at))
        tick += 1
    return numbers


def check_shades(segment: Segment, numbers: list[int], tokens: int = 4) -> None:
    greys = segment.content.reshape(len(numbers), tokens, -1).astype(int)
    for tick, number in enumerate(numbers):
        assert np.abs(greys[tick] - shade(number)).max() <= 6, (tick, number)


@pytest.mark.parametrize("container", [*VIDEO_FORMATS, "mov", "mpegts"])
@pytest.mark.parametrize("frames_per_second", [1, 2, 4, 0.5, 3])
def test_a_constant_rate_shows_the_frame_of_each_tick(container: str, frames_per_second: float) -> None:
    times = list(range(0, 3_100, 100))
    codec = {"mov": "libx264", "mpegts": "libx264"}.get(container)
    segment = film(encode_video(times, container, codec=codec), at_rate(frames_per_second))
    numbers = shown(times, frames_per_second)
    assert len(segment) == 4 * len(numbers)
    check_shades(segment, numbers)


@pytest.mark.parametrize("container", ["mp4", "matroska", "webm"])
@pytest.mark.parametrize("seed", range(6))
def test_a_variable_rate_shows_the_frame_on_screen_at_each_tick(container: str, seed: int) -> None:
    generator = random.Random(seed)
    start = generator.choice((0, 0, 700, 5_000))
    times = sorted({start, *(start + generator.randrange(1, 6_000) for _ in range(generator.randrange(1, 12)))})
    rate = generator.choice((1, 2, 4))
    segment = film(encode_video(times, container), at_rate(rate))
    numbers = shown(times, rate)
    assert len(segment) == 4 * len(numbers), times
    check_shades(segment, numbers)


@pytest.mark.parametrize(
    ("times", "numbers"),
    [
        ([0], [0]),
        ([7_300], [0]),
        ([0, 999], [0]),
        ([0, 1_000], [0, 1]),
        ([0, 1_001], [0, 0]),
        ([5_000, 5_400, 6_500], [0, 1]),
        ([0, 400, 1_400, 1_500, 2_600], [0, 1, 3]),
        ([0, 3_500, 3_600], [0, 0, 0, 0]),
    ],
)
def test_ticks_by_hand(times: list[int], numbers: list[int]) -> None:
    segment = film(encode_video(times), TINY)
    assert len(segment) == 4 * len(numbers)
    check_shades(segment, numbers)


def test_frames_stored_in_another_order_come_in_the_order_of_their_times() -> None:
    times = list(range(0, 4_000, 125))
    rng = np.random.default_rng(0)
    pictures = [np.clip(shade(n) + rng.integers(-4, 4, (32, 32, 3)), 0, 255).astype(np.uint8) for n in range(32)]
    data = encode_video(times, pictures=pictures, bf="3", **{"x264-params": "b-adapt=0:scenecut=0"})
    with av.open(io.BytesIO(data)) as container:
        stored = [packet.pts for packet in container.demux(video=0) if packet.pts is not None]
    assert stored != sorted(stored)  # it has B-frames
    segment = film(data, at_rate(2))
    greys = segment.content.reshape(8, -1).mean(axis=1)
    assert np.abs(greys - [shade(n) for n in range(0, 32, 4)]).max() < 10


def test_a_minute_at_30_frames_a_second_is_15360_tokens() -> None:
    times = [round(n * 1_000 / 30) for n in range(1_800)]
    segment = film(encode_video(times, codec="mpeg4"), VideoConfig())
    assert VideoConfig().frames_per_second == 1
    assert len(segment) == 15_360
    assert segment.content.shape == (15_360, 588)
    assert segment.position[[0, 255, 256, -1]].tolist() == [[0, 0, 0], [0, 15, 15], [1, 0, 0], [59, 15, 15]]
    check_shades(segment, list(range(0, 1_800, 30)), tokens=256)


def lossless(pictures: list[np.ndarray], container: str = "matroska") -> bytes:
    """A frame a second, each pixel as given."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as output:
        track = output.add_stream("ffv1", rate=1)
        track.height, track.width = pictures[0].shape[:2]
        track.pix_fmt = "bgr0"
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="bgr0")
            frame.pts, frame.time_base = number, Fraction(1, 1)
            output.mux(track.encode(frame))
        output.mux(track.encode(None))
    return stream.getvalue()


def test_patches_are_the_pixels_put_in_frame_by_frame_and_row_by_row() -> None:
    pictures = [np.random.default_rng(n).integers(0, 256, (16, 16, 3), np.uint8) for n in range(3)]
    segment = film(lossless(pictures), VideoConfig(size_pixels=16, patch_pixels=8))
    assert segment.modality == VIDEO
    assert not segment.is_target
    assert (segment.content.dtype, segment.position.dtype) == (np.uint8, np.int32)
    assert segment.position.tolist() == [[t, r, c] for t in range(3) for r in range(2) for c in range(2)]
    for content, (t, r, c) in zip(segment.content, segment.position, strict=True):
        assert content.tolist() == pictures[t][8 * r : 8 * r + 8, 8 * c : 8 * c + 8].flatten().tolist()


@pytest.mark.parametrize("size", [(33, 17), (17, 33), (1, 1), (2, 90), (101, 64)])
def test_any_shape_is_resized_to_the_square_as_pillow_does(size: tuple[int, int]) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    segment = film(lossless([picture]), VideoConfig(size_pixels=8, patch_pixels=8))
    expected = np.asarray(Image.fromarray(picture).resize((8, 8), Image.Resampling.BILINEAR))
    assert segment.content.reshape(8, 8, 3).tolist() == expected.tolist()


@pytest.mark.parametrize(("container", "size"), [("mp4", (34, 18)), ("webm", (33, 17)), ("avi", (35, 21))])
def test_odd_sizes_read(container: str, size: tuple[int, int]) -> None:
    check_shades(film(encode_video([0, 500, 1_000], container, size), TINY), [0, 2])


def picture(format: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(stream, format)
    return stream.getvalue()


def without_frames(container: str) -> bytes:
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as output:
        track = output.add_stream(VIDEO_FORMATS[container], rate=25)
        track.width = track.height = 32
        track.pix_fmt = "yuv420p"
        output.start_encoding()
    return stream.getvalue()


WHOLE = encode_video(list(range(0, 3_000, 100)))
BAD = {
    "empty": (b"", UNREADABLE),
    "one byte": (b"\0", UNREADABLE),
    "zeros": (bytes(10_000), UNREADABLE),
    "text": (b"It was the best of times\n" * 100, UNREADABLE),
    "jpeg": (picture("JPEG"), UNREADABLE),
    "png": (picture("PNG"), UNREADABLE),
    "gif": (picture("GIF"), UNREADABLE),
    "wav": (wav(tone(440, 1, 16_000), 16_000), UNREADABLE),
    "mp3": (encode_sound(tone(440, 1, 16_000), 16_000, "mp3"), UNREADABLE),
    "header alone": (WHOLE[:300], UNREADABLE),
    "sound in a video's container": (encode_sound(tone(440, 1, 48_000), 48_000, "mp4", "aac"), "no picture track"),
    "matroska sound": (encode_sound(tone(440, 1, 48_000), 48_000, "matroska", "libopus"), "no picture track"),
    "matroska without a frame": (without_frames("matroska"), UNREADABLE),
    "mp4 without a frame": (without_frames("mp4"), "no picture track"),
    "avi without a frame": (without_frames("avi"), "video without a frame"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_its_reason(name: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(DataError, match=reason):
        film(data, TINY)


@pytest.mark.parametrize("container", VIDEO_FORMATS)
def test_a_cut_file_gives_its_beginning_or_a_data_error(container: str) -> None:
    data = encode_video(list(range(0, 3_000, 100)), container)
    for share in (0.95, 0.7, 0.4, 0.1, 0.01):
        try:
            segment = film(data[: int(len(data) * share)], TINY)
        except DataError:
            continue
        check_shades(segment, [0, 10, 20][: len(segment) // 4])


def test_video_over_limit_bytes_is_refused() -> None:
    film(WHOLE, at_rate(1, limit_bytes=len(WHOLE)))
    with pytest.raises(DataError, match=rf"{len(WHOLE)} bytes is over modality\.video\.limit_bytes={len(WHOLE) - 1}"):
        film(WHOLE, at_rate(1, limit_bytes=len(WHOLE) - 1))


def test_video_over_limit_seconds_is_refused_wherever_its_times_start() -> None:
    for start in (0, 9_000):
        data = encode_video([start, start + 1_000, start + 2_000])
        assert len(film(data, at_rate(1, limit_seconds=3))) == 12
        with pytest.raises(DataError, match=r"longer than modality\.video\.limit_seconds=2"):
            film(data, at_rate(1, limit_seconds=2))


QUARTERS = np.zeros((32, 64, 3), np.uint8)  # red, green over blue, black
QUARTERS[:16, :32], QUARTERS[:16, 32:], QUARTERS[16:, :32] = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270, 88, -93])
def test_a_video_is_turned_and_mirrored_as_it_says(degrees: int, mirrored: bool) -> None:
    stream = io.BytesIO()
    with av.open(stream, "w", format="mov") as output:
        track = output.add_stream("png", rate=1)
        track.width, track.height, track.pix_fmt = 64, 32, "rgb24"
        track.set_display_rotation(degrees, hflip=mirrored)
        output.mux(track.encode(av.VideoFrame.from_ndarray(QUARTERS, format="rgb24")))
        output.mux(track.encode(None))
    shown = np.rot90(QUARTERS, round(degrees / 90))  # against the clock
    shown = shown[:, ::-1] if mirrored else shown
    segment = film(stream.getvalue(), VideoConfig(size_pixels=4, patch_pixels=4))
    expected = np.asarray(Image.fromarray(np.ascontiguousarray(shown)).resize((4, 4), Image.Resampling.BILINEAR))
    assert np.abs(segment.content.reshape(4, 4, 3).astype(int) - expected).max() <= 1


def test_a_file_without_its_moov_atom_is_refused() -> None:
    data = encode_video(list(range(0, 2_000, 100)))
    at = data.index(b"moov") - 4
    for cut in (data[:at], data[:at] + b"\0\0\0\x08free", data.replace(b"moov", b"junk")):
        with pytest.raises(DataError, match=UNREADABLE):
            film(cut, TINY)


def test_a_video_that_changes_its_size_keeps_its_frames() -> None:
    sizes = ((32, 32), (64, 48), (48, 96))
    parts = [encode_video([1_000 * n, 1_000 * n + 500], "mpegts", size, "libx264") for n, size in enumerate(sizes)]
    segment = film(b"".join(parts), at_rate(1))
    check_shades(segment, [0] * (len(segment) // 4))
    assert len(segment) >= 8


@pytest.mark.parametrize("container", VIDEO_FORMATS)
@pytest.mark.parametrize("size", [(34, 16), (16, 34), (48, 48), (256, 256)])
def test_video_over_limit_side_is_refused(container: str, size: tuple[int, int]) -> None:
    data, side = encode_video([0, 1_000], container, size), max(size)
    assert len(film(data, at_rate(1, limit_side_pixels=side))) == 8
    reason = rf"video of {size[0]} × {size[1]} pixels is over modality\.video\.limit_side_pixels={side - 1}"
    with pytest.raises(DataError, match=reason):
        film(data, at_rate(1, limit_side_pixels=side - 1))


def test_a_video_that_grows_on_the_way_is_refused() -> None:
    small, large = (encode_video([0, 500, 1_000], "mpegts", size, "libx264") for size in ((32, 32), (640, 640)))
    assert len(film(small + large, at_rate(1, limit_side_pixels=640))) >= 8
    with pytest.raises(DataError, match=UNREADABLE):
        film(small + large, at_rate(1, limit_side_pixels=64))


def test_a_bomb_is_refused_before_its_pixels_are_decoded(tmp_path: Path) -> None:
    plain, bomb = tmp_path / "plain.mov", tmp_path / "bomb.mov"
    plain.write_bytes(png_video(large_png(10), 10))
    bomb.write_bytes(png_video(large_png(10_000), 10_000))
    assert bomb.stat().st_size < 2e6
    assert len(film(plain.read_bytes(), TINY)) == 4
    _, growth = peak_growth_bytes("video.read_video", plain, bomb, config="config.VideoConfig(), config.AudioConfig()")
    assert growth < 3e7  # the picture would take 1e8
    with pytest.raises(DataError, match=r"over modality\.video\.limit_side_pixels=8000"):
        film(bomb.read_bytes(), VideoConfig())


@pytest.mark.parametrize(
    "listing",
    [
        "ffconcat version 1.0\nfile '{}'\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{}\n#EXT-X-ENDLIST\n",
        "<?xml version='1.0'?><MPD><Period><AdaptationSet><BaseURL>{}</BaseURL></AdaptationSet></Period></MPD>",
    ],
)
def test_a_playlist_opens_no_other_file(listing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("secret.ts").write_bytes(encode_video([0, 1_000], "mpegts", codec="libx264"))
    for name in ("secret.ts", str(tmp_path / "secret.ts"), (tmp_path / "secret.ts").as_uri()):
        with pytest.raises(DataError, match=UNREADABLE):
            film(listing.format(name).encode(), TINY)


def test_real_clips_show_the_decoded_frame_of_each_tick(real_data: Path) -> None:
    captions = (real_data / "video" / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    clips = sorted(map(json.loads, captions), key=lambda clip: (real_data / "video" / clip["file"]).stat().st_size)
    assert len(clips) >= 5
    for clip in clips[:2]:
        data = (real_data / "video" / clip["file"]).read_bytes()
        segment = film(data, VideoConfig(size_pixels=32, patch_pixels=32))
        with av.open(io.BytesIO(data)) as container:
            decoded = [(frame.time, frame) for frame in container.decode(video=0)]
        seconds = [time - decoded[0][0] for time, _ in decoded]
        assert len(segment) == int(seconds[-1] + 5e-4) + 1, clip["file"]
        assert abs(len(segment) - clip["frames"] / clip["fps"]) <= 1, clip["file"]
        for tick, content in enumerate(segment.content):
            frame = decoded[max(n for n, second in enumerate(seconds) if second <= tick + 5e-4)][1]
            expected = frame.to_image().resize((32, 32), Image.Resampling.BILINEAR)
            assert content.tolist() == np.asarray(expected).flatten().tolist(), (clip["file"], tick)


@pytest.mark.slow
def test_every_real_clip_reads_to_256_tokens_a_second(real_data: Path) -> None:
    for line in (real_data / "video" / "captions.jsonl").read_text(encoding="utf-8").splitlines():
        clip = json.loads(line)
        segment = film((real_data / "video" / clip["file"]).read_bytes(), VideoConfig())
        assert len(segment) % 256 == 0, clip["file"]
        assert abs(len(segment) / 256 - clip["frames"] / clip["fps"]) <= 1, clip["file"]
        assert segment.content.std() > 5, clip["file"]
