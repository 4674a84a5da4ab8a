"""Sound files become log-mel frames, or are refused with a DataError; nothing else may come out of read_audio."""

import io
import math
import wave
from pathlib import Path

import numpy as np
import pytest
from made_media import (
    encode_film,
    encode_sound,
    encode_video,
    large_png,
    mp3_with_cover,
    peak_growth_bytes,
    speechlike,
    tone,
    wav,
)
from PIL import Image
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import spectrogram, window_function

from omniloom.errors import DataError
from omniloom.modality.audio import decode_sound, log_mel, read_audio
from omniloom.modality.config import AudioConfig
from omniloom.modality.files import Media
from omniloom.modality.sequence import AUDIO, Segment

CONFIG = AudioConfig()
RATE = CONFIG.sample_rate


def clip(content: bytes | Path, config: AudioConfig) -> Segment:
    (segment,) = read_audio(Media("clip", content), config)
    return segment


def whole(data: bytes, config: AudioConfig) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.float32), *decode_sound(Media("clip", data), config)])


def hertz_to_mel(hertz: float) -> float:
    """Slaney's scale: linear below 1 kHz, logarithmic above."""
    return 3 * hertz / 200 if hertz < 1_000 else 15 + 27 * math.log(hertz / 1_000) / math.log(6.4)


def mel_to_hertz(mel: float) -> float:
    return 200 * mel / 3 if mel < 15 else 1_000 * 6.4 ** ((mel - 15) / 27)


def edges(config: AudioConfig) -> list[float]:
    """Corners of the triangles: band m rises from corner m to m + 1 and falls to m + 2."""
    top = hertz_to_mel(config.sample_rate / 2)
    return [mel_to_hertz(top * i / (config.mels + 1)) for i in range(config.mels + 2)]


def literal_log_mel(samples: np.ndarray, config: AudioConfig) -> list[list[float]]:
    window, hop = config.sample_rate * config.window_ms // 1_000, config.sample_rate * config.hop_ms // 1_000
    hann = [0.5 - 0.5 * math.cos(2 * math.pi * n / window) for n in range(window)]
    cosine = [math.cos(2 * math.pi * n / window) for n in range(window)]
    sine = [math.sin(2 * math.pi * n / window) for n in range(window)]
    corners, sound, last = edges(config), [float(s) for s in samples], len(samples) - 1
    frames = []
    for frame in range(len(sound) // hop):
        at = [abs(frame * hop - window // 2 + n) for n in range(window)]  # reflected at the start
        held = [sound[i if i <= last else 2 * last - i] * hann[n] for n, i in enumerate(at)]  # and at the end
        power = []
        for k in range(window // 2 + 1):
            real = sum(x * cosine[k * n % window] for n, x in enumerate(held))
            imaginary = sum(x * sine[k * n % window] for n, x in enumerate(held))
            power.append(real**2 + imaginary**2)
        bands = []
        for low, peak, high in zip(corners, corners[1:], corners[2:], strict=False):
            energy = 0.0
            for k, p in enumerate(power):
                hertz = k * config.sample_rate / window
                weight = min((hertz - low) / (peak - low), (high - hertz) / (high - peak))
                energy += max(weight, 0.0) * 2 / (high - low) * p
            bands.append(math.log10(max(energy, 1e-10)))
        frames.append(bands)
    return frames


def band_of(hertz: float) -> int:
    """The band whose peak is nearest."""
    return int(np.argmin([abs(peak - hertz) for peak in edges(CONFIG)[1:-1]]))


@pytest.mark.parametrize(
    ("config", "samples"),
    [
        (CONFIG, 1_000),
        (CONFIG, 400),
        (AudioConfig(sample_rate=8_000, mels=20, window_ms=32, hop_ms=16), 1_100),
        (AudioConfig(mels=40, window_ms=20, hop_ms=20), 1_279),
    ],
)
def test_log_mel_equals_a_literal_loop_in_float64(config: AudioConfig, samples: int) -> None:
    sound = speechlike(0.2, seed=3)[:samples] * np.linspace(0, 1, samples, dtype=np.float32) ** 4
    seen, expected = log_mel(sound, config), literal_log_mel(sound, config)
    assert seen.dtype == np.float64
    assert seen.shape == (samples * 1_000 // (config.sample_rate * config.hop_ms), config.mels)
    assert np.ptp(seen) > 3
    np.testing.assert_allclose(seen, expected, atol=1e-4, rtol=0)


def test_log_mel_equals_whispers() -> None:
    sound = speechlike(2.345)
    whisper = WhisperFeatureExtractor()
    seen = log_mel(sound, CONFIG)
    hann = window_function(whisper.n_fft, "hann")
    sizes = {"frame_length": whisper.n_fft, "hop_length": whisper.hop_length, "power": 2.0}
    before_clamp = spectrogram(sound, hann, **sizes, mel_filters=whisper.mel_filters, log_mel="log10")[:, :-1].T
    np.testing.assert_allclose(seen, before_clamp, atol=1e-4, rtol=0)
    features = whisper(sound, sampling_rate=RATE, padding=False, return_tensors="np").input_features[0].T
    np.testing.assert_allclose((np.maximum(seen, seen.max() - 8) + 4) / 4, features, atol=1e-3, rtol=0)


def test_silence_is_the_floor_and_a_second_is_100_frames() -> None:
    assert (log_mel(np.zeros(RATE, np.float32), CONFIG) == -10).all()
    assert log_mel(np.zeros(RATE, np.float32), CONFIG).shape == (100, 80)


@pytest.mark.parametrize("samples", [400, 401, 639, 640, 641, 15_999, 16_000, 16_159, 16_160])
def test_frames_are_whole_hops_and_tokens_whole_and_begun_groups_of_frames(samples: int) -> None:
    segment = clip(wav(speechlike(2)[:samples], RATE), CONFIG)
    frames = samples // 160
    assert segment.content.shape == (frames, 80)
    assert len(segment) == math.ceil(frames / 4)
    assert segment.position.tolist() == [[t, 0, 0] for t in range(math.ceil(frames / 4))]
    assert segment.modality == AUDIO
    assert (segment.content.dtype, segment.position.dtype) == (np.float16, np.int32)
    assert not segment.is_target


def test_frames_are_rounded_to_float16_once_at_the_end() -> None:
    data = wav(speechlike(0.5), RATE)
    exact = log_mel(whole(data, CONFIG), CONFIG)
    segment = clip(data, CONFIG)
    assert np.array_equal(segment.content, exact.astype(np.float16))
    assert np.abs(segment.content - exact).max() > 0


@pytest.mark.parametrize(
    ("container", "codec"),
    [("mp4", "aac"), ("ipod", "aac"), ("adts", "aac"), ("matroska", "libopus"), ("webm", "libopus"), ("mov", "alac")],
)
def test_sound_of_other_containers_reads(container: str, codec: str) -> None:
    data = encode_sound(tone(1_000, 2, 48_000), 48_000, container, codec)
    content = clip(data, CONFIG).content[10:190].astype(np.float64)
    assert 195 <= len(clip(data, CONFIG).content) <= 210
    assert int(content.mean(axis=0).argmax()) == band_of(1_000)
    loudness = np.sqrt((whole(data, CONFIG)[4_000:28_000] ** 2).mean())  # AAC's peaks stand out
    assert loudness == pytest.approx(0.5 / math.sqrt(2), abs=0.02)


def test_the_sound_of_a_video_reads() -> None:
    sound = speechlike(2)
    content = clip(encode_film(2, sound, RATE), CONFIG).content
    assert np.array_equal(content, clip(wav(np.round(sound * 2**15) / (2**15 - 1), RATE), CONFIG).content)


def test_path_and_bytes_read_alike_whatever_the_files_name(tmp_path: Path) -> None:
    for name in ("sound.wav", "concat:sound.mp4", "http:", "sound.m3u8"):
        (tmp_path / name).write_bytes(WHOLE)
        assert np.array_equal(clip(tmp_path / name, CONFIG).content, clip(WHOLE, CONFIG).content)


@pytest.mark.parametrize("hertz", [440, 1_000, 3_000])
@pytest.mark.parametrize(
    ("container", "codec", "rates"),
    [
        ("wav", None, (8_000, 16_000, 22_050, 44_100, 48_000)),
        ("flac", None, (8_000, 22_050, 44_100, 48_000)),
        ("mp3", None, (8_000, 22_050, 44_100, 48_000)),
        ("ogg", None, (8_000, 48_000)),
        ("ogg", "flac", (22_050, 44_100)),
    ],
)
def test_each_format_and_rate_gives_a_second_of_the_same_tone(
    container: str, codec: str | None, rates: tuple[int, ...], hertz: int
) -> None:
    for rate in rates:
        data = encode_sound(tone(hertz, 1, rate), rate, container, codec)
        samples = whole(data, CONFIG)
        assert samples.dtype == np.float32
        assert abs(len(samples) - RATE) <= 0.06 * RATE, rate  # lossy codecs work in blocks
        assert np.abs(samples[2_000:14_000]).max() == pytest.approx(0.5, abs=0.05), rate
        peaks = clip(data, CONFIG).content[10:90].astype(np.float64).mean(axis=0)
        assert abs(int(peaks.argmax()) - band_of(hertz)) <= (hertz < 1_000), rate  # two bands share a low bin
        if codec or container in ("wav", "flac"):
            assert len(samples) == RATE
            inside = slice(400, -400)
            np.testing.assert_allclose(samples[inside], tone(hertz, 1, RATE)[inside], atol=5e-3)


@pytest.mark.parametrize(
    ("bits", "is_float"), [(8, False), (16, False), (24, False), (32, False), (32, True), (64, True)]
)
def test_each_width_of_a_sample_reads_to_its_value(bits: int, is_float: bool) -> None:
    sound = speechlike(0.2)
    samples = whole(wav(sound, RATE, bits, is_float), CONFIG)
    step = 1e-6 if bits >= 24 else 2.0 ** (2 - bits)
    np.testing.assert_allclose(samples, sound, atol=step)


def test_stereo_is_the_mean_of_its_channels() -> None:
    left, right = tone(440, 0.5, RATE), tone(2_000, 0.5, RATE, amplitude=0.25)
    for data in (wav(np.stack([left, right]), RATE), encode_sound(np.stack([left, right]), RATE, "flac")):
        np.testing.assert_allclose(whole(data, CONFIG), (left + right) / 2, atol=1e-4)
    with pytest.raises(DataError, match="silent"):
        clip(wav(np.stack([left, -left]), RATE), CONFIG)


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 6, 7, 8, 16])
def test_a_sound_on_every_channel_is_as_loud_as_on_one(channels: int) -> None:
    sound = tone(440, 0.2, 44_100)
    samples = whole(wav(np.stack([sound] * channels), 44_100), CONFIG)
    np.testing.assert_allclose(samples, whole(wav(sound, 44_100), CONFIG), atol=1e-4)


def picture(format: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(stream, format)
    return stream.getvalue()


def with_sample(value: float, bits: int = 32) -> bytes:
    sound = tone(440, 0.2, RATE).astype(np.float64)
    sound[700] = value
    return wav(sound, RATE, bits, is_float=True)


WHOLE = wav(tone(440, 1, RATE), RATE)
UNREADABLE = "not a readable sound file"
BAD = {
    "empty": (b"", UNREADABLE),
    "one byte": (b"R", UNREADABLE),
    "zeros": (bytes(10_000), UNREADABLE),
    "text": (b"To be, or not to be\n" * 100, UNREADABLE),
    "png": (picture("PNG"), UNREADABLE),
    "jpeg": (picture("JPEG"), UNREADABLE),
    "gif": (picture("GIF"), UNREADABLE),
    "wrong extension": (encode_film(0.3, speechlike(0.3), RATE, "avi"), UNREADABLE),
    "half a header": (WHOLE[:20], UNREADABLE),
    "header alone": (WHOLE[:44], "clip of 0 samples is shorter than one window of 400"),
    "video": (encode_video([0, 40, 80]), "no sound in the file"),
    "silent": (wav(np.zeros(RATE), RATE), "silent clip: no sample reaches 0.0001 of full scale"),
    "nearly silent": (wav(np.full(RATE, 9e-5), RATE, 32, is_float=True), "silent clip"),
    "shorter than a window": (wav(tone(440, 0.02, RATE), RATE), "320 samples is shorter than one window of 400"),
    "nan": (with_sample(math.nan), "no numbers"),
    "inf": (with_sample(math.inf), "no numbers"),
    "minus inf": (with_sample(-math.inf), "no numbers"),
    "more than float32 holds": (with_sample(1e300, bits=64), "no numbers"),
    "all nan": (wav(np.full(RATE, math.nan), RATE, 32, is_float=True), "no numbers"),
    "absurdly fast": (wav(tone(440, 1, RATE), 2_000_000_000), "2000000000 samples a second is outside 1000 … 1000000"),
    "absurdly slow": (wav(tone(440, 1, RATE), 999), "999 samples a second is outside"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_its_reason(name: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(DataError, match=reason):
        clip(data, CONFIG)


def test_a_cut_file_gives_its_beginning_or_a_data_error() -> None:
    for container in ("wav", "flac", "mp3", "ogg"):
        data = encode_sound(speechlike(1), RATE, container)
        for share in (0.9, 0.5, 0.1, 0.01):
            try:
                segment = clip(data[: int(len(data) * share)], CONFIG)
            except DataError:
                continue
            assert len(segment.content) <= 106 * share + 3, (container, share)
    assert len(clip(WHOLE[: len(WHOLE) // 2], CONFIG).content) == 49


def test_a_clip_of_large_but_finite_samples_is_finite() -> None:
    assert np.isfinite(clip(with_sample(3e38), CONFIG).content.astype(np.float64)).all()


def test_clip_over_limit_bytes_is_refused() -> None:
    clip(WHOLE, AudioConfig(limit_bytes=len(WHOLE)))
    with pytest.raises(DataError, match=rf"{len(WHOLE)} bytes is over modality\.audio\.limit_bytes={len(WHOLE) - 1}"):
        clip(WHOLE, AudioConfig(limit_bytes=len(WHOLE) - 1))


def test_the_fastest_and_slowest_sound_read() -> None:
    for rate in (1_000, 999_983, 1_000_000):
        assert abs(len(clip(wav(tone(100, 0.5, rate), rate), CONFIG).content) - 50) <= 1


def test_clip_over_limit_seconds_is_refused() -> None:
    clip(WHOLE, AudioConfig(limit_seconds=1))
    for rate in (8_000, 48_000):
        with pytest.raises(DataError, match=r"longer than modality\.audio\.limit_seconds=1"):
            clip(wav(tone(440, 1.01, rate), rate), AudioConfig(limit_seconds=1))


@pytest.mark.parametrize("listing", ["ffconcat version 1.0\nfile '{}'\n", "#EXTM3U\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"])
def test_a_playlist_opens_no_other_file(listing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("secret.wav").write_bytes(WHOLE)
    for name in ("secret.wav", str(tmp_path / "secret.wav"), (tmp_path / "secret.wav").as_uri()):
        with pytest.raises(DataError, match=UNREADABLE):
            clip(listing.format(name).encode(), CONFIG)


def test_a_cover_picture_of_any_size_is_not_decoded(tmp_path: Path) -> None:
    sound = encode_sound(tone(440, 1, RATE), RATE, "mp3")
    plain, bomb = tmp_path / "plain.mp3", tmp_path / "bomb.mp3"
    plain.write_bytes(mp3_with_cover(large_png(10), sound))
    bomb.write_bytes(mp3_with_cover(large_png(10_000), sound))
    assert bomb.stat().st_size < 2e6
    _, growth = peak_growth_bytes("audio.read_audio", plain, bomb, config="config.AudioConfig()")
    assert growth < 3e7  # the picture would take 1e8
    assert np.array_equal(*(clip(file.read_bytes(), CONFIG).content for file in (plain, bomb)))


def test_same_damaged_file_is_refused_in_the_same_words() -> None:
    """The reason goes into the corpus's index, whose hash must not change from run to run."""
    for data in (b"no sound", WHOLE[:20], encode_video([0])):
        reasons = set()
        for copy in (bytes(data), bytes(bytearray(data))):
            with pytest.raises(DataError) as refused:
                clip(copy, CONFIG)
            reasons.add(str(refused.value))
        assert len(reasons) == 1
        assert "0x" not in reasons.pop()


def test_real_wavs_have_a_frame_for_every_hop(real_data: Path) -> None:
    audio = real_data / "audio"
    files = [*sorted((audio / "fsdd").glob("*.wav"))[::40], *sorted((audio / "asterisk").glob("*.wav"))[::6]]
    files += sorted((audio / "speech").glob("*.wav"))
    assert len(files) >= 30
    for file in files:
        with wave.open(str(file)) as held:
            seconds = held.getnframes() / held.getframerate()
        content = clip(file.read_bytes(), CONFIG).content.astype(np.float64)
        assert abs(len(content) - seconds * 100) <= 1, file.name
        assert np.isfinite(content).all(), file.name
        assert content.std() > 0.5, file.name


def test_real_flac_and_mp3_read(real_data: Path) -> None:
    speech = clip((real_data / "audio" / "speech" / "jfk.flac").read_bytes(), CONFIG)
    assert (len(speech.content), len(speech)) == (1_100, 275)
    roar = clip((real_data / "audio" / "sounds" / "t-rex-roar.mp3").read_bytes(), CONFIG)
    assert len(roar.content) > 100
    assert roar.content.astype(np.float64).mean(axis=0).argmax() < 40  # it growls
