"""A picture file becomes patches (Pillow decodes; every size is checked before pixels are read)."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from omniloom.errors import DataError
from omniloom.modality.config import ImageConfig
from omniloom.modality.sequence import IMAGE, Segment

FORMATS = ("JPEG", "PNG", "GIF", "WEBP")


def read_image(data: bytes, config: ImageConfig) -> Segment:
    """Decode one picture, resize it to a square and cut it into patches.

    Returns a Segment of (size / patch)² tokens in row-major order, media uint8 (N, patch² · 3), position (0, row,
    column). The first frame of an animation is taken; EXIF orientation is applied; transparency lies on white.
    Raises DataError for a file that is too large, of another format or broken.
    """
    if len(data) > config.limit_bytes:
        raise DataError(f"picture of {len(data):,} bytes is over modality.image.limit_bytes={config.limit_bytes:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                if max(picture.size) > config.limit_side_pixels:
                    raise DataError(
                        f"picture of {picture.width} × {picture.height} pixels is over "
                        f"modality.image.limit_side_pixels={config.limit_side_pixels}"
                    )
                upright = ImageOps.exif_transpose(picture).convert("RGBA")
    except (UnidentifiedImageError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"not a readable {', '.join(FORMATS)} picture: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoders raise on damaged files
        raise DataError(f"damaged picture: {error}") from error
    white = Image.new("RGBA", upright.size, "white")
    colour = Image.alpha_composite(white, upright).convert("RGB")
    square = colour.resize((config.size_pixels, config.size_pixels), Image.Resampling.BILINEAR)
    return patches(np.asarray(square, dtype=np.uint8), config)


def patches(pixels: np.ndarray, config: ImageConfig) -> Segment:
    """Cut pixels uint8 (size, size, 3) into a Segment of patches, row by row."""
    grid, patch = config.grid, config.patch_pixels
    cut = pixels.reshape(grid, patch, grid, patch, 3).transpose(0, 2, 1, 3, 4).reshape(grid**2, config.patch_values)
    row, column = np.divmod(np.arange(grid**2, dtype=np.int32), grid)
    return Segment(IMAGE, np.ascontiguousarray(cut), np.stack([np.zeros_like(row), row, column], axis=1))
