"""A medium of any kind becomes segments."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omniloom.modality.audio import read_audio
from omniloom.modality.config import ModalityConfig
from omniloom.modality.files import Media, read_bounded
from omniloom.modality.image import read_image
from omniloom.modality.sequence import Segment
from omniloom.modality.video import read_video

READERS: dict[str, Callable[[bytes, Any], Segment]] = {"image": read_image, "audio": read_audio, "video": read_video}


def read_media(kind: str, media: Media, config: ModalityConfig) -> list[Segment]:
    """Read one medium of `kind`: image, audio or video; a file over its limit is refused before its bytes are read."""
    sizes = getattr(config, kind)
    data = media.content
    if isinstance(data, Path):
        data = read_bounded(data, sizes.limit_bytes, f"modality.{kind}.limit_bytes")
    return [READERS[kind](data, sizes)]
