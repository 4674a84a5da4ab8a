"""Sizes of the media and of the vocabulary: how files become tokens."""

from dataclasses import dataclass, field
from typing import NamedTuple

from omniloom.errors import ConfigError, refuse_unless_one_of

RESIZE = ("fixed", "native")


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
    """Pictures are resized and cut into patches, a token each.

    `fixed` makes a square of `size_pixels`; `native` keeps the aspect, in whole patches: at most `limit_tokens` of
    them, and no more than the picture has.
    """

    size_pixels: int = 224
    patch_pixels: int = 14
    resize: str = "fixed"  # or native
    limit_tokens: int = 1_024
    limit_bytes: int = 10_000_000
    limit_side_pixels: int = 8_000

    @property
    def tokens(self) -> int:
        """Tokens of the largest picture."""
        return (self.size_pixels // self.patch_pixels) ** 2 if self.resize == "fixed" else self.limit_tokens


@dataclass
class AudioConfig:
    """Sound becomes log-mel frames, one every `hop_ms`; the model's convolutions make one token of several frames.

    A sound of more than `clip_seconds` becomes several clips in a row.
    """

    sample_rate: int = 16_000
    mels: int = 80
    window_ms: int = 25
    hop_ms: int = 10
    frames_per_token: int = 4
    clip_seconds: int = 30
    limit_bytes: int = 2_000_000_000
    limit_seconds: int = 7_200

    @property
    def window_samples(self) -> int:
        """Samples of one window."""
        return self.sample_rate * self.window_ms // 1_000

    @property
    def hop_samples(self) -> int:
        """Samples from one frame to the next."""
        return self.sample_rate * self.hop_ms // 1_000

    @property
    def clip_frames(self) -> int:
        """Frames of the longest clip, but for a last one that was too short to stand alone."""
        return self.clip_seconds * 1_000 // self.hop_ms

    def tokens(self, frames: int) -> int:
        """Tokens of a clip of `frames` frames; the last one may stand on fewer."""
        return -(-frames // self.frames_per_token)


@dataclass
class VideoConfig:
    """Frames are taken at a fixed rate by timestamp, resized to a square, cut into patches: (size / patch)² a frame.

    With `audio` the sound track is read too: what is heard from one frame to the next follows the frame.
    """

    size_pixels: int = 224
    patch_pixels: int = 14
    frames_per_second: float = 1.0
    audio: bool = False
    limit_bytes: int = 8_000_000_000
    limit_side_pixels: int = 8_000
    limit_seconds: int = 7_200


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
        refuse_unless_one_of("modality.image.resize", self.image.resize, RESIZE)
        if self.image.limit_tokens < 1:
            raise ConfigError(f"modality.image.limit_tokens={self.image.limit_tokens} must be at least 1")
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
        if audio.clip_seconds < 1 or audio.clip_seconds * 1_000 < audio.window_ms:
            raise ConfigError(
                f"modality.audio.clip_seconds={audio.clip_seconds} must be at least 1 and hold one window of "
                f"modality.audio.window_ms={audio.window_ms}"
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
