"""A media file of any kind becomes a segment."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omniloom.modality.audio import read_audio
from omniloom.modality.config import ModalityConfig
from omniloom.modality.files import read_bounded
from omniloom.modality.image import read_image
from omniloom.modality.sequence import Segment
from omniloom.modality.video import read_video

READERS: dict[str, Callable[[bytes, Any], Segment]] = {"image": read_image, "audio": read_audio, "video": read_video}


def read_media_file(kind: str, path: Path, config: ModalityConfig) -> Segment:
    """Read one file of the medium `kind`: image, audio or video; one over its limit is refused before its bytes are."""
    sizes = getattr(config, kind)
    return READERS[kind](read_bounded(path, sizes.limit_bytes, f"modality.{kind}.limit_bytes"), sizes)
