"""What users may upload: files are measured before anything in them is decoded.

Limits hold for one question. A picture's size is read from its header, a video's from its container.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.images import load_image, measure_image
from ..data.video import Video, load_video


VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # of Pillow; others run programs, or are seldom read
MAX_FILES = 4
MAX_PICTURE_BYTES, MAX_PIXELS = 20_000_000, 40_000_000
MAX_VIDEO_BYTES, MAX_FRAME_PIXELS, MAX_SECONDS = 100_000_000, 4096 * 2304, 600
MAX_FRAMES = 16  # that the model sees of a video


@dataclass
class Upload:
    """What came with a question, decoded."""

    pictures: list[Image.Image] = field(default_factory=list)
    videos: list[Video] = field(default_factory=list)


def read_uploads(files: Sequence[str | os.PathLike], takes_video: bool) -> Upload:
    """The pictures and videos in `files`; which of them a file is, its suffix says.

    Args:
        takes_video: whether the model does.

    Raises:
        ValueError: there are too many, one is too large or cannot be read, or it is a video and the model takes none. One
            line that names the file, without the folder it was stored in.
    """
    if len(files) > MAX_FILES:
        raise ValueError(f"{len(files)} files: a question takes at most {MAX_FILES}")
    upload = Upload()
    for name in files:
        path = Path(name)
        try:
            if path.suffix.lower() not in VIDEO_SUFFIXES:
                check_picture(path)
                upload.pictures.append(load_image(path))
            elif not takes_video:
                raise ValueError("it is a video, and this model takes pictures only")
            else:
                check_video(path)
                upload.videos.append(load_video(path, MAX_FRAMES))
        except (ValueError, OSError) as error:
            raise ValueError(f"{path.name}: {_reason(error, path)}") from None
    return upload


def check_picture(path: Path) -> None:
    """Raises `ValueError` if the file is too large, has too many pixels, or is of no format that is taken."""
    _check_bytes(path, MAX_PICTURE_BYTES)
    width, height = measure_image(path, FORMATS)
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"it has {width} x {height} pixels, {width * height / 1e6:.0f} megapixels; the limit is {MAX_PIXELS / 1e6:.0f}"
        )


def check_video(path: Path) -> None:
    """Raises `ValueError` if the file is too large, its frames are, it is too long, or it cannot be opened."""
    _check_bytes(path, MAX_VIDEO_BYTES)
    try:
        import av
    except ImportError as error:
        raise ValueError(f"reading a video needs the extra: pip install '.[video]' ({error})") from None
    try:
        with av.open(str(path)) as container:
            streams: Any = container.streams.video
            sizes = [(stream.width, stream.height) for stream in streams]
            seconds = (container.duration or 0) / av.time_base
    except (OSError, ValueError):
        raise ValueError("it is no video that can be read, or it is broken") from None
    for width, height in sizes:
        if width * height > MAX_FRAME_PIXELS:
            raise ValueError(
                f"its frames have {width} x {height} pixels; the limit is {MAX_FRAME_PIXELS / 1e6:.0f} megapixels"
            )
    if seconds > MAX_SECONDS:
        raise ValueError(f"it is {seconds / 60:.0f} minutes long; the limit is {MAX_SECONDS // 60}")


def _check_bytes(path: Path, limit: int) -> None:
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"it has {size / 1e6:.0f} MB; the limit is {limit / 1e6:.0f}")


def _reason(error: Exception, path: Path) -> str:
    """What is wrong with the file, without the name that the loaders put before it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = " ".join(str(error).split())
    return said.removeprefix(f"cannot read the image {path}: ").removeprefix(f"cannot read the video {path}: ")
