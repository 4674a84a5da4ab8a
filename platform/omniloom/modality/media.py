"""A medium of any kind becomes segments."""

from pathlib import Path
from tempfile import TemporaryDirectory

from omniloom.modality.audio import read_audio
from omniloom.modality.config import ModalityConfig
from omniloom.modality.files import Media
from omniloom.modality.image import read_image
from omniloom.modality.sequence import Segment
from omniloom.modality.video import Film, decode_video, film_segments


def read_media(kind: str, media: Media, config: ModalityConfig) -> list[Segment]:
    """Read one medium of `kind`: image, audio or video; a file over its limit is refused before its bytes are read."""
    with TemporaryDirectory() as folder:  # what a video leaves there stays mapped until its segments are gone
        return segments_of(decode_media(kind, media, config, Path(folder) / "spool"), config)


def decode_media(kind: str, media: Media, config: ModalityConfig, spool: Path) -> list[Segment] | Film:
    """Decode one medium to what one process may hand to another; a video's patches go to the file `spool`."""
    if kind == "video":
        return decode_video(media, config.video, config.audio, spool)
    return [read_image(media, config.image)] if kind == "image" else read_audio(media, config.audio)


def segments_of(decoded: list[Segment] | Film, config: ModalityConfig) -> list[Segment]:
    """The segments of a decoded medium; a video's file is mapped, not read."""
    return film_segments(decoded, config.audio) if isinstance(decoded, Film) else decoded
