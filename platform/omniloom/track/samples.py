"""A few of a task's evaluation samples, right and wrong ones, for whoever shows them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FEW = 6
LIMIT_BYTES = 4 * 2**20  # one media file that is shown
# Only these: an unknown type is named, and no other file of the machine gets into a page.
MIME = {
    "image": {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp", "gif": "gif"},
    "audio": {"wav": "wav", "flac": "flac", "mp3": "mpeg", "ogg": "ogg"},
    "video": {"mp4": "mp4", "webm": "webm", "mkv": "x-matroska"},
}


@dataclass
class Chosen:
    """Some samples as they were written, of how many, of which how many are right."""

    samples: list[dict[str, Any]]
    total: int
    right: int


def choose_samples(path: Path) -> Chosen | None:
    """Half right, half wrong where there are enough of both, spread over the file; None where there are none."""
    places: dict[Any, list[int]] = {True: [], False: [], None: []}  # where each sample begins: the file may be large
    offset = 0
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        for line in stream:
            sample = _sample(line)
            if sample is not None:
                right = sample.get("right")
                places[right if isinstance(right, bool) else None].append(offset)
            offset += len(line)
        total = sum(map(len, places.values()))
        if not total:
            return None
        samples = []
        for place in sorted(_chosen(places)):
            stream.seek(place)
            samples.append(_sample(stream.readline()) or {})
    return Chosen(samples, total, len(places[True]))


def pieces_of(sample: dict[str, Any]) -> list[dict[str, Any]]:
    """A sample's prompt, piece by piece: each names its text or one medium's file."""
    prompt = sample.get("prompt")
    pieces = prompt if isinstance(prompt, list) else [prompt]
    return [piece if isinstance(piece, dict) else {"text": piece} for piece in pieces]


def _sample(line: bytes) -> dict[str, Any] | None:
    try:
        sample = json.loads(line)  # fails for a line torn off
    except ValueError:
        return None
    return sample if isinstance(sample, dict) else None


def _chosen(places: dict[Any, list[int]]) -> list[int]:
    """Whatever else there is fills up the rest."""
    wrong, right, unknown = places[False], places[True], places[None]
    half = FEW // 2
    wrong_count = min(len(wrong), max(half, FEW - len(right)))
    right_count = min(len(right), FEW - wrong_count)
    unknown_count = FEW - wrong_count - right_count
    return [*_spread(wrong, wrong_count), *_spread(right, right_count), *_spread(unknown, unknown_count)]


def _spread(places: list[int], wanted: int) -> list[int]:
    wanted = min(wanted, len(places))
    return [places[i * len(places) // wanted] for i in range(wanted)]
