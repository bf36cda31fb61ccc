"""Pictures as the models take them: RGB, 8 bits per channel, upright. Every picture that this package reads passes here.

    load_image("photo.png")          # a path, or a http(s), file or data URL
    load_images(["photo.png", "holiday"])  # of a directory, all pictures in it
    to_rgb(Image.open("photo.png"))  # what Pillow holds already

Rules, where a picture can be read in more than one way:
    transparency    is composed on white
    EXIF            its orientation is applied; EXIF that cannot be read is ignored
    16 bits         0 to 65535 become 0 to 255; what a TIFF stores in 12 bits, 0 to 4095
    32 bits, floats refused: no file says which value is white
    several frames  the first one; of a picture that is open, the one it shows
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from string import punctuation
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import Request, url2pathname, urlopen

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError


SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
TIMEOUT = 30  # seconds that a server may be silent
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF tags


def load_images(names: Iterable[str | os.PathLike]) -> list[Image.Image]:
    """[`load_image`] of each; of a directory, all pictures in it, in the order of their names (2.png before 10.png).

    Raises:
        ValueError: as `load_image`, and for a directory without pictures.
    """
    found: list[str | os.PathLike] = []
    for name in names:
        try:
            path = Path(name).expanduser()
            is_folder = path.is_dir()
        except (OSError, RuntimeError):  # a long data URL; a user that does not exist
            is_folder = False
        found += pictures_in(path) if is_folder else [name]
    return [load_image(name) for name in found]


def pictures_in(folder: Path) -> list[Path]:
    """The files in a directory whose names are those of pictures. Raises `ValueError` if there are none."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]
    if not files:
        raise ValueError(f"the directory {_shown(folder)} holds no pictures ({', '.join(SUFFIXES)})")

    def natural(file: Path) -> list[tuple[int, str]]:
        return [
            (int(part), "") if part.isdecimal() else (0, part.casefold()) for part in re.split(r"(\d+)", file.name)
        ]

    return sorted(files, key=natural)


def load_image(name: str | os.PathLike) -> Image.Image:
    """The RGB picture in a file or behind a URL.

    Args:
        name: a `Path`, taken as it is, or a string: a path, in which a leading ~ is the home directory, or a URL of one
            of the schemes http, https, file and data.

    Raises:
        ValueError: it cannot be read; one line that names it and says why.
    """
    try:
        data = _read(name)
        if not data:
            raise ValueError("it is empty")
        with Image.open(BytesIO(data)) as image, _no_half_pictures():
            return to_rgb(image)
    except Exception as error:  # as many kinds as there are broken files and servers
        raise ValueError(f"cannot read the image {_shown(name)}: {_reason(error)}") from None


def measure_image(path: str | os.PathLike, formats: tuple[str, ...] | None = None) -> tuple[int, int]:
    """Width and height, as the header of a file says; no pixel is decoded.

    Args:
        formats: Pillow's names of those that are tried; all by default.

    Raises:
        ValueError: it is no picture of these formats, or has so many pixels that Pillow refuses it.
    """
    try:
        with Image.open(path, formats=formats) as image:
            return image.size
    except UnidentifiedImageError:
        known = "" if formats is None else f"; {', '.join(formats)} can be read"
        raise ValueError(f"it is no picture{known}") from None
    except Image.DecompressionBombError:
        raise ValueError("it has too many pixels") from None


@contextmanager
def _no_half_pictures() -> Iterator[None]:
    """Inside, a file that ends too early is an error, also where another library of the process
    (lmms-eval) has told Pillow to fill the rest with grey."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any Pillow mode as RGB, by the rules above; a copy.

    Raises:
        ValueError: it is no Pillow picture, has no pixels, or holds values whose range is not known.
        OSError: its file is broken.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"a picture must be a Pillow image, not {type(image).__name__}")
    if 0 in image.size:
        raise ValueError(f"its size is {image.width} x {image.height}: it has no pixels")
    image.load()
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception:  # of broken EXIF; the pixels are there
        upright = image
    if upright.mode.startswith("I") or upright.mode == "F":
        return _wide_to_rgb(upright, *_wide_range(image))
    if upright.mode == "La":
        upright = upright.convert("LA")
    if not _has_alpha(upright):
        return upright.convert("RGB")
    white = Image.new("RGBA", upright.size, "white")
    return Image.alpha_composite(white, upright.convert("RGBA")).convert("RGB")


def _has_alpha(image: Image.Image) -> bool:
    transparent_palette = image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")
    return image.mode in ("LA", "PA", "RGBA", "RGBa") or transparent_palette or "transparency" in image.info


def _wide_range(image: Image.Image) -> tuple[int, int]:
    """The values of black and white in a grey picture of more than 8 bits. Raises `ValueError` if nothing says so."""
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    elif image.mode == "I" and image.format in ("PNG", "PPM"):  # Pillow scales them to 16 bits
        bits = 16
    else:
        kind = "floating-point numbers" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"its pixels are {kind}, and nothing says which of them is white; save it with 8 or 16 bits")
    white = 2**bits - 1
    return (white, 0) if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else (0, white)


def _wide_to_rgb(image: Image.Image, black: int, white: int) -> Image.Image:
    values = np.asarray(image).astype(np.int32)
    low, high = sorted((black, white))
    if values.min() < low or values.max() > high:
        raise ValueError(f"its pixels are {values.min()} to {values.max()}; {low} to {high} was expected")
    grey = np.rint((values - black) * (255 / (white - black)))
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _read(name: str | os.PathLike) -> bytes:
    if isinstance(name, str):
        scheme, separator, rest = name.partition(":")
        scheme = scheme.lower()
        if scheme in ("http", "https") and rest.startswith("//") or scheme == "data" and separator:
            url = quote(name, safe=punctuation)  # of spaces and other letters; what is quoted stays
            request = Request(url, headers={"User-Agent": "shortv_hf"})  # servers refuse Python's own
            with urlopen(request, timeout=TIMEOUT) as response:
                return response.read()
        if scheme == "file" and rest.startswith("//"):
            parts = urlsplit(name)
            if parts.netloc not in ("", "localhost"):
                raise ValueError(f"a file URL names no file of another machine, {parts.netloc}")
            name = url2pathname(parts.path)
        elif rest.startswith("//"):
            raise ValueError("the schemes of URLs are http, https, file and data")
        else:
            name = os.path.expanduser(name)
    if not os.path.exists(name):
        raise ValueError("no such file")
    if os.path.isdir(name):
        raise ValueError("it is a directory")
    return Path(name).read_bytes()


def _shown(name: str | os.PathLike) -> str:
    """The name in one line that a terminal can print."""
    name = str(name)
    name = name if len(name) <= 200 else f"{name[:60]}..."  # a data URL
    return name if name.isprintable() else repr(name)


def _reason(error: BaseException | str) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is no picture that Pillow can read"
    if isinstance(error, HTTPError):
        return f"the server answers {error.code} {error.reason}".strip()
    if isinstance(error, URLError):
        error = error.reason
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
