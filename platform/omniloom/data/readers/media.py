"""Which files are media, which are text beside them: by their names."""

MEDIA_KINDS = {
    **dict.fromkeys(("jpg", "jpeg", "jfif", "png", "gif", "webp"), "image"),
    **dict.fromkeys(("wav", "w64", "flac", "mp3", "ogg", "oga", "opus", "aac", "m4a", "m4b", "mka", "mp2"), "audio"),
    **dict.fromkeys(("mp4", "m4v", "mov", "3gp", "3g2", "mj2", "mkv", "webm", "avi"), "video"),
    **dict.fromkeys(("mpg", "mpeg", "ts", "mts", "m2ts", "ogv"), "video"),
}
METADATA_STEMS = ("captions", "metadata", "transcripts")
METADATA_EXTENSIONS = ("jsonl", "csv", "tsv")
# What stands beside media and is none: text, labels, indexes, and what systems and tools leave in a folder.
NO_MEDIA = frozenset(
    [
        "txt",
        "text",
        "json",
        "jsonl",
        "csv",
        "tsv",
        "md",
        "rst",
        "html",
        "xml",
        "yaml",
        "yml",
        "srt",
        "vtt",
        "url",
        "cls",
        "cls2",
        "class",
        "count",
        "index",
        "inx",
        "id",
        "readme",
        "license",
        "licence",
        "notice",
        "sha256sums",
        "md5",
        "sha256",
        "idx",
        "ini",
        "db",
        "lock",
        "metadata",
    ]
)


def extension_of(file: str) -> str:
    """What stands behind the last dot of a file's name, or all of it."""
    return file.rpartition("/")[2].rpartition(".")[2].lower()


def media_kind(file: str) -> str | None:
    """image, audio or video by a file's extension, or None."""
    return MEDIA_KINDS.get(extension_of(file))


def is_no_medium(file: str) -> bool:
    """Whether a file is known to hold none; one that is neither this nor of a known kind is a reject."""
    return extension_of(file) in NO_MEDIA or file.rpartition("/")[2].startswith(".") or "/.git/" in file


def unknown(file: str) -> str:
    """Why a file that is neither a medium nor known to be none is not read."""
    name = file.rpartition("/")[2]
    said = f".{extension_of(file)[:50]}" if "." in name else "a file without an extension"
    return f"not a medium: {said} is not read; known are {', '.join(MEDIA_KINDS)}"


def is_metadata(file: str) -> bool:
    """Whether a file holds the captions of its folder's media."""
    stem, _, extension = file.rpartition("/")[2].rpartition(".")
    return stem in METADATA_STEMS and extension in METADATA_EXTENSIONS


def sidecar(file: str) -> str:
    """The text file of a medium: its name with the extension txt."""
    return f"{file.rpartition('.')[0]}.txt"
