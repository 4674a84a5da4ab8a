"""Picture files become patches, or are refused with a DataError; nothing else may come out of read_image."""

import io
import struct
import zlib
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
from PIL import Image, ImageFile

from omniloom.errors import ConfigError, DataError
from omniloom.modality.config import ImageConfig, ModalityConfig
from omniloom.modality.files import Media
from omniloom.modality.image import read_image
from omniloom.modality.sequence import IMAGE, Segment

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged EXIF

TINY = ImageConfig(size_pixels=4, patch_pixels=2)
PIXELS = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)  # pixel (r, c) holds 12 r + 3 c and its successors
COLOUR = (200, 40, 90)


def encode(picture: Image.Image | np.ndarray, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(stream, format, **options)
    return stream.getvalue()


def plain(mode: str = "RGB", side: int = 8) -> Image.Image:
    return Image.new("RGB", (side, side), COLOUR).convert(mode)


def noise(side: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))


def read(content: bytes, config: ImageConfig) -> Segment:
    return read_image(Media("picture", content), config)


def read_picture(content: bytes, config: ImageConfig) -> Segment:
    return read_image(Media("picture", content), config)


def joined(segment: Segment, config: ImageConfig) -> np.ndarray:
    """The square picture that the patches were cut from, put together by a loop."""
    pixels = np.zeros((config.size_pixels, config.size_pixels, 3), np.uint8)
    for content, (_, row, column) in zip(segment.content, segment.position, strict=True):
        for y in range(config.patch_pixels):
            for x in range(config.patch_pixels):
                at = (y * config.patch_pixels + x) * 3
                place = row * config.patch_pixels + y, column * config.patch_pixels + x
                pixels[place] = content[at : at + 3]
    return pixels


def png_header(width: int, height: int) -> bytes:
    """A whole but empty PNG that claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_patches_are_the_pixels_put_in_row_by_row() -> None:
    segment = read_picture(encode(PIXELS, "PNG"), TINY)
    # Patch (0, 0) is pixels (0, 0), (0, 1), (1, 0), (1, 1): 0 1 2, 3 4 5, 12 13 14, 15 16 17. Rightwards add 6,
    # downwards 24.
    first = np.array([0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17])
    assert segment.content.tolist() == [(first + add).tolist() for add in (0, 6, 24, 30)]
    assert segment.position.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    assert segment.modality == IMAGE
    assert not segment.is_target


def test_picture_dtypes_are_the_contracts() -> None:
    segment = read_picture(encode(PIXELS, "PNG"), TINY)
    assert (segment.content.dtype, segment.position.dtype) == (np.uint8, np.int32)
    assert segment.content.flags.c_contiguous


def test_default_picture_is_256_tokens_of_588_values() -> None:
    config = ImageConfig()
    segment = read_picture(encode(noise(50), "JPEG"), config)
    assert config.tokens == 256
    assert len(segment) == 256
    assert segment.content.shape == (256, 588)
    assert segment.position.shape == (256, 3)
    assert segment.position[17].tolist() == [0, 1, 1]
    assert segment.position[-1].tolist() == [0, 15, 15]


def test_picture_is_resized_to_a_square() -> None:
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 4:] = 255
    square = joined(read_picture(encode(wide, "PNG"), ImageConfig(8, 2)), ImageConfig(8, 2))
    assert (square[:, :4] == 0).all()
    assert (square[:, 4:] == 255).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP"])
def test_each_format_keeps_its_colour(format: str) -> None:
    segment = read_picture(encode(plain(), format), TINY)
    assert np.abs(segment.content.reshape(-1, 3).astype(int) - COLOUR).max() <= 6


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(format: str) -> None:
    red, blue = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(red, format, save_all=True, append_images=[blue], **options)
    assert (read_picture(data, TINY).content.reshape(-1, 3) == (255, 0, 0)).all()


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, PIXELS),
        (2, PIXELS[:, ::-1]),
        (3, PIXELS[::-1, ::-1]),
        (4, PIXELS[::-1]),
        (5, PIXELS.transpose(1, 0, 2)),
        (6, PIXELS[::-1].transpose(1, 0, 2)),
        (7, PIXELS[::-1, ::-1].transpose(1, 0, 2)),
        (8, PIXELS[:, ::-1].transpose(1, 0, 2)),
    ],
)
def test_exif_orientation_is_applied(format: str, orientation: int, upright: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    segment = read_picture(encode(PIXELS, format, exif=exif, **options), TINY)
    assert np.array_equal(joined(segment, TINY), upright)


def test_exif_orientation_is_applied_to_jpeg() -> None:
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:, 8:] = 255  # the right half is white; a quarter turn clockwise brings it to the bottom
    exif = Image.Exif()
    exif[0x0112] = 6
    square = joined(read_picture(encode(picture, "JPEG", exif=exif), ImageConfig(16, 4)), ImageConfig(16, 4))
    assert square[:7].max() < 20
    assert square[9:].min() > 235


def test_transparency_lies_on_white() -> None:
    picture = np.zeros((4, 4, 4), np.uint8)
    picture[:2] = (255, 0, 0, 0)  # clear red is white
    picture[2:] = (255, 0, 0, 128)  # half red over white: 255 · 127 / 255 of green and blue
    square = joined(read_picture(encode(picture, "PNG"), TINY), TINY)
    assert (square[:2] == 255).all()
    assert (square[2:] == (255, 127, 127)).all()


def test_transparent_palette_colour_lies_on_white() -> None:
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    picture.putpixel((0, 0), 1)
    for format in ("PNG", "GIF"):
        square = joined(read_picture(encode(picture, format, transparency=0), TINY), TINY)
        assert square[0, 0].tolist() == [10, 20, 30]
        assert (square[1:] == 255).all()


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        ("CMYK", "JPEG"),
        ("L", "JPEG"),
        ("1", "PNG"),
        ("L", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("RGBA", "PNG"),
        ("P", "GIF"),
        ("L", "GIF"),
        ("RGBA", "WEBP"),
    ],
)
def test_each_colour_mode_reads_to_its_colour(mode: str, format: str) -> None:
    seen = read_picture(encode(plain(mode), format), TINY).content.reshape(-1, 3).astype(int).mean(0)
    expected = np.asarray(plain(mode).convert("RGB")).reshape(-1, 3).astype(int).mean(0)
    assert np.abs(seen - expected).max() < (40 if mode == "1" else 8)  # 1 bit is dithered


def test_sixteen_bit_grey_keeps_its_brightness() -> None:
    picture = np.array([[0, 0x4000], [0x8000, 0xFFFF]], np.uint16).repeat(2, 0).repeat(2, 1)
    square = joined(read_picture(encode(picture, "PNG"), TINY), TINY)
    assert np.abs(square[::2, ::2, 0].astype(int) - [[0, 0x40], [0x80, 0xFF]]).max() <= 1


def test_sixteen_bit_grey_is_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture = np.zeros((4, 4), np.uint16)
    picture[:2] = 0x4000
    square = joined(read_picture(encode(picture, "PNG", exif=exif), TINY), TINY)
    assert (square[:2] == 0).all()
    assert (square[2:] == 0x40).all()


def test_transparent_sixteen_bit_grey_lies_on_white() -> None:
    picture = np.zeros((4, 4), np.uint16)
    picture[:2] = 0x4000
    square = joined(read_picture(encode(picture, "PNG", transparency=0x4000), TINY), TINY)
    assert (square[:2] == 255).all()
    assert (square[2:] == 0).all()


def test_one_pixel_and_one_line_pictures_read() -> None:
    for size in ((1, 1), (1, 300), (300, 1)):
        assert (
            read_picture(encode(Image.new("RGB", size, COLOUR), "PNG"), TINY).content.reshape(-1, 3) == COLOUR
        ).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.8])
def test_cut_file_is_refused(format: str, share: float) -> None:
    data = encode(noise(), format)
    with pytest.raises(DataError, match="picture"):
        read_picture(data[: int(len(data) * share)], TINY)


@pytest.mark.parametrize("format", ["BMP", "TIFF", "ICO", "PPM"])
def test_other_format_is_refused_whatever_its_name(format: str) -> None:
    with pytest.raises(DataError, match="JPEG, PNG, GIF, WEBP"):
        read_picture(encode(plain(), format), TINY)


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 200, b"plain text", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\0\0\0\0WEBP"]
)
def test_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="picture"):
        read_picture(data, TINY)


def test_same_damaged_file_is_refused_in_the_same_words() -> None:
    """The reason goes into the corpus's index, whose hash must not change from run to run."""
    reasons = []
    for data in (b"no picture", b"no picture"):
        with pytest.raises(DataError) as refused:
            read_picture(data, TINY)
        reasons.append(str(refused.value))
    assert reasons[0] == reasons[1]
    assert "0x" not in reasons[0]


def test_file_over_limit_bytes_is_refused() -> None:
    data = encode(PIXELS, "PNG")
    assert len(read_picture(data, ImageConfig(4, 2, limit_bytes=len(data)))) == 4
    with pytest.raises(DataError, match=f"{len(data)} bytes is over modality.image.limit_bytes={len(data) - 1}"):
        read_picture(data, ImageConfig(4, 2, limit_bytes=len(data) - 1))


@pytest.mark.parametrize("size", [(5, 3), (3, 5)])
def test_picture_over_limit_side_is_refused(size: tuple[int, int]) -> None:
    data = encode(Image.new("RGB", size), "PNG")
    assert len(read_picture(data, ImageConfig(4, 2, limit_side_pixels=5))) == 4
    with pytest.raises(DataError, match=f"{size[0]} × {size[1]} pixels is over modality.image.limit_side_pixels=4"):
        read_picture(data, ImageConfig(4, 2, limit_side_pixels=4))


def bombs() -> dict[str, bytes]:
    """Small files of each format that claim 60,000 × 60,000 pixels (a PNG also 9,000 × 1: one side too long)."""
    jpeg, gif = bytearray(encode(plain(), "JPEG")), bytearray(encode(plain(), "GIF"))
    frame = jpeg.index(b"\xff\xc0") + 5
    jpeg[frame : frame + 4] = struct.pack(">HH", 60_000, 60_000)
    gif[6:10] = struct.pack("<HH", 60_000, 60_000)
    webp = bytearray(encode(plain("RGBA"), "WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"))
    assert webp[12:16] == b"VP8X"
    webp[24:30] = struct.pack("<I", 59_999)[:3] * 2
    return {
        "png": png_header(60_000, 60_000),
        "long png": png_header(9_000, 1),
        "jpeg": bytes(jpeg),
        "gif": bytes(gif),
        "webp": bytes(webp),
    }


@pytest.mark.parametrize("name", bombs())
def test_bomb_is_refused_before_a_pixel_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(picture: ImageFile.ImageFile) -> None:
        raise AssertionError(f"pixels of a {picture.size} picture were read")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    started = perf_counter()
    with pytest.raises(DataError, match=r"limit|readable"):
        read_picture(bombs()[name], TINY)
    assert perf_counter() - started < 2


def exif_with(*entries: tuple[int, int, bytes]) -> bytes:
    """An EXIF block of (tag, type, value) entries; type 2 is ASCII, 3 is SHORT."""
    body = b"".join(struct.pack(">HHI", tag, kind, 2 if kind == 2 else 1) + value for tag, kind, value in entries)
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(entries)) + body + b"\0\0\0\0"


TURNED = (0x0112, 3, b"\0\6\0\0")


@pytest.mark.parametrize(
    "entries",
    [
        [TURNED, (0x011A, 2, b"x\0\0\0")],  # XResolution as text
        [TURNED, (0x0100, 2, b"x\0\0\0")],  # ImageWidth as text
        [(0x0112, 2, b"6\0\0\0")],  # the orientation itself as text
        [(0x0112, 3, b"\0\x63\0\0")],  # orientation 99
    ],
)
def test_damaged_exif_gives_a_picture_or_a_data_error(entries: list[tuple[int, int, bytes]]) -> None:
    try:
        segment = read_picture(encode(plain(), "JPEG", exif=exif_with(*entries)), TINY)
    except DataError:
        return
    assert segment.content.shape == (4, 12)


@pytest.mark.parametrize(("size", "patch"), [(225, 14), (14, 0), (14, 28), (0, 14), (-28, 14)])
def test_sizes_without_whole_patches_are_refused(size: int, patch: int) -> None:
    with pytest.raises(ConfigError, match=f"modality.image.size_pixels={size}"):
        ModalityConfig(ImageConfig(size, patch)).check()


def test_real_photos_read_to_256_tokens(real_data: Path) -> None:
    config = ImageConfig()
    photos = sorted((real_data / "image" / "photos").glob("*.jpg"))
    assert len(photos) >= 10
    for photo in photos:
        segment = read_picture(photo.read_bytes(), config)
        assert segment.content.shape == (256, 588), photo.name
        assert segment.content.std() > 5, photo.name


def test_real_photo_reads_as_pillow_shows_it(real_data: Path) -> None:
    config = ImageConfig()
    photo = real_data / "image" / "photos" / "bee.jpg"
    with Image.open(photo) as picture:
        shown = np.asarray(picture.convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(joined(read_picture(photo.read_bytes(), config), config) - shown).max() <= 2
