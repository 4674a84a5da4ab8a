"""Damaged sound and video files give a valid segment or a DataError: no other exception, no crash, hang or NaN."""

import os
import random
from collections import Counter
from time import process_time

import numpy as np
import pytest
from made_media import SOUND_FORMATS, VIDEO_FORMATS, damaged, encode_sound, encode_video, speechlike, wav

from omniloom.errors import DataError
from omniloom.modality.audio import read_audio
from omniloom.modality.config import AudioConfig, VideoConfig
from omniloom.modality.files import Media
from omniloom.modality.video import read_video

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about samples that are no numbers

AUDIO = AudioConfig(limit_seconds=20)
VIDEO = VideoConfig(size_pixels=8, patch_pixels=4, limit_seconds=20, limit_side_pixels=1_000)
MANY = 4_000 if os.environ.get("OMNILOOM_SOAK") else 300
LIMIT_S = 20  # of processor time, for files of a few kilobytes


def whole_sounds() -> dict[str, bytes]:
    sounds = {name: encode_sound(speechlike(0.3, 48_000), 48_000, name) for name in SOUND_FORMATS}
    return sounds | {"float wav": wav(speechlike(0.3), 16_000, 32, is_float=True)}


def whole_videos() -> dict[str, bytes]:
    times = list(range(0, 2_000, 100))
    videos = {name: encode_video(times, name) for name in VIDEO_FORMATS}
    return videos | {"mpegts": encode_video(times, "mpegts", codec="libx264")}


def check_audio(data: bytes) -> None:
    (segment,) = read_audio(Media("sound", data), AUDIO)
    assert np.isfinite(segment.content).all()
    assert segment.content.shape[1] == AUDIO.mels
    assert 1 <= len(segment) == AUDIO.tokens(len(segment.content)) <= 500
    assert segment.position.shape == (len(segment), 3)


def check_video(data: bytes) -> None:
    (segment,) = read_video(Media("film", data), VIDEO, AUDIO)
    assert segment.content.dtype == np.uint8
    assert segment.content.shape == (len(segment), 48)
    assert 1 <= len(segment) / 4 <= 21
    assert segment.position.tolist() == [[n // 4, n // 2 % 2, n % 2] for n in range(len(segment))]


CHECKS = {"audio": (whole_sounds, check_audio), "video": (whole_videos, check_video)}
CASES = [("audio", name) for name in (*SOUND_FORMATS, "float wav")] + [
    ("video", name) for name in (*VIDEO_FORMATS, "mpegts")
]


def mutate(kind: str, name: str, seed: str, count: int) -> Counter:
    make, check = CHECKS[kind]
    whole, generator, outcomes = make()[name], random.Random(seed), Counter()
    for number in range(count):
        data = damaged(whole, generator)
        started = process_time()
        try:
            check(data)
        except DataError:
            outcomes["refused"] += 1
        except Exception as error:
            pytest.fail(f"mutation {number} of {name}, seed {seed!r}, raised {error!r}")
        else:
            outcomes["read"] += 1
        assert process_time() - started < LIMIT_S, (number, name, seed)
    return outcomes


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_damaged_file_gives_a_segment_or_a_data_error(kind: str, name: str) -> None:
    assert mutate(kind, name, f"{name} quick", 25)["refused"] > 0


@pytest.mark.slow
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_many_damaged_files_give_a_segment_or_a_data_error(kind: str, name: str) -> None:
    outcomes = mutate(kind, name, f"{name} many {os.environ.get('OMNILOOM_SOAK', '')}", MANY)
    assert outcomes["refused"] > 0
    assert outcomes["read"] > 0
