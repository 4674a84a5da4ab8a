"""Documents and questions as jsonl, media as files: what a sample corpus is written with."""

import json
import wave
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np


def document(*segments: dict[str, Any]) -> dict[str, Any]:
    """An interleaved document."""
    return {"segments": list(segments)}


def asked(question: str) -> dict[str, Any]:
    """Text that is read, not learned."""
    return {"text": question, "loss": False}


def answered(answer: str) -> dict[str, Any]:
    """Text that is learned."""
    return {"text": f" {answer}"}


def question(media: list[dict[str, Any]], text: str, choices: list[str], answer: str) -> dict[str, Any]:
    """A question of the media tasks under evals/."""
    return {"segments": [*media, {"text": text}], "choices": choices, "answer": choices.index(answer)}


def write_jsonl(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_wav(path: Path, samples: np.ndarray, sample_rate: int) -> None:
    """Write int16 (S,) as a mono wav."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(samples.astype("<i2").tobytes())


def write_mp4(path: Path, frames: np.ndarray, frames_per_second: int) -> None:
    """Encode uint8 (frames, height, width, 3), even sizes, as H.264."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=frames_per_second, options={"preset": "ultrafast", "crf": "18"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, frames_per_second)
        stream.codec_context.thread_count = 1  # the same bytes on every machine
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
