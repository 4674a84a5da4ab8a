"""Sizes of the media and of the vocabulary: how files become tokens."""

from dataclasses import dataclass, field

from omniloom.errors import ConfigError


@dataclass
class TokenizerConfig:
    """A byte-level BPE: trained on the corpus, or an existing `tokenizer.json`."""

    path: str | None = None
    vocab_size: int = 32_768


@dataclass
class ImageConfig:
    """Pictures are resized to a square and cut into patches: (size / patch)² tokens each."""

    size_pixels: int = 224
    patch_pixels: int = 14
    limit_bytes: int = 10_000_000
    limit_side_pixels: int = 8_000

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.size_pixels // self.patch_pixels

    @property
    def tokens(self) -> int:
        """Tokens of one picture."""
        return self.grid**2

    @property
    def patch_values(self) -> int:
        """Numbers in one patch: patch² pixels of three colours."""
        return self.patch_pixels**2 * 3


@dataclass
class ModalityConfig:
    """Everything that decides which tokens a file becomes; stored with the corpus and with each checkpoint."""

    image: ImageConfig = field(default_factory=ImageConfig)

    def check(self) -> None:
        """Raise ConfigError where a size cannot hold."""
        image = self.image
        if image.patch_pixels < 1 or image.size_pixels < 1 or image.size_pixels % image.patch_pixels:
            raise ConfigError(
                f"a picture must divide into whole patches: modality.image.size_pixels={image.size_pixels} is no "
                f"multiple of modality.image.patch_pixels={image.patch_pixels}"
            )
