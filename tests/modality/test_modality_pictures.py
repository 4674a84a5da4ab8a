"""Every kind of pixel a picture may hold, and pictures that keep their aspect."""

import io
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from made_media import peak_growth_bytes, png_bytes
from PIL import Image, ImageOps

from omniloom.errors import ConfigError
from omniloom.modality.config import ImageConfig, ModalityConfig
from omniloom.modality.files import Media
from omniloom.modality.image import native_size, read_image
from omniloom.modality.sequence import Segment

SMALL = ImageConfig(size_pixels=4, patch_pixels=4)  # one patch: its values are the pixels in order
NATIVE = ImageConfig(patch_pixels=4, resize="native")


def encode(picture: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format, **options)
    return stream.getvalue()


def pixels_of(data: bytes) -> np.ndarray:
    return read_image(Media("picture", data), SMALL).content.reshape(4, 4, 3).astype(int)


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def test_cmyk_has_the_colours_of_its_inks() -> None:
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:8, :8], inks[:8, 8:], inks[8:, :8], inks[8:, 8:] = (
        (255, 0, 0, 0),
        (0, 255, 0, 0),
        (0, 0, 255, 0),
        (0, 0, 0, 99),
    )
    data = encode(Image.fromarray(inks, "CMYK"), "JPEG", quality=100)
    at = data.index(b"\xff\xee")
    assert data[at + 4 : at + 9] == b"Adobe"  # its files hold 255 − ink
    seen = pixels_of(data)
    for row, column, colour in (
        (0, 0, (0, 255, 255)),
        (0, 3, (255, 0, 255)),
        (3, 0, (255, 255, 0)),
        (3, 3, (156,) * 3),
    ):
        assert np.abs(seen[row, column] - colour).max() <= 8, (row, column)


@pytest.mark.parametrize(("kind", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_each_png_of_8_and_16_bits_keeps_the_upper_8_on_white(kind: int, channels: int, dtype: type) -> None:
    stored = noise(4, 4, channels, dtype=dtype)
    upper = (stored >> 8 * (stored.itemsize - 1)).astype(float)
    colour = upper[..., :3] if kind in (2, 6) else upper[..., :1].repeat(3, axis=2)
    alpha = upper[..., -1:] / 255 if kind in (4, 6) else 1.0
    np.testing.assert_allclose(pixels_of(png_bytes(stored, kind)), colour * alpha + 255 * (1 - alpha), atol=1.01)


def test_only_the_clear_one_of_65536_greys_is_white() -> None:
    stored = np.full((4, 4, 1), 0x4001, np.uint16)
    stored[:2] = 0x4000
    seen = pixels_of(png_bytes(stored, 0, tRNS=b"\x40\x00"))
    assert (seen[:2] == 255).all()
    assert (seen[2:] == 0x40).all()


def test_one_bit_is_black_or_white() -> None:
    bits = noise(4, 4) > 127
    assert np.array_equal(
        pixels_of(encode(Image.fromarray(bits), "PNG")), np.where(bits, 255, 0)[..., None].repeat(3, 2)
    )


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_palette_has_its_colours(format: str) -> None:
    palette, indices = noise(16, 3), noise(4, 4) % 16
    picture = Image.fromarray(indices, "L").convert("P")
    picture.putdata(indices.flatten().tolist())
    picture.putpalette(palette.flatten().tolist())
    assert np.array_equal(pixels_of(encode(picture, format)), palette[indices])


def test_a_palette_with_alpha_lies_on_white() -> None:
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    seen = pixels_of(encode(picture, "PNG", transparency=bytes([255, 128])))
    np.testing.assert_allclose(seen[0, 0], np.array([10, 20, 30]) * 128 / 255 + 127, atol=1)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF"])
def test_a_shrunk_transparent_picture_is_the_shrunk_picture_on_white(format: str) -> None:
    stored = noise(40, 40, 4)
    stored[..., 3] = np.where(stored[..., 3] > 99, 255, 0) if format == "GIF" else stored[..., 3]
    data = encode(Image.fromarray(stored), format, **({"lossless": True, "exact": True} if format == "WEBP" else {}))
    with Image.open(io.BytesIO(data)) as picture:
        shown = Image.alpha_composite(Image.new("RGBA", (40, 40), "white"), picture.convert("RGBA")).convert("RGB")
    np.testing.assert_allclose(pixels_of(data), shown.resize((4, 4), Image.Resampling.BILINEAR), atol=2)


def test_an_animated_png_shows_its_first_frame_though_none_of_the_film() -> None:
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    for default_image in (True, False):
        data = encode(red, "PNG", save_all=True, append_images=[blue, blue], default_image=default_image)
        assert (pixels_of(data) == (255, 0, 0)).all()


def test_a_gif_whose_first_frame_is_a_part_of_its_canvas_lies_on_white() -> None:
    data = bytearray(encode(Image.new("RGB", (4, 4), (0, 0, 255)), "GIF"))
    data[6:10] = struct.pack("<HH", 8, 8)  # the canvas grows, the frame stays at its corner
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.size == (8, 8)
    assert (pixels_of(bytes(data))[:2, :2] == (0, 0, 255)).all()


def literal_cut(picture: Image.Image, patch: int) -> list[list[int]]:
    pixels = np.asarray(picture)
    return [
        pixels[top : top + patch, left : left + patch].flatten().tolist()
        for top in range(0, pixels.shape[0], patch)
        for left in range(0, pixels.shape[1], patch)
    ]


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((8, 4), (1, 2)),
        ((4, 12), (3, 1)),
        ((11, 7), (1, 2)),  # down to whole patches
        ((1, 1), (1, 1)),  # up to one
        ((3, 40), (10, 1)),
        ((80, 20), (2, 8)),  # 100 patches are over 16
        ((16, 16), (4, 4)),
        ((20, 20), (4, 4)),
        ((400, 4), (1, 16)),  # a thin one: what its one row leaves
        ((3, 8_000), (16, 1)),
    ],
)
def test_a_native_picture_keeps_its_aspect_in_whole_patches(size: tuple[int, int], grid: tuple[int, int]) -> None:
    picture = Image.fromarray(noise(size[1], size[0], 3))
    segment = read_image(Media("picture", encode(picture, "PNG")), ImageConfig(4, 4, "native", limit_tokens=16))
    assert segment.position.tolist() == [[0, r, c] for r in range(grid[0]) for c in range(grid[1])]
    resized = picture.resize((4 * grid[1], 4 * grid[0]), Image.Resampling.BILINEAR)
    assert segment.content.tolist() == literal_cut(resized, 4)


@given(
    width=st.integers(1, 8_000),
    height=st.integers(1, 8_000),
    patch=st.sampled_from([1, 2, 7, 14, 16]),
    limit=st.integers(1, 5_000),
)
@example(width=8_000, height=1, patch=1, limit=1)
@example(width=448, height=448, patch=14, limit=1_024)
@example(width=4_480, height=4_480, patch=14, limit=1_024)
def test_native_sizes_fit_the_budget_and_never_grow(width: int, height: int, patch: int, limit: int) -> None:
    config = ImageConfig(patch_pixels=patch, resize="native", limit_tokens=limit)
    across, down = (side // patch for side in native_size(width, height, config))
    assert native_size(width, height, config) == (across * patch, down * patch)
    assert across >= 1
    assert down >= 1
    assert across * down <= limit
    assert across * patch <= max(width, patch)
    assert down * patch <= max(height, patch)
    # Within a patch of the largest size of the same aspect, unless that is thinner than a patch.
    scale = min(1.0, math.sqrt(limit * patch**2 / (width * height)))
    if min(width, height) * scale >= patch:
        assert 0 <= width * scale / patch - across < 1 + 1e-9
        assert 0 <= height * scale / patch - down < 1 + 1e-9
    else:
        assert across == 1 or down == 1
    assert native_size(height, width, config) == (down * patch, across * patch)


def test_a_turned_native_picture_stands_upright() -> None:
    picture = Image.fromarray(noise(8, 16, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(picture, "PNG", exif=exif)
    with Image.open(io.BytesIO(data)) as stored:
        upright = ImageOps.exif_transpose(stored).convert("RGB")
    assert upright.size == (8, 16)
    segment: Segment = read_image(Media("picture", data), NATIVE)
    assert segment.content.tolist() == literal_cut(upright, 4)
    assert segment.position[:, 1:].max(axis=0).tolist() == [3, 1]


def test_native_rules_that_cannot_hold_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"modality\.image\.resize=nativ is none of .* 'native'"):
        ModalityConfig(ImageConfig(resize="nativ")).check()
    with pytest.raises(ConfigError, match=r"modality\.image\.limit_tokens=0 must be at least 1"):
        ModalityConfig(ImageConfig(limit_tokens=0)).check()


def test_real_photos_keep_their_aspect(real_data: Path) -> None:
    config = ImageConfig(resize="native")
    sizes = set()
    for photo in sorted((real_data / "image" / "photos").glob("*.jpg")):
        with Image.open(photo) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGB")
        segment = read_image(Media(photo.name, photo), config)
        down, across = segment.position[:, 1:].max(axis=0) + 1
        assert len(segment) == down * across <= 1_024
        assert down * across > 0.85 * min(1_024, upright.width * upright.height // 14**2), photo.name
        assert abs(math.log(across / down * upright.height / upright.width)) < 0.1, photo.name
        resized = upright.resize((14 * across, 14 * down), Image.Resampling.BILINEAR)
        assert segment.content.tolist() == literal_cut(resized, 14), photo.name
        sizes.add((down, across))
    assert len(sizes) > 1


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "channels", "dtype"), [(6, 4, np.uint8), (2, 3, np.uint8), (0, 1, np.uint16)])
def test_the_largest_picture_stays_within_a_workers_memory(
    tmp_path: Path, kind: int, channels: int, dtype: type
) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(png_bytes(np.full((8_000, 8_000, channels), 9, dtype), kind))
    (growth,) = peak_growth_bytes("image.read_image", path, config="config.ImageConfig()")
    assert growth < 6e8  # as decoded it takes 2.6e8, and once more for one copy
