"""Sizes of the media and of the vocabulary: how files become tokens."""

from dataclasses import dataclass, field
from typing import NamedTuple

from omniloom.errors import ConfigError


class Widths(NamedTuple):
    """Numbers in one row of each media field: a picture's patch, an audio frame, a video's patch."""

    image: int
    audio: int
    video: int


@dataclass
class TokenizerConfig:
    """A byte-level BPE: trained on the corpus, or anybody's that is there already: conf/tokenizer/."""

    path: str | None = None  # tokenizer.json, a folder of one or of GPT-2's two files, a URL; None: train one
    vocab_size: int = 32_768  # of the one that is trained


@dataclass
class ImageConfig:
    """Pictures are resized to a square and cut into patches: (size / patch)² tokens each."""

    size_pixels: int = 224
    patch_pixels: int = 14
    limit_bytes: int = 10_000_000
    limit_side_pixels: int = 8_000

    @property
    def tokens(self) -> int:
        """Tokens of one picture."""
        return (self.size_pixels // self.patch_pixels) ** 2


@dataclass
class AudioConfig:
    """Sound becomes log-mel frames, one every `hop_ms`; the model's convolutions make one token of several frames."""

    sample_rate: int = 16_000
    mels: int = 80
    window_ms: int = 25
    hop_ms: int = 10
    frames_per_token: int = 4
    limit_bytes: int = 50_000_000
    limit_seconds: int = 300

    @property
    def window_samples(self) -> int:
        """Samples of one window."""
        return self.sample_rate * self.window_ms // 1_000

    @property
    def hop_samples(self) -> int:
        """Samples from one frame to the next."""
        return self.sample_rate * self.hop_ms // 1_000

    def tokens(self, frames: int) -> int:
        """Tokens of a clip of `frames` frames; the last one may stand on fewer."""
        return -(-frames // self.frames_per_token)


@dataclass
class VideoConfig:
    """Frames are taken at a fixed rate by timestamp, resized to a square, cut into patches: (size / patch)² a frame."""

    size_pixels: int = 224
    patch_pixels: int = 14
    frames_per_second: float = 1.0
    limit_bytes: int = 1_000_000_000
    limit_side_pixels: int = 8_000
    limit_seconds: int = 600


@dataclass
class ModalityConfig:
    """Everything that decides which tokens a file becomes; stored with the corpus and with each checkpoint."""

    image: ImageConfig = field(default_factory=ImageConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    video: VideoConfig = field(default_factory=VideoConfig)

    @property
    def widths(self) -> Widths:
        """Numbers in one row of each media field."""
        return Widths(self.image.patch_pixels**2 * 3, self.audio.mels, self.video.patch_pixels**2 * 3)

    def check(self) -> None:
        """Raise ConfigError where a size cannot hold."""
        for name, square in (("image", self.image), ("video", self.video)):
            if square.patch_pixels < 1 or square.size_pixels < 1 or square.size_pixels % square.patch_pixels:
                raise ConfigError(
                    f"a picture must divide into whole patches: modality.{name}.size_pixels={square.size_pixels} is no "
                    f"multiple of modality.{name}.patch_pixels={square.patch_pixels}"
                )
        audio = self.audio
        for key in ("sample_rate", "mels", "hop_ms"):
            if getattr(audio, key) < 1:
                raise ConfigError(f"modality.audio.{key}={getattr(audio, key)} must be at least 1")
        for key in ("window_ms", "hop_ms"):
            if audio.sample_rate * getattr(audio, key) % 1_000:
                raise ConfigError(
                    f"modality.audio.{key}={getattr(audio, key)} is no whole number of samples at "
                    f"modality.audio.sample_rate={audio.sample_rate}"
                )
        if audio.window_samples % 2:
            raise ConfigError(
                f"a centred window needs an even number of samples: modality.audio.window_ms={audio.window_ms} has "
                f"{audio.window_samples} at modality.audio.sample_rate={audio.sample_rate}"
            )
        if audio.window_ms < audio.hop_ms:
            raise ConfigError(
                f"windows must overlap or touch: modality.audio.window_ms={audio.window_ms} is under "
                f"modality.audio.hop_ms={audio.hop_ms}"
            )
        if audio.frames_per_token < 2 or audio.frames_per_token & (audio.frames_per_token - 1):
            raise ConfigError(
                "each convolution halves the frames: "
                f"modality.audio.frames_per_token={audio.frames_per_token} must be 2, 4, 8, …"
            )
        if not 0 < self.video.frames_per_second <= 60:
            raise ConfigError(
                f"modality.video.frames_per_second={self.video.frames_per_second} must be over 0 and at most 60"
            )
