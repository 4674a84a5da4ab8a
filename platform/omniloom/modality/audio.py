"""A sound file becomes log-mel frames (PyAV decodes and resamples).

S samples, F frames, M mel bands.
"""

from collections.abc import Iterator
from functools import cache
from itertools import chain

import av
import numpy as np

from omniloom.errors import DataError
from omniloom.modality.config import AudioConfig
from omniloom.modality.files import Media, open_bounded
from omniloom.modality.sequence import AUDIO, Segment

# Containers the reader may open: playlists and the like, which name other files, are not among them.
CONTAINERS = "wav,w64,flac,mp3,ogg,aac,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm"
LOG_FLOOR = 1e-10
SILENCE = 1e-4  # of full scale, −80 dB: below the noise of any recording
SLOWEST, FASTEST = 1_000, 1_000_000  # samples a second: a resampler from absurd ones takes gigabytes
BLOCK_FRAMES = 1_000  # transformed together: a bound on memory


def read_audio(media: Media, config: AudioConfig) -> list[Segment]:
    """Decode one sound to mono and turn it into log-mel frames, cut into clips of `clip_seconds`.

    Returns a Segment a clip: ⌈frames / frames_per_token⌉ tokens, content float16 (frames, mels), position (token, 0,
    0). The samples are never in memory as a whole. Raises DataError for a file that is too large or long, of another
    format or broken, shorter than a window, silent.
    """
    mel = LogMel(config)
    blocks = [block.astype(np.float16) for samples_S in decode_sound(media, config) for block in mel.add(samples_S)]
    if mel.samples < config.window_samples:
        raise DataError(f"clip of {mel.samples} samples is shorter than one window of {config.window_samples}")
    if mel.loudest < SILENCE:
        raise DataError(f"silent clip: no sample reaches {SILENCE} of full scale")
    return audio_segments(np.concatenate([*blocks, mel.rest().astype(np.float16)]), config)


def decode_sound(media: Media, config: AudioConfig) -> Iterator[np.ndarray]:
    """A file's first sound track as mono float32 at `sample_rate`, in −1 … 1, piece by piece; raises DataError."""
    limit = config.limit_seconds * config.sample_rate
    given = 0
    options = {"format_whitelist": CONTAINERS, "max_pixels": "1"}  # probing would decode a cover picture of any size
    try:
        with (
            open_bounded(media, config.limit_bytes, "modality.audio.limit_bytes") as file,
            av.open(file, "r", options=options) as container,
        ):
            if not container.streams.audio:
                raise DataError("no sound in the file")
            resample = Resampler(config)
            for frame in chain(container.decode(audio=0), [None]):
                for samples_S in resample(frame):
                    given += len(samples_S)
                    if given > limit:
                        raise DataError(f"clip is longer than modality.audio.limit_seconds={config.limit_seconds}")
                    yield samples_S
    except DataError:
        raise
    except Exception as error:  # on damaged files the decoders raise whatever their parsers met
        raise DataError(f"not a readable sound file ({type(error).__name__})") from error


class Resampler:
    """Decoded sound to mono float32 (S,) at `sample_rate`; called with None it gives what it still holds."""

    def __init__(self, config: AudioConfig) -> None:
        # Channels are averaged here: FFmpeg's own mix to mono lets two equal ones come out 3 dB louder.
        self._resampler = av.AudioResampler(format="flt", rate=config.sample_rate)

    def __call__(self, frame: av.AudioFrame | None) -> Iterator[np.ndarray]:
        if frame is not None and not SLOWEST <= frame.sample_rate <= FASTEST:
            raise DataError(f"sound of {frame.sample_rate} samples a second is outside {SLOWEST} … {FASTEST}")
        for part in self._resampler.resample(frame):
            yield part.to_ndarray().reshape(-1, part.layout.nb_channels).mean(axis=1)


class LogMel:
    """log10 max(mel · |STFT|², 1e-10) of a sound that comes piece by piece, float64 (F, M) with F = ⌊S / hop⌋.

    Hann window; frames centred on multiples of the hop, ends reflected, the frame past the end dropped; Slaney's mel
    scale and area norm; no normalisation per clip. The pieces' sizes change nothing: blocks start at fixed frames.
    Source: Whisper's framing (Radford et al. 2022, section 2.2), which is the reading of the speech encoders in use.
    """

    def __init__(self, config: AudioConfig) -> None:
        self._window, self._hop = config.window_samples, config.hop_samples
        self._block_samples = BLOCK_FRAMES * self._hop
        self._filters_BM = _filters(config.sample_rate, self._window, config.mels)
        self._hann_W = np.hanning(self._window + 1)[:-1]  # periodic
        self._held: list[np.ndarray] = []
        self._held_samples = self._given_frames = 0
        self.samples, self.loudest = 0, 0.0

    def add(self, samples_S: np.ndarray) -> Iterator[np.ndarray]:
        """The blocks of frames that these samples complete; raises DataError for samples that are no numbers."""
        # In parts: however long the piece, no more than a block and a part is held.
        for part_S in np.split(samples_S, range(self._block_samples, len(samples_S), self._block_samples)):
            if not np.isfinite(part_S).all():
                raise DataError("clip with samples that are no numbers")
            self.loudest = max(self.loudest, float(np.abs(part_S).max(initial=0.0)))
            self.samples += len(part_S)
            self._held.append(part_S)
            self._held_samples += len(part_S)
            # Two windows more than the block's steps: the end is reflected from what is still held.
            if self._held_samples >= self._block_samples + 2 * self._window:
                padded = self._from_first_frame()
                yield self._transform(padded, BLOCK_FRAMES)
                self._held = [padded[self._block_samples :]]
                self._held_samples = len(self._held[0])

    def rest(self) -> np.ndarray:
        """The frames that no block held; there are none of a sound shorter than a window."""
        frames = self.samples // self._hop - self._given_frames if self.samples >= self._window else 0
        if not frames:
            return np.zeros((0, self._filters_BM.shape[1]))
        padded = np.pad(self._from_first_frame(), (0, self._window // 2), mode="reflect")
        return self._transform(padded, frames)

    def _from_first_frame(self) -> np.ndarray:
        """What is held, from the first sample under the next frame's window; before the sound it is reflected."""
        held = np.concatenate(self._held)
        return held if self._given_frames else np.pad(held, (self._window // 2, 0), mode="reflect")

    def _transform(self, padded: np.ndarray, frames: int) -> np.ndarray:
        frames_FW = np.lib.stride_tricks.sliding_window_view(padded, self._window)[:: self._hop][:frames]
        power_FB = np.abs(np.fft.rfft(frames_FW * self._hann_W)) ** 2
        self._given_frames += frames
        return np.log10(np.maximum(power_FB @ self._filters_BM, LOG_FLOOR))


@cache
def _filters(sample_rate: int, window: int, mels: int) -> np.ndarray:
    from transformers.audio_utils import mel_filter_bank  # a second to import, and only sound needs it

    return mel_filter_bank(window // 2 + 1, mels, 0.0, sample_rate / 2, sample_rate, norm="slaney", mel_scale="slaney")


def log_mel(samples_S: np.ndarray, config: AudioConfig) -> np.ndarray:
    """A whole sound's `LogMel` frames, float64 (F, M)."""
    mel = LogMel(config)
    return np.concatenate([*mel.add(samples_S), mel.rest()])


def audio_segments(frames_FM: np.ndarray, config: AudioConfig) -> list[Segment]:
    """Log-mel frames float16 (F, M) as clips of `clip_seconds` in a row, each with its own positions from 0.

    A last clip with fewer frames than a window spans joins the one before.
    """
    spanned = -(-config.window_samples // config.hop_samples)
    starts = range(0, max(len(frames_FM) - spanned, 0) + 1, config.clip_frames)
    return [
        audio_segment(frames_FM[start:stop], config)
        for start, stop in zip(starts, [*starts[1:], len(frames_FM)], strict=True)
    ]


def audio_segment(frames_FM: np.ndarray, config: AudioConfig) -> Segment:
    """Log-mel frames float16 (F, M) as one clip."""
    token = np.arange(config.tokens(len(frames_FM)), dtype=np.int32)
    return Segment(AUDIO, frames_FM, np.stack([token, np.zeros_like(token), np.zeros_like(token)], axis=1))
