"""A picture file becomes patches (Pillow decodes; every size is checked before pixels are read)."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from omniloom.errors import DataError
from omniloom.modality.config import ImageConfig
from omniloom.modality.files import Media, open_bounded
from omniloom.modality.sequence import IMAGE, Segment

FORMATS = ("JPEG", "PNG", "GIF", "WEBP")


def read_image(media: Media, config: ImageConfig) -> Segment:
    """Decode one picture, resize it to a square and cut it into patches.

    Returns a Segment of (size / patch)² tokens in row-major order, media uint8 (N, patch² · 3), position (0, row,
    column). The first frame of an animation is taken; EXIF orientation is applied; transparency lies on white; 16-bit
    grey keeps its upper 8. Raises DataError for a file that is too large, of another format or broken.
    """
    with open_bounded(media, config.limit_bytes, "modality.image.limit_bytes") as file:
        data = file.read()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                if max(picture.size) > config.limit_side_pixels:
                    raise DataError(
                        f"picture of {picture.width} × {picture.height} pixels is over "
                        f"modality.image.limit_side_pixels={config.limit_side_pixels}"
                    )
                upright = ImageOps.exif_transpose(_eight_bits(picture)).convert("RGBA")
    except DataError:
        raise
    except (UnidentifiedImageError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        # Without Pillow's own words: they hold an address in memory, and the reason goes into a hashed index.
        raise DataError(f"not a readable {', '.join(FORMATS)} picture ({type(error).__name__})") from error
    except Exception as error:  # on damaged files Pillow's decoders raise whatever their parsers met
        raise DataError(f"damaged picture: {type(error).__name__}: {error}") from error
    white = Image.new("RGBA", upright.size, "white")
    colour = Image.alpha_composite(white, upright).convert("RGB")
    square = colour.resize((config.size_pixels, config.size_pixels), Image.Resampling.BILINEAR)
    return Segment(IMAGE, *cut_patches(np.asarray(square, dtype=np.uint8), config.patch_pixels))


def _eight_bits(picture: Image.Image) -> Image.Image:
    if not picture.mode.startswith("I"):
        return picture
    grey = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    grey.info.update(picture.info)  # its EXIF
    if isinstance(transparent := grey.info.get("transparency"), int):
        grey.info["transparency"] = transparent >> 8
    return grey


def cut_patches(pixels: np.ndarray, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut pixels uint8 (size, size, 3) into patches uint8 (N, patch² · 3), row by row, and their (0, row, column)."""
    grid = len(pixels) // patch
    cut = pixels.reshape(grid, patch, grid, patch, 3).transpose(0, 2, 1, 3, 4).reshape(grid**2, patch**2 * 3)
    row, column = np.divmod(np.arange(grid**2, dtype=np.int32), grid)
    return np.ascontiguousarray(cut), np.stack([np.zeros_like(row), row, column], axis=1)
