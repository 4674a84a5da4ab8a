"""A video file becomes patches of frames taken by timestamp, and the sound heard with them (PyAV decodes).

S samples, F frames of sound, M mel bands.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from omniloom.errors import DataError
from omniloom.modality.audio import SILENCE, LogMel, Resampler, audio_segments
from omniloom.modality.config import AudioConfig, VideoConfig
from omniloom.modality.files import Media, open_bounded
from omniloom.modality.image import cut_patches
from omniloom.modality.sequence import VIDEO, Segment

# Containers the reader may open: playlists and the like, which name other files, are not among them.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,ogg"

DECODER_PADDING = 256  # pixels that a decoder may add to a side
CLOCK_SECONDS = 5e-4  # containers round their times to a millisecond
GAP_SECONDS = 0.1  # from which on a hole in the sound is one, and no rounding


@dataclass(frozen=True)
class Film:
    """A decoded video: its patches lie in a file, frame after frame."""

    path: Path
    frames: int
    grid: tuple[int, int]  # patches down and across
    patch_values: int  # patch² · 3
    sound: list[np.ndarray]  # log-mel float16 (F, M) heard from each frame to the next; [] without sound or not asked


def read_video(media: Media, config: VideoConfig, audio: AudioConfig) -> list[Segment]:
    """Decode one video by way of a temporary file, which lives as long as the segments do; see `decode_video`."""
    with TemporaryDirectory() as folder:
        return film_segments(decode_video(media, config, audio, Path(folder) / "film"), audio)


def decode_video(media: Media, config: VideoConfig, audio: AudioConfig, path: Path) -> Film:
    """Decode one video in one pass and keep the frame that is shown at 0, 1/rate, 2/rate, … seconds.

    Patches are written to `path` frame after frame, uint8 (frames · (size / patch)², patch² · 3): one kept frame is in
    memory at a time. With `config.audio` the sound's log-mel frames are kept, cut at the frames' times: an array a
    frame, the last one's at most 1/rate seconds. Raises DataError for a file that is too large or long, of another
    format or broken, or without a frame.
    """
    track = _SoundTrack(audio, config.limit_seconds) if config.audio else None
    screen: _Screen | None = None
    frames, origin = 0, 0.0
    with path.open("wb") as file:
        shown, patches = None, b""
        for frame in _shown_at_ticks(_decode(media, config, track), config):
            with _damage_as_data_error():
                if screen is None:
                    screen, origin = _Screen(frame, config.size_pixels), frame.time or 0.0
                if frame is not shown:
                    shown, patches = frame, cut_patches(screen.show(frame), config.patch_pixels)[0].tobytes()
            file.write(patches)  # a full disk is no fault of the video's
            frames += 1
    if not frames:
        raise DataError("video without a frame")
    across = config.size_pixels // config.patch_pixels
    with _damage_as_data_error():
        sound = track.cut(origin, frames, config.frames_per_second) if track else []
    return Film(path, frames, (across, across), config.patch_pixels**2 * 3, sound)


def film_segments(film: Film, audio: AudioConfig) -> list[Segment]:
    """A film as segments: content uint8 (N, patch² · 3) mapped from its file, position (frame, row, column).

    Without sound one segment; with sound the frames up to and with one that is heard, its clip, the next frames, ….
    """
    tokens = math.prod(film.grid)
    content = np.memmap(film.path, np.uint8, mode="r", shape=(film.frames * tokens, film.patch_values))
    place = np.indices((film.frames, *film.grid), dtype=np.int32).reshape(3, -1).T
    position = np.ascontiguousarray(place)
    segments: list[Segment] = []
    start = 0
    for number in range(film.frames):
        clips = audio_segments(film.sound[number], audio) if film.sound and len(film.sound[number]) else []
        if clips or number == film.frames - 1:
            rows = slice(start * tokens, (number + 1) * tokens)
            segments.append(Segment(VIDEO, content[rows], position[rows]))
            start = number + 1
        segments += clips
    return segments


def _decode(media: Media, config: VideoConfig, track: "_SoundTrack | None") -> Iterator[av.VideoFrame]:
    """The pictures of a file; its sound goes to `track` on the way."""
    # No decoder allocates more: not while the file is probed (it then has no size), not where its size changes later.
    bounds = {"max_pixels": str((config.limit_side_pixels + DECODER_PADDING) ** 2)}
    options = {"format_whitelist": CONTAINERS} | bounds
    with (
        _damage_as_data_error(),
        open_bounded(media, config.limit_bytes, "modality.video.limit_bytes") as file,
        av.open(file, "r", options=options) as container,
    ):
        if not container.streams.video:
            raise DataError("no picture track in the file")
        pictures = container.streams.video[0]
        pictures.codec_context.options = bounds
        if not pictures.width:
            raise DataError(
                f"video without a size, or over modality.video.limit_side_pixels={config.limit_side_pixels}"
            )
        if max(pictures.width, pictures.height) > config.limit_side_pixels:
            raise DataError(
                f"video of {pictures.width} × {pictures.height} pixels is over "
                f"modality.video.limit_side_pixels={config.limit_side_pixels}"
            )
        sounds = container.streams.audio[:1] if track else []
        for packet in container.demux(pictures, *sounds):
            for frame in packet.decode():
                if isinstance(frame, av.VideoFrame):
                    yield frame
                elif track is not None and isinstance(frame, av.AudioFrame):
                    track.hear(frame)


@contextmanager
def _damage_as_data_error() -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # on damaged files the decoders raise whatever their parsers met
        raise DataError(f"not a readable video file ({type(error).__name__})") from error


class _SoundTrack:
    """The sound of a video as it is decoded between the pictures; what it holds are log-mel frames."""

    def __init__(self, config: AudioConfig, limit_seconds: int) -> None:
        self._config, self._limit_seconds = config, limit_seconds
        self._resample, self._mel = Resampler(config), LogMel(config)
        self._blocks: list[np.ndarray] = []
        self._start: float | None = None

    def hear(self, frame: av.AudioFrame) -> None:
        """Add a frame of sound at its time: a hole before it is silent; sound past the limit on seconds is let go."""
        if self._start is None:
            self._start = frame.time
        if self._start is None:
            return  # a track without times cannot be placed
        rate = self._config.sample_rate
        heard = self._mel.samples / rate
        seconds = heard if frame.time is None else frame.time - self._start
        if max(seconds, heard) > self._limit_seconds:
            return
        if seconds - heard > GAP_SECONDS:
            self._add(np.broadcast_to(np.float32(0), round((seconds - heard) * rate)))
        for samples_S in self._resample(frame):
            self._add(samples_S)

    def cut(self, origin: float, frames: int, frames_per_second: float) -> list[np.ndarray]:
        """What is heard from each of `frames` pictures to the next, the first at `origin`; [] where nothing is."""
        for samples_S in self._resample(None) if self._start is not None else ():
            self._add(samples_S)
        self._blocks.append(self._mel.rest().astype(np.float16))
        sound_FM = np.concatenate(self._blocks)
        if self._start is None or not len(sound_FM) or self._mel.loudest < SILENCE:
            return []
        seconds = origin - self._start + np.arange(frames + 1) / frames_per_second
        edges = np.ceil((seconds - CLOCK_SECONDS) * 1_000 / self._config.hop_ms).clip(0, len(sound_FM)).astype(int)
        return [sound_FM[start:stop] for start, stop in pairwise(edges)]

    def _add(self, samples_S: np.ndarray) -> None:
        self._blocks += [block.astype(np.float16) for block in self._mel.add(samples_S)]


def _shown_at_ticks(decoded: Iterator[av.VideoFrame], config: VideoConfig) -> Iterator[av.VideoFrame]:
    """The frame on screen at each tick: the last one whose time is not after it. Times count from the first frame."""
    tick = 0
    shown: av.VideoFrame | None = None
    first = None
    for frame in decoded:
        if frame.time is None:
            continue  # a frame without a time cannot be placed
        first = frame.time if first is None else first
        seconds = frame.time - first
        if seconds >= config.limit_seconds:
            raise DataError(f"video is longer than modality.video.limit_seconds={config.limit_seconds}")
        while shown is not None and tick / config.frames_per_second < seconds - CLOCK_SECONDS:
            yield shown
            tick += 1
        shown = frame
    # The last frame is on screen at its own tick; how long after, few files say.
    if (
        shown is not None
        and first is not None
        and tick / config.frames_per_second <= shown.time - first + CLOCK_SECONDS
    ):
        yield shown


class _Screen:
    """Frames as they are shown: squares, turned and mirrored as the file's first one says."""

    def __init__(self, first: av.VideoFrame, size_pixels: int) -> None:
        self._converter = VideoReformatter()  # one for all frames: it costs more to make than to use
        self._size = (size_pixels, size_pixels)
        # Asked of one frame alone: a frame that was asked keeps itself alive until the garbage collector comes.
        side_data: Any = first.side_data  # whose stub names two of its keys
        matrix = np.frombuffer(bytes(side_data["DISPLAYMATRIX"]), np.int32) if "DISPLAYMATRIX" in side_data else None
        # Where a pixel's step to the right (a, b) and down (c, d) leads on the screen, in the nearest quarter turns.
        a, b, c, d = matrix[[0, 1, 3, 4]].astype(float) if matrix is not None else (1.0, 0.0, 0.0, 1.0)
        self._is_turned = abs(b) + abs(c) > abs(a) + abs(d)
        rightwards, downwards = (c, b) if self._is_turned else (a, d)
        self._steps = (slice(None, None, -1 if downwards < 0 else 1), slice(None, None, -1 if rightwards < 0 else 1))

    def show(self, frame: av.VideoFrame) -> np.ndarray:
        """Pixels uint8 (size, size, 3)."""
        picture = Image.fromarray(self._converter.reformat(frame, format="rgb24", threads=1).to_ndarray())
        square = np.asarray(picture.resize(self._size, Image.Resampling.BILINEAR), dtype=np.uint8)
        return (square.transpose(1, 0, 2) if self._is_turned else square)[self._steps]
