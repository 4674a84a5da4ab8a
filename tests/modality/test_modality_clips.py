"""A long sound: its frames come in blocks, its clips in a row, and neither changes a frame."""

import math
import random
import wave
from pathlib import Path

import numpy as np
import pytest
from made_media import peak_growth_bytes, speechlike, wav

from omniloom.modality.audio import BLOCK_FRAMES, LogMel, _filters, log_mel, read_audio
from omniloom.modality.config import AudioConfig
from omniloom.modality.files import Media
from omniloom.modality.sequence import AUDIO

CONFIG = AudioConfig()
RATE = CONFIG.sample_rate


def log_mel_in_one_go(samples: np.ndarray, config: AudioConfig) -> np.ndarray:
    window, hop = config.window_samples, config.hop_samples
    padded = np.pad(samples.astype(np.float64), window // 2, mode="reflect")
    frames = np.stack([padded[at : at + window] for at in range(0, len(samples) // hop * hop, hop)])
    power = np.abs(np.fft.rfft(frames * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)))) ** 2
    return np.log10(np.maximum(power @ _filters(config.sample_rate, window, config.mels), 1e-10))


@pytest.mark.parametrize(
    "config", [CONFIG, AudioConfig(mels=16, window_ms=40, hop_ms=5), AudioConfig(8_000, 8, 20, 20)]
)
def test_a_sound_that_comes_in_pieces_is_the_sound_as_a_whole(config: AudioConfig) -> None:
    generator = random.Random(config.mels)
    block, window = BLOCK_FRAMES * config.hop_samples, config.window_samples
    edges = [block + near for near in (-window, -1, 0, 1, window // 2, window, 2 * window - 1, 2 * window, 3 * window)]
    for length in (window, window + 1, *edges, 2 * block + window, 2 * block + 2 * window + 77):
        sound = speechlike(length / RATE + 1, seed=length)[:length]
        whole = log_mel(sound, config)
        np.testing.assert_allclose(whole, log_mel_in_one_go(sound, config), atol=1e-9, rtol=0)
        for most in (window, 3_000, 5 * block):
            cuts = sorted(generator.randrange(length) for _ in range(length // most))
            mel = LogMel(config)
            blocks = [block for piece in np.split(sound, cuts) for block in mel.add(piece)]
            assert np.array_equal(np.concatenate([*blocks, mel.rest()]), whole), (length, most)
            assert (mel.samples, mel.loudest) == (length, float(np.abs(sound).max()))


@pytest.mark.parametrize(
    ("frames", "clips"),
    [
        (99, [99]),
        (100, [100]),
        (101, [101]),
        (102, [102]),  # two frames are less than a window of 2.5: no clip
        (103, [100, 3]),
        (200, [100, 100]),
        (202, [100, 102]),
        (350, [100, 100, 100, 50]),
    ],
)
def test_a_long_sound_becomes_clips_in_a_row(frames: int, clips: list[int]) -> None:
    data = wav(speechlike(4)[: frames * 160], RATE)
    segments = read_audio(Media("sound", data), AudioConfig(clip_seconds=1))
    assert [len(segment.content) for segment in segments] == clips
    (whole,) = read_audio(Media("sound", data), CONFIG)
    assert np.array_equal(np.concatenate([segment.content for segment in segments]), whole.content)
    for segment in segments:
        tokens = math.ceil(len(segment.content) / 4)
        assert segment.modality == AUDIO
        assert segment.position.tolist() == [[t, 0, 0] for t in range(tokens)]


@pytest.mark.slow
def test_an_hour_needs_little_more_memory_than_its_frames(tmp_path: Path) -> None:
    minute = (np.stack([speechlike(60, 44_100)] * 2, axis=1) * 20_000).astype("<i2").tobytes()
    peaks = []
    for minutes in (1, 60):
        path = tmp_path / f"{minutes}.wav"
        with wave.open(str(path), "wb") as file:
            file.setnchannels(2)
            file.setsampwidth(2)
            file.setframerate(44_100)
            for _ in range(minutes):
                file.writeframes(minute)
        peaks += peak_growth_bytes("audio.read_audio", path, config="config.AudioConfig()")
    # The frames are 5.8e7 bytes, held twice as they are joined; the samples are 2.3e8 and the file 6.4e8.
    assert peaks[1] - peaks[0] < 1.5e8
