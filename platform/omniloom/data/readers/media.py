"""Which files are media, which are text beside them: by their names."""

MEDIA_KINDS = {
    **dict.fromkeys(("jpg", "jpeg", "png", "gif", "webp"), "image"),
    **dict.fromkeys(("wav", "flac", "mp3", "ogg", "m4a"), "audio"),
    **dict.fromkeys(("mp4", "webm", "mkv", "avi", "mov"), "video"),
}
METADATA_STEMS = ("captions", "metadata", "transcripts")
METADATA_EXTENSIONS = ("jsonl", "csv", "tsv")


def media_kind(file: str) -> str | None:
    """image, audio or video by a file's extension, or None."""
    return MEDIA_KINDS.get(file.rpartition(".")[2].lower())


def is_metadata(file: str) -> bool:
    """Whether a file holds the captions of its folder's media."""
    stem, _, extension = file.rpartition("/")[2].rpartition(".")
    return stem in METADATA_STEMS and extension in METADATA_EXTENSIONS


def sidecar(file: str) -> str:
    """The text file of a medium: its name with the extension txt."""
    return f"{file.rpartition('.')[0]}.txt"
