"""A picture file becomes patches (Pillow decodes; every size is checked before pixels are read)."""

import math
import warnings
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from omniloom.errors import DataError
from omniloom.modality.config import ImageConfig
from omniloom.modality.files import Media, open_bounded
from omniloom.modality.sequence import IMAGE, Segment

FORMATS = ("JPEG", "PNG", "GIF", "WEBP")


def read_image(media: Media, config: ImageConfig) -> Segment:
    """Decode one picture, resize it (to a square, or near its own size: `config.resize`) and cut it into patches.

    Returns a Segment of a token a patch in row-major order, media uint8 (N, patch² · 3), position (0, row, column). The
    first frame of an animation is taken; EXIF orientation is applied; transparency lies on white; 16 bits keep their
    upper 8. Raises DataError for a file that is too large, of another format or broken.
    """
    with open_bounded(media, config.limit_bytes, "modality.image.limit_bytes") as file:
        data = file.read()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(data), formats=FORMATS) as picture:
                if max(picture.size) > config.limit_side_pixels:
                    raise DataError(
                        f"picture of {picture.width} × {picture.height} pixels is over "
                        f"modality.image.limit_side_pixels={config.limit_side_pixels}"
                    )
                upright = _eight_bits(picture)
                ImageOps.exif_transpose(upright, in_place=True)
                resized = _resize(upright, config)
    except DataError:
        raise
    except (UnidentifiedImageError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        # Without Pillow's own words: they hold an address in memory, and the reason goes into a hashed index.
        raise DataError(f"not a readable {', '.join(FORMATS)} picture ({type(error).__name__})") from error
    except Exception as error:  # on damaged files Pillow's decoders raise whatever their parsers met
        raise DataError(f"damaged picture: {type(error).__name__}: {error}") from error
    return Segment(IMAGE, *cut_patches(np.asarray(resized, dtype=np.uint8), config.patch_pixels))


def _eight_bits(picture: Image.Image) -> Image.Image:
    if not picture.mode.startswith("I"):  # Pillow itself halves 16-bit colours
        return picture
    values = np.asarray(picture)
    grey = Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8))
    if isinstance(clear := picture.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    grey.info.update({key: value for key, value in picture.info.items() if key != "transparency"})  # its EXIF
    return grey


def _resize(picture: Image.Image, config: ImageConfig) -> Image.Image:
    """The picture at its final size as RGB. Transparent ones are laid on white when small: it takes two more."""
    mode = "RGBA" if picture.has_transparency_data else "RGB"
    coloured = picture if picture.mode == mode else picture.convert(mode)
    size = (config.size_pixels, config.size_pixels) if config.resize == "fixed" else native_size(*picture.size, config)
    resized = coloured.resize(size, Image.Resampling.BILINEAR)
    if mode == "RGB":
        return resized
    return Image.alpha_composite(Image.new("RGBA", size, "white"), resized).convert("RGB")


def native_size(width: int, height: int, config: ImageConfig) -> tuple[int, int]:
    """Width and height in whole patches that keep the aspect within `limit_tokens`, never over the picture's own.

    Each side is rounded down to whole patches, but is at least one; where one side of a thin picture is held at one
    patch, the other takes the tokens that are left.
    """
    patch, limit = config.patch_pixels, config.limit_tokens
    scale = min(1.0, math.sqrt(limit * patch**2 / (width * height)))
    # A hair more: a side of exactly so many patches may come out just under.
    across, down = (max(1, math.floor(side * scale / patch + 1e-9)) for side in (width, height))
    return min(across, max(1, limit // down)) * patch, min(down, limit // min(across, limit)) * patch


def cut_patches(pixels: np.ndarray, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut pixels uint8 (H, W, 3) into patches uint8 (N, patch² · 3), row by row, and their (0, row, column)."""
    down, across = pixels.shape[0] // patch, pixels.shape[1] // patch
    cut = pixels.reshape(down, patch, across, patch, 3).transpose(0, 2, 1, 3, 4).reshape(down * across, patch**2 * 3)
    row, column = np.divmod(np.arange(down * across, dtype=np.int32), across)
    return np.ascontiguousarray(cut), np.stack([np.zeros_like(row), row, column], axis=1)


def join_patches(patches: np.ndarray, position: np.ndarray) -> np.ndarray:
    """The pixels uint8 (H, W, 3) of one picture or frame: `cut_patches` the other way round."""
    down, across = position[-1, 1:] + 1
    patch = math.isqrt(patches.shape[1] // 3)
    squares = patches.reshape(down, across, patch, patch, 3).transpose(0, 2, 1, 3, 4)
    return squares.reshape(down * patch, across * patch, 3)
