"""A video file becomes patches of frames taken by timestamp (PyAV decodes)."""

import io
from collections.abc import Iterator

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from omniloom.errors import DataError
from omniloom.modality.config import VideoConfig
from omniloom.modality.files import refuse_large
from omniloom.modality.image import cut_patches
from omniloom.modality.sequence import VIDEO, Segment

# Containers the reader may open: playlists and the like, which name other files, are not among them.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,ogg"

DECODER_PADDING = 256  # pixels that a decoder may add to a side


def read_video(data: bytes, config: VideoConfig) -> Segment:
    """Decode one video and keep the frame that is shown at 0, 1/rate, 2/rate, … seconds.

    Returns a Segment of frames × (size / patch)² tokens, content uint8 (N, patch² · 3), position (frame, row, column).
    One kept frame is in memory at a time, at its final size. Raises DataError for a file that is too large or long, of
    another format or broken, or without a frame.
    """
    refuse_large(len(data), config.limit_bytes, "modality.video.limit_bytes")
    # No decoder allocates more: not while the file is probed (it then has no size), not where its size changes later.
    bounds = {"max_pixels": str((config.limit_side_pixels + DECODER_PADDING) ** 2)}
    try:
        with av.open(io.BytesIO(data), "r", options={"format_whitelist": CONTAINERS} | bounds) as container:
            if not container.streams.video:
                raise DataError("no picture track in the file")
            stream = container.streams.video[0]
            stream.codec_context.options = bounds
            if not stream.width:
                raise DataError(
                    f"video without a size, or over modality.video.limit_side_pixels={config.limit_side_pixels}"
                )
            if max(stream.width, stream.height) > config.limit_side_pixels:
                raise DataError(
                    f"video of {stream.width} × {stream.height} pixels is over "
                    f"modality.video.limit_side_pixels={config.limit_side_pixels}"
                )
            converter = VideoReformatter()  # one for all frames: it costs more to make than to use
            frames = [
                cut_patches(_square(frame, config.size_pixels, converter), config.patch_pixels)
                for frame in _shown_at_ticks(container, config)
            ]
    except DataError:
        raise
    except Exception as error:  # on damaged files the decoders raise whatever their parsers met
        raise DataError(f"not a readable video file ({type(error).__name__})") from error
    if not frames:
        raise DataError("video without a frame")
    patches = np.concatenate([patches for patches, _ in frames])
    position = np.concatenate([position for _, position in frames])
    position[:, 0] = np.repeat(np.arange(len(frames), dtype=np.int32), len(frames[0][0]))
    return Segment(VIDEO, patches, position)


def _shown_at_ticks(container: "av.container.InputContainer", config: VideoConfig) -> Iterator[av.VideoFrame]:
    """The frame on screen at each tick: the last one whose time is not after it. Times count from the first frame."""
    tick = 0
    shown: av.VideoFrame | None = None
    first = None
    for frame in container.decode(video=0):
        if frame.time is None:
            continue  # a frame without a time cannot be placed
        first = frame.time if first is None else first
        seconds = frame.time - first
        if seconds >= config.limit_seconds:
            raise DataError(f"video is longer than modality.video.limit_seconds={config.limit_seconds}")
        # Half a millisecond: containers round their times to one.
        while shown is not None and tick / config.frames_per_second < seconds - 5e-4:
            yield shown
            tick += 1
        shown = frame
    # The last frame is on screen at its own tick; how long after, few files say.
    if shown is not None and first is not None and tick / config.frames_per_second <= shown.time - first + 5e-4:
        yield shown


def _square(frame: av.VideoFrame, size_pixels: int, converter: VideoReformatter) -> np.ndarray:
    picture = Image.fromarray(converter.reformat(frame, format="rgb24", threads=1).to_ndarray())
    return np.asarray(picture.resize((size_pixels, size_pixels), Image.Resampling.BILINEAR), dtype=np.uint8)
