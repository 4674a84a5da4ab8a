"""A sound file becomes log-mel frames (PyAV decodes and resamples).

S samples, F frames, M mel bands.
"""

import io
from functools import cache
from itertools import chain

import av
import numpy as np

from omniloom.errors import DataError
from omniloom.modality.config import AudioConfig
from omniloom.modality.files import refuse_large
from omniloom.modality.sequence import AUDIO, Segment

# Containers the reader may open: playlists and the like, which name other files, are not among them.
CONTAINERS = "wav,w64,flac,mp3,ogg"
LOG_FLOOR = 1e-10
SILENCE = 1e-4  # of full scale, −80 dB: below the noise of any recording


def read_audio(data: bytes, config: AudioConfig) -> Segment:
    """Decode one clip to mono and turn it into log-mel frames.

    Returns a Segment of ⌈frames / frames_per_token⌉ tokens, content float16 (frames, mels), position (token, 0, 0).
    Raises DataError for a file that is too large or long, of another format or broken, shorter than a window, silent.
    """
    samples = decode(data, config)
    if len(samples) < config.window_samples:
        raise DataError(f"clip of {len(samples)} samples is shorter than one window of {config.window_samples}")
    if not np.isfinite(samples).all():
        raise DataError("clip with samples that are no numbers")
    if np.abs(samples).max() < SILENCE:
        raise DataError(f"silent clip: no sample reaches {SILENCE} of full scale")
    return audio_segment(log_mel(samples, config).astype(np.float16), config)


def decode(data: bytes, config: AudioConfig) -> np.ndarray:
    """A file's first sound track as mono float32 (S,) at `sample_rate`, in −1 … 1; raises DataError."""
    refuse_large(len(data), config.limit_bytes, "modality.audio.limit_bytes")
    limit = config.limit_seconds * config.sample_rate
    parts: list[np.ndarray] = []
    held = 0
    options = {"format_whitelist": CONTAINERS, "max_pixels": "1"}  # probing would decode a cover picture of any size
    try:
        with av.open(io.BytesIO(data), "r", options=options) as container:
            if not container.streams.audio:
                raise DataError("no sound in the file")
            # Channels are averaged here: FFmpeg's own mix to mono lets two equal ones come out 3 dB louder.
            resampler = av.AudioResampler(format="flt", rate=config.sample_rate)
            for frame in chain(container.decode(audio=0), [None]):  # None: what the resampler still holds
                for part in resampler.resample(frame):
                    parts.append(part.to_ndarray().reshape(-1, part.layout.nb_channels).mean(axis=1))
                    held += len(parts[-1])
                if held > limit:
                    raise DataError(f"clip is longer than modality.audio.limit_seconds={config.limit_seconds}")
    except DataError:
        raise
    except Exception as error:  # on damaged files the decoders raise whatever their parsers met
        raise DataError(f"not a readable sound file ({type(error).__name__})") from error
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def log_mel(samples_S: np.ndarray, config: AudioConfig) -> np.ndarray:
    """log10 max(mel · |STFT|², 1e-10), float64 (F, M) with F = ⌊S / hop⌋.

    Hann window; frames centred on multiples of the hop, ends reflected, the frame past the end dropped; Slaney's mel
    scale and area norm; no normalisation per clip. Source: Whisper's framing (Radford et al. 2022, section 2.2), which
    is the reading of the speech encoders in use.
    """
    window, hop = config.window_samples, config.hop_samples
    padded = np.pad(samples_S.astype(np.float64), window // 2, mode="reflect")
    frames_FW = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop][: len(samples_S) // hop]
    hann_W = np.hanning(window + 1)[:-1]  # periodic
    power_FB = np.abs(np.fft.rfft(frames_FW * hann_W)) ** 2
    return np.log10(np.maximum(power_FB @ _filters(config.sample_rate, window, config.mels), LOG_FLOOR))


@cache
def _filters(sample_rate: int, window: int, mels: int) -> np.ndarray:
    from transformers.audio_utils import mel_filter_bank  # a second to import, and only sound needs it

    return mel_filter_bank(window // 2 + 1, mels, 0.0, sample_rate / 2, sample_rate, norm="slaney", mel_scale="slaney")


def audio_segment(frames_FM: np.ndarray, config: AudioConfig) -> Segment:
    """Log-mel frames float16 (F, M) as a Segment."""
    token = np.arange(config.tokens(len(frames_FM)), dtype=np.int32)
    return Segment(AUDIO, frames_FM, np.stack([token, np.zeros_like(token), np.zeros_like(token)], axis=1))
